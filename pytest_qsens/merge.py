"""The result files of all shards, put together into the one that a run without shards would have written."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from pytest_qsens import profile
from pytest_qsens.details import joined
from pytest_qsens.errors import QsensError
from pytest_qsens.ops import TOTAL
from pytest_qsens.result_files import load
from pytest_qsens.results import Cost, OpResult, RunInfo, RunResult
from pytest_qsens.same_run import SAME_RUN, difference, difference_of_ops, listed, machine_difference
from pytest_qsens.shards import ELSEWHERE
from pytest_qsens.wording import count

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from pytest_qsens.profile import Profile
    from pytest_qsens.shards import Shard

NOT_RUN = "not run"
"""Reason of an op that this very run should have measured, and did not come to."""


@dataclass(frozen=True)
class Part:
    """One shard's result file."""

    path: Path
    shard: Shard
    result: RunResult

    @property
    def entries(self) -> dict[str, OpResult]:
        """Every op and `TOTAL` with its result."""
        found = {result.op: result for result in self.result.ops}
        return found | ({} if self.result.total is None else {TOTAL: self.result.total})

    @property
    def reports(self) -> dict[str, OpResult]:
        """What this shard says of ops that are its own, or nobody's."""
        return {name: result for name, result in self.entries.items() if result.reason != ELSEWHERE}

    def __str__(self) -> str:
        return f"{self.path} (shard {self.shard})"


@dataclass(frozen=True)
class Merged:
    """The whole result, and what to tell about it."""

    result: RunResult
    notes: tuple[str, ...]


def merge(paths: Sequence[Path], *, mixed_environments: bool = False, partial: bool = False) -> Merged:
    """Put the results of all shards of one run together.

    Ops are in the model's order, each as its own shard reported it. What ops cost and where time went is added up;
    `pytest_qsens.results.Cost` says which seconds are whose.

    Args:
        paths: The shards' result files, in any order.
        mixed_environments: Whether shards may have been measured on different kinds of CPU or device.
        partial: Whether ops may be left without a result that their shard did not come to.

    Raises:
        QsensError: If a shard is missing, there twice or of another run, if two of them contradict each other, or if a
            shard is not complete; names files and values.

    """
    parts = sorted(map(_part, paths), key=lambda part: part.shard.index)
    if not parts:
        raise QsensError("no result files to merge. Give those of all shards")
    for other in parts[1:]:
        _check_same_run(parts[0], other)
    _check_shards(parts)
    _check_owners(parts)
    for other in parts[1:]:
        _check_same_place(parts[0], other, mixed=mixed_environments)
    merged = _merged(parts)
    if not partial:
        _check_complete(parts, merged)
    return Merged(merged, tuple(_notes(parts, merged)))


def _part(path: Path) -> Part:
    result = load(path)
    if result.run.shard is None:
        raise QsensError(
            f"{path} is no shard: it was written without --qsens-shard, or merged before. Give the files that "
            "`pytest --qsens-shard i/N --qsens-json FILE` wrote"
        )
    if not result.run.environment:
        raise QsensError(f"{path}, shard {result.run.shard}, has no environment: nothing was measured. Run it again")
    return Part(path, result.run.shard, result)


def _check_same_run(first: Part, other: Part) -> None:
    """Check that two files are of one run.

    Raises:
        QsensError: Naming the first difference.

    """
    one, two = first.shard.count, other.shard.count
    what = (
        f"number of shards {one} and {two}" if one != two else difference(first.result.run, other.result.run, SAME_RUN)
    )
    what = what or difference_of_ops(first.result.ops, other.result.ops)
    if what is not None:
        raise _foreign(first, other, what)


def _foreign(first: Part, other: Part, what: str) -> QsensError:
    return QsensError(
        f"{first} and {other} are not of one run: {what}. Measure all shards with the same command, versions and data, "
        "and merge only these"
    )


def _check_shards(parts: Sequence[Part]) -> None:
    """Check that each shard is there once.

    Raises:
        QsensError: Naming those that are missing, or the files of one that is there twice.

    """
    for one, other in pairwise(parts):
        if one.shard == other.shard:
            raise QsensError(f"{one.path} and {other.path} are both shard {one.shard}. Give one file for each shard")
    every = parts[0].shard.count
    missing = sorted(set(range(1, every + 1)) - {part.shard.index for part in parts})
    if missing:
        names = ", ".join(f"{index}/{every}" for index in missing)
        raise QsensError(
            f"{len(missing)} of {every} shards missing: {names}. Run `pytest ... --qsens-shard {missing[0]}/{every} "
            "--qsens-json FILE`, and merge all files"
        )


def _check_owners(parts: Sequence[Part]) -> None:
    """Check that each op is reported by one shard, or not selected by any.

    Raises:
        QsensError: Naming an op with two shards or with none.

    """
    for name in _names(parts):
        owners = [part for part in parts if name in part.reports]
        if not owners:
            raise QsensError(
                f"{name} is in no shard: each of the {len(parts)} files has it in another one. They divide different "
                "selections of ops. Measure all shards with the same command and tests"
            )
        found = {replace(part.entries[name], seconds=0.0) for part in owners if not part.entries[name].modes}
        unmeasured = len(owners) == len(parts) and len(found) == 1  # not selected, or nothing that can be quantized
        if len(owners) > 1 and not unmeasured:
            raise _reported_twice(name, owners)


