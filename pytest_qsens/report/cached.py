"""What is in the cache, as lines for people."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from pytest_qsens.result_cache import KIND, count_scores, schemes_in

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pytest_qsens.cache import Entry


def listing(entries: Sequence[Entry]) -> list[list[str]]:
    """Rows of a table of all entries, the most recently used first, under a header."""
    rows = [["model", "what", "schemes", "scores", "size", "last used"]]
    for entry in reversed(entries):
        scores = entry.kind == KIND
        rows.append(
            [
                entry.model,
                entry.kind,
                " ".join(schemes_in(entry.path)) if scores else "-",
                str(count_scores(entry.path)) if scores else "-",
                size(entry.size),
                datetime.fromtimestamp(entry.used).astimezone().strftime("%Y-%m-%d %H:%M"),
            ]
        )
    return rows


def summary(cache_dir: Path, entries: Sequence[Entry]) -> str:
    """Say how much there is, and where."""
    count = f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'}"
    return f"{cache_dir}: {count}, {size(sum(entry.size for entry in entries))}"


def size(number: float) -> str:
    """Write a number of bytes as `pytest_qsens.memory.parse_memory` reads it.

    >>> size(999), size(12_345), size(7_500_000_000)
    ('999 B', '12.3 KB', '7.5 GB')
    """
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
