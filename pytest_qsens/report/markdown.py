"""Text as Markdown takes it for text."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_MARKS = "\\`*_[]|~"


def escaped(value: str) -> str:
    """Escape what Markdown, and the HTML in it, take for more than text, for a place within a line or table."""
    found = " ".join(escape(value, quote=False).splitlines())
    for mark in _MARKS:
        found = found.replace(mark, f"\\{mark}")
    return found


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int = 0) -> Iterator[str]:
    """Lines of a table, with the cells escaped.

    Args:
        head: Titles of the columns.
        rows: Texts of the cells.
        numbers: How many of the last columns are aligned to the right.

    """
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * (len(head) - numbers)}{'---:|' * numbers}"
    for row in rows:
        yield f"| {' | '.join(map(escaped, row))} |"


def code(text: str, language: str = "") -> Iterator[str]:
    """Lines of a block of code, in fences that nothing in it closes."""
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)
    fence = "`" * max(3, longest + 1)
    yield f"{fence}{language}"
    yield from text.splitlines()
    yield fence
