"""Whether two sensitivity files agree: rank correlation, the most sensitive ops, the largest disagreements."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qsens.errors import QsensError
from pytest_qsens.op_names import match
from pytest_qsens.results import round_score
from pytest_qsens.wording import count

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from pytest_qsens.op_names import Matching
    from pytest_qsens.sensitivity_files import Sensitivities

FEWEST = 3
"""Two ops are either in the same order or not: a correlation says nothing."""

SUSPICIOUS = 3
"""Ops with one value from which on chance is no explanation: two of a few hundred float32 sums do meet by chance."""

ABSENT = "not in the file"
NEVER_MEASURED = "probably never measured"
_NAMES_SHOWN = 3


@dataclass(frozen=True)
class Shared:
    """Ops of one file, by their names in it, with one and the same value; ``suspect``: they are not ranked."""

    value: float
    ops: tuple[str, ...]
    suspect: bool


@dataclass(frozen=True)
class Missing:
    """An op that is not ranked in one file, and why; ``other`` is its value in the other file, if it has one."""

    op: str
    why: str
    other: float | None


@dataclass(frozen=True)
class Side:
    """One of the two files. ``missing`` lists what the other file finds most sensitive first."""

    source: Sensitivities
    shared: tuple[Shared, ...]
    missing: tuple[Missing, ...]


@dataclass(frozen=True)
class Ranked:
    """An op with a rank on both sides. Rank 1 is the most sensitive; equal values share their mean rank."""

    op: str
    rank_a: float
    rank_b: float
    value_a: float
    value_b: float

    @property
    def difference(self) -> float:
        """How many ranks the two sides are apart."""
        return abs(self.rank_a - self.rank_b)


@dataclass(frozen=True)
class Correlation:
    """Rank correlations over ``ops`` ops; ``None`` if all values of one side are equal."""

    ops: int
    spearman: float | None
    kendall_tau_b: float | None


@dataclass(frozen=True)
class Comparison:
    """What two files have in common and where they differ.

    ``common`` counts ops that are in both files, ``ops`` are those with a rank in both, in order of the mean of their
    ranks. ``with_suspects`` is the correlation with ops of suspect values ranked like any other, if there are any.
    ``top_a`` and ``top_b`` are the most sensitive of ``ops`` on each side, ``disagreements`` all that differ, the
    largest difference first.
    """

    a: Side
    b: Side
    matching: Matching
    common: int
    correlation: Correlation
    with_suspects: Correlation | None
    ops: tuple[Ranked, ...]
    top_a: tuple[Ranked, ...]
    top_b: tuple[Ranked, ...]
    disagreements: tuple[Ranked, ...]

    @property
    def top_both(self) -> tuple[Ranked, ...]:
        """Ops that are among the most sensitive on both sides."""
        return tuple(op for op in self.top_a if op in self.top_b)

    @property
    def expected_by_chance(self) -> float:
        """Mean length of ``top_both`` if one side were shuffled: k² / n."""
        return len(self.top_a) ** 2 / len(self.ops)


def compare(a: Sensitivities, b: Sensitivities, top: int = 10) -> Comparison:
    """Compare two files, each in its own direction of sensitivity.

    Raises:
        QsensError: If fewer than 3 ops have a value that can be ranked in both.

    """
    matching = match(a.ops, b.ops)
    if not matching.pairs:
        raise QsensError(_nothing_common(a, b, matching))
    shared_a, shared_b = _shared(a), _shared(b)
    usable_a, usable_b = _usable(a, shared_a), _usable(b, shared_b)
    pairs = [pair for pair in matching.pairs if pair[0] in usable_a and pair[1] in usable_b]
    if len(pairs) < FEWEST:
        raise QsensError(
            f"{count(len(pairs), 'op')} of {len(matching.pairs)} in both files can be ranked in both, and {FEWEST} "
            f"are needed. {_shortage(a, shared_a)}; {_shortage(b, shared_b)}. Measure more ops."
        )
    ops = _ranked(pairs, a, b)
    by_a = sorted(ops, key=lambda op: (op.rank_a, op.op))
    by_b = sorted(ops, key=lambda op: (op.rank_b, op.op))
    places = _places([op.rank_a for op in by_a], [op.rank_b for op in by_b], top)
    every = [pair for pair in matching.pairs if pair[0] in a.values and pair[1] in b.values]
    to_b, to_a = dict(matching.pairs), {right: left for left, right in matching.pairs}
    return Comparison(
        a=Side(a, shared_a, _missing(a, shared_a, b, usable_b, to_b)),
        b=Side(b, shared_b, _missing(b, shared_b, a, usable_a, to_a)),
        matching=matching,
        common=len(matching.pairs),
        correlation=_correlation(ops),
        with_suspects=_correlation(_ranked(every, a, b)) if len(every) > len(pairs) else None,
        ops=tuple(sorted(ops, key=lambda op: (op.rank_a + op.rank_b, op.op))),
        top_a=tuple(by_a[:places]),
        top_b=tuple(by_b[:places]),
        disagreements=tuple(
            sorted(
                (op for op in ops if op.difference), key=lambda op: (-op.difference, min(op.rank_a, op.rank_b), op.op)
            )
        ),
    )


def _shared(source: Sensitivities) -> tuple[Shared, ...]:
    by_value: dict[float, list[str]] = defaultdict(list)
    for op, value in source.values.items():
        by_value[value].append(op)
    groups = [(value, tuple(ops)) for value, ops in by_value.items() if len(ops) > 1]
    groups.sort(key=lambda group: -len(group[1]))
    return tuple(Shared(value, ops, not source.trusted and len(ops) >= SUSPICIOUS) for value, ops in groups)


def _usable(source: Sensitivities, shared: Iterable[Shared]) -> dict[str, float]:
    suspects = {op for group in shared if group.suspect for op in group.ops}
    return {op: value for op, value in source.values.items() if op not in suspects}


def _missing(
    source: Sensitivities,
    shared: Iterable[Shared],
    other: Sensitivities,
    usable: Mapping[str, float],
    to_other: Mapping[str, str],
) -> tuple[Missing, ...]:
    why = dict(source.without)
    for group in shared:
        if group.suspect:
            why |= dict.fromkeys(group.ops, f"value {group.value:.9g} shared by {len(group.ops)} ops: {NEVER_MEASURED}")
    found = []
    for op, reason in why.items():
        twin = to_other.get(op)
        found.append(
            Missing(op, reason, None) if twin is None else Missing(joint_name(op, twin), reason, usable.get(twin))
        )
    reached = set(to_other.values())
    found += [Missing(op, ABSENT, usable.get(op)) for op in other.ops if op not in reached]
    sign = -1 if other.larger_is_sensitive else 1
    return tuple(sorted(found, key=lambda it: (it.other is None, sign * (it.other or 0.0))))


def joint_name(a: str, b: str) -> str:
    """Name of an op in both files: the longer one, which starts at the outer module."""
    return max(a, b, key=len)


def _places(ranks_a: Sequence[float], ranks_b: Sequence[float], top: int) -> int:
    """Most places, ``top`` at most, after which no side has an equal rank: names would decide who is in."""

    def clean(places: int) -> bool:
        return places == len(ranks_a) or all(ranks[places - 1] != ranks[places] for ranks in (ranks_a, ranks_b))

    return next((places for places in range(min(top, len(ranks_a)), 0, -1) if clean(places)), 0)


def _ranked(pairs: Sequence[tuple[str, str]], a: Sensitivities, b: Sensitivities) -> list[Ranked]:
    values_a, values_b = [a.values[left] for left, _ in pairs], [b.values[right] for _, right in pairs]
    ranks = zip(_ranks(values_a, a.larger_is_sensitive), _ranks(values_b, b.larger_is_sensitive), strict=True)
    return [
        Ranked(joint_name(*pair), rank_a, rank_b, value_a, value_b)
        for pair, (rank_a, rank_b), value_a, value_b in zip(pairs, ranks, values_a, values_b, strict=True)
    ]


def _ranks(values: Sequence[float], larger_is_sensitive: bool) -> list[float]:
    from scipy.stats import rankdata

    return [float(rank) for rank in rankdata([-value if larger_is_sensitive else value for value in values])]


def _correlation(ops: Sequence[Ranked]) -> Correlation:
    from scipy.stats import spearmanr

    a, b = [op.rank_a for op in ops], [op.rank_b for op in ops]
    return Correlation(len(ops), _statistic(spearmanr, a, b), kendall_tau_b(a, b))


def kendall_tau_b(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Kendall's rank correlation of paired values, tau-b; ``None`` if all values of one side are equal."""
    from scipy.stats import kendalltau

    return _statistic(kendalltau, a, b)


