"""Gates on the order of the ops: whether those that were most sensitive still are. Knows nothing of torch.

Ops are ranked by how much quantizing them hurts, 1 being the most sensitive, in the snapshot and now, at the precision
of the snapshot. Ranks are of all ops together: a gate holds or fails once for a run, and of a run that has not measured
every op of the snapshot nothing can be said.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from pytest_qsens.compare import FEWEST, kendall_tau_b
from pytest_qsens.errors import QsensError
from pytest_qsens.results import round_score
from pytest_qsens.run_verdicts import RunVerdict
from pytest_qsens.wording import first_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from pytest_qsens.ops import Op
    from pytest_qsens.results import Mode, OpResult
    from pytest_qsens.snapshot import Entry

RANKED_BY: Mapping[Mode, str] = MappingProxyType({"isolated": "nmse", "fallback": "gain", "added": "loss"})
"""Mode → the metric that ops are ranked by: the larger, the more sensitive."""

_NAMED = 5
"""Ops named in one line."""

_TOP = re.compile(r"top([1-9][0-9]{0,8})", re.ASCII)
_KENDALL = "kendall"


@dataclass(frozen=True)
class Ranking:
    """Ops with an exact score in the snapshot and now.

    Attributes:
        old: Op → rank in the snapshot. Equal scores share none: the one that is larger now comes first.
        new: Op → rank now. Of equal scores those come first that did in the snapshot.
        scores: Op → recorded score and score now.

    """

    old: Mapping[str, int]
    new: Mapping[str, int]
    scores: Mapping[str, tuple[float, float]]

    @classmethod
    def of(cls, scores: Mapping[str, tuple[float, float]]) -> Ranking:
        """Rank ops by their recorded score and their score now. Ties are broken in favour of what was."""
        rounded = {op: (round_score(old), round_score(new)) for op, (old, new) in scores.items()}
        before = sorted(rounded, key=lambda op: (-rounded[op][0], -rounded[op][1], op))
        old = {op: place for place, op in enumerate(before, 1)}
        now = sorted(rounded, key=lambda op: (-rounded[op][1], old[op]))
        return cls(old, {op: place for place, op in enumerate(now, 1)}, rounded)

    def moves(self, ops: Iterable[str]) -> str:
        """Name ops with their rank in the snapshot and now."""
        return first_of([f"{op} ({self.old[op]} → {self.new[op]})" for op in ops], _NAMED)


@dataclass(frozen=True)
class Top:
    """At least so many of the most sensitive ops of the snapshot are still among as many most sensitive ones."""

    places: int
    least: int

    def __str__(self) -> str:
        """Give the text that `parse_rank` reads as this gate."""
        return f"top{self.places}:{self.least}"

    @property
    def needed(self) -> int:
        """How many ops have to be compared: of fewer, all are always among the first."""
        return self.places + 1

    def judge(self, ranking: Ranking) -> tuple[bool, str]:
        """Tell whether it holds, and what was found."""
        before = {op for op, place in ranking.old.items() if place <= self.places}
        now = {op for op, place in ranking.new.items() if place <= self.places}
        kept = len(before & now)
        text = f"{kept} of the {self.places} most sensitive ops of the snapshot still are"
        if kept < self.places:
            left = sorted(before - now, key=ranking.old.__getitem__)
            entered = sorted(now - before, key=ranking.new.__getitem__)
            text += f"; left: {ranking.moves(left)}; entered: {ranking.moves(entered)}"
        return kept >= self.least, text


@dataclass(frozen=True)
class Kendall:
    """Kendall's rank correlation (tau-b) of the scores in the snapshot and now is at least so much."""

    least: float

    def __str__(self) -> str:
        """Give the text that `parse_rank` reads as this gate."""
        return f"{_KENDALL}:{self.least!r}"

    @property
    def needed(self) -> int:
        """How many ops have to be compared."""
        return FEWEST

    def judge(self, ranking: Ranking) -> tuple[bool, str]:
        """Tell whether it holds, and what was found."""
        pairs = list(ranking.scores.values())
        found = kendall_tau_b([old for old, _ in pairs], [new for _, new in pairs])
        if found is None:
            return False, "Kendall's tau-b does not exist: all scores of one side are equal"
        moved = [op for op in ranking.old if ranking.old[op] != ranking.new[op]]
        furthest = sorted(moved, key=lambda op: (-abs(ranking.old[op] - ranking.new[op]), ranking.old[op]))
        text = f"Kendall's tau-b with the snapshot is {found:.4g}"
        return found >= self.least, f"{text}; moved: {ranking.moves(furthest)}" if moved else text


