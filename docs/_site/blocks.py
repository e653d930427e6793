"""The code blocks of a page of Markdown: fenced ones, indented ones, and what a comment before them says about them.

Extraction is that of markdown-it-py, the parser that MyST builds the site with. A comment before a block is a mark::

    <!-- not run: needs a cluster -->      why tests do not run it
    <!-- output -->                        what a command printed
    <!-- file: quant.yaml -->              later blocks of the page find it under this name
    <!-- exit codes: 1 0 -->               of its commands, where they are not all 0
"""

from __future__ import annotations

import ast
import re
import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from markdown_it import MarkdownIt

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MARKS = ("not run", "output", "file", "exit codes", "synopsis")
_COMMENT = re.compile(r"\s*<!--\s*([a-z ]+?)\s*(?::\s*(.*?))?\s*-->\s*", re.DOTALL)
_SHELL = re.compile(r"(\$ )?(\w+=\S+ )*(pytest|qsens|python3?|pip|git|mkdir|export|bash|sphinx-build|job=)\b")


@dataclass(frozen=True)
class Block:
    """One code block. ``language`` is what its fence says, or `language_of` an indented one."""

    page: Path
    line: int
    language: str | None
    text: str
    marks: dict[str, str] = field(default_factory=dict)

    @property
    def runs(self) -> bool:
        """Whether it is code that is to be run as it stands there."""
        kept = {"not run", "output", "synopsis", "file"} & self.marks.keys()
        return self.language in ("bash", "python") and not kept

    @property
    def commands(self) -> list[tuple[str, list[str]]]:
        """Commands of a shell block, each with the lines that the block shows as its output.

        If a line starts with ``$``, only such lines are commands. ``...`` stands for lines that are left out.
        """
        lines = self.text.replace("\\\n", " ").splitlines()
        prompted = any(line.startswith("$ ") for line in lines)
        found: list[tuple[str, list[str]]] = []
        for line in lines:
            if line.startswith("$ ") or not prompted:
                if line.strip() and not line.startswith("#"):
                    found.append((line.removeprefix("$ "), []))
            elif found and line.strip() not in ("", "..."):
                found[-1][1].append(line)
        return found

    @property
    def place(self) -> str:
        """Where it is: ``docs/ci.md:12``."""
        return f"{self.page.parent.name}/{self.page.name}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """Every code block of a page, in order, those in lists and quotes as well.

    Raises:
        ValueError: For a comment before a block that looks like a mark and is none.

    """
    marks: dict[str, str] = {}
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        if token.type == "html_block":
            if found := _COMMENT.fullmatch(token.content):
                if found[1] not in MARKS:
                    line = (token.map or [0])[0] + 1
                    raise ValueError(f"{page}:{line}: {found[1]!r} is no mark of a block. Known: {', '.join(MARKS)}")
                marks[found[1]] = found[2] or ""
        elif token.type in ("fence", "code_block"):
            language = token.info.split()[0] if token.info.split() else language_of(token.content)
            yield Block(page, (token.map or [0])[0] + 1, language, token.content, marks)
            marks = {}
        else:
            marks = {}


def language_of(text: str) -> str | None:
    """Tell the language of a block that does not say it; None if it is not one of those that are written here."""
    text = textwrap.dedent(text).strip()
    first = text.splitlines()[0] if text else ""
    if text.startswith("#!") or _SHELL.match(first):
        return "bash"
    if first.startswith("[") and first.endswith("]"):
        return "ini"
    if first.startswith("{"):
        return "json"
    if re.match(r"(import|from|def|class|@)\b|@", first) and _is_python(text):
        return "python"
    if re.match(r"(- )?\w+:( |$)", first):
        return "yaml"
    return None


def _is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True
