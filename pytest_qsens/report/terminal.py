"""The section of a run in pytest's terminal summary."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import TYPE_CHECKING

from pytest_qsens.collect import base_options
from pytest_qsens.ops import TOTAL
from pytest_qsens.rank_gates import RANKED_BY
from pytest_qsens.report import profile
from pytest_qsens.report.accepting import accepting
from pytest_qsens.report.findings import findings
from pytest_qsens.report.heat import BLOCKS, LETTERS, strip
from pytest_qsens.report.interactions import side_by_side
from pytest_qsens.report.lines import Lines
from pytest_qsens.report.repeating import repeating
from pytest_qsens.results import CANNOT, LEFT_OUT, MODES, lost_in_noise
from pytest_qsens.wording import first_of, score_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import pytest

    from pytest_qsens.controller import Controller, Run
    from pytest_qsens.results import Interval, Mode, OpResult, Payload, Scores

WORST = 10
LISTED = 5
"""Ops named in one line."""
_BAR = 16
_INDEX = re.compile(r"\.\d+")


def report(terminal: pytest.TerminalReporter, controller: Controller) -> None:
    """Write a section for each (model, scheme) of the run; with ``-q`` only what needs attention."""
    config = controller.config
    lines = Lines(terminal)
    for run in controller.runs.values():
        if not run.results:
            continue
        engine = f", engine {'+'.join(run.engines)}" if run.engines else ""
        shard = f", shard {chosen}" if (chosen := base_options(config).shard) else ""
        groups = "" if run.granularity == "op" else f", granularity {run.granularity}"
        what = "scheme" if run.config is None else "config"
        lines.title(f"qsens: model {run.model}, {what} {run.scheme}{groups}{engine}{shard}")
        lines.write(_counts(run))
        if run.config is not None and config.option.verbose >= 0:
            lines.write(config_line(run, run.config))
        if run.cached:
            lines.write(_sources(run))
        if config.option.verbose >= 0:
            worst = worst_ops(run, lines.width, "█" if lines.can_write("█") else "#")
            heat = _heat(run, lines.width, BLOCKS if lines.can_write(BLOCKS) else LETTERS)
            for line in (*worst, *heat, *_top(run, config, lines.width), *_order(run)):
                lines.write(line)
        for line in attention(run, gated=base_options(config).gate_estimates):
            lines.write(line, yellow=True)
        _repeat(lines, controller, run)
        for line in _costs(run, controller):
            lines.write(line)
        if command := accepting(controller, run):
            lines.write(f"accept with: {command}", whole=True, bold=True)
    _end(lines, controller)


def _repeat(lines: Lines, controller: Controller, run: Run) -> None:
    if command := repeating(controller, run, findings(run)):
        lines.write(f"repeat with: {command}", whole=True, bold=True)


def config_line(run: Run, config: Payload) -> str:
    """Say what is measured: which file, and how many ops or groups have which scheme."""
    schemes = Counter(run.schemes[unit.name] for unit in run.ops)
    listed = ", ".join(f"{number} {name}" for name, number in schemes.most_common())
    return f"config: {config['about']['path']} ({config['about']['format']}): {listed}"


def _end(lines: Lines, controller: Controller) -> None:
    for warning in controller.warnings:
        lines.write(f"qsens: {warning}", yellow=True)
    for path, news in controller.written.items():
        lines.write(f"qsens: wrote {path}{news}", whole=True)
    for problem in controller.problems:
        lines.write(f"qsens: {problem}", red=True)


def _counts(run: Run) -> str:
    results = [result for op, result in run.results.items() if op != TOTAL]
    if not results:
        return f"the whole model, and none of its {_listed(run)}{_compared(run)}"
    statuses = Counter(result.status for result in results)
    found = [f"{count} {status}" for status, count in statuses.items()]
    tested = [op for op in run.ops if op.name not in run.unquantized]
    without = [op.name in run.elsewhere for op in tested if op.name not in run.results]
    found += [f"{without.count(False)} not run"] if False in without else []
    found += [f"{without.count(True)} in other shards"] if True in without else []
    found += [f"{len(run.unquantized)} unquantized"] if run.unquantized else []
    if run.functional:
        found.append(f"{len(run.functional)} functional products not quantized by {run.scheme}")
    return f"{_listed(run)}: {', '.join(found)}{_compared(run)}"


def _listed(run: Run) -> str:
    """Count what is measured, and, where that are groups, their ops: one with no other in its group counts as one."""
    if run.granularity == "op":
        return f"{len(run.ops)} ops"
    return f"{len(run.ops)} groups of {sum(len(unit.ops) for unit in run.ops)} ops"


def _sources(run: Run) -> str:
    cached = {result.op for result in run.cached}
    measured = sum(result.op not in cached for result in run.measured)
    noun = _noun(run)[: None if len(cached) != 1 else -1]
    return f"scores: {len(cached)} {noun} from the cache, {measured} measured in this run"


def _noun(run: Run) -> str:
    return "ops" if run.granularity == "op" else "groups"


def _compared(run: Run) -> str:
    verdicts = Counter(verdict.kind for verdict in run.verdicts.values())
    found = [f"{verdicts[kind]} {kind}" for kind in ("regressed", "improved", "new") if verdicts[kind]]
    past = f"; {verdicts['exceeded']} past a limit" if verdicts["exceeded"] else ""
    return f"{past}; against the snapshot: {', '.join(found)}" if found else past


def worst_ops(run: Run, width: int, bar: str) -> Iterator[str]:
    """Tables of the ops that hurt most, one for each mode, and the line of the whole model.

    Args:
        run: The results.
        width: Columns of the terminal.
        bar: Character that bars are drawn with.

    """
    total = run.total
    one = "op" if run.granularity == "op" else "group"
    rest = "all" if run.config is None else "all of the config"
    modes: tuple[tuple[Mode, str, str], ...] = (
        ("isolated", "nmse", f"only this {one} quantized; higher nmse is worse"),
        (
            "fallback",
            "gain",
            f"{rest} but this {one} quantized; gain: total nmse minus its nmse, high: keep it in fp32",
        ),
        ("added", "loss", f"{rest} and this {one} quantized; loss: its nmse minus total nmse, high: keep it in fp32"),
    )
    for mode, metric, direction in modes:
        known = {result.op: result for result in (*run.measured, *run.estimated) if mode in result.modes}
        scores = {op: result.modes[mode] for op, result in known.items()}
        intervals = {op: result.intervals[mode] for op, result in known.items() if mode in result.intervals}
        if scores:
            estimates = f"; {len(intervals)} of {len(scores)} are estimates" if intervals else ""
            yield f"worst {one}s, {mode} ({direction}{estimates})"
            yield from _table(scores, metric, width, bar, intervals)
        noisy = sum(map(lost_in_noise, scores.values()))
        if noisy:
            yield f"~ {noisy} of {len(scores)} {'losses' if mode == 'added' else 'gains'} are not to be told from noise"
    if total is not None and total.isolated is not None:
        how = "" if run.config is None else " as the config says"
        note = f" ({total.reason})" if total.reason else ""
        yield f"total, everything quantized{how}: {_numbers(total.isolated)}{note}"
        yield from side_by_side(total)


def _heat(run: Run, width: int, marks: str) -> Iterator[str]:
    """Draw the scores of the first mode that there is anything to draw of."""
    known = {result.op: result.modes for result in (*run.measured, *run.estimated)}
    for mode, metric in RANKED_BY.items():
        modes = {op.name: known[op.name] for op in run.ops if op.name in known}
        lines = list(
            strip({op: _number(m[mode][metric]) for op, m in modes.items() if mode in m}, width, marks, metric)
        )
        if lines:
            return iter(lines)
    return iter(())


def _top(run: Run, config: pytest.Config, width: int) -> Iterator[str]:
    """Name the most sensitive ops, and how sure that is, if that was asked for."""
    options = base_options(config)
    known = [result for result in (*run.measured, *run.estimated) if result.modes]
    mode = next((mode for mode in MODES if any(mode in result.modes for result in known)), None)
    if options.top is None or mode is None:
        return
    from pytest_qsens.refinement import certainty, estimated, measured

    exact = [result for result in known if mode in result.modes and mode not in result.intervals]
    nmse = {result.op: _number(result.modes[mode]["nmse"]) for result in exact}
    beliefs = {op: measured(mode, value) for op, value in nmse.items()}
    beliefs |= {result.op: estimated(mode, result.intervals[mode]) for result in known if mode in result.intervals}
    ranked = sorted(nmse, key=lambda op: (-beliefs[op].middle, op))[: options.top]
    told = sum(result.status in ("unexercised", "unquantizable") for result in run.results.values())
    asked = [op for op in run.ops if op.name in run.results or not options.selective]
    unknown = len(asked) - told - len(beliefs)
    sure = f"no other op belongs to them with probability {_chance(certainty(beliefs, options.top))}"
    if unknown > 0:
        sure = f"nothing is known of {unknown} ops, each of which may belong to them"
    if len(ranked) < options.top:
        sure = f"only {len(ranked)} were measured"
    yield f"top {options.top}, {mode} ({'higher' if mode == 'isolated' else 'lower'} nmse is more sensitive): {sure}"
    if not ranked:
        return
    longest = max(map(len, ranked))
    name_width = max(12, min(longest, width - 15))
    for place, op in enumerate(ranked, 1):
        yield f"  {place:>3} {_shortened(op, name_width):<{name_width}} {nmse[op]:10.3g}"


def _chance(value: float) -> str:
    """Write a probability; one that is not certain never reads as certain."""
    return "1 (all were)" if value == 1 else f"{min(value, 0.9999):.4f}"


def _number(value: float | None) -> float:
    return 0.0 if value is None else value


def _order(run: Run) -> Iterator[str]:
    """Tell what gates of the whole run found, if nobody has to do anything about it: else it is a problem of all."""
    yield from (f"order of ops: {verdict}" for verdict in run.ranks if verdict.state in ("held", "accepted"))
    yield from (f"interactions: {verdict}" for verdict in run.joint if verdict.state == "held")


def _table(
    scores: dict[str, Scores], metric: str, width: int, bar: str, intervals: Mapping[str, Interval]
) -> Iterator[str]:
    ranked = sorted(scores, key=lambda op: (-(scores[op][metric] or 0.0), op))[:WORST]
    values = [scores[op][metric] or 0.0 for op in ranked]
    longest = max(map(len, ranked))
    numbers = 2 + 10 + 11  # spaces and two numbers
    name_width = max(12, min(longest, width - numbers - 1))
    bar_width = min(_BAR, width - numbers - name_width - 3)
    for op, value in zip(ranked, values, strict=True):
        drawn = f"  {bar * _length(value, values, bar_width)}" if bar_width > 3 else ""
        if op in intervals:  # that of the nmse takes the place of the bar
            low, high = intervals[op]
            drawn = f"  estimated, nmse {low:.3g} to {high:.3g}"
        sqnr = scores[op]["sqnr_db"]
        decibels = "identical" if sqnr is None else f"{sqnr:6.1f} dB"
        mark = "~" if lost_in_noise(scores[op]) else " "
        yield f"  {_shortened(op, name_width):<{name_width}} {value:10.3g}{mark}{decibels:>9}{drawn}".rstrip()


def _length(value: float, values: Sequence[float], width: int) -> int:
    """Length of a bar, logarithmic: errors of ops differ by orders of magnitude."""
    positive = [v for v in values if v > 0]
    if value <= 0:
        return 0
    span = math.log10(max(positive) / min(positive)) or 1.0
    return 1 + round((width - 1) * math.log10(value / min(positive)) / span) if len(positive) > 1 else width


def _shortened(name: str, width: int) -> str:
    """Cut the middle out: the layer number and the end tell ops apart."""
    if len(name) <= width:
        return name
    tail = (width - 2) * 2 // 3
    return f"{name[: width - 2 - tail]}..{name[-tail:]}"


def _numbers(scores: Scores) -> str:
    names = {"nmse": "nmse", "sqnr_db": "sqnr", "kl": "kl", "top1": "top-1 agreement"}
    parts = []
    for metric, name in names.items():
        if metric in scores:
            value = scores[metric]
            unit = " dB" * (metric == "sqnr_db" and value is not None)
            parts.append(f"{name} {score_text(value)}{unit}")
    return ", ".join(parts)


def attention(run: Run, *, gated: bool = False) -> Iterator[str]:
    """Lines that must not be missed, with ``-q`` either.

    Args:
        run: The results.
        gated: Whether estimates gate as well.

    """
    yield from _worse(run)
    yield from _lost(run)
    for result in run.results.values():
        if result.status == "failed":
            yield f"FAILED: {result.op}: {result.reason}"
    yield from notes(run, gated=gated)


def _worse(run: Run) -> Iterator[str]:
    """Name the ops that got worse, and by how much: pytest's own list of failures is cut at the end of a line."""
    worse = [finding for finding in findings(run) if finding.kind in ("exceeded", "regressed")]
    if worse:
        yield f"WORSE: {len(worse)} of {len(run.verdicts)} scores are past their thresholds or limits"
    for finding in worse[:LISTED]:
        yield from (f"  {finding.op}: {line}" for line in finding.lines)
    if len(worse) > LISTED:
        yield f"  and {len(worse) - LISTED} more"


