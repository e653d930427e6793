"""Processes with little memory, of which files take a part as well."""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Group:
    """A control group that limits memory."""

    path: Path

    @property
    def entry(self) -> tuple[str, ...]:
        """What a command starts with to run in the group."""
        return "sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.path / "cgroup.procs")

    def kills(self) -> int:
        """How many of its processes the system has killed."""
        names = ("memory.events", "memory.oom_control")
        [text] = [(self.path / name).read_text() for name in names if (self.path / name).exists()]
        return int(dict(line.split() for line in text.splitlines())["oom_kill"])

    def reclaimed(self) -> bool:
        """Whether the system had to take memory back to keep the limit."""
        version1, version2 = self.path / "memory.failcnt", self.path / "memory.events"
        if version1.exists():
            return int(version1.read_text()) > 0
        return int(dict(line.split() for line in version2.read_text().splitlines())["max"]) > 0


@contextmanager
def little_memory(limit: int) -> Iterator[Group]:
    """Make a control group with a limit, of either version, for processes that enter it until the block ends.

    Raises:
        PermissionError: If that is not possible here.

    """
    root = Path("/sys/fs/cgroup")
    name = f"qsens-{os.getpid()}"
    path = next((version / name for version in (root / "memory", root) if version.is_dir()), root / name)
    try:
        path.mkdir()
    except OSError as error:
        raise PermissionError(str(error)) from error
    try:
        files = [path / name for name in ("memory.max", "memory.limit_in_bytes") if (path / name).exists()]
        if not files:
            raise PermissionError(f"{path} has no limit for memory")
        files[0].write_text(str(limit))
        for swap, value in (("memory.swap.max", "0"), ("memory.swappiness", "0")):
            with suppress(OSError):
                if (path / swap).exists():
                    (path / swap).write_text(value)
        yield Group(path)
    finally:
        path.rmdir()


def forget(checkpoint: Path) -> None:
    """Have the system drop what it holds of weights: it counts for the group that read them first."""
    for file in checkpoint.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
