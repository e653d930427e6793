"""Charts of how far the channels of the most sensitive ops reach."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_qsens.inspection.found import NAMES
from pytest_qsens.inspection.verdict import channel_name
from pytest_qsens.ops import PRODUCTS
from pytest_qsens.report.directory.charts import SCHEMA, Chart, tooltip, value_of
from pytest_qsens.report.directory.contents import ranked
from pytest_qsens.report.measures import name_of
from pytest_qsens.wording import count

if TYPE_CHECKING:
    from pytest_qsens.details import Channels, Details, OpRanges
    from pytest_qsens.report.directory.contents import Report
    from pytest_qsens.results import OpResult, RunResult

RANGES = 12
"""Ops, or groups, whose ranges are drawn."""

_MEMBERS = 4
"""Of a group, so that one of many ops does not take the place of all others."""

_LINES = 8
"""Beginnings of heads that are marked at most."""


@dataclass(frozen=True)
class RangeCard:
    """Ranges of one op: its name, its score, and up to two charts."""

    op: str
    type: str
    score: str
    charts: tuple[Chart, ...]


def wanted(result: RunResult) -> list[str]:
    """Names of the ops whose ranges are drawn: the most sensitive ones, or the first members of these groups."""
    return list(dict.fromkeys(name for op in _drawn(result) for name in _members(op)))


def without_ranges(result: RunResult) -> str | None:
    """Say which of the most sensitive ops have no ranges: they are no layers, nor queries, keys and values."""
    worst = ranked(result)[:RANGES]
    others = [op for op in worst if not _has_ranges(op)]
    if not others:
        return None
    kinds = " and ".join(sorted({op.type for op in others}))
    number = f"{len(others)} of the {count(len(worst), 'worst op')} {'is' if len(others) == 1 else 'are'} none"
    return f"Ranges are collected of layers, queries, keys and values; {number} (type {kinds}), {others[0].op} for one."


def _drawn(result: RunResult) -> list[OpResult]:
    return [op for op in ranked(result) if _has_ranges(op)][:RANGES]


def _has_ranges(op: OpResult) -> bool:
    return set(op.type.split("+")).isdisjoint(PRODUCTS)


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
        name = NAMES.get(ranges.type)
        axis = "input channel" if name is None else "channel, head after head"
        found.append(_channel_chart(name or "inputs", axis, "max |x|", ranges.inputs, ranges.head_dim))
    if ranges.weight is not None:
        rows = "row" if ranges.type == "embedding" else "output channel"
        found.append(_channel_chart("weight", rows, "max |w|", ranges.weight))
    return tuple(found)


def _channel_chart(title: str, axis: str, what: str, channels: Channels, head_dim: int | None = None) -> Chart:
    width = math.ceil(channels.count / len(channels.largest)) if channels.largest else 1
    bins = [{"c": place * width, "v": value} for place, value in enumerate(channels.largest)]
    bins += [{"c": channels.count, "v": bins[-1]["v"]}] if bins else []
    outliers = [
        {"c": channel + 0.5, "n": channel_name(channel, head_dim), "v": value}
        for channel, value in channels.outliers
        if channels.is_outlier(value)
    ]
    x: dict[str, object] = {
        "field": "c",
        "type": "quantitative",
        "scale": {"domain": [0, channels.count], "nice": False},
        "axis": {"title": axis, "format": "d", "tickCount": 5, "tickMinStep": 1, "grid": False},
    }
    if head_dim is not None:  # lines where heads begin
        step = head_dim * math.ceil(channels.count / head_dim / _LINES)
        x["axis"] = {"title": axis, "format": "d", "values": [*range(0, channels.count + 1, step)], "grid": True}
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
    noun = axis.rpartition(" ")[2] if head_dim is None else "channel"
    return Chart(title, _about(channels, what, noun, head_dim), spec)


def _about(channels: Channels, what: str, noun: str, head_dim: int | None) -> str:
    if not channels.outliers:
        return "no values"
    channel, value = channels.outliers[0]
    ratio = "" if channels.ratio is None else f", {channels.ratio:.1f} times the median {noun}'s"
    return f"{what} {value:.3g} in {noun} {channel_name(channel, head_dim)} of {channels.count}{ratio}"
