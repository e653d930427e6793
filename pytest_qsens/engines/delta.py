"""The fast engine: the ops of a block scored together, by the differences they make."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from pytest_qsens.engines.replay import ReplayEngine
from pytest_qsens.graph.delta import DeltaRun
from pytest_qsens.metrics import squared_distance
from pytest_qsens.ops import Op

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from torch import Tensor, nn
    from torch.fx import Node

    from pytest_qsens.graph.capture import Output
    from pytest_qsens.graph.replay import Override
    from pytest_qsens.models.spec import Batch
    from pytest_qsens.quant.simulate import Simulator

TOLERANCE = 2e-3
"""How far an error may be from that of an exact replay, relative: bf16 has 8 bits, and rounding is random."""

_ROUNDING = 2**-22
"""What rounding values to fp32 adds up to on the way, relative to them: a few times half a unit in the last place."""


def tolerance(nmse: float) -> float:
    """Return how far, relative to itself, an error of this size can be from that of another way to compute it.

    Beside `TOLERANCE`, values on the way are rounded to fp32, in a replay too: an error δ turns into δ + ε, and its
    square differs by 2·δ·ε at most to first order.
    """
    return TOLERANCE + (2 * _ROUNDING / math.sqrt(nmse) if nmse else math.inf)


class DeltaEngine(ReplayEngine):
    """Isolated errors by differences, within `TOLERANCE` of an exact replay; the other modes are replayed.

    An op downstream of which the graph writes in place is replayed.
    """

    name: str = "delta"

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        output: Output,
        simulator: Simulator,
        quantizable: Collection[str],
    ) -> None:
        super().__init__(model, batches, output, simulator, quantizable)
        narrow = torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001 - no public name
        self._deltas = [DeltaRun(run, narrow=narrow) for run in self._clean]
        self.expected: Collection[str] | None = None
        self._waves: dict[str, tuple[str, ...]] = {}
        for op in self._quantizable:
            block = Op(op, "").block
            self._waves[block] = (*self._waves.get(block, ()), op)
        self._distrusted: str | None = None
        self._outputs: dict[str, list[Tensor]] = {}
        self._errors: dict[str, list[float]] = {}
        self._distrusted = self._find_fault()
        if self._distrusted is not None:
            self.name = "replay"

    def isolated(self, op: str) -> Iterator[Tensor]:
        """Only this op is quantized."""
        if not self._can_follow(op):
            yield from super().isolated(op)
            return
        if op not in self._outputs:
            self._outputs = self._wave(op, DeltaRun.outputs)
        yield from self._outputs.pop(op)

    def errors(self, op: str) -> list[float] | None:
        """Sum of squared differences of each batch with only this op quantized; ``None`` if outputs are needed."""
        if not self._can_follow(op):
            return None
        if op not in self._errors:
            found = self._wave(op, DeltaRun.errors)
            self._errors |= {name: [float(error) for error in errors] for name, errors in found.items()}
        return self._errors.pop(op)

    @property
    def distrusted(self) -> str | None:
        """Why differences are not to be trusted for this model, and all ops are replayed."""
        return self._distrusted

    def _find_fault(self) -> str | None:
        """Compare with a replay, for the first op and the last but one."""
        candidates = [op for op in self._quantizable if op in self.exercised and self._can_follow(op)]
        energy = sum(float(reference.double().square().sum()) for reference in self.references)
        for op in dict.fromkeys([*candidates[:1], *candidates[-2:-1]]):
            try:
                found = sum(self.errors(op) or [])
            except Exception as error:  # noqa: BLE001 - whatever torch raises when values are batched
                return f"differences cannot be followed ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
            pairs = zip(self.references, super().isolated(op), strict=True)
            exact = sum(squared_distance(reference, output) for reference, output in pairs)
            if not abs(found - exact) <= tolerance(exact / energy) * exact:  # nor if it is NaN
                return f"the error of {op} comes out {abs(found - exact) / exact:.1%} apart from an exact replay"
        return None

    def _can_follow(self, op: str) -> bool:
        return self._distrusted is None and all(
            delta.can_follow(run.graph.calls.get(op, ())) for delta, run in zip(self._deltas, self._clean, strict=True)
        )

    def _wave(
        self, op: str, measure: Callable[[DeltaRun, Sequence[Mapping[Node, Override]]], Tensor]
    ) -> dict[str, list[Tensor]]:
        """Measure this op and the others of its block that are expected to be asked for."""
        block = self._waves[Op(op, "").block]
        ops = [other for other in block if other == op or (self._expected(other) and self._can_follow(other))]
        found: dict[str, list[Tensor]] = {other: [] for other in ops}
        for delta, run in zip(self._deltas, self._clean, strict=True):
            with self._threads(), _quiet_vmap():
                values = measure(delta, [self._quantize(run.graph, [other]) for other in ops])
            for other, value in zip(ops, values, strict=True):
                found[other].append(value)
        return found

    def _expected(self, op: str) -> bool:
        return op in self.exercised and (self.expected is None or op in self.expected)


@contextmanager
def _quiet_vmap() -> Iterator[None]:
    """Accept that some ops, such as attention, are run for one change after the other."""
    functorch: Any = torch._C._functorch  # noqa: SLF001 - no public name
    functorch._set_vmap_fallback_warning_enabled(False)  # noqa: SLF001
    try:
        yield
    finally:
        functorch._set_vmap_fallback_warning_enabled(True)  # noqa: SLF001
