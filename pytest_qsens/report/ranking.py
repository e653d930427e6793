"""The most sensitive ops of a run, as text: tables of the worst, a strip of all, the top K that were asked for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pytest_qsens.given_options import base_options
from pytest_qsens.rank_gates import RANKED_BY
from pytest_qsens.report.heat import strip
from pytest_qsens.report.interactions import side_by_side
from pytest_qsens.results import MODES, lost_in_noise
from pytest_qsens.wording import score_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import pytest

    from pytest_qsens.results import Interval, Mode, Scores
    from pytest_qsens.session.run import Run

WORST = 10

_BAR = 16


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


def heat_of(run: Run, width: int, marks: str) -> Iterator[str]:
    """Draw the scores of the first mode that there is anything to draw of."""
    known = {result.op: result.modes for result in (*run.measured, *run.estimated)}
    for mode, metric in RANKED_BY.items():
        modes = {op.name: known[op.name] for op in run.ops if op.name in known}
        lines = list(strip({op: m[mode][metric] or 0.0 for op, m in modes.items() if mode in m}, width, marks, metric))
        if lines:
            return iter(lines)
    return iter(())


def top(run: Run, config: pytest.Config, width: int) -> Iterator[str]:
    """Name the most sensitive ops, and how sure that is, if that was asked for."""
    options = base_options(config)
    known = [result for result in (*run.measured, *run.estimated) if result.modes]
    mode = next((mode for mode in MODES if any(mode in result.modes for result in known)), None)
    if options.top is None or mode is None:
        return
    from pytest_qsens.refinement import certainty, estimated, measured

    exact = [result for result in known if mode in result.modes and mode not in result.intervals]
    nmse = {result.op: result.modes[mode]["nmse"] or 0.0 for result in exact}
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
