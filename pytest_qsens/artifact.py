"""What is known of a model before any op is scored, kept on disk: one process finds it out, the others read it.

An entry of the cache (`pytest_qsens.cache`) with one safetensors file: the content as JSON in its metadata, with a
checksum, and the tensors. The model's weights are not in it. A file that is damaged, or was made for something else, is
never believed; it is read at once and not mapped, so that nothing that happens to it later reaches those who have it.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qsens import cache
from pytest_qsens.files import locked, temporary_prefix, write_atomically
from pytest_qsens.result_cache import digest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

SCHEMA = 2
KIND = "artifacts"


@dataclass(frozen=True)
class Content:
    """What a file holds.

    Attributes:
        facts: What JSON can hold.
        tensors: Name → tensor.

    """

    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Artifact:
    """One file.

    Attributes:
        entry: Directory of the entry in the cache.
        key: Names everything that its content depends on.
        model: Label of the model, for those who look into the cache.

    """

    entry: Path
    key: str
    model: str

    @classmethod
    def of(cls, cache_dir: Path, model: str, facts: Mapping[str, object]) -> Artifact:
        """Find the place of the artifact of a model.

        Args:
            cache_dir: The cache.
            model: Label of the model.
            facts: All that it depends on, in builtin values.

        """
        key = digest([SCHEMA, facts])
        return cls(cache_dir / KIND / key, key, model)

    @property
    def path(self) -> Path:
        """The file."""
        return self.entry / "calibrated.safetensors"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let no other process make the file meanwhile; one that dies lets go.

        Raises:
            QsensError: If the directory cannot be written.

        """
        with suppress(OSError):  # `locked` says what is wrong
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path, timeout=-1):  # as long as it takes to make the file
            yield

    def read(self) -> Content | None:
        """Read the file; ``None`` if there is none that can be believed."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            content = self.path.read_bytes()
            tensors = load(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            metadata = header["__metadata__"]
            facts = json.loads(metadata["facts"])
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        expected = {"schema": str(SCHEMA), "key": self.key, "checksum": _checksum(metadata["facts"], tensors)}
        if any(metadata.get(name) != value for name, value in expected.items()):
            return None
        cache.touch(self.entry)
        return Content(facts, tensors)

    def write(self, content: Content) -> None:
        """Write the file in one step.

        Raises:
            OSError: If it cannot be written; nothing of it is left.
            QsensError: If the entry cannot be described, likewise.

        """
        from safetensors.torch import save

        facts = json.dumps(content.facts)
        tensors = dict(content.tensors)
        metadata = {"schema": str(SCHEMA), "key": self.key, "facts": facts, "checksum": _checksum(facts, tensors)}
        prefix = temporary_prefix(self.path)
        for left in self.path.parent.glob(f"{prefix}*.tmp"):  # of processes that were killed: this one has the lock
            left.unlink(missing_ok=True)
        temporary = self.path.with_name(f"{prefix}{os.getpid()}.tmp")
        try:
            temporary.write_bytes(save(tensors, metadata))
            write_atomically(self.entry / cache.ABOUT, json.dumps({"by": cache.OWNER, "model": self.model}))
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)


def _checksum(facts: str, tensors: Mapping[str, Tensor]) -> str:
    import torch

    digest = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
