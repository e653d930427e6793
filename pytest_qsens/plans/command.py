"""The command ``qsens plan``."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from pytest_qsens.errors import QsensError
from pytest_qsens.files import write_atomically
from pytest_qsens.groups import Fused
from pytest_qsens.models.arguments import find_model, given_model_arguments
from pytest_qsens.plans.candidates import Wishes, read_problem
from pytest_qsens.plans.config import check_output, config_text, notes
from pytest_qsens.plans.solve import least_error, smallest
from pytest_qsens.report.pareto import check_plot, plot

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from pytest_qsens.configs.documents import Syntax
    from pytest_qsens.plans.problem import Chosen, Floats, Problem

_STEPS = 10
"""The path of budgets goes from everything unquantized to everything as small as it can be in so many steps."""

_TRIES = 10
"""Plans that are measured at most to find one within a budget of error."""

_STEP = 0.95
"""A plan after one that is past the budget is predicted to be better by a factor of at most this."""

_TOLERANCE = 1e-9
"""Relative: budgets that differ by less are equal."""


@dataclass(frozen=True)
class Plan:
    """One choice of schemes.

    Attributes:
        name: What was asked for.
        chosen: The candidates.
        rival: Those that additive scores would choose for the same budget; ``None`` if nothing else is known.
        path: Where its config goes; ``None`` for one that is only shown.
        measured: Joint NMSE, if it was measured.
        missed: Predicted and measured NMSE of the plans before, which were past the budget.

    """

    name: str
    chosen: Chosen
    rival: Chosen | None = None
    path: Path | None = None
    measured: float | None = None
    missed: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Plans:
    """What there is to choose from, what was chosen, and the best plans from large to small."""

    problem: Problem
    plans: tuple[Plan, ...]
    frontier: tuple[Plan, ...]


def make_plans(given: Namespace) -> Plans:
    """Choose schemes as the command line asks, and write the configs.

    Raises:
        QsensError: If the command line or a result file cannot be used, or the budget cannot be kept; nothing is
            written then.

    """
    _check_one_aim(given)
    if not given.verify and (useless := given_model_arguments(given)):
        raise QsensError(f"{useless[0]} is of what --verify measures. Add --verify, or leave it out")
    share = None if given.keep is None else _share(given.keep, "--keep")
    shares = None if given.spectrum is None else [_share(text, "--spectrum") for text in given.spectrum.split(",")]
    fused = tuple(Fused.parse(text, "--fused") for text in given.fused)
    run, problem = read_problem(
        given.results, Wishes(tuple(given.never), fused, given.allow_estimated, given.unquantized_bits)
    )
    paths = [given.out] if shares is None else [_numbered(given.out, share) for share in shares]
    syntaxes = [check_output(path, given.to) for path in paths]
    if given.plot is not None:
        _check_sizes(problem, "--plot")
        check_plot(given.plot)
    if shares is not None:
        _check_sizes(problem, "--spectrum")
        plans = [_of_saving(problem, s, f"{float(100 * s):g} %", path) for s, path in zip(shares, paths, strict=True)]
    elif share is not None:
        plans = [_keeping(problem, share, given.keep, given.out)]
    elif given.budget_bits is not None:
        plans = [_within_bits(problem, given.budget_bits, given.out)]
    else:
        plans = [_within_error(problem, given.budget_nmse, given.out)]
    texts = _texts(problem, plans, given.to, syntaxes)  # what cannot be said is told before it is measured
    if given.verify:
        source = find_model(given, run, given.results[0])

        from pytest_qsens.plans.verify import Verifier  # torch, once all that is given can be

        nmse = Verifier(source, given.results[0], run, problem).nmse
        plans = [_verified(problem, plan, given.budget_nmse, nmse) for plan in plans]
        texts = _texts(problem, plans, given.to, syntaxes)
    problem = replace(problem, notes=(*problem.notes, *notes(given.to, _chosen(problem, plans))))
    frontier: list[Plan] = []
    shown = shares is None or given.plot is not None
    if shown and problem.sized:
        steps = [Fraction(step, _STEPS) for step in range(_STEPS + 1)]
        frontier = [_of_saving(problem, s, f"{float(100 * s):g} %") for s in steps]
    for path, text in zip(paths, texts, strict=True):
        write_atomically(path, text)
    found = Plans(problem, tuple(plans), tuple(frontier))
    if given.plot is not None:
        write_atomically(given.plot, plot(found, given.plot.suffix))
    return found


def _texts(problem: Problem, plans: Sequence[Plan], target: str, syntaxes: Sequence[Syntax]) -> list[str]:
    return [
        config_text(problem, problem.assignment(plan.chosen), target, syntax)
        for plan, syntax in zip(plans, syntaxes, strict=True)
    ]


def _chosen(problem: Problem, plans: Sequence[Plan]) -> set[str]:
    """Names of all schemes in plans."""
    return {name for plan in plans for name in problem.assignment(plan.chosen).values() if name is not None}


def _verified(
    problem: Problem, plan: Plan, budget: float | None, nmse: Callable[[Mapping[str, str | None]], float]
) -> Plan:
    """Measure a plan; with a budget of error, take smaller ones in its place until what is measured is within it.

    Raises:
        QsensError: If no plan is.

    """
    missed: list[tuple[float, float]] = []
    while True:
        found = replace(plan, measured=nmse(problem.assignment(plan.chosen)), missed=tuple(missed))
        assert found.measured is not None  # noqa: S101 - for mypy: given above
        if budget is None or found.measured <= budget:
            return found
        predicted = problem.predicted(plan.chosen)
        missed.append((predicted, found.measured))
        # what the prediction is wrong by is much the same for a plan that differs by a few ops
        smaller = _within_error(problem, predicted * min(budget / found.measured, _STEP), plan.path)
        if len(missed) == _TRIES or not smaller.chosen.any():
            number = "one plan was" if len(missed) == 1 else f"{len(missed)} plans were"
            raise QsensError(
                f"--budget-nmse {budget:g}: {number} measured, and none keeps it, the last one at "
                f"{found.measured:.4g}, predicted {predicted:.4g}. Give a larger budget, or leave --verify out"
            )
        plan = replace(smaller, name=found.name)


def _check_one_aim(given: Namespace) -> None:
    names = ("budget_bits", "budget_nmse", "keep", "spectrum")
    aims = [f"--{name.replace('_', '-')}" for name in names if getattr(given, name) is not None]
    if len(aims) != 1:
        raise QsensError(
            f"{' and '.join(aims) or 'nothing'} given: a plan is made for one of --budget-bits B, --budget-nmse X, "
            "--keep 10% and --spectrum 0,25,50,75,100"
        )


def _share(text: str, option: str) -> Fraction:
    match = re.fullmatch(r"\s*(\d{1,3}(?:\.\d{1,6})?)\s*%?\s*", text, re.ASCII)
    share = Fraction(match[1]) / 100 if match else None
    if share is None or share > 1:
        raise QsensError(f"{option} takes percentages from 0 to 100, not {text!r}")
    return share


def _numbered(path: Path, share: Fraction) -> Path:
    return path.with_name(f"{path.stem}-{float(100 * share):g}{path.suffix}")


def _check_sizes(problem: Problem, option: str) -> None:
    """Check that it is known how large the ops are.

    Raises:
        QsensError: If it is not.

    """
    if problem.unsized:
        raise QsensError(
            f"{option} needs the size of every op, and the result files do not tell that of "
            f"{problem.unsized[0].name}: they were written by an older version. "
            "Measure again; what is cached is not measured anew"
        )
    if not problem.values:
        raise QsensError(f"{option}: the ops have no {problem.value}s at all")


def _within_bits(problem: Problem, budget: float, path: Path) -> Plan:
    _check_sizes(problem, "--budget-bits")
    least = problem.unquantized - problem.most(problem.saved) / problem.values
    if budget < least * (1 - _TOLERANCE):
        kept = sum(len(unit.ops) for unit in problem.units if unit.kept is not None)
        raise QsensError(
            f"--budget-bits {budget:g}: {least:.6g} bits a {problem.value} is the least that "
            f"{', '.join(problem.schemes)} reach{f' with {kept} ops unquantized' * bool(kept)}. "
            "Give a larger budget, or results of a smaller scheme"
        )
    need = max(0.0, (problem.unquantized - budget) * problem.values)
    return _gaining(problem, problem.saved, need, f"at most {budget:g} bits a {problem.value}", path)


def _within_error(problem: Problem, budget: float, path: Path | None) -> Plan:
    _check_sizes(problem, "--budget-nmse")
    rival = smallest(_adding_up(problem), budget) if problem.interacting else None
    return Plan(f"a predicted nmse of at most {budget:g}", smallest(problem, budget), rival, path)


def _keeping(problem: Problem, share: Fraction, text: str, path: Path) -> Plan:
    kept = int(share * problem.ops)
    able = int(problem.most(problem.counts))
    if problem.ops - able > kept:
        first = next(unit for unit in problem.units if unit.kept is not None)
        raise QsensError(
            f"--keep {text}: that are {kept} of {problem.ops} ops, and {problem.ops - able} have to stay unquantized, "
            f"{first.name} for one ({first.kept}). Keep more"
        )
    return _gaining(problem, problem.counts, problem.ops - kept, f"{kept} of {problem.ops} ops kept", path)


def _of_saving(problem: Problem, share: Fraction, name: str, path: Path | None = None) -> Plan:
    """Plan to save this part of the bits that can be saved."""
    return _gaining(problem, problem.saved, float(share) * problem.most(problem.saved), name, path)


def _gaining(problem: Problem, gains: Floats, need: float, name: str, path: Path | None) -> Plan:
    rival = least_error(_adding_up(problem), gains, need) if problem.interacting else None
    return Plan(name, least_error(problem, gains, need), rival, path)


def _adding_up(problem: Problem) -> Problem:
    """Leave the interactions out."""
    return replace(problem, candidates=tuple(replace(c, own=c.nmse, sketch=None) for c in problem.candidates))
