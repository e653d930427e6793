"""The page of error messages quotes messages that the code has."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.documentation.pages import DOCS, ROOT

PAGE = (DOCS / "troubleshooting.md").read_text()
HEADINGS = re.findall(r"^### (.*)$", PAGE, re.MULTILINE)
GAP = "\0"


@cache
def messages() -> tuple[str, ...]:
    """Every text of the package, with a mark where something is filled in."""
    found = []
    for path in (ROOT / "pytest_qsens").rglob("*.py"):
        tree = ast.parse(path.read_text())
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else GAP for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                found.append(node.value)
    return tuple(found)


def quoted() -> list[str]:
    """Messages in the headings, each a code span: with two backquotes where the message has some of its own."""
    span = re.compile(r"(?<!`)(?:`{2}|`(?!`))(.+?)(?:`{2}|(?<!`)`)(?=$|,)")
    return [text for heading in HEADINGS for text in span.findall(heading)]


def is_in(fragment: str, message: str) -> bool:
    """Whether a message is what the page quotes: its pieces, in order, with something filled in between."""
    pattern = ".*?".join(re.escape(piece.strip()) for piece in re.split(r"…\.?", fragment) if piece.strip())
    return re.search(pattern, message, re.DOTALL) is not None


def test_there_is_something_to_check() -> None:
    """The page has entries, each with a cause or a next step below it."""
    assert len(HEADINGS) >= 30
    for body in re.split(r"^#.*$", PAGE, flags=re.MULTILINE)[1:]:
        assert body.strip() or body == "\n\n"
    assert all(heading.startswith("`") and heading.endswith("`") for heading in HEADINGS)


@pytest.mark.parametrize("fragment", quoted())
def test_a_message_is_one_of_the_code(fragment: str) -> None:
    """Who searches the page for what they see finds it, and the code still says it."""
    assert len(fragment) >= 12
    assert any(is_in(fragment, message) for message in messages()), f"no message of the code has {fragment!r}"


def test_other_texts_are_told_apart() -> None:
    """The check refuses what the code does not say."""
    assert not any(is_in("the model is not deterministic: three runs", message) for message in messages())
