"""Results as builtin values, which test reports and JSON can carry, and back, checked."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, cast, get_args

from pytest_qsens.errors import QsensError
from pytest_qsens.files import Fields, finite, typed
from pytest_qsens.results import ABOUT_SCORES, OpResult, Status

if TYPE_CHECKING:
    from pytest_qsens.results import Interval, Mode, Payload, Scores

INTERVAL = "interval"
"""Key of the interval beside the metrics of a mode."""

NON_NEGATIVE = frozenset({"sse", "mse", "nmse", "kl", "top1", *ABOUT_SCORES}) - {"distinguishable"}
"""Metrics that no measurement makes negative."""


def to_payload(result: OpResult) -> Payload:
    """Turn an `OpResult` into builtin values, at full precision (xdist cannot carry NumPy's).

    Raises:
        ValueError: If a score is not finite: that op has failed, and a failed op has no numbers.

    """
    payload = asdict(result)
    del payload["intervals"], payload["ops"]
    for name in ("scheme", "added", "weights", "kv_values", "kv_heads", "sketch"):
        if payload[name] is None:
            del payload[name]
    if result.ops:
        payload["ops"] = list(result.ops)
    payload["seconds"] = float(result.seconds)
    for mode, scores in result.modes.items():
        payload[mode] = {metric: _builtin(value) for metric, value in sorted(scores.items())}
        try:
            read_scores(payload[mode], mode)
        except QsensError as error:
            raise ValueError(f"{result.op}: {error}") from error
        if mode in result.intervals:
            payload[mode][INTERVAL] = [float(bound) for bound in result.intervals[mode]]
    return payload


def _builtin(value: float | None) -> float | None:
    return value if value is None or isinstance(value, bool) else float(value)


def from_payload(payload: object, where: str = "payload") -> OpResult:
    """Rebuild the `OpResult` that `to_payload` took apart.

    Raises:
        QsensError: If something in it is missing, unknown or of a wrong type; names ``where``.

    """
    fields = Fields(payload, where)
    op = fields.text("op")
    if op:
        fields.where = f"{where} {op!r}"
    status = cast("Status", fields.choice("status", get_args(Status)))
    intervals: dict[Mode, Interval] = {}
    result = OpResult(
        op=op,
        type=fields.text("type"),
        block=fields.text("block"),
        status=status,
        reason=fields.optional_text("reason"),
        isolated=_optional_scores(fields, "isolated", intervals),
        fallback=_optional_scores(fields, "fallback", intervals),
        seconds=fields.number("seconds"),
        intervals=intervals,
        ops=_optional_names(fields, "ops"),
        scheme=fields.optional_text("scheme"),
        added=_optional_scores(fields, "added", intervals),
        weights=_optional_count(fields, "weights"),
        kv_values=_optional_count(fields, "kv_values"),
        kv_heads=_optional_count(fields, "kv_heads"),
        sketch=fields.optional_text("sketch"),
    )
    fields.end()
    return result


def _optional_count(fields: Fields, key: str) -> int | None:
    value, where = fields.take(key), fields.at(key)
    if value is None:
        return None
    count: int = typed(value, int, where)
    if count < 0:
        raise QsensError(f"{where}: {count!r} is not possible, it is never negative")
    return count


def _optional_names(fields: Fields, key: str) -> tuple[str, ...]:
    value, where = fields.take(key), fields.at(key)
    return () if value is None else tuple(typed(name, str, where) for name in typed(value, list, where))


def _optional_scores(fields: Fields, mode: Mode, intervals: dict[Mode, Interval]) -> Scores | None:
    """Scores of a mode; their interval, if there is one, is put where it belongs."""
    value, where = fields.take(mode), fields.at(mode)
    if value is None:
        return None
    scores = dict(typed(value, dict, where))
    if INTERVAL in scores:
        intervals[mode] = _read_interval(scores.pop(INTERVAL), f"{where}, {INTERVAL!r}")
    return read_scores(scores, where)


def _read_interval(value: object, where: str) -> Interval:
    bounds = [finite(bound, where) for bound in typed(value, list, where)]
    if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1]:
        raise QsensError(f"{where}: {value!r} is no interval, which is [low, high]")
    return bounds[0], bounds[1]


def read_scores(value: object, where: str) -> Scores:
    """Scores from parsed JSON: an object of finite numbers, where only ``sqnr_db`` may be null, and few negative.

    Raises:
        QsensError: With the place and the offending value.

    """
    return {
        metric: None if number is None and metric == "sqnr_db" else _score(metric, number, f"{where}, {metric!r}")
        for metric, number in typed(value, dict, where).items()
    }


def _score(metric: str, number: object, where: str) -> float:
    if metric == "distinguishable":
        flag: bool = typed(number, bool, where)
        return flag
    score = finite(number, where)
    if score < 0 and metric in NON_NEGATIVE:
        raise QsensError(f"{where}: {number!r} is not possible, it is never negative")
    return score
