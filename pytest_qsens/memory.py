"""How much memory values may take that could be computed again."""

from __future__ import annotations

import ctypes
import re
from contextlib import suppress
from pathlib import Path

from pytest_qsens.errors import QsensError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_CGROUPS = Path("/sys/fs/cgroup")


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
    """Half of the memory that is free on a torch device, shared by the workers of this machine; bytes.

    Args:
        workers: How many.
        device: A torch device.
        reserved: Bytes of it that are needed for something else, such as weights in a mapped file.

    """
    import psutil
    import torch

    if torch.device(device).type == "cuda":
        free: float = torch.cuda.mem_get_info(device)[0]
    else:
        free = min(psutil.virtual_memory().available, _free_in_cgroup())
    return int(max(0.0, free - reserved) // 2 // workers)


def trim() -> None:
    """Give memory that was freed back to the system, where the C library can be asked to: glibc keeps much of it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _free_in_cgroup() -> float:
    """Bytes that the container of this process leaves it; infinite where nothing limits it."""
    try:
        limit, used, stat = ((_CGROUPS / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
    except OSError:
        return float("inf")
    if limit.strip() == "max":
        return float("inf")
    facts = dict(line.split() for line in stat.splitlines())
    return max(0, int(limit) - int(used) + int(facts.get("inactive_file", 0)))  # files that were read count as used
