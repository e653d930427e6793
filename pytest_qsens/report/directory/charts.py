"""The charts of the page, as Vega-Lite specifications: data and what is drawn of them, without colours of a theme.

Vega-Lite: A. Satyanarayan et al., "Vega-Lite: A Grammar of Interactive Graphics", IEEE TVCG 23(1), 2017.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qsens.report.heat import INDEX
from pytest_qsens.report.measures import name_of, score
from pytest_qsens.results import lost_in_noise
from pytest_qsens.wording import count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_qsens.report.directory.contents import Report
    from pytest_qsens.report.measures import Measure
    from pytest_qsens.results import OpResult

_TOWERS = 6
_ROWS = 48
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"

Spec = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """One chart: a title and what there is to say about it, unless the section says it, and its specification."""

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
        match = INDEX.search(op.op)
        if match is not None and score(op, measure) is not None:
            kind = INDEX.sub("#", op.op[match.end() :].lstrip(".:")) or op.type
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
    kept = rows[:_ROWS]
    data = []
    for (kind, block), ops in cells.items():
        if kind in kept:
            worst = max(ops, key=lambda op: value_of(op, measure))
            of = f", the worst of {len(ops)}" if len(ops) > 1 else ""
            data.append({"k": kind, "b": block, "v": value_of(worst, measure), "o": worst.op, "s": worst.status + of})
    blocks = sorted({block for _, block in cells})
    encoding: Spec = {
        "x": {
            "field": "b",
            "type": "ordinal",
            "scale": {"domain": list(range(blocks[0], blocks[-1] + 1)), "paddingInner": 0.04},
            "axis": {"title": "block", "labelAngle": 0, "labelOverlap": True, "domain": False, "ticks": False},
        },
        "y": {
            "field": "k",
            "type": "nominal",
            "scale": {"domain": kept, "paddingInner": 0.06},
            "axis": {"title": None, "domain": False, "ticks": False, "labelLimit": 260},
        },
        "color": {
            "condition": {
                "test": "datum.v > 0",
                "field": "v",
                "type": "quantitative",
                "scale": {"type": "log", "domain": domain, "scheme": "viridis"},
                "legend": {
                    "title": f"{_metrics(measure)}, higher is worse",
                    "format": ".0e",
                    "orient": "top",
                    "values": _decades(*domain),
                    "gradientLength": 220,
                    "titleLimit": 300,
                },
            },
            "value": "#8885",
        },
        "tooltip": tooltip(("o", "op"), ("v", _metrics(measure)), ("s", "status")),
    }
    shared = "Where # stands for an index, the worst of these ops is drawn." if any("#" in row for row in kept) else ""
    dropped = f" {count(len(rows) - _ROWS, 'more kind')} of ops are in the table." if len(rows) > _ROWS else ""
    return Chart(
        name or "blocks",
        f"{shared}{dropped}".strip(),
        _spec(data, "rect", encoding) | {"height": 19 * len(kept)},
    )


def agreement(report: Report) -> Chart | None:
    """Draw what an op does alone against what keeping it helps; ``None`` unless both were measured."""
    points: list[dict[str, Any]] = []
    for op in report.result.ops:
        if op.isolated is not None and op.fallback is not None:
            alone, gain = op.isolated.get("nmse"), op.fallback.get("gain")
            if alone and gain is not None:
                noisy = "within noise" if lost_in_noise(op.fallback) else "distinguishable"
                points.append({"x": alone, "y": gain, "o": op.op, "n": noisy})
    if len({point["x"] for point in points}) < 2:
        return None
    xs, ys = ([float(point[axis]) for point in points] for axis in "xy")
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
    many = len(points) > 1000
    dots = {
        "data": {"values": points},
        "mark": {"type": "point", "filled": True, "size": 20 if many else 46, "opacity": 0.6 if many else 0.85},
        "encoding": {
            "x": {
                "field": "x",
                "type": "quantitative",
                "scale": {"type": "log"},
                "axis": {
                    "title": "isolated: NMSE with only this op quantized",
                    "format": ".0e",
                    "values": _decades(low, max(xs)),
                },
            },
            "y": {
                "field": "y",
                "type": "quantitative",
                "scale": scale,
                "axis": {
                    "title": "fallback: gain by keeping only this op",
                    "labelExpr": "datum.value === 0 ? '0' : format(datum.value, '.0e')",
                    "values": ticks,
                },
            },
            "color": {
                "field": "n",
                "type": "nominal",
                "scale": {"domain": ["distinguishable", "within noise"], "range": ["#3a8fd6", "#e69f00"]},
                "legend": {"title": None, "orient": "top"},
            },
            "shape": {
                "field": "n",
                "type": "nominal",
                "scale": {"domain": ["distinguishable", "within noise"], "range": ["circle", "triangle-up"]},
            },
            "tooltip": tooltip(("o", "op"), ("x", "isolated nmse"), ("y", "gain"), ("n", "gain is")),
        },
    }
    return Chart(
        "",
        "On the dashed line keeping an op gains exactly what quantizing it alone costs: errors add up. Below it, other "
        "ops' errors cover for it; a gain below zero says that keeping the op makes the whole worse.",
        {"$schema": SCHEMA, "width": "container", "height": 340, "layer": [line, dots]},
    )


def _metrics(measure: Measure) -> str:
    own = name_of(measure.metric)
    return own if measure.also is None else f"{own} or {_metrics(measure.also)}"


def value_of(op: OpResult, measure: Measure) -> float:
    """Value by which an op is ranked; zero if it has none."""
    value = score(op, measure)
    return 0.0 if value is None else value


def _spec(data: list[dict[str, Any]], mark: str, encoding: Spec) -> Spec:
    return {"$schema": SCHEMA, "data": {"values": data}, "width": "container", "mark": mark, "encoding": encoding}


def tooltip(*fields: tuple[str, str]) -> list[Spec]:
    """Encode what is shown at a mark: names of fields, and what they are called."""
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
    return [*reversed(negative), 0.0, *positive]


def _spread(low: float, high: float, points: int) -> list[float]:
    ratio = math.log(high / low)
    return [low * math.exp(ratio * place / (points - 1)) for place in range(points)]
