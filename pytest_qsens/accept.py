"""Accepting a result file into the snapshot, after the run: what ``--snapshot-update`` does at its end."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pytest_qsens.errors import QsensError
from pytest_qsens.ops import TOTAL, Op
from pytest_qsens.option_declarations import MODES
from pytest_qsens.quant.assignment import ADDED_AS
from pytest_qsens.rank_gates import judge_ranks
from pytest_qsens.snapshot import (
    EVALUATION,
    Entry,
    accepted,
    adopt,
    changed,
    file_name,
    load,
    merge,
    on_other_data,
    with_other_schemes,
    write,
)
from pytest_qsens.thresholds import judge

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pytest_qsens.gates import Gates
    from pytest_qsens.rank_gates import RankGate
    from pytest_qsens.results import OpResult, RunResult
    from pytest_qsens.run_verdicts import RunVerdict
    from pytest_qsens.snapshot import Snapshot
    from pytest_qsens.thresholds import Threshold


def accept(result: RunResult, directory: Path, gates: Gates, *, allow_ci: bool = False) -> tuple[Path, list[str]]:
    """Write what was measured into the snapshot of its model, scheme and granularity.

    As with ``--snapshot-update``, lines within their thresholds stay as they are, and so do those of ops that were not
    measured; all that was measured is written if the order of the ops is gated and is another one. The environment is
    replaced only with every line of the file.

    Args:
        result: A result file's content, of a whole run or of merged shards.
        directory: Where snapshots live.
        gates: What counts as a change.
        allow_ci: Whether to write although ``CI`` is set.

    Returns:
        The snapshot's path, and the names of lines that are new or changed.

    Raises:
        QsensError: In CI, if nothing was measured, or if the snapshot cannot be read or written.

    """
    run = result.run
    path = directory / run.model / file_name(run.scheme, run.granularity)
    if os.environ.get("CI") and not allow_ci:
        raise QsensError(
            f"CI is set to {os.environ['CI']!r}, and there snapshots are compared, not written: {path} would accept "
            "whatever was measured. Accept on your own machine and commit the file, or add --allow-ci-update"
        )
    total = () if result.total is None else (result.total,)
    measured = {op.op: op for op in (*result.ops, *total) if op.status == "measured"}
    if not measured:
        raise QsensError(f"nothing to accept: of {run.model}, {run.scheme}, no op was measured")
    news: list[str] = []

    def update(old: Snapshot) -> Snapshot:
        other = on_other_data(old.environment, run.environment.get(EVALUATION))
        found = {name: _entry(old, op, gates.thresholds, other_data=other) for name, op in measured.items()}
        entries = {name: entry for name, entry in found.items() if entry.modes}
        everything = {name: Entry.of(op) for name, op in measured.items()}
        reordered = any(verdict.state == "failed" for verdict in ranks_of(result, old, gates.ranks))
        new = merge(old, everything if reordered else with_other_schemes(old, everything) | entries)
        if dict(old.environment) != dict(run.environment):
            new = adopt(new, everything, run.environment)
        news[:] = changed(old, new)
        return new

    # a file that cannot be used is refused before anything is made
    load(path, model=run.model, scheme=run.scheme, granularity=run.granularity)
    write(path, update, model=run.model, scheme=run.scheme, granularity=run.granularity)
    return path, news


def ranks_of(result: RunResult, snapshot: Snapshot, gates: Sequence[RankGate]) -> list[RunVerdict]:
    """Compare the order of the ops in a result file with a snapshot's."""
    ops = [
        Op(op.op, op.type)
        for op in result.ops
        if op.status != "unquantized" and ADDED_AS not in (op.scheme or "")  # those that would be added have no place
    ]
    return judge_ranks(gates, ops, snapshot.ops, result.ops, MODES[result.run.mode])


def _entry(old: Snapshot, op: OpResult, thresholds: Sequence[Threshold], *, other_data: bool) -> Entry:
    """Modes to record: those that are new, or better or worse than recorded."""
    recorded = old.ops.get(op.op)
    if recorded is not None and recorded.type != op.type:
        recorded = None
    known = {} if recorded is None else recorded.modes
    gated = [threshold for threshold in thresholds if op.op != TOTAL or threshold.metric not in ("gain", "loss")]
    verdicts = {
        mode: judge(known.get(mode), scores, gated, mode, other_data=other_data) for mode, scores in op.modes.items()
    }
    return accepted(Entry.of(op), recorded, verdicts)