def _lost(run: Run) -> Iterator[str]:
    """Name the ops that have a score in the snapshot, and none now."""
    lost = [finding for finding in findings(run) if finding.kind == "lost"]
    if lost:
        has, remain = ("has", "its line") if len(lost) == 1 else ("have", "their lines")
        noun = _noun(run)[: None if len(lost) != 1 else -1]
        yield f"LOST: {len(lost)} {noun} of the snapshot {has} no score any more"
        yield from (f"  {finding.op}: {'; '.join(finding.lines)}" for finding in lost[:LISTED])
        yield from [f"  and {len(lost) - LISTED} more"] if len(lost) > LISTED else []
        yield f"  if that is meant, remove {remain} with --snapshot-update --qsens-snapshot-prune"


def notes(run: Run, *, gated: bool = False) -> Iterator[str]:
    """Lines about a run as a whole, that must not be missed.

    Args:
        run: The results.
        gated: Whether estimates gate as well.

    """
    yield from _about_config(run)
    lost = {finding.op for finding in findings(run) if finding.kind == "lost"}
    unexercised = [r for r in run.results.values() if r.status == "unexercised" and r.op not in lost]
    if unexercised:
        yield (
            f"NOT EXERCISED: {len(unexercised)} of {len(run.ops)} {_noun(run)} have no score, nothing is known about "
            "them: "
            f"{_grouped(unexercised)}"
        )
        for reason in sorted({result.reason or "" for result in unexercised}):
            yield f"  {reason}: give data that do (--qsens-calib, --qsens-eval)"
    yield from _within_noise(run)
    yield from _estimates(run, gated=gated)
    if run.engine_reason:
        yield f"slower engine {'+'.join(run.engines)}: {run.engine_reason}"
    if run.mismatch:
        where = "elsewhere" if any(not line.startswith("kernels ") for line in run.mismatch) else "with other kernels"
        yield f"the snapshot was measured {where}, scores may differ for that alone: {'; '.join(run.mismatch)}"
    if len(run.environments) > 1:
        yield "workers run in different environments, scores may differ for that alone"
    if len({facts["reference"] for facts in run.facts}) > 1:
        yield "the unquantized outputs differ between machines: if by more than rounding, seed what is random"
    if run.gone:
        lines = "line" if len(run.gone) == 1 else "lines"
        yield (
            f"{len(run.gone)} {lines} in {run.path} of no op of this model: {', '.join(run.gone[:LISTED])}"
            f"{', ...' * (len(run.gone) > LISTED)}; remove with --snapshot-update --qsens-snapshot-prune"
        )


