"""What of a run goes into its snapshot, once all of it is judged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.given_options import accepts_all, base_options, updating
from pytest_qsens.ops import TOTAL

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from pytest_qsens.options import Options
    from pytest_qsens.session.problems import Problems
    from pytest_qsens.session.run import Run
    from pytest_qsens.snapshot import Snapshot


def remember(run: Run, options: Options) -> None:
    """Keep the snapshot as it is, for a report to compare with."""
    if options.report is not None:
        from pytest_qsens.snapshot import load

        run.recorded = load(run.path, model=run.model, scheme=run.scheme, granularity=run.granularity)


def write_snapshot(run: Run, config: pytest.Config, problems: Problems, written: dict[Path, str]) -> None:
    """Write what is accepted into the snapshot, and note how that differs from this run.

    Args:
        run: All of it, judged.
        config: Says whether and what is accepted.
        problems: Takes why lines of ops are kept that were to be removed.
        written: Takes the file, and how much in it is new, in words.

    """
    from pytest_qsens.snapshot import changed, environment_diff, load, merge, prune, with_other_schemes, write

    kept = _kept(run, config, problems)
    news = ""

    def update(old: Snapshot) -> Snapshot:
        nonlocal news
        # An order that is accepted is that of all scores, of those within their thresholds, too.
        reordered = any(verdict.state == "accepted" for verdict in run.ranks)
        moved = with_other_schemes(old, run.compared) if accepts_all(config) else {}
        new = merge(old, run.compared if reordered else {**moved, **run.entries})
        if kept is not None:
            new = prune(new, kept)
        if environment_diff(old.environment, run.environment):
            new = _moved(new, run, config)
        # syrupy's count misses the lines of a worker that died, and those that only move with the environment.
        count = len(changed(old, new))
        removed = len(old.ops.keys() - new.ops.keys())
        news = f" ({count} line{'s' * (count != 1)} new or changed{f', {removed} removed' * bool(removed)})"
        return new

    changing = updating(config) and (run.compared or kept is not None)
    kind = {"model": run.model, "scheme": run.scheme, "granularity": run.granularity}
    if changing and write(run.path, update, **kind):
        written[run.path] = news
    now = load(run.path, **kind)
    if now.ops and run.facts:
        run.mismatch = environment_diff(now.environment, run.environment)
    run.gone = sorted(set(now.ops) - {TOTAL} - {op.name for op in run.ops}) if run.ops else []
    run.moved = {
        name: (entry.scheme or "not recorded", run.schemes[name])
        for name, entry in now.ops.items()
        if name in run.schemes
        and run.schemes[name] != entry.scheme
        # what it would cost to add it may have been measured by another run
        and not (name in run.unquantized and (entry.scheme or "").startswith("unquantized"))
    }


def _moved(snapshot: Snapshot, run: Run, config: pytest.Config) -> Snapshot:
    """Replace the environment, and all lines with it, if this run may and has measured all of them in one place."""
    from pytest_qsens.snapshot import adopt, changed

    if snapshot.environment and len(run.environments) != 1:
        return snapshot
    moved = adopt(snapshot, run.compared, run.environment)
    return snapshot if not accepts_all(config) and changed(snapshot, moved) else moved


def _kept(run: Run, config: pytest.Config, problems: Problems) -> set[str] | None:
    """Ops to keep when pruning; ``None`` if nothing may be removed."""
    run.pruned = base_options(config).snapshot_prune
    if not run.pruned:
        return None
    wanted = [op.name for op in run.ops if op.name not in run.unquantized]
    missing = [name for name in wanted if name not in run.results or run.results[name].status == "failed"]
    if missing:
        problems.add(
            f"{run.path} was not pruned: {len(missing)} ops were not measured in this run, such as {missing[0]}"
        )
        return None
    return {result.op for result in run.measured}
