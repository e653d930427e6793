"""The report of a finished result file."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_qsens.accept import ranks_of
from pytest_qsens.diff import read
from pytest_qsens.errors import QsensError
from pytest_qsens.gates import Overrides
from pytest_qsens.limits import judge_limits
from pytest_qsens.report.directory.contents import Judgement, Report, compared, judged_by
from pytest_qsens.report.findings import Finding, furthest_first
from pytest_qsens.snapshot import Entry, Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_qsens.diff import Side
    from pytest_qsens.gates import Gates
    from pytest_qsens.results import RunResult
    from pytest_qsens.run_verdicts import RunVerdict
    from pytest_qsens.thresholds import Verdict


def report_of(result: RunResult, against: str | None, gates: Gates, path: Path | None = None) -> Report:
    """Put a report together.

    Args:
        result: What was measured.
        against: A result, a snapshot, or ``REVISION:PATH`` of one in git, to compare it with.
        gates: What counts as worse.
        path: Directory that the report goes to.

    Raises:
        QsensError: If what to compare with cannot be read, or not be compared, or is needed and missing.

    """
    verdicts = dict(_past_limits(result, gates))
    schemes = {op.op: op.scheme for op in result.ops}
    found = [
        Finding(op, "exceeded", verdict.lines, verdict.compared, schemes.get(op), None)
        for op, verdict in verdicts.items()
    ]
    changes, uncompared = None, None
    failed = [
        f"Interactions: {verdict}." for gate in gates.joint if (verdict := gate.judge(result.total)).state != "held"
    ]
    if against is None:
        if gates.ranks:
            raise QsensError(
                f"--fail {', '.join(map(str, gates.ranks))}: the order of the ops is compared with another one. Give "
                "--against OLD"
            )
        uncompared = "Give what it is to be compared with: qsens report RESULT.json DIR --against OLD"
    else:
        old = read(against)
        changes, uncompared = compared(result, old, gates.thresholds, verdicts)
        if uncompared is not None:
            raise QsensError(uncompared)
        failed += [f"Order of the ops: {verdict}." for verdict in _ranks(result, old, gates) if verdict.state != "held"]
    open_ = Judgement("open", "")
    report = Report(result, open_, changes, uncompared, gates.thresholds, gates.limits, tuple(furthest_first(found)))
    return replace(report, judgement=judged_by(report, failed, path))


def _past_limits(result: RunResult, gates: Gates) -> Iterator[tuple[str, Verdict]]:
    """Judge what was measured; estimates gate nothing."""
    for op in (*result.ops, *([] if result.total is None else [result.total])):
        limits = Overrides().gates_for(op.op, gates, op.ops).limits
        if op.status == "measured" and (verdict := judge_limits(op, limits)).kind == "exceeded":
            yield op.op, verdict


def _ranks(result: RunResult, old: Side, gates: Gates) -> list[RunVerdict]:
    """Compare the order of the ops with that of the old file."""
    entries = {
        name: Entry(op.type, **{str(mode): scores for mode, scores in op.scores.items()}, scheme=op.scheme)
        for name, op in old.ops.items()
    }
    return ranks_of(result, Snapshot(old.model, old.scheme, {}, entries), gates.ranks)
