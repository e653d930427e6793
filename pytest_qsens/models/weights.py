"""Whether two machines have the same checkpoint: told from its files, without loading or even reading all of them."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_CONFIG = "config.json"
_WEIGHTS = (".safetensors", ".bin")
_ENDS = 64 * 1024
"""Bytes at both ends of a file that count."""
_BLOCK = 4 * 1024
_BLOCKS = 64
"""Blocks that count in between, at equal distances: 64 seeks, however large the file is."""
HEADER_LIMIT = 100_000_000
"""Bytes that safetensors allows for a header."""


def checkpoint_digest(directory: Path) -> str | None:
    """Short hash of the config and the weights in a directory with a Hugging Face snapshot; ``None`` if unreadable.

    It depends on no path and no time, so that it is the same for a copy. Of each file of weights, the name, the size,
    the header of safetensors (names, shapes, types), and samples of the content count: other weights have another
    digest unless they differ between the samples alone, as after training a single small tensor.
    """
    digest = hashlib.sha256()
    try:
        names = sorted(path.name for path in directory.iterdir())
        for name in names:
            if name == _CONFIG or name.endswith(_WEIGHTS):
                digest.update(f"\0{name}\0".encode())
                for part in _samples(directory / name):
                    digest.update(part)
    except OSError:
        return None
    return digest.hexdigest()[:16]


def weight_bytes(directory: Path) -> int:
    """Size of the files with weights in a directory; 0 if it is unreadable."""
    try:
        return sum(path.stat().st_size for path in directory.iterdir() if path.name.endswith(_WEIGHTS))
    except OSError:
        return 0


def _samples(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    yield str(size).encode()
    with path.open("rb") as file:
        if size <= 2 * _ENDS + _BLOCKS * _BLOCK:
            yield file.read()
            return
        if path.suffix == ".safetensors":
            yield file.read(min(int.from_bytes(file.read(8), "little"), HEADER_LIMIT))
        places = [(0, _ENDS), (size - _ENDS, _ENDS)]
        places += [(step * (size - _BLOCK) // (_BLOCKS - 1), _BLOCK) for step in range(_BLOCKS)]
        for start, length in places:
            file.seek(start)
            yield file.read(length)
