"""Whether a checkpoint is still the same: every change of what loading reads shows, and nothing else does."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest

from pytest_qsens.models.identity import checkpoint_identity
from pytest_qsens.models.resolve import resolve
from pytest_qsens.models.source import ModelRequest
from tests.checkpoints import bert

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Make a small BERT."""
    return bert(tmp_path / "checkpoint")


def change_a_weight(directory: Path) -> None:
    """Change one bit, and restore what can be restored of the times."""
    path = directory / "model.safetensors"
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "weight": change_a_weight,
    "config": lambda path: (path / "config.json").write_text((path / "config.json").read_text() + "\n"),
    "tokenizer": lambda path: (path / "tokenizer.json").write_text((path / "tokenizer.json").read_text() + "\n"),
    "new file": lambda path: (path / "chat_template.jinja").write_text("{{ messages }}"),
    "template": lambda path: (
        (path / "additional_chat_templates").mkdir(),
        (path / "additional_chat_templates" / "tool.jinja").write_text("x"),
    ),
}


@pytest.mark.parametrize("hash_weights", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_shows(checkpoint: Path, change: str, *, hash_weights: bool) -> None:
    """A bit of a weight as well, although size and modification time are as they were."""
    before = checkpoint_identity(checkpoint, hash_weights=hash_weights)
    assert before is not None
    CHANGES[change](checkpoint)
    assert checkpoint_identity(checkpoint, hash_weights=hash_weights) not in (None, before)


@pytest.mark.parametrize("hash_weights", [False, True])
def test_what_pytest_writes_there_does_not_count(checkpoint: Path, *, hash_weights: bool) -> None:
    """Pytest may run in the directory of the checkpoint."""
    before = checkpoint_identity(checkpoint, hash_weights=hash_weights)
    (checkpoint / "out.json").write_text('{\n  "schema": 1,\n  "run": {}\n}\n')
    (checkpoint / "qsens_snapshots").mkdir()
    (checkpoint / "qsens_snapshots" / "w8a8.json").write_text("{}")
    (checkpoint / ".cache.json").write_text("{}")
    (checkpoint / "README.md").write_text("read me")
    assert checkpoint_identity(checkpoint, hash_weights=hash_weights) == before


def test_contents_know_a_copy(checkpoint: Path, tmp_path: Path) -> None:
    """A copy elsewhere with new times is the same if contents count, and another one if not."""
    copy = shutil.copytree(checkpoint, tmp_path / "copy", copy_function=shutil.copyfile)
    for hash_weights in (False, True):
        same = checkpoint_identity(copy, hash_weights=hash_weights) == checkpoint_identity(
            checkpoint, hash_weights=hash_weights
        )
        assert same == hash_weights


def test_touching_weights_counts_only_without_contents(checkpoint: Path) -> None:
    """Times are compared for being the same, whichever is later."""
    found = []
    for seconds in (2_000_000_000, 1, 1):
        os.utime(checkpoint / "model.safetensors", (seconds, seconds))
        found.append([checkpoint_identity(checkpoint, hash_weights=hash_weights) for hash_weights in (False, True)])
    assert len({times for times, _ in found}) >= 2
    assert len({contents for _, contents in found}) == 1


def test_shards_in_folders_count(tmp_path: Path) -> None:
    """Weights lie where the index says."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part/1.safetensors", "b": 3}}')
    assert checkpoint_identity(tmp_path) is None  # a shard is missing
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "1.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    before = checkpoint_identity(tmp_path, hash_weights=True)
    (tmp_path / "part" / "1.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0[]")
    assert checkpoint_identity(tmp_path, hash_weights=True) not in (None, before)


def test_a_directory_that_cannot_be_read_has_none(tmp_path: Path) -> None:
    """What is wrong with it is told when it is loaded."""
    assert checkpoint_identity(tmp_path / "none") is None


def test_which_sources_can_tell(checkpoint: Path, tmp_path: Path) -> None:
    """Directories and presets can; what a factory does cannot be told from outside."""
    (tmp_path / "net.py").write_text("def spec(): pass")
    for model, told in ((str(checkpoint), True), ("minilm", True), ("tiny_qwen2_5_vl", True), ("net:spec", False)):
        source = resolve(ModelRequest(model, root=str(tmp_path)))
        assert (source.identity(hash_weights=False) is not None) == told
