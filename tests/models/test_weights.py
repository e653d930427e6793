"""The hash that tells checkpoints on two machines apart."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pytest_qsens.models.weights import checkpoint_digest


def checkpoint(directory: Path, size: int = 1_000_000, name: str = "a") -> Path:
    """Write a config and weights of so many numbers."""
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    save_file({name: torch.arange(size).float()}, directory / "model.safetensors")
    return directory


def test_a_copy_is_the_same(tmp_path: Path) -> None:
    """Neither path nor time counts, and files that are not weights do not either."""
    original = checkpoint(tmp_path / "a")
    copy = Path(shutil.copytree(original, tmp_path / "b"))
    os.utime(copy / "model.safetensors", (0, 0))
    (copy / "README.md").write_text("a copy")
    assert checkpoint_digest(copy) == checkpoint_digest(original)
    assert checkpoint_digest(copy) is not None


def test_what_makes_another_checkpoint(tmp_path: Path) -> None:
    """Config, names, sizes, and the content at the ends and in between."""
    digests = {
        checkpoint_digest(checkpoint(tmp_path / "first")),
        checkpoint_digest(checkpoint(tmp_path / "longer", 1_000_001)),
        checkpoint_digest(checkpoint(tmp_path / "named", name="b")),
    }
    for place in (0, 500_000, 999_999):
        other = checkpoint(tmp_path / f"at{place}")
        save_file({"a": torch.arange(1_000_000).float().roll(place % 7 + 1)}, other / "model.safetensors")
        digests.add(checkpoint_digest(other))
    configured = checkpoint(tmp_path / "configured")
    (configured / "config.json").write_text('{"x": 1}')
    digests.add(checkpoint_digest(configured))
    more = checkpoint(tmp_path / "more")
    (more / "adapter.bin").write_bytes(b"x")
    digests.add(checkpoint_digest(more))
    assert len(digests) >= 7


@pytest.mark.parametrize("place", range(8))
def test_small_files_count_whole(tmp_path: Path, place: int) -> None:
    """Up to a few hundred KB, no byte can differ unseen."""
    one, other = checkpoint(tmp_path / "one", 50_000), checkpoint(tmp_path / "other", 50_000)
    content = bytearray((other / "model.safetensors").read_bytes())
    content[200 + place * 24_000] ^= 1
    (other / "model.safetensors").write_bytes(content)
    assert checkpoint_digest(one) != checkpoint_digest(other)


def test_little_is_read_of_large_files(tmp_path: Path) -> None:
    """Half a terabyte, nearly all of it a hole, takes no time."""
    large = checkpoint(tmp_path / "large")
    os.truncate(large / "model.safetensors", 1 << 39)
    assert checkpoint_digest(large) != checkpoint_digest(checkpoint(tmp_path / "small"))


def test_what_cannot_be_read_has_no_hash(tmp_path: Path) -> None:
    """What is wrong with it is told by whoever loads it."""
    assert checkpoint_digest(tmp_path / "missing") is None
