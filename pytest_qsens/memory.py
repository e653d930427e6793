"""How much memory values may take that could be computed again."""

from __future__ import annotations

import ctypes
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pytest_qsens.errors import QsensError

if TYPE_CHECKING:
    from collections.abc import Iterator

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def parse_memory(text: str, origin: str) -> int:
    """Read a size such as ``4GB``, ``1.5GiB`` or ``800M``; returns bytes.

    Raises:
        QsensError: If it is no size, or less than a megabyte; ``origin`` says where it was given.

    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]?I?)B?", text.strip().upper())
    unit = _UNITS.get(found[2]) if found else None
    if found is None or unit is None:
        raise QsensError(f"{origin} takes a size such as 4GB, 1.5GiB or 800M, not {text!r}")
    size = int(float(found[1]) * unit)
    if size < 10**6:
        raise QsensError(f"{origin} takes at least 1MB, not {text!r}. Is the unit missing?")
    return size


def default_memory(workers: int, device: str = "cpu", reserved: int = 0) -> int:
    """Return a third of the memory that is free on a torch device, shared by the workers of this machine; bytes.

    Args:
        workers: How many.
        device: A torch device.
        reserved: Bytes of it that are needed for something else, such as weights in a mapped file.

    """
    import torch

    if torch.device(device).type == "cuda":
        free: float = torch.cuda.mem_get_info(device)[0]
    else:
        free = free_memory()
    return int(max(0.0, free - reserved) // 3 // workers)


def free_memory() -> float:
    """Bytes that this machine and the container of this process leave it; files that were read count as free."""
    import psutil

    return min(psutil.virtual_memory().available, *map(_free_in_cgroup, _cgroups()))


def trim() -> None:
    """Give memory that was freed back to the system, where the C library can be asked to: glibc keeps much of it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class _Names(NamedTuple):
    """Files of a control group that tell its limit and what is used, and where it says how much of that is files."""

    limit: str
    used: str
    stat: str
    read: str


_V2 = _Names("memory.max", "memory.current", "memory.stat", "inactive_file")
_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file")


def _cgroups() -> Iterator[tuple[Path, _Names]]:
    """Control groups that limit the memory of this process: its own, and those around it."""
    yield _CGROUPS, _V2  # in a container, its own is the root of what it sees
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root, names = (_CGROUPS, _V2) if not controllers else (_CGROUPS / "memory", _V1)
            own = root / path.lstrip("/")
            for place in (own, *own.parents):
                if place.is_relative_to(root):
                    yield place, names


def _free_in_cgroup(group: tuple[Path, _Names]) -> float:
    """Bytes that a control group leaves; infinite where nothing limits it."""
    place, names = group
    try:
        limit, used, stat = ((place / name).read_text() for name in names[:3])
    except OSError:
        return float("inf")
    if limit.strip() == "max":
        return float("inf")
    facts = dict(line.split() for line in stat.splitlines())
    return max(0, int(limit) - int(used) + int(facts.get(names.read, 0)))  # files that were read count as used