def _reported_twice(name: str, owners: Sequence[Part]) -> QsensError:
    one, other = owners[:2]
    values = [_value(part.entries[name]) for part in (one, other)]
    what = f"contradict each other about {name}: {values[0]} and {values[1]}"
    if values[0] == values[1]:
        what = f"both report {name} ({values[0]})"
    return QsensError(
        f"{one} and {other} {what}. Each op is of one shard: measure all shards with the same command and tests"
    )


def _value(result: OpResult) -> str:
    scores = [f"{mode} nmse {values['nmse']!r}" for mode, values in result.modes.items() if "nmse" in values]
    return ", ".join([result.status, *scores])


def _check_same_place(first: Part, other: Part, *, mixed: bool) -> None:
    """Check that two shards were measured in equal environments, and there with equal unquantized outputs.

    Raises:
        QsensError: Naming what differs.

    """
    if mixed:
        return
    one, two = first.result.run, other.result.run
    differing = machine_difference(one.environment, two.environment)
    if differing is not None:
        raise QsensError(
            f"{first} and {other} were measured in different environments: {differing}. Numbers differ by "
            "about 1e-4 of themselves for that alone. Merge them all the same with --mixed-environments"
        )
    if one.reference != two.reference:
        raise QsensError(
            f"{first} and {other} contradict each other: the unquantized outputs differ (reference {one.reference} and "
            f"{two.reference}). Other weights or data, then measure again; or only other numbers of threads, then set "
            "OMP_NUM_THREADS to the same everywhere, or merge with --mixed-environments"
        )


def _names(parts: Sequence[Part]) -> Iterable[str]:
    return dict.fromkeys(name for part in parts for name in part.entries)


def _merged(parts: Sequence[Part]) -> RunResult:
    found = {name: result for part in reversed(parts) for name, result in part.reports.items()}
    ops = tuple(found[op.op] for op in parts[0].result.ops)
    runs = [part.result.run for part in parts]
    references = {digest for run in runs if run.reference for digest in run.reference.split("+")}
    info = replace(
        runs[0],
        environment=_environment(runs),
        cost=_cost(runs, [op for op in ops if op.status == "measured"]),
        engine_reason=next((run.engine_reason for run in runs if run.engine_reason), None),
        profile=_profile(runs),
        reference="+".join(sorted(references)) or None,
        shard=None,
        cached=sum(run.cached for run in runs),
    )
    total, joint = found.get(TOTAL), None
    if any(op.sketch for op in ops):
        from pytest_qsens.interactions import matrix, with_prediction

        total, joint = with_prediction(total, ops, str(parts[0].path)), matrix(ops, str(parts[0].path))
    return RunResult(info, ops, total, joint, joined(part.result.details for part in parts))


def _environment(runs: Sequence[RunInfo]) -> dict[str, str]:
    """Join what differs with ``+``: it is equal to no single environment, and says so wherever it is compared."""
    names = dict.fromkeys(name for run in runs for name in run.environment)
    return {name: " + ".join(sorted({run.environment.get(name, "not known") for run in runs})) for name in names}


def _cost(runs: Sequence[RunInfo], measured: Sequence[OpResult]) -> Cost:
    walls = [run.cost.wall_seconds for run in runs]
    reference = min((run.cost.reference_seconds for run in runs if run.cost.reference_seconds), default=None)
    mean = sum(op.seconds for op in measured) / len(measured) if measured else None
    return Cost(max(walls), reference, mean / reference if mean is not None and reference else None, sum(walls))


def _profile(runs: Sequence[RunInfo]) -> Profile | None:
    found = [run.profile for run in runs if run.profile is not None]
    return profile.total(found) if len(found) == len(runs) else None


def _not_run(merged: RunResult) -> list[str]:
    entries = (*merged.ops, *filter(None, (merged.total,)))
    return [result.op for result in entries if result.status == "unrun" and result.reason == NOT_RUN]


def _check_complete(parts: Sequence[Part], merged: RunResult) -> None:
    """Check that every shard came to all of its ops.

    Raises:
        QsensError: Naming a shard that did not, and ops.

    """
    if missing := _not_run(merged):
        owner = next(part for part in parts if missing[0] in part.reports)
        raise QsensError(
            f"{owner} is not complete: {count(len(missing), 'op')} of all shards not run, {listed(missing)}. Run it "
            "again to its end, or merge what there is with --partial"
        )


def _notes(parts: Sequence[Part], merged: RunResult) -> Iterator[str]:
    """Say what a reader of the merged file has to know."""
    counts = Counter(result.status for result in merged.ops)
    statuses = ", ".join(f"{number} {status}" for status, number in counts.items())
    yield f"{count(len(merged.ops), 'op')} of {count(len(parts), 'shard')}: {statuses}"
    if missing := _not_run(merged):
        yield f"not complete: {count(len(missing), 'op')} not run in their shards, {listed(missing)}"
    for result in (*merged.ops, *filter(None, (merged.total,))):
        if result.status == "failed":
            yield f"FAILED: {result.op}: {result.reason}"
    if "+" in (merged.run.reference or ""):
        yield "measured in different environments: scores differ by about 1e-4 of themselves for that alone"
