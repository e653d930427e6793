"""Whether what is asked for can be measured and judged, of the models that it is asked of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.collection.catalogue import catalogue
from pytest_qsens.collection.choice import near_names, select, wants_total
from pytest_qsens.errors import QsensError
from pytest_qsens.given_options import updating
from pytest_qsens.ops import TOTAL, Op, matches

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pytest

    from pytest_qsens.collection.model import Model
    from pytest_qsens.options import Options


def check_fused(options: Options, models: Iterable[Model]) -> None:
    """Check that every pattern of ``qsens_fused`` means something in this run.

    Raises:
        QsensError: Naming the first that matches no op of any model.

    """
    names = [op.name for model in models for op in model.ops]
    for pattern in options.fused:
        if not any(pattern.parts(name) for name in names):
            raise QsensError(
                f"qsens_fused: {pattern.text!r} matches no op of this run's models, so it would group nothing. Correct "
                "the line, or give this run others with -o qsens_fused=..."
            )


def check_overrides(options: Options, models: Iterable[Model], units: Iterable[Op]) -> None:
    """Check that every glob of ``qsens_fail_overrides``, and of a limit in ``--qsens-fail``, means something here.

    Raises:
        QsensError: Naming the first that matches neither an op of any model nor a group of ``units`` nor ``total``.

    """
    names = list(dict.fromkeys(op.name for op in (*(op for model in models for op in model.ops), *units)))
    ini = "Correct the line, or give this run others with -o qsens_fail_overrides=..."
    globs = [("qsens_fail_overrides", glob, ini) for glob, _ in options.overrides().rules]
    origin = options.origins["fail"]
    globs += [(f"{origin}, {limit}", limit.glob, "Correct it") for limit in options.gates.limits if limit.glob]
    for where, glob, advice in globs:
        if not any(matches(name, glob) for name in (*names, TOTAL)):
            raise QsensError(
                f"{where}: {glob!r} matches neither an op of this run's models nor {TOTAL}{near_names(glob, names)}, "
                f"so it would gate nothing. {advice}"
            )


def check_shard(model: Model, options: Options) -> None:
    """Check that there is something to measure for every shard.

    Raises:
        QsensError: If there are more shards than ops.

    """
    most = len(select(model, options)) + wants_total(options)
    if options.shard is not None and options.shard.count > most:
        raise QsensError(
            f"{options.origins['shard']} {options.shard}: {most} results of {model.label} (ops, and the whole model) "
            f"cannot be shared by {options.shard.count} machines. Use {most} shards at most"
        )


def check_interactions(options: Options) -> None:
    """Check that ops are measured by themselves, if it is to be known how their errors meet.

    Raises:
        QsensError: If they are not.

    """
    if not options.interactions:
        return
    origin = options.origins["interactions"]
    if options.mode == "fallback":
        raise QsensError(
            f"{origin} goes by what ops do when they alone are quantized, which mode fallback does not "
            "measure. Use --qsens-mode isolated or both"
        )
    if options.estimating:
        raise QsensError(
            f"{origin} goes by what is measured, and this run estimates. Leave out engine probe, --qsens-time-budget, "
            "--qsens-top and --qsens-representatives"
        )


def check_refinement(model: Model, options: Options) -> None:
    """Check that what turns estimates into exact scores can be done.

    Raises:
        QsensError: If the engine makes none, or there are fewer ops than asked for.

    """
    names = ("time_budget", "top", "representatives", "gate_estimates")
    given = [options.origins[name] for name in names if getattr(options, name)]
    if given and options.engine not in ("auto", "probe"):
        raise QsensError(
            f"{given[0]} goes by estimates, and {options.origins['engine']} {options.engine} makes none. "
            "Leave the engine out, or leave out what goes by estimates"
        )
    if options.gate_estimates and not options.estimating:
        raise QsensError(
            f"{options.origins['gate_estimates']}: engine {options.engine} measures all, and there are no estimates "
            "to gate. Add --qsens-engine probe, --qsens-time-budget, --qsens-top or --qsens-representatives"
        )
    if options.gate_estimates and "nmse" not in options.gates.metrics:
        raise QsensError(
            f"{options.origins['gate_estimates']}: only nmse is estimated with an interval, and "
            f"{options.origins['fail']} has no threshold and no limit for it. Add one, such as nmse:5%"
        )
    if options.top is None:
        return
    if options.shard is not None and options.shard.count > 1:
        raise QsensError(
            f"{options.origins['top']} {options.top} compares all ops, and {options.origins['shard']} {options.shard} "
            "measures a part of them. Leave one of the two out"
        )
    selected = len(select(model, options))
    if options.top > selected:
        raise QsensError(
            f"{options.origins['top']} {options.top}: {selected} ops of {model.label} are asked for. "
            f"Give {selected} at most"
        )


def check_limits(config: pytest.Config, model: Model, options: Options) -> None:
    """Check that limits of named ops, and gates of interactions, can be judged with all that the options ask for.

    Raises:
        QsensError: If what they are of is not measured.

    """
    if config.option.collectonly:
        return
    origin, total = options.origins["fail"], wants_total(options)
    chosen = select(model, options)
    for limit in options.gates.limits:
        exists = any(limit.is_of(op.name) for op in (*model.ops, *model.units(options))) or limit.is_of(TOTAL)
        known = any(limit.is_of(unit.name, unit.member_names) for unit in chosen) or (total and limit.is_of(TOTAL))
        if limit.glob is not None and exists and not known:  # what does not exist at all is told with what is near
            raise QsensError(
                f"{origin}: {limit} limits nothing that is measured{_left_out(options)}. Measure it, or leave the "
                "limit out"
            )
    for gate in options.gates.joint:
        if not options.interactions:
            raise QsensError(
                f"{origin}: {gate} is of how errors of ops meet, which only --qsens-interactions tells. Add it"
            )
        if options.selective:
            raise QsensError(
                f"{origin}: {gate} is of all ops together{_left_out(options)}. Measure all, or leave the gate out"
            )
        if options.shard is not None and options.shard.count > 1:
            raise QsensError(
                f"{origin}: {gate} is of all ops together, and {options.origins['shard']} {options.shard} measures a "
                f"part of them. Judge it where all parts are together: qsens merge --fail '{gate}'"
            )


def check_own_limits(model: Model, options: Options, base: Options) -> None:
    """Check that the limits of a marker are of what its test measures; those of a run may be of several models.

    Raises:
        QsensError: Naming the first that is not.

    """
    if options.fail == base.fail:
        return
    chosen = select(model, options)
    for limit in options.gates.limits:
        if limit.glob and not any(limit.is_of(unit.name, unit.member_names) for unit in (*chosen, Op(TOTAL, TOTAL))):
            near = near_names(limit.glob, [unit.name for unit in chosen])
            raise QsensError(f"{options.origins['fail']}: {limit} limits nothing that is measured{near}. Correct it")


def _left_out(options: Options) -> str:
    given = [options.origins[name] for name in ("ops", "max_ops") if getattr(options, name)]
    return f", as {' and '.join(given)} leaves it out" if given else ""


def check_ranks(config: pytest.Config, model: Model, options: Options) -> None:
    """Check that gates of the order of ops can be judged with all that the options ask for.

    Raises:
        QsensError: If they leave out ops, or there are too few.

    """
    gates = options.gates.ranks
    if not gates or config.option.collectonly:
        return
    from pytest_qsens.rank_gates import recorded_scores

    assignment = model.assigned.assignment
    units = [unit for unit in model.measurable(options) if not assignment.adds(unit)]
    origin, names = options.origins["fail"], ", ".join(map(str, gates))
    for gate in gates:
        if len(units) < gate.needed:
            raise QsensError(
                f"{origin}: {gate} needs {gate.needed} ops at least, or it says nothing, and {model.label} has "
                f"{len(units)}. Give a smaller number, or only thresholds such as nmse:5%"
            )
    if updating(config):
        return
    without = "Give this run only thresholds, such as --qsens-fail nmse:5%"
    if options.estimating:
        raise QsensError(f"{origin}: {names} compares exact scores, and engine {options.engine} estimates. {without}")
    if options.shard is not None and options.shard.count > 1:
        raise QsensError(
            f"{origin}: {names} compares the order of all ops, and {options.origins['shard']} {options.shard} measures "
            f"a part of them. {without}, and judge the order where all parts are together: qsens merge --fail {names}"
        )
    for mode in options.modes:
        recorded = recorded_scores(units, catalogue(config).snapshot(options, model).ops, mode)
        left_out = recorded.keys() - {op.name for op in select(model, options)}
        if left_out:
            what = " and ".join(options.origins[name] for name in ("ops", "max_ops") if getattr(options, name))
            raise QsensError(
                f"{origin}: {names} compares the order of the {len(recorded)} ops in the snapshot, and {what} leaves "
                f"out {len(left_out)} of them. {without}"
            )
