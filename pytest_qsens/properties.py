"""What the report of a test carries for other tools: properties of JUnit files (``--junitxml``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_qsens.results import OpResult
    from pytest_qsens.thresholds import Verdict

_SCORES = ("nmse", "sqnr_db", "gain", "loss")

Property = tuple[str, object]


def of_result(model: str, scheme: str, mode: str, result: OpResult) -> list[Property]:
    """Tell what was measured of an op, and why if there are no numbers.

    Args:
        model: Label of the model.
        scheme: Name of the scheme, or of the config, that the run is of.
        mode: As in ``--qsens-mode``.
        result: What was measured. The metrics of its first mode go by their own names, those of another one have the
            mode's before them, as in ``fallback_nmse``.

    """
    found: list[Property] = [
        ("status", result.status),
        ("model", model),
        ("scheme", result.scheme or scheme),
        ("mode", mode),
        ("type", result.type),
    ]
    if result.scheme is not None:
        found.append(("config", scheme))
    if result.reason is not None:
        found.append(("reason", result.reason))
    for measured, scores in result.modes.items():
        prefix = _prefix(result, measured)
        found += [(prefix + name, _number(scores[name])) for name in _SCORES if name in scores]
        if measured in result.intervals:
            low, high = result.intervals[measured]
            found += [(f"{prefix}nmse_low", low), (f"{prefix}nmse_high", high)]
    return found


def of_verdict(verdict: Verdict, result: OpResult) -> list[Property]:
    """Tell what the gate found, and of every metric that it compared the snapshot's value and the limit."""
    properties: dict[str, object] = {"verdict": verdict.kind}
    for name, value in _compared(verdict, result):
        properties.setdefault(name, value)  # what is past a limit and a threshold: the limit, which comes first
    return list(properties.items())


def _compared(verdict: Verdict, result: OpResult) -> Iterator[Property]:
    for found in verdict.compared:
        name = f"{_prefix(result, found.mode)}{found.metric}"
        if found.metric not in _SCORES and (found.limit is not None or found.kind == "new"):
            yield name, _number(found.new)
        if found.kind not in ("new", "exceeded"):
            yield f"{name}_old", _number(found.old)
        if found.limit is not None:
            yield f"{name}_limit", found.limit


def _prefix(result: OpResult, mode: str) -> str:
    """Nothing for the first mode that was measured."""
    return "" if mode in list(result.modes)[:1] else f"{mode}_"


def _number(value: float | None) -> float | str:
    """Write an SQNR that is infinite as most languages read it."""
    return "inf" if value is None else value
