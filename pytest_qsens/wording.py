"""How counts, lists of names and scores are written in messages."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def count(number: int, noun: str) -> str:
    """Give a number of things, in words: ``1 op``, ``2 ops``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def first_of(names: Sequence[str], most: int) -> str:
    """Name the first of some things, and count the others: ``a, b and 3 more``."""
    return f"{', '.join(names[:most])}{f' and {len(names) - most} more' * (len(names) > most)}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Ask about the known name that is most like one that is not; nothing if none is."""
    near = get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def score_text(value: float | None, digits: int = 4) -> str:
    """Write a score in significant digits; ``None`` is the SQNR of what is identical."""
    return "infinite" if value is None else f"{value:.{digits}g}"
