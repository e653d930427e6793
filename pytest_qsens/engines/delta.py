"""The fast engine: the ops of a block scored together, by the differences they make."""

from __future__ import annotations

import math
from itertools import chain, groupby
from typing import TYPE_CHECKING

import torch

from pytest_qsens import profile
from pytest_qsens.engines.replay import ReplayEngine
from pytest_qsens.errors import first_line
from pytest_qsens.graph.delta import DeltaRun, Weights
from pytest_qsens.metrics import Score, energy
from pytest_qsens.ops import Op

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from torch import Tensor, nn

    from pytest_qsens.graph.capture import Output
    from pytest_qsens.models.spec import Batch
    from pytest_qsens.quant.simulate import Simulator

TOLERANCE = 2e-3
"""How far an error may be from that of an exact replay, relative: bf16 has 8 bits, and rounding is random."""

_WAVE_SHARE = 4
"""The part of the memory for changes that go side by side: one in so many."""

_ROUNDING = 2**-22
"""What rounding values to fp32 adds up to on the way, relative to them: a few times half a unit in the last place."""


def tolerance(nmse: float) -> float:
    """Return how far an NMSE of this size can be from what another way to compute it gives.

    Beside `TOLERANCE`, values on the way are rounded to fp32, in a replay too: an error δ turns into δ + ε, and its
    square differs by 2·δ·ε + ε².
    """
    return TOLERANCE * nmse + 2 * _ROUNDING * math.sqrt(nmse) + _ROUNDING**2


class DeltaEngine(ReplayEngine):
    """Isolated errors by differences, within `TOLERANCE` of an exact replay; the other modes are replayed.

    Args:
        model: In evaluation mode.
        batches: For evaluation.
        references: The model's outputs for them.
        output: Takes the scored output.
        simulator: Gives the outputs of quantized ops.
        quantizable: Names of ops that can be quantized.
        memory: Bytes for values.
        expected: Those that are going to be scored.
        logits: Whether outputs are compared as distributions of classes, too.

    Attributes:
        distrusted: Why differences are not to be trusted for this model, and all ops are replayed.

    """

    name: str = "delta"

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        references: Iterable[Tensor],
        output: Output,
        simulator: Simulator,
        quantizable: Collection[str],
        memory: int,
        expected: Collection[str],
        *,
        logits: bool,
    ) -> None:
        super().__init__(model, batches, references, output, simulator, quantizable, memory)
        self._logits = logits
        weights = Weights(narrow=_has_fast_bf16(self._clean[0].output.device))
        self._deltas = [DeltaRun(run, weights) for run in self._clean]
        widest = max(1, *(delta.bytes_per_change() for delta in self._deltas))
        self._waves = list(self._find_waves(expected, max(1, memory // _WAVE_SHARE // widest)))
        self._scores: dict[str, Score] = {}
        self._energy = sum(map(energy, self.references))
        self.distrusted: str | None = None
        self.distrusted = self._find_fault()
        if self.distrusted is not None:
            self.name = "replay"
            self._scores.clear()
            self._deltas.clear()

    def together(self, op: str) -> Score | None:
        """Score with only this op quantized, measured with the others of its block."""
        if self.distrusted is not None:
            return None
        if op not in self._scores:
            wave = next((wave for wave in self._waves if op in wave), [op])
            try:
                self._scores |= self._measure(wave)
            except Exception:  # one of them makes the model fail: the others shall have their scores
                if len(wave) == 1:
                    raise
                self._waves.remove(wave)
                self._waves += [[other] for other in wave]
                return self.together(op)
        return self._scores[op]

    def _find_waves(self, expected: Collection[str], most: int) -> Iterator[list[str]]:
        """Group the expected ops of each block, at most so many together."""
        wanted = (op for op in self._quantizable if op in self.exercised and op in expected)
        for _, block in groupby(wanted, key=lambda op: Op(op, "").block):
            ops = list(block)
            yield from (ops[i : i + most] for i in range(0, len(ops), most))

    def _measure(self, ops: Sequence[str]) -> dict[str, Score]:
        found = {op: Score(logits=self._logits) for op in ops}
        for delta, run in zip(self._deltas, self._clean, strict=True):
            changes = [self._quantize(run.graph, [op]) for op in ops]
            try:
                with self._threads():
                    if self._logits:
                        for score, output in zip(found.values(), delta.outputs(changes), strict=True):
                            score.add(run.output, output)
                    else:
                        for score, error in zip(found.values(), delta.errors(changes), strict=True):
                            score.add_error(error)
            finally:
                run.release_all()
        return found

    @profile.phase("replay")
    def _find_fault(self) -> str | None:
        """Compare with a replay, for the first op and the last but one."""
        candidates = list(chain.from_iterable(self._waves))
        faults = (self._fault(op) for op in dict.fromkeys([*candidates[:1], *candidates[-2:-1]]))
        return next(filter(None, faults), None)

    def _fault(self, op: str) -> str | None:
        exact = Score(logits=False)
        try:
            for reference, output in zip(self.references, self.isolated(op), strict=True):
                exact.add(reference, output)
        except Exception:  # noqa: BLE001 - quantized values can make a model raise anything: it is told when op is scored
            return None
        if not exact.finite:
            return None
        try:
            self.together(op)
        except Exception as error:  # noqa: BLE001 - a replay raises nothing
            return f"differences cannot be followed ({first_line(error)})"
        found = self._scores[op]
        nmse, expected = found.sse / self._energy, exact.sse / self._energy
        if abs(nmse - expected) <= tolerance(expected):  # false for NaN
            return None
        return f"the NMSE of {op} comes out as {nmse:.3e}, but {expected:.3e} in an exact replay"


def _has_fast_bf16(device: torch.device) -> bool:
    """Whether matrix products in bf16 are faster than in fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())  # noqa: SLF001 - no public name