def _about_config(run: Run) -> Iterator[str]:
    """Say what is wrong with the config, what of it is not measured, and what in it is not as the snapshot says."""
    if run.config is None:
        return
    problems = run.config["problems"]
    if problems:
        yield f"CONFIG: {_things(len(problems))} wrong with {run.config['about']['path']}:"
        yield from (f"  {problem}" for problem in problems)
    left_out, ops = run.config["unsimulated"], sum(len(unit.ops) for unit in run.ops)
    if left_out:
        yield (
            f"NOT SIMULATED: the config quantizes {len(left_out)} of {ops} ops in a way that has no score; the "
            f"total is without them: {first_of(left_out, LISTED)}"
        )
    moved = [f"{op} ({old} → {new})" for op, (old, new) in run.moved.items() if op != TOTAL]
    if moved:
        prune = " --qsens-snapshot-prune" if run.unquantized.intersection(run.moved) else ""
        yield (
            f"the snapshot was measured with another scheme of {len(moved)} {_noun(run)}: {first_of(moved, LISTED)}; "
            f"record with --snapshot-update{prune}"
        )


def _things(count: int) -> str:
    return "1 thing is" if count == 1 else f"{count} things are"


def _within_noise(run: Run) -> Iterator[str]:
    """Name ops that differ by more than was asked for, and pass."""
    found = {op: verdict.within_noise for op, verdict in run.verdicts.items() if verdict.within_noise}
    if found:
        yield (
            f"NOT DISTINGUISHABLE: {len(found)} of {len(run.verdicts)} scores are past their thresholds, but no "
            "further from the snapshot than noise reaches: they count as equal"
        )
    for op, lines in list(found.items())[:LISTED]:
        yield from (f"  {op}: {line}" for line in lines)
    if len(found) > LISTED:
        yield f"  and {len(found) - LISTED} more"


