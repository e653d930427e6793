"""Charts of how far the channels of the most sensitive ops reach."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_qsens.compare import count
from pytest_qsens.ops import WEIGHTLESS
from pytest_qsens.report.directory.charts import SCHEMA, Chart, tooltip, value_of
from pytest_qsens.report.directory.contents import ranked
from pytest_qsens.report.measures import name_of

if TYPE_CHECKING:
    from pytest_qsens.details import Channels, Details, OpRanges
    from pytest_qsens.report.directory.contents import Report
    from pytest_qsens.results import OpResult, RunResult

RANGES = 12
"""Ops, or groups, whose ranges are drawn."""

_MEMBERS = 4
"""Of a group, so that one of many ops does not take the place of all others."""


@dataclass(frozen=True)
class RangeCard:
    """Ranges of one op: its name, its score, and up to two charts."""

    op: str
    type: str
    score: str
    charts: tuple[Chart, ...]


def wanted(result: RunResult) -> list[str]:
    """Names of the ops whose ranges are drawn: the most sensitive layers, or the first members of these groups."""
    return list(dict.fromkeys(name for op in _drawn(result) for name in _members(op)))


def without_ranges(result: RunResult) -> str | None:
    """Say which of the most sensitive ops have no ranges, having no weight."""
    worst = ranked(result)[:RANGES]
    others = [op for op in worst if not _is_layer(op)]
    if not others:
        return None
    kinds = " and ".join(sorted({op.type for op in others}))
    return (
        f"Ranges are collected of layers; {len(others)} of the {count(len(worst), 'worst op')} "
        f"{'is' if len(others) == 1 else 'are'} none (type {kinds}), {others[0].op} for one."
    )


def _drawn(result: RunResult) -> list[OpResult]:
    return [op for op in ranked(result) if _is_layer(op)][:RANGES]


def _is_layer(op: OpResult) -> bool:
    return set(op.type.split("+")).isdisjoint(WEIGHTLESS)


def _members(op: OpResult) -> tuple[str, ...]:
    return op.ops[:_MEMBERS] or (op.op,)


def range_cards(report: Report, details: Details) -> list[RangeCard]:
    """Draw the ranges of the most sensitive ops, the worst first."""
    known = {ranges.op: ranges for ranges in details.ranges}
    measure = report.measure
    if measure is None:
        return []
    return [
        RangeCard(
            name,
            known[name].type,
            f"{name_of(measure.of(op).metric)} {value_of(op, measure):.3g}",
            _charts(known[name]),
        )
        for op in _drawn(report.result)
        for name in _members(op)
        if name in known
    ]


def _charts(ranges: OpRanges) -> tuple[Chart, ...]:
    found: list[Chart] = []
    if ranges.inputs is not None:
        found.append(_channel_chart("inputs", "input channel", "max |x|", ranges.inputs))
    rows = "row" if ranges.type == "embedding" else "output channel"
    found.append(_channel_chart("weight", rows, "max |w|", ranges.weight))
    return tuple(found)


def _channel_chart(title: str, axis: str, what: str, channels: Channels) -> Chart:
    width = math.ceil(channels.count / len(channels.largest)) if channels.largest else 1
    bins = [{"c": place * width, "v": value} for place, value in enumerate(channels.largest)]
    bins += [{"c": channels.count, "v": bins[-1]["v"]}] if bins else []
    outliers = [
        {"c": channel + 0.5, "n": str(channel), "v": value}
        for channel, value in channels.outliers
        if channels.is_outlier(value)
    ]
    x = {
        "field": "c",
        "type": "quantitative",
        "scale": {"domain": [0, channels.count], "nice": False},
        "axis": {"title": axis, "format": "d", "tickCount": 5, "tickMinStep": 1, "grid": False},
    }
    y = {
        "field": "v",
        "type": "quantitative",
        "axis": {"title": what, "tickCount": 4, "format": ".3~r", "minExtent": 34},
    }
    area = {
        "data": {"values": bins},
        "mark": {
            "type": "area",
            "interpolate": "step-after",
            "line": {"strokeWidth": 0.8},
            "opacity": 0.55,
            "color": "#56b4e9",
        },
        "encoding": {"x": x, "y": y},
    }
    median = {
        "data": {"values": [{"v": channels.median}]},
        "mark": {"type": "rule", "strokeDash": [4, 3], "style": "reference"},
        "encoding": {"y": {"field": "v", "type": "quantitative"}},
    }
    marked = {
        "data": {"values": outliers},
        "mark": {"type": "point", "filled": True, "size": 40, "color": "#d55e00", "opacity": 1},
        "encoding": {
            "x": {"field": "c", "type": "quantitative"},
            "y": {"field": "v", "type": "quantitative"},
            "tooltip": tooltip(("n", "channel"), ("v", what)),
        },
    }
    spec = {
        "$schema": SCHEMA,
        "width": "container",
        "height": 96,
        "layer": [area, median, *([marked] if outliers else [])],
    }
    return Chart(title, _about(channels, what, axis.rpartition(" ")[2]), spec)


def _about(channels: Channels, what: str, noun: str) -> str:
    if not channels.outliers:
        return "no values"
    channel, value = channels.outliers[0]
    ratio = "" if channels.ratio is None else f", {channels.ratio:.1f} times the median {noun}'s"
    return f"{what} {value:.3g} in {noun} {channel} of {channels.count}{ratio}"
