"""What became of an op, as a result: its scores, or why it has none, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.results import IDENTICAL, OpResult
from pytest_qsens.wording import first_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_qsens.ops import Op
    from pytest_qsens.results import Mode, Scores, Status

NAMED = 3
"""Ops that are named for one reason."""


def without_score(op: Op, status: Status, *, reason: str) -> OpResult:
    """Make the result of an op, or group, that has no score."""
    return OpResult(op.name, op.type, op.block, status, reason, ops=op.member_names)


def measured_result(
    op: Op, measured: dict[Mode, Scores | str], failures: Sequence[str], note: str | None, seconds: float
) -> OpResult:
    """Make the result of an op, or group, that was measured.

    Args:
        op: What it is of.
        measured: Mode → scores, or what is wrong with its output.
        failures: What is wrong, in words.
        note: What has to be said beside the scores.
        seconds: How long it took.

    """
    found: dict[str, Scores] = {mode: values for mode, values in measured.items() if not isinstance(values, str)}
    identical = not failures and all(values["sse"] == 0 for values in found.values())
    return OpResult(
        op.name,
        op.type,
        op.block,
        "failed" if failures else "measured",
        "; ".join(failures) or (IDENTICAL if identical else note),
        isolated=found.get("isolated"),
        fallback=found.get("fallback"),
        added=found.get("added"),
        seconds=seconds,
        ops=op.member_names,
    )


def why_left_out(op: Op, without: Mapping[str, tuple[Status, str]]) -> str:
    """Say why an op was not measured, or which members of a group were not, and why."""
    if not op.members:
        _, reason = without[op.name]
        return reason
    by_reason: dict[tuple[Status, str], list[str]] = {}
    for name, why in without.items():
        by_reason.setdefault(why, []).append(name)
    return ", ".join(f"{first_of(names, NAMED)} ({status}: {reason})" for (status, reason), names in by_reason.items())