def _estimates(run: Run, *, gated: bool) -> Iterator[str]:
    """Say which ops are estimated, and which could not be."""
    if run.estimated:
        gates = "They fail only where all of their interval is past the threshold" if gated else "They gate nothing"
        yield (
            f"ESTIMATES: {len(run.estimated)} of {len(run.ops)} ops are estimated, not measured. {gates}, "
            "and nothing is recorded. Intervals are to hold the exact nmse of 9 in 10 ops"
        )
    left_out = [result for result in run.results.values() if (result.reason or "").startswith(LEFT_OUT)]
    for reason in sorted({result.reason or "" for result in left_out}):
        names = [result.op for result in sorted(left_out, key=_most) if result.reason == reason]
        yield f"{reason}: {first_of(names, LISTED)}"
    refused = [result for result in run.measured if (result.reason or "").startswith(CANNOT)]
    for reason in sorted({result.reason or "" for result in refused}):
        names = [result.op for result in refused if result.reason == reason]
        yield f"{first_of(names, LISTED)}: {reason}"


def _most(result: OpResult) -> float:
    """Key by which what may be most sensitive comes first."""
    return -max((high for _, high in result.intervals.values()), default=math.inf)


def _grouped(results: Iterable[OpResult]) -> str:
    """Count ops by block, with the layer number left out: ``visual.blocks.* (12)``."""
    blocks = Counter(_INDEX.sub(".*", result.block) or result.op for result in results)
    return ", ".join(f"{block} ({count})" for block, count in blocks.items())


def _costs(run: Run, controller: Controller) -> Iterator[str]:
    if controller.config.option.verbose >= 0 and run.reference_seconds is not None:
        yield cost(run, controller.wall_seconds)
    if run.profile is not None:
        yield from profile.table(run.profile)


def cost(run: Run, wall_seconds: float) -> str:
    """Say what a run took; only with a known time of a reference forward."""
    told = f"cost: {wall_seconds:.1f} s in all; reference forward {run.reference_seconds:.3g} s"
    if run.estimated and run.forwards is not None:
        return f"{told}; {run.forwards:.1f} forwards for all ops"
    return told if run.forwards_per_op is None else f"{told}; {run.forwards_per_op:.2f} forwards per op"