def _statistic(measure: Callable[..., Any], a: Sequence[float], b: Sequence[float]) -> float | None:
    if len(set(a)) == 1 or len(set(b)) == 1:
        return None
    found = float(measure(a, b).statistic)
    return None if math.isnan(found) else round_score(found)


def _nothing_common(a: Sensitivities, b: Sensitivities, matching: Matching) -> str:
    names = "; ".join(
        f"{source.path} has {', '.join(source.ops[:_NAMES_SHOWN])}{', ...' if len(source.ops) > _NAMES_SHOWN else ''}"
        for source in (a, b)
    )
    if matching.rivals:
        prefixes = ", ".join(repr(prefix.text) for prefix in matching.rivals[:_NAMES_SHOWN])
        more = ", ..." if len(matching.rivals) > _NAMES_SHOWN else ""
        return f"no op is in both files: several prefixes fit the names equally well ({prefixes}{more}). {names}."
    return f"no op is in both files, whichever prefix is put in front of a file's names. {names}. Is it the same model?"


def _shortage(source: Sensitivities, shared: Iterable[Shared]) -> str:
    reasons = [f"{count(len(group.ops), 'op')} share the value {group.value:.9g}" for group in shared if group.suspect]
    reasons = [f"{', '.join(reasons)} ({NEVER_MEASURED})"] if reasons else []
    if source.without:
        reasons.append(f"{count(len(source.without), 'op')} without a value")
    tail = f", {', '.join(reasons)}" if reasons else ""
    return f"{source.path}: {count(len(source.ops), 'op')}{tail}"
