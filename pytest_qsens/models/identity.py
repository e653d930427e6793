"""Whether a checkpoint on disk is still the same: told from its files, without loading weights."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING

from pytest_qsens.models.checkpoint import PICKLED_INDEX, SAFE_INDEX
from pytest_qsens.models.weights import HEADER_LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
_PARTS = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".bpe", ".vocab", ".yaml", ".spm")
"""Configs, tokenizers, processors and templates."""

_TEMPLATES = "additional_chat_templates"
_RESULT = b'{\n  "schema": '
"""How result files and snapshots of ours begin, which may lie there if pytest runs in the checkpoint's directory."""


def checkpoint_identity(directory: Path, *, hash_weights: bool = False) -> str | None:
    """Hash of everything that loading a directory with a Hugging Face snapshot reads; ``None`` if it cannot be read.

    Small files count with their contents. Weights do so with ``hash_weights``; else with their place, their size, the
    times at which their content and their inode changed, which are compared for equality alone, and the headers of
    safetensors files. That takes milliseconds, and takes a copied or newly downloaded checkpoint for another one.
    """
    digest = hashlib.sha256(b"contents" if hash_weights else os.path.realpath(directory).encode())
    try:
        for name, path in sorted(_files(directory)):
            weights = name.endswith(_WEIGHTS)
            found = _state(path) if weights and not hash_weights else _contents(path)
            if weights or not found.startswith(_RESULT):
                digest.update(f"\0{name}\0{len(found)}\0".encode() + found)
    except OSError:
        return None
    return digest.hexdigest()


def _files(directory: Path) -> Iterator[tuple[str, Path]]:
    """Name and path of every file that loading may read, symbolic links followed."""
    for path in directory.iterdir():
        if path.name.endswith(_WEIGHTS + _PARTS) and not path.name.startswith(".") and path.is_file():
            yield path.name, path
        elif path.name == _TEMPLATES and path.is_dir():
            yield from ((f"{_TEMPLATES}/{file.name}", file) for file in path.iterdir() if file.is_file())
    for index in (SAFE_INDEX, PICKLED_INDEX):  # shards may lie in folders
        try:
            shards = set(json.loads((directory / index).read_bytes())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # what is wrong with it is told when it is loaded
        yield from ((shard, directory / shard) for shard in shards if isinstance(shard, str) and "/" in shard)


def _contents(path: Path) -> bytes:
    """Content of a small file, hash of a large one."""
    if path.name.endswith(_WEIGHTS):
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    return path.read_bytes()


def _state(path: Path) -> bytes:
    status = path.stat()
    header = b""
    if path.name.endswith(".safetensors"):
        with path.open("rb") as file:
            header = file.read(min(int.from_bytes(file.read(8), "little"), HEADER_LIMIT))
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} ".encode() + header
