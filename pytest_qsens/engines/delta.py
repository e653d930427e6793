"""The fast engine: the ops of a block, or groups of them, scored together, by the differences they make."""

from __future__ import annotations

import math
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch

from pytest_qsens import profile
from pytest_qsens.engines.replay import ReplayEngine
from pytest_qsens.errors import first_line
from pytest_qsens.graph.calls import bind
from pytest_qsens.graph.delta import DeltaRun, Weights
from pytest_qsens.graph.joint import JointRun, RowWise
from pytest_qsens.metrics import Score, energy
from pytest_qsens.noise import factors
from pytest_qsens.ops import Op

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor
    from torch.fx import Node

    from pytest_qsens.engines import Unit
    from pytest_qsens.engines.replay import Captured
    from pytest_qsens.graph.capture import Graph
    from pytest_qsens.graph.replay import Change
    from pytest_qsens.graph.together import Together
    from pytest_qsens.quant.simulate import Simulator
    from pytest_qsens.results import Mode

_TRIES = 3
"""Ops at either end of the model that are tried until one can be compared with its replay."""

TOLERANCE = 1e-2
"""How far an error may be from that of an exact replay, relative.

bf16 has 8 bits, and rounding is random; but what a layer amplifies of an error it amplifies of that rounding, too.
Found were up to 4e-4 in 24 layers, and 4e-3 in 68 of random weights, where errors grow a hundredfold on the way.
"""

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


class Verdict(NamedTuple):
    """What comparing differences with replays has shown."""

    fault: str | None
    """Why they are not to be trusted, if they are not."""

    logits: bool
    """Whether that was found out with all logits made, and not by way of their errors alone."""

    groups: bool = False
    """Whether a change of several ops at once was compared as well."""


class Waves:
    """Scores of units that are measured a wave at a time, and kept.

    Args:
        waves: Units that are measured together.
        measure: Measures some units.

    """

    def __init__(
        self, waves: Iterable[Sequence[Unit]], measure: Callable[[Sequence[Unit]], Mapping[Unit, Score]]
    ) -> None:
        self._waves = list(waves)
        self._measure = measure
        self._scores: dict[Unit, Score] = {}

    def add(self, scores: Mapping[Unit, Score], waves: Iterable[Sequence[Unit]]) -> None:
        """Take scores that were measured otherwise; what is left to be measured comes in these waves."""
        self._scores |= scores
        self._waves = list(waves)

    def score(self, unit: Unit) -> Score:
        """Measure a unit with those of its wave, unless it has been."""
        if unit not in self._scores:
            wave = next((wave for wave in self._waves if unit in wave), [unit])
            try:
                self._scores |= self._measure(wave)
            except Exception:  # one of them makes the model fail: the others shall have their scores
                if len(wave) == 1:
                    raise
                self._waves.remove(wave)
                self._waves += [[other] for other in wave]
                return self.score(unit)
        return self._scores[unit]

    def measured_with(self, unit: Unit) -> Collection[Unit]:
        """Others of its wave that have a score."""
        wave = next((wave for wave in self._waves if unit in wave), [])
        return [other for other in wave if other != unit and other in self._scores]


