"""All scores of a result, as a table for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.ops import TOTAL
from pytest_qsens.report.columns import aligned
from pytest_qsens.report.interactions import side_by_side
from pytest_qsens.results import lost_in_noise
from pytest_qsens.wording import score_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_qsens.results import OpResult, RunResult, Scores


_LEGEND = {
    "nmse": "nmse: higher is worse",
    "sqnr_db": "sqnr_db: lower is worse",
    "stderr": "stderr: standard error of the nmse over the evaluation samples",
    "fallback nmse": "fallback nmse (all quantized but this op): lower means a more sensitive op",
    "gain": "gain (total - fallback): higher means a more sensitive op; ~: not to be told from noise",
    "added nmse": "added nmse (all of the config and this op quantized): higher is worse",
    "loss": "loss (added - total): higher means a more sensitive op; ~: not to be told from noise",
    "noise": "noise: how far the fallback nmse moves with the last digits of values",
}


def table(result: RunResult, sort: str | None = None) -> list[str]:
    """Lines of a table of all ops: with ``sort`` ``nmse`` the most sensitive first, ops without numbers last."""
    run = result.run
    orders: dict[str | None, Callable[[OpResult], tuple[float | str, ...]]] = {
        "nmse": _least_sensitive_last,
        "op": lambda op: (op.op,),
    }
    ops = sorted(result.ops, key=orders[sort]) if sort else list(result.ops)
    if result.total is not None:
        ops.append(result.total)
    columns: dict[str, Callable[[OpResult], str]] = {}
    if any(op.isolated for op in ops):
        columns["nmse"] = lambda op: _cell(op.isolated, "nmse")
        columns["sqnr_db"] = lambda op: _cell(op.isolated, "sqnr_db")
    if any(op.isolated and "stderr" in op.isolated for op in ops):
        columns["stderr"] = lambda op: _cell(op.isolated, "stderr")
    if any(op.fallback for op in ops):
        columns["fallback nmse"] = lambda op: _cell(op.fallback, "nmse")
        columns["gain"] = lambda op: _cell(op.fallback, "gain") + " ~" * lost_in_noise(op.fallback)
    if any(op.added for op in ops):
        columns["added nmse"] = lambda op: _cell(op.added, "nmse")
        columns["loss"] = lambda op: _cell(op.added, "loss") + " ~" * lost_in_noise(op.added)
    if any(op.fallback and "noise" in op.fallback for op in ops):
        columns["noise"] = lambda op: _cell(op.fallback, "noise")
    if run.config is not None:
        columns["scheme"] = lambda op: op.scheme or "-"
    if any(op.ops for op in ops):
        columns["ops"] = lambda op: str(len(op.ops) or 1) if op.type != TOTAL else "-"
    header = ["op", "type", "status", *columns, "reason"]
    rows = [[op.op, op.type, op.status, *(cell(op) for cell in columns.values()), op.reason or ""] for op in ops]
    granularity = "" if run.granularity == "op" else f", granularity {run.granularity}"
    what = "scheme" if run.config is None else "config"
    return [
        f"model {run.model}, {what} {run.scheme}, engine {run.engine}, mode {run.mode}{granularity}",
        *(_LEGEND[name] for name in columns if name in _LEGEND),
        "",
        *aligned([header, *rows]),
        *side_by_side(result.total),
    ]


def _least_sensitive_last(op: OpResult) -> tuple[float | str, ...]:
    if op.isolated and op.isolated.get("nmse") is not None:
        return (0, -(op.isolated["nmse"] or 0.0))
    if op.fallback and op.fallback.get("nmse") is not None:
        return (0, op.fallback["nmse"] or 0.0)
    return (1, 0.0)


def _cell(scores: Scores | None, metric: str) -> str:
    if scores is None or metric not in scores:
        return "-"
    return score_text(scores[metric])