RankGate = Top | Kendall


def is_rank(name: str) -> bool:
    """Whether the part of a rule before the colon names a gate of ranks; ``top1`` is a metric, top-1 agreement."""
    return name == _KENDALL or (name != "top1" and re.fullmatch(r"top[0-9]*", name, re.ASCII) is not None)


def parse_rank(name: str, amount: str, where: str) -> RankGate:
    """Read ``top10`` and ``9``, or ``kendall`` and ``0.95``.

    Raises:
        QsensError: If the number cannot be, or would let everything pass.

    """
    if name == _KENDALL:
        if re.fullmatch(r"[0-9]+\.?[0-9]*|\.[0-9]+", amount, re.ASCII) is None or float(amount) > 1:
            raise QsensError(
                f"{where}: {amount!r} is not the least Kendall's tau-b that passes. Write {_KENDALL}:0.95, a number "
                "from 0 (no relation) to 1 (the same order)."
            )
        return Kendall(float(amount))
    match = _TOP.fullmatch(name)
    places = int(match[1]) if match else 0
    least = int(amount) if re.fullmatch(r"[0-9]{1,9}", amount, re.ASCII) else 0
    if not 1 <= least <= places:
        raise QsensError(
            f"{where}: '{name}:{amount}' is no gate. Write top10:9, at least 9 of the snapshot's 10 most sensitive ops "
            "are still among the 10 most sensitive: whole numbers from 2 and from 1, the second not larger."
        )
    return Top(places, least)


def recorded_scores(ops: Iterable[Op], entries: Mapping[str, Entry], mode: Mode) -> dict[str, float]:
    """Find what a mode ranks ops by in the snapshot; lines of no op of the model, or of another type, are left out."""
    found = {}
    for op in ops:
        entry = entries.get(op.name)
        value = None if entry is None or entry.type != op.type else entry.modes.get(mode, {}).get(RANKED_BY[mode])
        if value is not None:
            found[op.name] = value
    return found


def judge_ranks(
    gates: Sequence[RankGate],
    ops: Collection[Op],
    entries: Mapping[str, Entry],
    results: Iterable[OpResult],
    modes: Iterable[Mode],
) -> list[RunVerdict]:
    """Compare the order of the ops with the snapshot's.

    Args:
        gates: What is to hold, in each of the modes.
        ops: All ops of the model.
        entries: Lines of the snapshot.
        results: What is known of ops now. Only exact scores count: ``measured``, not estimates.
        modes: Those that were measured.

    """
    measured = [result for result in results if result.status == "measured"]
    return [verdict for mode in modes for verdict in _judged(gates, ops, entries, measured, mode)]


def _judged(
    gates: Sequence[RankGate],
    ops: Collection[Op],
    entries: Mapping[str, Entry],
    measured: Sequence[OpResult],
    mode: Mode,
) -> Iterator[RunVerdict]:
    recorded = recorded_scores(ops, entries, mode)
    metric = RANKED_BY[mode]
    by = f"{mode} {metric}"
    now = {result.op: value for result in measured if (value := result.modes.get(mode, {}).get(metric)) is not None}
    missing = [op for op in recorded if op not in now]
    ranking = Ranking.of({op: (old, now[op]) for op, old in recorded.items() if op in now})
    for gate in gates:
        if missing:
            names = first_of(missing, _NAMED)
            why = f"{len(missing)} of the {len(recorded)} ops in the snapshot were not measured ({names})"
            yield RunVerdict(gate, "not judged", why, by)
        elif len(recorded) < gate.needed:
            why = f"the snapshot has {len(recorded)} of the model's ops, and {gate.needed} are needed at least"
            yield RunVerdict(gate, "not judged", why, by)
        else:
            holds, text = gate.judge(ranking)
            yield RunVerdict(gate, "held" if holds else "failed", f"{text} (of {len(recorded)} ops)", by)
