"""Where things are: lines of a snapshot file, and paths in a repository."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_qsens.errors import QsensError
from pytest_qsens.files import read_text
from pytest_qsens.ops import TOTAL

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_ENTRY = re.compile(r'(?:    |  (?="total"))("(?:[^"\\]|\\.)*"): ')
_OPS = '  "ops": {'


@dataclass(frozen=True)
class SnapshotLines:
    """Where things are in a snapshot file, which has one op a line; lines are counted from 1."""

    known: Mapping[str, int]
    start: int | None
    """Line where the ops begin, if there is a file."""

    @classmethod
    def of(cls, path: Path) -> SnapshotLines:
        """Look into a file; one that is not there, or not readable, has no lines."""
        try:
            text = read_text(path)
        except QsensError:
            text = None
        lines = [] if text is None else text.split("\n")
        start = next((number for number, line in enumerate(lines, 1) if line == _OPS), None)
        return cls(dict(_entries(lines, start or len(lines))), None if text is None else start or 1)

    def at(self, op: str) -> int | None:
        """Line of an op; of a new one that after which it will come."""
        if op in self.known or self.start is None:
            return self.known.get(op)
        before = [name for name in self.known if name != TOTAL and (name < op or op == TOTAL)]
        return max((self.known[name] for name in before), default=self.start)


def _entries(lines: list[str], start: int) -> Iterator[tuple[str, int]]:
    for number, line in enumerate(lines[start:], start + 1):
        match = _ENTRY.match(line)
        if match is not None:
            try:
                name = json.loads(match[1])
            except ValueError:  # an escape that JSON does not have
                continue
            yield name, number


def relative(path: Path, base: Path) -> str | None:
    """Path from ``base`` on, with slashes; ``None`` if it is elsewhere."""
    try:
        return path.resolve().relative_to(base.resolve()).as_posix()
    except (OSError, ValueError):
        return None
