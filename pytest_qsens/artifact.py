"""What is known of a model before any op is scored, kept on disk: one process finds it out, the others read it.

An entry of the cache (`pytest_qsens.cache`) with one safetensors file: the content as JSON in its metadata, with a
checksum, and the tensors, which are mapped. The model's weights are not in it; they are mapped from the checkpoint. A
file that is damaged, or was made for something else, is never believed.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qsens import cache
from pytest_qsens.files import locked, temporary_prefix
from pytest_qsens.result_cache import digest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

SCHEMA = 1
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
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
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

        """
        from safetensors.torch import save_file

        facts = json.dumps(content.facts)
        tensors = dict(content.tensors)
        metadata = {"schema": str(SCHEMA), "key": self.key, "facts": facts, "checksum": _checksum(facts, tensors)}
        prefix = temporary_prefix(self.path)
        for left in self.path.parent.glob(f"{prefix}*.tmp"):  # of processes that were killed: this one has the lock
            left.unlink(missing_ok=True)
        temporary = self.path.with_name(f"{prefix}{os.getpid()}.tmp")
        try:
            save_file(tensors, temporary, metadata)
            (self.entry / cache.ABOUT).write_text(json.dumps({"by": cache.OWNER, "model": self.model}))
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
