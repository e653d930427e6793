"""What nobody should miss of a run, in the terminal and for CI: what got worse, is lost, estimated or uncertain."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import TYPE_CHECKING

from pytest_qsens.ops import TOTAL
from pytest_qsens.report.counts import noun
from pytest_qsens.report.findings import findings
from pytest_qsens.results import CANNOT, LEFT_OUT
from pytest_qsens.wording import first_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pytest_qsens.results import OpResult
    from pytest_qsens.session.run import Run

LISTED = 5
"""Ops named in one line."""

_INDEX = re.compile(r"\.\d+")


def attention(run: Run, *, gated: bool = False) -> Iterator[str]:
    """Lines that must not be missed, with ``-q`` either.

    Args:
        run: The results.
        gated: Whether estimates gate as well.

    """
    yield from _worse(run)
    yield from _lost(run)
    for result in run.results.values():
        if result.status == "failed":
            yield f"FAILED: {result.op}: {result.reason}"
    yield from notes(run, gated=gated)


def _worse(run: Run) -> Iterator[str]:
    """Name the ops that got worse, and by how much: pytest's own list of failures is cut at the end of a line."""
    worse = [finding for finding in findings(run) if finding.kind in ("exceeded", "regressed")]
    if worse:
        yield f"WORSE: {len(worse)} of {len(run.verdicts)} scores are past their thresholds or limits"
    for finding in worse[:LISTED]:
        yield from (f"  {finding.op}: {line}" for line in finding.lines)
    if len(worse) > LISTED:
        yield f"  and {len(worse) - LISTED} more"


def _lost(run: Run) -> Iterator[str]:
    """Name the ops that have a score in the snapshot, and none now."""
    lost = [finding for finding in findings(run) if finding.kind == "lost"]
    if lost:
        has, remain = ("has", "its line") if len(lost) == 1 else ("have", "their lines")
        one = noun(run)[: None if len(lost) != 1 else -1]
        yield f"LOST: {len(lost)} {one} of the snapshot {has} no score any more"
        yield from (f"  {finding.op}: {'; '.join(finding.lines)}" for finding in lost[:LISTED])
        yield from [f"  and {len(lost) - LISTED} more"] if len(lost) > LISTED else []
        yield f"  if that is meant, remove {remain} with --snapshot-update --qsens-snapshot-prune"


def notes(run: Run, *, gated: bool = False) -> Iterator[str]:
    """Lines about a run as a whole, that must not be missed.

    Args:
        run: The results.
        gated: Whether estimates gate as well.

    """
    yield from _about_config(run)
    lost = {finding.op for finding in findings(run) if finding.kind == "lost"}
    unexercised = [r for r in run.results.values() if r.status == "unexercised" and r.op not in lost]
    if unexercised:
        yield (
            f"NOT EXERCISED: {len(unexercised)} of {len(run.ops)} {noun(run)} have no score, nothing is known about "
            "them: "
            f"{_grouped(unexercised)}"
        )
        for reason in sorted({result.reason or "" for result in unexercised}):
            yield f"  {reason}: give data that do (--qsens-calib, --qsens-eval)"
    yield from _within_noise(run)
    yield from _estimates(run, gated=gated)
    if run.engine_reason:
        yield f"slower engine {'+'.join(run.engines)}: {run.engine_reason}"
    if run.mismatch:
        where = "elsewhere" if any(not line.startswith("kernels ") for line in run.mismatch) else "with other kernels"
        yield f"the snapshot was measured {where}, scores may differ for that alone: {'; '.join(run.mismatch)}"
    if len(run.environments) > 1:
        yield "workers run in different environments, scores may differ for that alone"
    if len({facts["reference"] for facts in run.facts}) > 1:
        yield "the unquantized outputs differ between machines: if by more than rounding, seed what is random"
    if run.gone:
        lines = "line" if len(run.gone) == 1 else "lines"
        yield (
            f"{len(run.gone)} {lines} in {run.path} of no op of this model: {', '.join(run.gone[:LISTED])}"
            f"{', ...' * (len(run.gone) > LISTED)}; remove with --snapshot-update --qsens-snapshot-prune"
        )


def _about_config(run: Run) -> Iterator[str]:
    """Say what is wrong with the config, what of it is not measured, and what in it is not as the snapshot says."""
    if run.config is None:
        return
    problems = run.config["problems"]
    if problems:
        yield f"CONFIG: {_things(len(problems))} wrong with {run.config['about']['path']}:"
        yield from (f"  {problem}" for problem in problems)
    left_out, ops = run.config["unsimulated"], sum(len(unit.ops) for unit in run.ops)
    if left_out:
        yield (
            f"NOT SIMULATED: the config quantizes {len(left_out)} of {ops} ops in a way that has no score; the "
            f"total is without them: {first_of(left_out, LISTED)}"
        )
    moved = [f"{op} ({old} → {new})" for op, (old, new) in run.moved.items() if op != TOTAL]
    if moved:
        prune = " --qsens-snapshot-prune" if run.unquantized.intersection(run.moved) else ""
        yield (
            f"the snapshot was measured with another scheme of {len(moved)} {noun(run)}: {first_of(moved, LISTED)}; "
            f"record with --snapshot-update{prune}"
        )


def _things(count: int) -> str:
    return "1 thing is" if count == 1 else f"{count} things are"


def _within_noise(run: Run) -> Iterator[str]:
    """Name ops that differ by more than was asked for, and pass."""
    found = {op: verdict.within_noise for op, verdict in run.verdicts.items() if verdict.within_noise}
    if found:
        yield (
            f"NOT DISTINGUISHABLE: {len(found)} of {len(run.verdicts)} scores are past their thresholds, but no "
            "further from the snapshot than noise reaches: they count as equal"
        )
    for op, lines in list(found.items())[:LISTED]:
        yield from (f"  {op}: {line}" for line in lines)
    if len(found) > LISTED:
        yield f"  and {len(found) - LISTED} more"


def _estimates(run: Run, *, gated: bool) -> Iterator[str]:
    """Say which ops are estimated, and which could not be."""
    if run.estimated:
        gates = "They fail only where all of their interval is past the threshold" if gated else "They gate nothing"
        yield (
            f"ESTIMATES: {len(run.estimated)} of {len(run.ops)} ops are estimated, not measured. {gates}, "
            "and nothing is recorded. Intervals are to hold the exact nmse of 9 in 10 ops"
        )
    left_out = [result for result in run.results.values() if (result.reason or "").startswith(LEFT_OUT)]
    for reason in sorted({result.reason or "" for result in left_out}):
        names = [result.op for result in sorted(left_out, key=_most) if result.reason == reason]
        yield f"{reason}: {first_of(names, LISTED)}"
    refused = [result for result in run.measured if (result.reason or "").startswith(CANNOT)]
    for reason in sorted({result.reason or "" for result in refused}):
        names = [result.op for result in refused if result.reason == reason]
        yield f"{first_of(names, LISTED)}: {reason}"


def _most(result: OpResult) -> float:
    """Key by which what may be most sensitive comes first."""
    return -max((high for _, high in result.intervals.values()), default=math.inf)


def _grouped(results: Iterable[OpResult]) -> str:
    """Count ops by block, with the layer number left out: ``visual.blocks.* (12)``."""
    blocks = Counter(_INDEX.sub(".*", result.block) or result.op for result in results)
    return ", ".join(f"{block} ({count})" for block, count in blocks.items())
