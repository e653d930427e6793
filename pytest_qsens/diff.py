"""What changed between two files with the scores of one model: results, snapshots, or revisions of a snapshot."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pytest_qsens import result_files, results, snapshot
from pytest_qsens.errors import QsensError
from pytest_qsens.files import parse_json, read_text
from pytest_qsens.ops import TOTAL, Op
from pytest_qsens.quant.schemes import noun
from pytest_qsens.snapshot import EVALUATION, environment_diff, on_other_data
from pytest_qsens.thresholds import applied, combine, judge
from pytest_qsens.wording import score_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pytest_qsens.results import Mode, OpResult, RunResult, Scores
    from pytest_qsens.snapshot import Snapshot
    from pytest_qsens.thresholds import Threshold

Kind = Literal["exceeded", "worse", "lost", "better", "appeared", "vanished", "unrun", "same"]
"""``exceeded``: past a limit, which only a run judges, whatever the old file says; ``lost``: an op of both files that
has numbers in the old one only; ``appeared``: has them in the new one only; ``unrun``: the new file is of a run that
did not come to it, which takes no score away."""

KINDS: tuple[Kind, ...] = ("exceeded", "worse", "lost", "better", "appeared", "vanished", "unrun", "same")
"""In the order in which they matter."""


@dataclass(frozen=True)
class Scored:
    """What one file says of one op.

    Attributes:
        type: Of the op.
        block: The op's block.
        scores: Mode → exact scores.
        why_not: Why there are none, if that is known.
        scheme: Name of its scheme, where a config says it.
        unrun: Whether the run did not come to it.

    """

    type: str
    block: str
    scores: Mapping[Mode, Scores]
    why_not: str | None = None
    scheme: str | None = None
    unrun: bool = False


@dataclass(frozen=True)
class Side:
    """One of the two files: what it is called, what it is of, and its ops, `TOTAL` for the whole model among them."""

    name: str
    model: str
    scheme: str
    granularity: str
    environment: Mapping[str, str]
    ops: Mapping[str, Scored]


@dataclass(frozen=True)
class Change:
    """What became of one op. ``lines`` say by how much, one for each metric; ``ratio`` is the new NMSE by the old."""

    op: str
    block: str
    kind: Kind
    lines: tuple[str, ...] = ()
    ratio: float | None = None


@dataclass(frozen=True)
class Diff:
    """What changed, op by op in the order of the new file.

    Attributes:
        old: The old file.
        new: The new file.
        modes: That were compared: both files have them.
        changes: One for each op of both files, or with a score in either.
        notes: What moves numbers beside the ops themselves.

    """

    old: Side
    new: Side
    modes: tuple[Mode, ...]
    changes: tuple[Change, ...]
    notes: tuple[str, ...] = field(default=())

    def count(self, kind: Kind) -> int:
        """How many ops are of this kind; the whole model is none."""
        return sum(change.kind == kind and change.op != TOTAL for change in self.changes)

    def blocks(self) -> dict[str, list[Change]]:
        """Group the changes by block, blocks in natural order and the whole model last; the worst ops first."""
        found: dict[str, list[Change]] = {}
        for change in sorted(self.changes, key=lambda change: (change.op == TOTAL, _natural(change.block))):
            found.setdefault(TOTAL if change.op == TOTAL else change.block, []).append(change)
        return {block: sorted(ops, key=_worst_first) for block, ops in found.items()}


def diff(old: Side, new: Side, thresholds: Sequence[Threshold]) -> Diff:
    """Compare two files as a gate compares a run with its snapshot: by the same thresholds, as much widened by noise.

    Raises:
        QsensError: If they are of different models, measure other groups of ops, have no mode in common, or a metric
            is in neither.

    """
    for kind in ("model", "granularity"):
        before, now = getattr(old, kind), getattr(new, kind)
        if before != now:
            raise QsensError(
                f"{old.name} is of {kind} {before!r}, {new.name} of {now!r}: their ops are not the same. "
                "qsens compare compares the order of ops of any two files."
            )
    modes = tuple(mode for mode in results.MODES if _has(old, mode) and _has(new, mode))
    if not modes:
        raise QsensError(
            f"{old.name} has {_modes(old)} scores, {new.name} {_modes(new)}. Measure both with one --qsens-mode."
        )
    for threshold in thresholds:
        if not any(_has_metric(side, threshold, modes) for side in (old, new)):
            raise QsensError(f"{threshold.metric} is in neither file. Compare by another metric, such as nmse:5%.")
    other_data = on_other_data(old.environment, new.environment.get(EVALUATION))
    # a result lists ops that never have a score, such as products of attention, and a snapshot does not
    names = [name for name in dict.fromkeys((*new.ops, *old.ops)) if _is_told(old.ops.get(name), new.ops.get(name))]
    notes = [*_notes(old, new, modes), *_left_out(old, new, modes, thresholds)]
    changes = [_change(name, old.ops.get(name), new.ops.get(name), modes, thresholds, other_data) for name in names]
    return Diff(old, new, modes, tuple(changes), tuple(notes))


def _is_told(old: Scored | None, new: Scored | None) -> bool:
    return (old is not None and new is not None) or any(side is not None and side.scores for side in (old, new))


def _has_metric(side: Side, threshold: Threshold, modes: Sequence[Mode]) -> bool:
    return any(
        gate.metric in op.scores[mode]
        for op in side.ops.values()
        for mode in modes
        if mode in op.scores
        for gate in applied([threshold], mode)
    )


def _left_out(old: Side, new: Side, modes: Sequence[Mode], thresholds: Sequence[Threshold]) -> Iterator[str]:
    for threshold in thresholds:
        having = [side.name for side in (old, new) if _has_metric(side, threshold, modes)]
        if len(having) == 1:
            yield f"{threshold.metric} is in {having[0]} only, and not compared"


def _has(side: Side, mode: Mode) -> bool:
    return any(mode in op.scores for op in side.ops.values())


def _modes(side: Side) -> str:
    return " and ".join(mode for mode in results.MODES if _has(side, mode)) or "no"


def _notes(old: Side, new: Side, modes: Sequence[Mode]) -> Iterator[str]:
    if old.scheme != new.scheme:
        nouns = noun(old.scheme), noun(new.scheme)
        yield f"{nouns[0]} {old.scheme} → {f'{nouns[1]} ' if nouns[0] != nouns[1] else ''}{new.scheme}"
    yield from environment_diff(old.environment, new.environment)
    for side in (old, new):
        left_out = [mode for mode in results.MODES if _has(side, mode) and mode not in modes]
        yield from (f"{mode} scores are in {side.name} only, and not compared" for mode in left_out)


def _change(
    name: str,
    old: Scored | None,
    new: Scored | None,
    modes: Sequence[Mode],
    thresholds: Sequence[Threshold],
    other_data: bool,
) -> Change:
    before, now = (_scores(side, modes) for side in (old, new))
    if old is None or new is None or not before or not now:
        return _one_sided(name, old, new, before, now, thresholds)
    if old.type != new.type:
        return Change(name, new.block, "lost", (f"type {old.type} → {new.type}: another op by the same name",))
    found = _compared(name, new.block, before, now, thresholds, other_data)
    if None in (old.scheme, new.scheme) or old.scheme == new.scheme:
        return found
    return replace(found, lines=(f"scheme {old.scheme} → {new.scheme}", *found.lines))


def _one_sided(
    name: str,
    old: Scored | None,
    new: Scored | None,
    before: Mapping[Mode, Scores],
    now: Mapping[Mode, Scores],
    thresholds: Sequence[Threshold],
) -> Change:
    """Tell of an op whose scores are in one file at most."""
    known = new or old
    assert known is not None  # noqa: S101 - the name is from one of them
    lines = [*_values(before, thresholds), *_values(now, thresholds)]
    kind: Kind = "same"
    if old is None or (now and not before):
        kind = "appeared"
    elif new is None:
        kind = "vanished"
    elif before:
        kind = "unrun" if new.unrun else "lost"
        lines += [] if new.unrun else [f"now: {new.why_not or 'no score'}"]
    return Change(name, known.block, kind, tuple(lines))


def _compared(
    name: str,
    block: str,
    before: Mapping[Mode, Scores],
    now: Mapping[Mode, Scores],
    thresholds: Sequence[Threshold],
    other_data: bool,
) -> Change:
    verdicts = []
    for mode in [mode for mode in before if mode in now]:
        gates = applied(thresholds, mode)
        both = before[mode].keys() & now[mode].keys()
        known = [threshold for threshold in gates if threshold.metric in both]
        verdicts.append(judge(before[mode], now[mode], known, mode, other_data=other_data))
    verdict = combine(verdicts)
    kind: Kind = "worse" if verdict.kind == "regressed" else "better" if verdict.kind == "improved" else "same"
    if missing := [mode for mode in before if mode not in now]:
        return Change(name, block, "lost", (*verdict.lines, f"no {' and '.join(missing)} score any more"))
    mode = next(iter(now))
    old, new = (scores.get(mode, {}).get("nmse") for scores in (before, now))
    lines = verdict.lines or verdict.within_noise or tuple(_values(now, thresholds))
    return Change(name, block, kind, lines, new / old if old and new else None)


def _scores(scored: Scored | None, modes: Sequence[Mode]) -> dict[Mode, Scores]:
    return {} if scored is None else {mode: scored.scores[mode] for mode in modes if mode in scored.scores}


def _values(scores: Mapping[Mode, Scores], thresholds: Sequence[Threshold]) -> Iterator[str]:
    for mode, found in scores.items():
        for name in dict.fromkeys(threshold.metric for threshold in applied(thresholds, mode)):
            if name in found:
                yield f"{mode} {name} {score_text(found[name], 6)}"


def _worst_first(change: Change) -> tuple[int, float]:
    ratio = 1.0 if change.ratio is None else change.ratio
    return KINDS.index(change.kind), ratio if change.kind == "better" else -ratio


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def read_pair(old: str, new: str) -> tuple[Side, Side]:
    """Read two files.

    Args:
        old: A result file, a snapshot file, or ``REVISION:PATH`` of one in git; or a revision alone, of ``new``.
        new: As ``old``, but for a revision alone.

    Raises:
        QsensError: If one cannot be read.

    """
    if not Path(old).exists() and ":" not in old and Path(new).is_file():
        return _read_revision(old, f"./{Path(new).name}", Path(new).parent), read(new)
    there = read(new)  # of two that cannot be read, a lone revision is the one that may be right
    return read(old), there


def read(name: str) -> Side:
    """Read a result file, a snapshot file, or ``REVISION:PATH`` of one in git.

    Raises:
        QsensError: If there is none, or it is neither.

    """
    if ":" in name and not Path(name).exists():
        revision, _, path = name.partition(":")
        return _read_revision(revision, path, Path())
    if Path(name).is_dir():
        inside = next(Path(name).rglob("*.json"), None)
        such = f", such as {inside}" if inside is not None else ""
        raise QsensError(f"{name} is a directory. Give one of its files{such}.")
    text = read_text(Path(name))
    if text is None:
        raise QsensError(f"there is no file {name}. Give a result file, a snapshot file, or REVISION:PATH of one.")
    return _parsed(text, name)


def _read_revision(revision: str, path: str, directory: Path) -> Side:
    name = f"{revision}:{path}"
    if revision.startswith("-"):
        raise QsensError(f"{revision!r} is no revision. Give one such as HEAD~1 or main.")
    try:
        # the name is one argument, and git takes none that begins with a revision for an option
        command = ["git", "-C", str(directory), "cat-file", "blob", name]
        found = subprocess.run(command, capture_output=True, check=False)  # noqa: S603 - as above
    except OSError as error:
        raise QsensError(f"{name} cannot be read, as git cannot be started: {error.strerror}.") from error
    if found.returncode:
        raise QsensError(f"git has no {name}: {found.stderr.decode(errors='replace').strip()}")
    try:
        return _parsed(found.stdout.decode(), name)
    except UnicodeDecodeError as error:
        raise QsensError(f"{name} is not UTF-8 text: it is no result and no snapshot.") from error


def _parsed(text: str, name: str) -> Side:
    path = Path(name)
    document = parse_json(text, path)
    keys = document.keys() if isinstance(document, dict) else ()
    if "run" in keys:
        return of_result(result_files.from_document(document, path), name)
    if {"model", "scheme", "ops"} <= set(keys):
        return of_snapshot(snapshot.from_document(document, path), name)
    raise QsensError(
        f"{name} is neither a result file ('run', 'ops'; pytest --qsens-json FILE) nor a snapshot ('model', 'scheme', "
        "'ops'; pytest --snapshot-update)."
    )


def of_result(found: RunResult, name: str) -> Side:
    """Take what a result file says."""
    run = found.run
    listed = [*found.ops, *([found.total] if found.total is not None else [])]
    return Side(
        name,
        run.model,
        run.scheme,
        run.granularity,
        run.environment,
        {op.op: _scored(op) for op in listed},
    )


def _scored(op: OpResult) -> Scored:
    return Scored(op.type, op.block, _exact(op), _why_not(op), op.scheme, op.status == "unrun")


def _exact(op: OpResult) -> dict[Mode, Scores]:
    return {mode: scores for mode, scores in op.modes.items() if mode not in op.intervals}


def _why_not(op: OpResult) -> str | None:
    return None if _exact(op) else f"{op.status}{f': {op.reason}' if op.reason else ''}"


def of_snapshot(found: Snapshot, name: str) -> Side:
    """Take what a snapshot file says."""
    ops = {
        op: Scored(entry.type, Op(op, entry.type).block, entry.modes, scheme=entry.scheme)
        for op, entry in found.ops.items()
    }
    return Side(name, found.model, found.scheme, found.granularity, found.environment, ops)