class DeltaEngine(ReplayEngine):
    """The ops of a block side by side.

    Isolated errors are within `TOLERANCE` of those of exact replays, as differences are multiplied; those with
    everything else quantized are the same but for the order in which squares are summed.

    Args:
        captured: Every evaluation batch.
        simulator: Gives the outputs of quantized ops.
        quantizable: Names of ops that can be quantized.
        memory: Bytes for values.
        expected: Units that are going to be scored, of quantizable ops: neighbours in a block come together.
        verdict: Whether differences are to be trusted; `check` finds out if it is not known.
        logits: Whether outputs are compared as distributions of classes, too.

    """

    name: str = "delta"

    def __init__(
        self,
        captured: Sequence[Captured],
        simulator: Simulator,
        quantizable: Collection[str],
        memory: int,
        expected: Sequence[Unit],
        verdict: Verdict | None,
        *,
        logits: bool,
    ) -> None:
        super().__init__(captured, simulator, quantizable, memory)
        self._logits = logits
        self._weights = Weights(fast_bf16=_has_fast_bf16(self._clean[0].output.device))
        self._deltas = [DeltaRun(run, self._weights) for run in self._clean]
        widest = max(1, *(delta.bytes_per_change() for delta in self._deltas))
        self._waves = list(self._find_waves(expected, max(1, memory // _WAVE_SHARE // widest)))
        self._groups = [unit for wave in self._waves for unit in wave if len(unit) > 1]
        self._alone = Waves(self._waves, self._measure_alone)
        self._others: dict[int | None, Waves] = {}
        self._checked = False
        self.verdict: Verdict | None = None
        """What others can take over: it was found out by comparing, here or by another process."""
        if verdict is not None and verdict.logits == logits and (verdict.groups or not self._groups):
            self._settle(verdict)

    def check(self) -> None:
        """See whether differences are to be trusted, by replays of two ops and a group, unless that is known."""
        if not self._checked:
            try:
                self._settle(self._find_verdict())
            except _CannotFollow as error:  # maybe for once only: no verdict for others
                self._distrust(str(error))

    def _settle(self, verdict: Verdict | None) -> None:
        self._checked = True
        self.verdict = verdict
        if verdict is not None and verdict.fault is not None:
            self._distrust(verdict.fault)

    def _distrust(self, why: str) -> None:
        self._checked = True
        self.distrusted = why
        self.name = "replay"
        self._deltas.clear()

    def together(self, *ops: str) -> Score | None:
        """Score with only these ops quantized, measured with others of their block; the first time after `check`."""
        self.check()
        return self._alone.score(ops) if self.distrusted is None else None

    def measured_with(self, unit: Unit, mode: Mode) -> Collection[Unit]:
        """Others of its block."""
        waves = self._alone if mode == "isolated" else self._others.get(None)
        return () if waves is None or self.distrusted is not None else waves.measured_with(unit)

    def all_but(self, *ops: str, seed: int | None = None) -> Score | None:
        """Score with everything but these ops quantized, measured with others of their block."""
        if self.distrusted is not None:
            return None
        return self._with_others(seed).score(ops)

    def _with_others(self, seed: int | None) -> Waves:
        if seed not in self._others:
            self._others[seed] = Waves(self._waves, self._measure_others(seed))
        return self._others[seed]

    def _find_waves(self, expected: Iterable[Unit], most: int) -> Iterator[list[Unit]]:
        """Put the expected units of each block together, at most so many.

        A unit that spans blocks is a wave by itself: the scheduler gives each to a worker of its own.
        """
        able = self.exercised.intersection(self._quantizable)
        for block, members in groupby(expected, key=_block):
            reached = (tuple(op for op in unit if op in able) for unit in members)
            wave = list(dict.fromkeys(unit for unit in reached if unit))  # two groups may come down to the same ops
            size = 1 if block is None else most
            yield from (wave[i : i + size] for i in range(0, len(wave), size))

    def _measure_alone(self, units: Sequence[Unit]) -> dict[Unit, Score]:
        return self._measure(units, self._deltas, self._quantize)

    def _measure_others(self, seed: int | None) -> Callable[[Sequence[Unit]], dict[Unit, Score]]:
        moved = None if seed is None else partial(factors, seed=seed)
        runs = [
            JointRun(run, clean.output, self._row_wise(run.graph), moved)
            for run, clean in zip(self._joint_runs(seed), self._clean, strict=True)
        ]
        return lambda units: self._measure(units, runs, lambda graph, unit: self._unquantized(graph, unit, seed))

    def _row_wise(self, graph: Graph) -> dict[Node, RowWise]:
        return {
            node: RowWise(call, partial(self._blocks, op, node.target))
            for op in self._quantizable
            for node, call in self._quantize(graph, [op]).items()
        }

    def _blocks(self, op: str, target: object, channels: int, *args: object) -> Iterator[Tensor]:
        return self._simulator.blocks(op, bind(target, args, {}), channels)

    def _measure(
        self, units: Sequence[Unit], runs: Sequence[Together], change: Callable[[Graph, Unit], Change]
    ) -> dict[Unit, Score]:
        found = {unit: Score(logits=self._logits) for unit in units}
        for together in runs:
            run, reference = together.run, together.reference
            changes = [change(run.graph, unit) for unit in units]
            try:
                with self._threads():
                    if self._logits:
                        for score, output in zip(found.values(), together.outputs(changes), strict=True):
                            score.add(reference, output)
                    else:
                        for score, error in zip(found.values(), together.errors(changes), strict=True):
                            score.add_error(error)
            finally:
                run.release_all()
        return found

    @profile.phase("replay")
    def _find_verdict(self) -> Verdict | None:
        """Compare with a replay, for the first op and the last but one that can be; ``None`` if none can be.

        And for the largest of the groups that are going to be scored: its errors meet on their way, and may cancel.
        """
        candidates = [(op,) for op in self._quantizable if op in self.exercised]
        ends = (candidates, candidates[:-1][::-1])
        compared = [next(filter(None, map(self._compared, end[:_TRIES])), None) for end in ends]
        largest = sorted(self._groups, key=len, reverse=True)
        with self._simulator.passing():  # the weights of a group may be most of the model
            group = next(filter(None, map(self._compared, largest[:_TRIES])), None)
        found = [verdict for verdict in (*compared, group) if verdict is not None]
        verdict = next((verdict for verdict in found if verdict.fault is not None), found[0] if found else None)
        return None if verdict is None else verdict._replace(groups=group is not None)

    def _compared(self, unit: Unit) -> Verdict | None:
        """Compare with a replay; ``None`` if its output cannot be scored."""
        exact = Score(logits=False)
        try:
            for reference, output in zip(self.references, self.isolated(*unit), strict=True):
                exact.add(reference, output)
        except Exception:  # noqa: BLE001 - quantized values can make a model raise anything: it is told when op is scored
            return None
        if not exact.finite:
            return None
        try:
            found = self._alone.score(unit)
        except Exception as error:
            raise _CannotFollow(f"differences cannot be followed ({first_line(error)})") from error
        size = sum(map(energy, self.references))
        nmse, expected = found.sse / size, exact.sse / size
        name = unit[0] if len(unit) == 1 else f"{unit[0]} to {unit[-1]} ({len(unit)} ops)"
        fault = f"the NMSE of {name} comes out as {nmse:.3e}, but {expected:.3e} in an exact replay"
        agrees = abs(nmse - expected) <= tolerance(expected)  # false for NaN
        return Verdict(None if agrees else fault, self._logits)


def _block(unit: Unit) -> str | None:
    """Return the block of all ops of a unit, ``None`` if it spans several."""
    blocks = {Op(op, "").block for op in unit}
    return blocks.pop() if len(blocks) == 1 else None


class _CannotFollow(Exception):  # noqa: N818 - no fault of the model: a replay raises nothing
    """Following differences raises what a replay does not."""


def _has_fast_bf16(device: torch.device) -> bool:
    """Whether matrix products in bf16 are faster than in fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())  # noqa: SLF001 - no public name
