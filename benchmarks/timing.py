"""Time in forwards, memory, and what the machine can do at most."""

from __future__ import annotations

import gc
import platform
import re
import resource
import statistics
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch.nn import functional

from pytest_qsens.graph.capture import run_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from subjects import Subject

_SAMPLES = 3


@dataclass
class Unit:
    """Seconds of one fp32 forward of all evaluation batches; known when the block that it belongs to has ended."""

    seconds: float = 0.0


class Forwards:
    """Times the forward of a model right before and right after other work, which is then given in forwards.

    The machine's clock and its other users move over minutes, and so would a ratio to a forward timed once.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._samples(1)

    @contextmanager
    def around(self) -> Iterator[Unit]:
        """Find the unit of the work in the block."""
        unit = Unit()
        before = self._samples()
        yield unit
        unit.seconds = statistics.median([*before, *self._samples()])

    def _samples(self, count: int = _SAMPLES) -> list[float]:
        spec, found = self._subject.spec, []
        with torch.no_grad():
            for _ in range(count):
                start = time.perf_counter()
                for batch in spec.evaluation:
                    run_model(self._subject.model, batch, spec.output)
                found.append(time.perf_counter() - start)
        return found


def seconds(work: Callable[[], object]) -> float:
    """Wall time."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def forget_peak() -> int:
    """Start counting peak memory anew; returns what is resident now, in bytes."""
    gc.collect()
    with suppress(OSError):  # some containers forbid it; the peak is then that of the process so far
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5): resets VmHWM
    return _status("VmRSS")


def peak() -> int:
    """Peak resident memory since `forget_peak`, in bytes."""
    return _status("VmHWM")


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine() -> dict[str, Any]:
    """Name what the numbers were measured on."""
    described = Path("/proc/cpuinfo").read_text()

    def field(name: str) -> str:
        found = re.search(rf"{name}\s*:\s*(.+)", described)
        return found[1] if found else "unknown"

    return {
        "cpu": field("model name"),
        "vendor": field("vendor_id"),
        "family": f"{field('cpu family')}/{field('model')}",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def gemm_rates(hidden: int, intermediate: int, rows: tuple[int, ...], tries: int) -> list[dict[str, Any]]:
    """FLOPs per second of products of the model's sizes, the best of several tries, by data type."""
    found = []
    for row in rows:
        for into, out in ((hidden, hidden), (hidden, intermediate), (intermediate, hidden)):
            rates = {
                name: 2 * row * into * out / _best(make(row, into, out), tries) for name, make in _PRODUCTS.items()
            }
            found.append({"rows": row, "in": into, "out": out} | rates)
    return found


def _best(product: Callable[[], object], tries: int) -> float:
    product()
    return min(seconds(product) for _ in range(tries))


def _linear(dtype: torch.dtype) -> Callable[[int, int, int], Callable[[], object]]:
    def make(rows: int, into: int, out: int) -> Callable[[], object]:
        x, weight = torch.randn(rows, into).to(dtype), torch.randn(out, into).to(dtype)
        return lambda: functional.linear(x, weight)

    return make


def _integers(rows: int, into: int, out: int) -> Callable[[], object]:
    x, weight = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((rows, into), (into, out)))
    return lambda: torch._int_mm(x, weight)


_PRODUCTS = {"fp32": _linear(torch.float32), "bf16": _linear(torch.bfloat16), "int8": _integers}
