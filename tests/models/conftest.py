"""Checkpoints and shorthands for the tests of model sources."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Protocol

import pytest

from tests.checkpoints import BUILDERS, bert

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every checkpoint that can be built, for reading only."""
    root = tmp_path_factory.mktemp("snapshots")
    return {name: build(root / name) for name, build in BUILDERS.items()}


@pytest.fixture(scope="session")
def _bert_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert(tmp_path_factory.mktemp("template") / "bert")


@pytest.fixture
def broken(_bert_template: Path, tmp_path: Path) -> Path:
    """Give a BERT checkpoint of one's own, to damage."""
    return shutil.copytree(_bert_template, tmp_path / "broken")


class WriteFile(Protocol):
    """Write a file for a test."""

    def __call__(self, name: str, content: str | bytes) -> str:
        """Write ``content`` to ``name`` in the test's own directory; return the path."""


@pytest.fixture
def write(tmp_path: Path) -> WriteFile:
    """Write text or bytes to a file in the test's own directory."""

    def write_file(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write_file
