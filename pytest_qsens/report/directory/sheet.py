"""All ops as CSV, one a line, for spreadsheets and scripts."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

from pytest_qsens.results import MODES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_qsens.report.directory.contents import Report
    from pytest_qsens.results import OpResult

FIRST = ("op", "type", "block", "scheme", "status", "reason", "change", "weights", "seconds")
"""Columns of every file; those of scores follow, as far as there are any."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""What a spreadsheet takes for the beginning of a formula, or drops before one."""


def as_csv(report: Report) -> str:
    """Give the text of the file: a header, the ops in model order, and the whole model.

    Columns of scores are named ``mode.metric``; an interval has ``mode.nmse.low`` and ``mode.nmse.high``. A value that
    there is none of is empty; an infinite ``sqnr_db`` is ``inf``. ``limits`` is ``exceeded`` where a score is past one.
    """
    result = report.result
    ops = [*result.ops, *([result.total] if result.total is not None else [])]
    metrics = {f"{mode}.{name}": None for mode in MODES for op in ops for name in sorted(op.modes.get(mode, {}))}
    intervals = {f"{mode}.nmse.{end}": None for mode in MODES for end in ("low", "high") if _estimated(ops, mode)}
    limits = {finding.op: finding.kind for finding in report.exceeded}
    changes = {} if report.changes is None else {change.op: change.kind for change in report.changes.changes}
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*FIRST, "limits", *metrics, *intervals])
    for op in ops:
        texts = [op.op, op.type, op.block, op.scheme or "", op.status, op.reason or "", changes.get(op.op, "")]
        values = {f"{mode}.{name}": value for mode, scores in op.modes.items() for name, value in scores.items()}
        bounds = {
            f"{mode}.nmse.{end}": value
            for mode, interval in op.intervals.items()
            for end, value in zip(("low", "high"), interval, strict=True)
        }
        writer.writerow(
            [
                *map(_text, texts),
                "" if op.weights is None else op.weights,
                f"{op.seconds:.6g}",
                limits.get(op.op, ""),
                *(_number(values, name) for name in metrics),
                *(_number(bounds, name) for name in intervals),
            ]
        )
    return stream.getvalue()


def _estimated(ops: Iterable[OpResult], mode: str) -> bool:
    return any(mode in op.intervals for op in ops)


def _number(values: dict[str, float | None] | dict[str, float], name: str) -> str:
    if name not in values:
        return ""
    value = values[name]
    return "inf" if value is None else repr(value)


def _text(value: str) -> str:
    """Text that no spreadsheet runs: an apostrophe before what may be a formula."""
    return f"'{value}" if value.startswith(_FORMULA) else value
