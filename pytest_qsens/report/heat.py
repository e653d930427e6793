"""Scores of all ops in a few lines: a row for each kind of op, a column for each block."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

BLOCKS = "▁▂▃▄▅▆▇█"
LETTERS = "123456789"
"""Where a terminal has no blocks."""

_ROWS = 24
INDEX = re.compile(r"(?<![^.])\d+(?![^.])")
"""The number of a block in the name of an op."""


def strip(scores: Mapping[str, float], width: int, marks: Sequence[str], metric: str = "nmse") -> Iterator[str]:
    """Draw the scores of ops in numbered blocks; nothing if there are no two blocks.

    Args:
        scores: Op → score, in model order; ops without one are left out.
        width: Columns of the terminal. Of blocks that have no column of their own, the worst one is shown.
        marks: Characters from the smallest score to the largest. The scale is logarithmic; what is not above zero has
            the first one.
        metric: Name of the scores.

    """
    rows = _rows(scores)
    columns = max((index + 1 for row in rows.values() for index in row), default=0)
    positive = [value for row in rows.values() for value in row.values() if value > 0]
    if columns < 2 or not positive:
        return
    longest = max(map(len, rows))
    names = max(8, min(longest, width - min(columns, 40) - 3))
    room = max(1, width - names - 3)
    pooled = -(-columns // room)  # blocks of one character
    low, high = min(positive), max(positive)
    yield f"blocks from left to right, by {metric}: {marks[0]} {low:.2g} to {marks[-1]} {high:.2g}{_of(pooled)}"
    for name, row in list(rows.items())[:_ROWS]:
        cells = "".join(
            _mark([row[i] for i in range(start, start + pooled) if i in row], low, high, marks)
            for start in range(0, max(row) + 1, pooled)
        )
        yield f"  {_shortened(name, names):<{names}} {cells}"
    if len(rows) > _ROWS:
        yield f"  and {len(rows) - _ROWS} more rows"


def _of(pooled: int) -> str:
    return f"; {pooled} blocks a character, the worst of them" if pooled > 1 else ""


def _rows(scores: Mapping[str, float]) -> dict[str, dict[int, float]]:
    """Put ops that differ in their first index alone into one row: name with a star → index → score."""
    found: dict[str, dict[int, float]] = {}
    for op, value in scores.items():
        match = INDEX.search(op)
        if match is not None:
            name = f"{op[: match.start()]}*{op[match.end() :]}"
            found.setdefault(name, {})[int(match[0])] = value
    return {name: row for name, row in found.items() if len(row) > 1}


def _mark(values: Sequence[float], low: float, high: float, marks: Sequence[str]) -> str:
    if not values:
        return " "
    worst = max(values)
    if worst <= 0:
        return marks[0]
    span = math.log(high / low)
    return marks[round((len(marks) - 1) * math.log(worst / low) / span) if span else -1]


def _shortened(name: str, width: int) -> str:
    """Cut the beginning off: the end tells kinds of ops apart."""
    return name if len(name) <= width else f"..{name[2 - width :]}"
