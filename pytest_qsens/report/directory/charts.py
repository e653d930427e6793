"""The charts of the page, as Vega-Lite specifications: data and what is drawn of them, without colours of a theme.

Vega-Lite: A. Satyanarayan et al., "Vega-Lite: A Grammar of Interactive Graphics", IEEE TVCG 23(1), 2017.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qsens.compare import count
from pytest_qsens.report.directory.contents import ranked, score
from pytest_qsens.results import lost_in_noise

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pytest_qsens.details import Channels, Details, OpRanges
    from pytest_qsens.report.directory.contents import Measure, Report
    from pytest_qsens.results import OpResult

RANGES = 12
"""Ops, or groups, whose ranges are drawn."""

OUTLIER = 5.0
"""Times the median channel's largest magnitude from which a channel is marked. LLM.int8() (Dettmers et al., NeurIPS
2022, arXiv:2208.07339) takes a fixed magnitude of 6, which suits inputs of a unit scale only."""

_TOWERS = 6
_ROWS = 48
_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")
_SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"

Spec = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """One chart: a title, what it says in a sentence, and its specification."""

    title: str
    caption: str
    spec: Spec


def heat_maps(report: Report) -> list[Chart]:
    """Draw the scores of ops in numbered blocks: a chart for each stack of blocks, a row for each kind of op.

    Ops that differ in further indices alone, such as experts, share a row; the worst of them is drawn.
    """
    measure = report.measure
    if measure is None:
        return []
    stacks: dict[str, dict[tuple[str, int], list[OpResult]]] = defaultdict(lambda: defaultdict(list))
    for op in report.result.ops:
        match = _INDEX.search(op.op)
        if match is not None and score(op, measure) is not None:
            kind = _INDEX.sub("#", op.op[match.end() :].lstrip(".:")) or op.type
            stacks[op.op[: match.start()].rstrip(".")][kind, int(match[0])].append(op)
    drawn = {name: cells for name, cells in stacks.items() if len({block for _, block in cells}) > 1}
    values = [value for op in report.result.ops if (value := score(op, measure)) is not None and value > 0]
    if not values:
        return []
    domain = [min(values), max(values)]
    return [_heat_map(name, cells, measure, domain) for name, cells in list(drawn.items())[:_TOWERS]]


def _heat_map(
    name: str, cells: dict[tuple[str, int], list[OpResult]], measure: Measure, domain: Sequence[float]
) -> Chart:
    rows = list(dict.fromkeys(kind for kind, _ in cells))
    kept = frozenset(rows[:_ROWS])
    data = []
    for (kind, block), ops in cells.items():
        if kind in kept:
            worst = max(ops, key=lambda op: _value(op, measure))
            of = f", the worst of {len(ops)}" if len(ops) > 1 else ""
            data.append({"k": kind, "b": block, "v": _value(worst, measure), "o": worst.op, "s": worst.status + of})
    blocks = sorted({block for _, block in cells})
    encoding: Spec = {
        "x": {
            "field": "b",
            "type": "ordinal",
            "scale": {"domain": list(range(blocks[0], blocks[-1] + 1)), "paddingInner": 0.06},
            "axis": {"title": "block", "labelAngle": 0, "labelOverlap": True, "domain": False, "ticks": False},
        },
        "y": {
            "field": "k",
            "type": "nominal",
            "scale": {"domain": rows[:_ROWS], "paddingInner": 0.06},
            "axis": {"title": None, "domain": False, "ticks": False, "labelLimit": 260},
        },
        "color": {
            "condition": {
                "test": "datum.v > 0",
                "field": "v",
                "type": "quantitative",
                "scale": {"type": "log", "domain": domain, "scheme": "viridis"},
                "legend": {
                    "title": f"{measure.metric.upper() if measure.metric == 'nmse' else measure.metric}, higher is worse",
                    "format": ".0e",
                    "orient": "top",
                    "values": _decades(*domain),
                    "gradientLength": 220,
                    "titleLimit": 300,
                },
            },
            "value": "#8885",
        },
        "tooltip": _tooltip(("o", "op"), ("v", measure.metric), ("s", "status")),
    }
    dropped = f" {count(len(rows) - _ROWS, 'more kind')} of ops are in the table." if len(rows) > _ROWS else ""
    return Chart(
        name or "blocks",
        f"Every square is one op; a column is one block, in the order of the model.{dropped}",
        _spec(data, "rect", encoding) | {"height": {"step": 19}, "autosize": {"type": "fit-x", "contains": "padding"}},
    )


def agreement(report: Report) -> Chart | None:
    """Draw what an op does alone against what keeping it helps; ``None`` unless both were measured."""
    points = []
    for op in report.result.ops:
        if op.isolated is not None and op.fallback is not None:
            alone, gain = op.isolated.get("nmse"), op.fallback.get("gain")
            if alone and gain is not None:
                noisy = "within noise" if lost_in_noise(op.fallback) else "distinguishable"
                points.append({"x": alone, "y": gain, "o": op.op, "n": noisy})
    if len(points) < 2:
        return None
    xs, ys = [point["x"] for point in points], [point["y"] for point in points]
    low, high = min(xs), max(*xs, *ys)
    signed = min(ys) <= 0
    step = 10.0 ** math.floor(math.log10(high) - 2.5) if signed else 0.0
    scale: Spec = {"type": "symlog", "constant": step} if signed else {"type": "log"}
    ticks = _signed_decades(min(ys), high, step) if signed else _decades(min(ys), high)
    diagonal = [{"x": value, "y": value} for value in _spread(low, high, 40)]
    line = {
        "data": {"values": diagonal},
        "mark": {"type": "line", "strokeDash": [5, 4], "strokeWidth": 1.2, "style": "reference", "tooltip": False},
        "encoding": {"x": {"field": "x", "type": "quantitative"}, "y": {"field": "y", "type": "quantitative"}},
    }
    dots = {
        "data": {"values": points},
        "mark": {"type": "point", "filled": True, "size": 46, "opacity": 0.75},
        "encoding": {
            "x": {
                "field": "x",
                "type": "quantitative",
                "scale": {"type": "log"},
                "axis": {"title": "isolated: NMSE with only this op quantized", "format": ".0e", "values": _decades(low, max(xs))},
            },
            "y": {
                "field": "y",
                "type": "quantitative",
                "scale": scale,
                "axis": {"title": "fallback: gain by keeping only this op", "format": ".0e", "values": ticks},
            },
            "color": {
                "field": "n",
                "type": "nominal",
                "scale": {"domain": ["distinguishable", "within noise"], "range": ["#0072b2", "#e69f00"]},
                "legend": {"title": None, "orient": "top"},
            },
            "shape": {
                "field": "n",
                "type": "nominal",
                "scale": {"domain": ["distinguishable", "within noise"], "range": ["circle", "triangle-up"]},
            },
            "tooltip": _tooltip(("o", "op"), ("x", "isolated nmse"), ("y", "gain"), ("n", "gain is")),
        },
    }
    return Chart(
        "Isolated against fallback",
        "On the dashed line keeping an op gains exactly what quantizing it alone costs: errors add up. Below it, other "
        "ops' errors cover for it; a gain below zero says that keeping the op makes the whole worse.",
        {"$schema": _SCHEMA, "width": "container", "height": 340, "layer": [line, dots]},
    )


@dataclass(frozen=True)
class RangeCard:
    """Ranges of one op: its name, its score, and up to two charts."""

    op: str
    type: str
    score: str
    charts: tuple[Chart, ...]


def wanted(report_ops: Iterable[OpResult]) -> list[str]:
    """Names of the ops whose ranges are drawn: the first few, or the members of these groups."""
    return list(dict.fromkeys(name for op in list(report_ops)[:RANGES] for name in (op.ops or (op.op,))))


def range_cards(report: Report, details: Details) -> list[RangeCard]:
    """Draw the ranges of the most sensitive ops, the worst first."""
    known = {ranges.op: ranges for ranges in details.ranges}
    measure, cards = report.measure, []
    if measure is None:
        return []
    for op in ranked(report.result)[:RANGES]:
        value = f"{measure.metric} {_value(op, measure):.3g}"
        for name in op.ops or (op.op,):
            if name in known:
                cards.append(RangeCard(name, known[name].type, value, _range_charts(known[name])))
    return cards[: 2 * RANGES]


def _range_charts(ranges: OpRanges) -> tuple[Chart, ...]:
    found = []
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
        if channels.median and value >= OUTLIER * channels.median
    ]
    x = {
        "field": "c",
        "type": "quantitative",
        "scale": {"domain": [0, channels.count], "nice": False},
        "axis": {"title": axis, "format": "d", "tickCount": 5, "grid": False},
    }
    y = {"field": "v", "type": "quantitative", "axis": {"title": what, "tickCount": 4, "format": "~g"}}
    area = {
        "data": {"values": bins},
        "mark": {"type": "area", "interpolate": "step-after", "line": {"strokeWidth": 0.8}, "opacity": 0.55, "color": "#56b4e9"},
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
            "tooltip": _tooltip(("n", "channel"), ("v", what)),
        },
    }
    spec = {"$schema": _SCHEMA, "width": "container", "height": 96, "layer": [area, median, *([marked] if outliers else [])]}
    return Chart(title, _about(channels, what, axis.rpartition(" ")[2]), spec)


def _about(channels: Channels, what: str, noun: str) -> str:
    if not channels.outliers:
        return "no values"
    channel, value = channels.outliers[0]
    ratio = "" if channels.ratio is None else f", {channels.ratio:.1f}× the median {noun}’s"
    return f"{what} {value:.3g} in {noun} {channel} of {channels.count}{ratio}"


def _value(op: OpResult, measure: Measure) -> float:
    value = score(op, measure)
    return 0.0 if value is None else value


def _spec(data: list[dict[str, Any]], mark: str, encoding: Spec) -> Spec:
    return {"$schema": _SCHEMA, "data": {"values": data}, "width": "container", "mark": mark, "encoding": encoding}


def _tooltip(*fields: tuple[str, str]) -> list[Spec]:
    numbers = {"v", "x", "y"}
    return [
        {"field": name, "title": title, "type": "quantitative", "format": ".3g"}
        if name in numbers
        else {"field": name, "title": title, "type": "nominal"}
        for name, title in fields
    ]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten within a range, no more than eight; its ends, if there are no two."""
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    stride = max(1, math.ceil((last - first + 1) / 8))
    found = [float(f"1e{exponent}") for exponent in range(first, last + 1, stride)]
    return found if len(found) > 1 else [low, *found, high] if high > low else [low]


def _signed_decades(low: float, high: float, step: float) -> list[float]:
    positive = [value for value in _decades(step, high) if value >= step] if high > step else []
    negative = [-value for value in _decades(step, -low) if value >= step] if -low > step else []
    return [*negative, 0.0, *positive]


def _spread(low: float, high: float, points: int) -> list[float]:
    ratio = math.log(high / low)
    return [low * math.exp(ratio * place / (points - 1)) for place in range(points)]
