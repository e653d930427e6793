"""The cache directory: what is kept in it, how much that is, and how it is taken away again.

An entry is a directory of one kind with a key as its name, and says what it is itself::

    <cache>/<kind>/<key>/entry.json     {"by": "pytest-qsens", "model": "minilm", ...}
    <cache>/<kind>/<key>/...            what the kind keeps there

Whoever removes an entry under the hands of another process costs it time and nothing else: what is missing is made
again. Nothing is removed but files whose names are ours, in directories that are ours.
"""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

ABOUT = "entry.json"
OWNER = "pytest-qsens"
MANIFESTS = "manifests"
"""Folder of op lists: a small file each, without an entry of its own."""

KINDS: dict[str, re.Pattern[str]] = {
    "artifacts": re.compile(r"entry\.json|calibrated\.safetensors"),
    "results": re.compile(r"entry\.json|[0-9a-f]{32}\.([a-z]+\.[0-9a-f]{32}|scheme)\.json"),
}
"""Kind → names of the files in its entries."""

_KEY = re.compile(r"[0-9a-f]{32}")
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
"""What `pytest_qsens.files.write_atomically` leaves of a process that was killed."""


@dataclass(frozen=True)
class Entry:
    """One entry.

    Attributes:
        kind: One of `KINDS`.
        path: Its directory.
        model: Label of the model that it is of.
        size: Bytes of its files.
        used: When it was used last, in seconds since the epoch.

    """

    kind: str
    path: Path
    model: str
    size: int
    used: float


def default_cache_dir() -> Path:
    """Directory for caches of this user on this machine."""
    from platformdirs import user_cache_path

    return user_cache_path("pytest-qsens")


def entries(cache_dir: Path) -> list[Entry]:
    """All entries that are there, the least recently used first; directories that are not ours are none."""
    found = []
    for kind in KINDS:
        for path in _directories(cache_dir / kind):
            with suppress(OSError):  # it has been removed meanwhile
                if (model := _model(path)) is not None:
                    size = sum(file.stat().st_size for file in _files(path, kind))
                    found.append(Entry(kind, path, model, size, path.stat().st_mtime))
    return sorted(found, key=lambda entry: (entry.used, entry.path))


def touch(path: Path) -> None:
    """Note that an entry is used now."""
    with suppress(OSError):  # a cache that cannot be written is used all the same
        os.utime(path)


def remove(entry: Entry) -> None:
    """Remove an entry, but for files in it that are not ours."""
    # What says that it is ours goes last: a process killed in between leaves an entry that can be removed.
    for file in sorted(_files(entry.path, entry.kind), key=lambda file: file.name == ABOUT):
        with suppress(OSError):
            (entry.path / file.name).unlink()
    with suppress(OSError):  # not empty
        entry.path.rmdir()


def trim(cache_dir: Path, limit: int, keep: Collection[Path]) -> list[Entry]:
    """Remove the least recently used entries until the others have at most ``limit`` bytes.

    An entry that was used in the future, by a clock that was wrong, counts as used now, and ages from now on.

    Args:
        cache_dir: The cache.
        limit: Bytes.
        keep: Directories of entries that stay in any case.

    Returns:
        What was removed.

    """
    present = entries(cache_dir)
    size = sum(entry.size for entry in present)
    removed = []
    for entry in present:
        if size > limit and entry.path not in keep:
            remove(entry)
            removed.append(entry)
            size -= entry.size
        elif entry.used > time.time():
            touch(entry.path)
    return removed


def clear(cache_dir: Path, model: str | None = None) -> list[Entry]:
    """Remove the entries of a model, or of all models and their op lists with them; returns the entries."""
    removed = [entry for entry in entries(cache_dir) if model in (None, entry.model)]
    for entry in removed:
        remove(entry)
    if model is None:
        for file in _scan(cache_dir / MANIFESTS):
            if _TEMPORARY.fullmatch(file.name) or _KEY.fullmatch(file.name.removesuffix(".json")):
                with suppress(OSError):
                    (cache_dir / MANIFESTS / file.name).unlink()
    return removed


def _directories(folder: Path) -> list[Path]:
    return [
        folder / item.name for item in _scan(folder) if _KEY.fullmatch(item.name) and item.is_dir(follow_symlinks=False)
    ]


def _files(path: Path, kind: str) -> Iterator[os.DirEntry[str]]:
    for file in _scan(path):
        ours = KINDS[kind].fullmatch(file.name) or _TEMPORARY.fullmatch(file.name)
        if ours and file.is_file(follow_symlinks=False):
            yield file


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as items:
            return list(items)
    except OSError:
        return []


def _model(path: Path) -> str | None:
    """Label in an entry's own description; ``None`` if there is none of ours."""
    try:
        about = json.loads((path / ABOUT).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(about, dict) or about.get("by") != OWNER:
        return None
    model = about.get("model")
    return model if isinstance(model, str) else None
