"""Writing to pytest's terminal: what its encoding and its width allow."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

_PLAIN = {"→": "->"}


class Lines:
    """Writes lines that fit.

    Args:
        terminal: Pytest's.

    """

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal
        self._writer = terminal._tw  # noqa: SLF001  # its width and its file
        self.width = self._writer.fullwidth
        """Columns."""

    def can_write(self, text: str) -> bool:
        """Whether the encoding has these characters."""
        encoding = getattr(self._writer._file, "encoding", None) or "ascii"  # noqa: SLF001  # where lines go
        try:
            text.encode(encoding)
        except (UnicodeEncodeError, LookupError):
            return False
        return True

    def title(self, text: str) -> None:
        """Begin a section; a title that is longer than the terminal is wide goes below its line."""
        fits = len(text) + 4 <= self.width
        self._terminal.write_sep("=", text if fits else text.partition(":")[0])
        if not fits:
            self.write(text.partition(":")[2].strip())

    def write(self, text: str, *, whole: bool = False, **markup: bool) -> None:
        """Write a line, on a narrow terminal as several, broken between words.

        Args:
            text: What to write.
            whole: Whether it stays one line: a command to copy, a file's name.
            markup: Of pytest's terminal writer.

        """
        for mark, plain in _PLAIN.items():
            if mark in text and not self.can_write(mark):
                text = text.replace(mark, plain)
        lines = [text]
        if len(text) > self.width and not whole and self._writer._file.isatty():  # noqa: SLF001  # a flag in old pytest
            indent = f"{text[: len(text) - len(text.lstrip())]}  "
            lines = textwrap.wrap(
                text, self.width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
            )
        for line in lines:
            self._terminal.write_line(line, **markup)
