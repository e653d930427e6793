"""Which ops of two files are the same one, where the names of one file start at a submodule."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

Side = Literal["a", "b"]


@dataclass(frozen=True)
class Prefix:
    """``text``, which ends with a dot, in front of every name of ``side``."""

    side: Side
    text: str


@dataclass(frozen=True)
class Matching:
    """What is the same op in two files.

    ``pairs`` are ``(name in A, name in B)``; ``by_prefix`` of them are equal only with ``prefix``. ``rivals`` are
    prefixes that match equally many names, so that none was taken.
    """

    pairs: tuple[tuple[str, str], ...]
    prefix: Prefix | None = None
    by_prefix: int = 0
    rivals: tuple[Prefix, ...] = ()


def match(a: Collection[str], b: Collection[str]) -> Matching:
    """Pair equal names, and the rest by one prefix for a whole file if that is what most names need.

    A prefix is taken only if it pairs more names than are equal as they are, and more than any other prefix.

    >>> match(["fc1", "fc2"], ["model.fc1", "model.fc2"]).prefix
    Prefix(side='a', text='model.')
    """
    left, right = set(a), set(b)
    equal = {name: name for name in a if name in right}
    left, right = left - equal.keys(), right - equal.keys()
    counts = Counter([*_prefixes("a", left, right), *_prefixes("b", right, left)])
    most = max(counts.values(), default=0)
    best = sorted((prefix for prefix, count in counts.items() if count == most), key=lambda it: (it.side, it.text))
    if most <= len(equal):
        return Matching(tuple(equal.items()))
    if len(best) > 1:
        return Matching(tuple(equal.items()), rivals=tuple(best))
    prefix = best[0]
    if prefix.side == "a":
        found = {name: prefix.text + name for name in left if prefix.text + name in right}
    else:
        found = {prefix.text + name: name for name in right if prefix.text + name in left}
    both = equal | found
    return Matching(tuple((name, both[name]) for name in a if name in both), prefix, len(found))


def _prefixes(side: Side, short: Collection[str], long: Collection[str]) -> Iterator[Prefix]:
    """Every prefix that makes a name of ``short`` one of ``long``, as often as it does."""
    for name in long:
        for at, character in enumerate(name, 1):
            if character == "." and name[at:] in short:
                yield Prefix(side, name[:at])
