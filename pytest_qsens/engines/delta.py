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
from pytest_qsens.results import MODES, Mode

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
    from pytest_qsens.samples import Rows

_TRIES = 3
"""Ops at either end of the model that are tried until one can be compared with its replay."""

TOLERANCE = 1e-2
"""How far an error may be from that of an exact replay, relative.

bf16 has 8 bits, and rounding is random; but what a layer amplifies of an error it amplifies of that rounding, too.
Found were up to 4e-4 in 24 layers, and 4e-3 in 68 of random weights, where errors grow a hundredfold on the way.
"""

SUMMATION = 1e-9
"""How far an error with everything else quantized may be from that of an exact replay, relative.

All that differs is the order in which squares are added in float64, and none of them is negative: 3e8 of them, in parts
of 2**16, come out within 1e-12. One integer that is another one moves the error by more than this.
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


class Waves:
    """Scores of units that are measured a wave at a time, and kept.

    Args:
        waves: Units that are measured together.
        measure: Measures some units.
        wanted: Tells which of them are measured when another one is asked for.

    """

    def __init__(
        self,
        waves: Iterable[Sequence[Unit]],
        measure: Callable[[Sequence[Unit]], Mapping[Unit, Score]],
        wanted: Callable[[Unit], bool],
    ) -> None:
        self._waves = list(waves)
        self._measure = measure
        self._wanted = wanted
        self._scores: dict[Unit, Score] = {}

    def add(self, scores: Mapping[Unit, Score]) -> None:
        """Take scores that were measured otherwise."""
        self._scores |= scores

    def score(self, unit: Unit) -> Score:
        """Measure a unit with those of its wave, unless it has been."""
        if unit not in self._scores:
            wave = next((wave for wave in self._waves if unit in wave), [unit])
            found = [other for other in wave if other == unit or (other not in self._scores and self._wanted(other))]
            try:
                self._scores |= self._measure(found)
            except Exception:  # one of them makes the model fail: the others shall have their scores
                if len(found) == 1:
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
        rows: Of each sample of every batch.

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
        rows: Sequence[Rows],
    ) -> None:
        super().__init__(captured, simulator, quantizable, memory)
        self._logits = logits
        self._rows = rows
        self._weights = Weights(fast_bf16=_has_fast_bf16(self._clean[0].output.device))
        self._deltas = [DeltaRun(run, self._weights, of_run) for run, of_run in zip(self._clean, rows, strict=True)]
        self._expected = expected
        self._wave_memory = memory // _WAVE_SHARE
        self._waves = self._find_waves(self._deltas)
        self._groups = [unit for wave in self._waves for unit in wave if len(unit) > 1]
        self._alone = Waves(self._waves, self._measure_alone, partial(self._wants, "isolated"))
        self._joined: dict[int | None, list[JointRun]] = {}
        self._others: dict[int | None, Waves] = {}
        self._checked = self._checked_group = self._checked_others = False
        self._replayed: set[Mode] = set()
        self.verdict: Verdict | None = None
        """What others can take over: it was found out by comparing, here or by another process."""
        if verdict is not None and verdict.logits == logits:
            self._settle(verdict)

    def check(self) -> None:
        """See whether differences are to be trusted, by replays of two ops, unless that is known, and of a group."""
        try:
            if not self._checked:
                self._settle(self._find_verdict())
            if self._groups and not self._checked_group and self.trusts("isolated"):
                self._checked_group = True
                fault = self._find_group_fault()
                if fault is not None:  # others may measure no groups, or smaller ones: it is no verdict for them
                    self._distrust(fault)
        except _CannotFollow as error:  # maybe for once only: no verdict for others
            self._distrust(str(error))

    def _settle(self, verdict: Verdict | None) -> None:
        self._checked = True
        self.verdict = verdict
        if verdict is not None and verdict.fault is not None:
            self._distrust(verdict.fault)

    def _distrust(self, why: str, modes: Collection[Mode] = MODES) -> None:
        self.distrusted = why if self.distrusted is None else f"{self.distrusted}; {why}"
        self._replayed.update(modes)
        self.name = "replay" if len(self._replayed) == len(MODES) else "delta+replay"
        if "isolated" in modes:
            self._checked = True
            self._deltas.clear()
        self._joined.clear()
        self._others.clear()

    def trusts(self, mode: Mode) -> bool:
        """Whether ops are measured together in this mode; they are not any more once that was found to be wrong."""
        return mode not in self._replayed

    def together(self, *ops: str) -> Score | None:
        """Score with only these ops quantized, measured with others of their block; the first time after `check`."""
        self.check()
        return self._alone.score(ops) if self.trusts("isolated") else None

    def measured_with(self, unit: Unit, mode: Mode) -> Collection[Unit]:
        """Others of its block."""
        waves = self._alone if mode == "isolated" else self._others.get(None)
        return () if waves is None or not self.trusts(mode) else waves.measured_with(unit)

    def all_but(self, *ops: str, seed: int | None = None) -> Score | None:
        """Score with everything but these ops quantized, measured with others of their block.

        The first time after `check_others`.
        """
        self.check_others()
        return self._with_others(seed).score(ops) if self.trusts("fallback") else None

    def check_others(self) -> None:
        """See whether ops that are measured together with everything else quantized get their own scores.

        Replays of two ops tell, the same in every process, and each finds out for itself: that takes less than any of
        the fully quantized runs that it makes, one and one with every seed.
        """
        if not self._checked_others and self.trusts("fallback"):
            self._checked_others = True
            fault = self._find_fault()
            if fault is not None:
                self._distrust(f"mode fallback is replayed: {fault}", ["fallback"])

    def _with_others(self, seed: int | None) -> Waves:
        if seed not in self._others:
            wanted = partial(self._wants, "fallback")
            self._others[seed] = Waves(self._joint_waves(), self._measure_others(seed), wanted)
        return self._others[seed]

    def _wants(self, mode: Mode, unit: Unit) -> bool:  # noqa: ARG002 - for others
        """Whether a unit is going to be asked for in this mode."""
        return True

    def _joint_waves(self) -> list[list[Unit]]:
        return self._find_waves(self._joint_together(None))

    def _most_at_once(self, runs: Sequence[Together]) -> int:
        return max(1, self._wave_memory // max(1, *(run.bytes_per_change() for run in runs)))

    def _find_waves(self, runs: Sequence[Together]) -> list[list[Unit]]:
        """Put the expected units of each block together, as many as there is memory for.

        A unit that spans blocks is a wave by itself: the scheduler gives each to a worker of its own.
        """
        able = self.exercised.intersection(self._quantizable)
        most = self._most_at_once(runs)
        waves: list[list[Unit]] = []
        for block, members in groupby(self._expected, key=_block):
            reached = (tuple(op for op in unit if op in able) for unit in members)
            wave = list(dict.fromkeys(unit for unit in reached if unit))  # two groups may come down to the same ops
            size = 1 if block is None else most
            waves += [wave[i : i + size] for i in range(0, len(wave), size)]
        return waves

    def _measure_alone(self, units: Sequence[Unit]) -> dict[Unit, Score]:
        return self._measure(units, self._deltas, self._quantize)

    def _measure_others(self, seed: int | None) -> Callable[[Sequence[Unit]], dict[Unit, Score]]:
        runs = self._joint_together(seed)
        return lambda units: self._measure(units, runs, lambda graph, unit: self._unquantized(graph, unit, seed))

    def _joint_together(self, seed: int | None) -> list[JointRun]:
        if seed not in self._joined:
            moved = None if seed is None else partial(factors, seed=seed)
            self._joined[seed] = [
                JointRun(run, clean.output, self._row_wise(run.graph), moved, rows)
                for run, clean, rows in zip(self._joint_runs(seed), self._clean, self._rows, strict=True)
            ]
        return self._joined[seed]

    def _row_wise(self, graph: Graph) -> dict[Node, RowWise]:
        return {
            node: RowWise(call, partial(self._blocks, op, node.target))
            for op in self._quantizable
            if self._simulator.is_row_wise(op)
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
                            score.add(reference, output, together.rows)
                    else:
                        for score, error in zip(found.values(), together.errors(changes), strict=True):
                            score.add_error(error)
            finally:
                run.release_all()
        return found

    @profile.phase("replay")
    def _find_verdict(self) -> Verdict | None:
        """Compare with a replay, for the first op and the last but one that can be; ``None`` if none can be."""
        compared = [next(filter(None, map(self._compared, end)), None) for end in self._ends()]
        found = [verdict for verdict in compared if verdict is not None]
        return next((verdict for verdict in found if verdict.fault is not None), found[0] if found else None)

    @profile.phase("replay")
    def _find_group_fault(self) -> str | None:
        """Compare with a replay of the largest group to be scored: its errors meet on their way, and may cancel."""
        with self._simulator.passing():  # the weights of a group may be most of the model
            verdict = next(filter(None, map(self._compared, self._largest())), None)
        return None if verdict is None else verdict.fault

    def _ends(self) -> tuple[list[Unit], list[Unit]]:
        """Ops at either end of the model, the best to compare first."""
        candidates: list[Unit] = [(op,) for op in self._quantizable if op in self.exercised]
        return candidates[:_TRIES], candidates[:-1][::-1][:_TRIES]

    def _largest(self) -> list[Unit]:
        """List groups that are going to be scored, the best to compare first."""
        return sorted(self._groups, key=len, reverse=True)[:_TRIES]

    def _compared(self, unit: Unit) -> Verdict | None:
        """Compare with a replay; ``None`` if its output cannot be scored."""
        expected = self._exact_sse(self.isolated(*unit))
        if expected is None:
            return None
        try:
            found = self._alone.score(unit)
        except Exception as error:
            raise _CannotFollow(f"differences cannot be followed ({first_line(error)})") from error
        size = sum(map(energy, self.references))
        nmse, exact = found.sse / size, expected / size
        fault = f"the NMSE of {_named(unit)} comes out as {nmse:.3e}, but {exact:.3e} in an exact replay"
        agrees = abs(nmse - exact) <= tolerance(exact)  # false for NaN
        return Verdict(None if agrees else fault, self._logits)

    def _exact_sse(self, outputs: Iterator[Tensor]) -> float | None:
        """Sum of squared differences of a replay; ``None`` if there is none."""
        exact = Score(logits=False)
        try:
            for reference, output in zip(self.references, outputs, strict=True):
                exact.add(reference, output)
        except Exception:  # noqa: BLE001 - quantized values can make a model raise anything: it is told when op is scored
            return None
        return exact.sse if exact.finite else None

    @profile.phase("replay")
    def _find_fault(self) -> str | None:
        """Compare the ops at both ends with replays, everything else quantized, side by side if there is memory for it.

        And the largest group that is going to be scored. The pass is one of its own: waves hold ops that this process
        may not be asked for. The second op goes with them, so that several changes meet in every layer, and not at the
        end alone.
        """
        expected: dict[Unit, float] = {}
        for end in (*self._ends(), self._largest()):
            exact = ((unit, self._exact_sse(self.fallback(*unit))) for unit in end if unit not in expected)
            expected |= next(({unit: sse} for unit, sse in exact if sse is not None), {})
        if not expected:
            return None
        units = list(dict.fromkeys([*self._ends()[0][:2], *expected]))
        try:
            try:
                found = self._followed(units)
            except Exception:  # noqa: BLE001 - maybe one without a replay makes the model fail: that is no fault
                found = self._followed(list(expected))
        except Exception as error:  # noqa: BLE001 - whatever torch raises when it runs several values together
            return f"ops cannot be followed side by side ({first_line(error)})"
        for unit, sse in expected.items():
            if not abs(found[unit].sse - sse) <= SUMMATION * sse:  # NaN is never within it
                sizes = f"the SSE comes out as {found[unit].sse:.9e}, but {sse:.9e} in an exact replay"
                return f"with everything but {_named(unit)} quantized {sizes}"
        return None

    def _followed(self, units: Sequence[Unit]) -> dict[Unit, Score]:
        """Measure with everything but each of these quantized, side by side as far as there is memory for it."""
        most, measure = self._most_at_once(self._joint_together(None)), self._measure_others(None)
        parts = (measure(units[i : i + most]) for i in range(0, len(units), most))
        return {unit: score for part in parts for unit, score in part.items()}


def _named(unit: Unit) -> str:
    """Name what is measured as one for a message."""
    return unit[0] if len(unit) == 1 else f"{unit[0]} to {unit[-1]} ({len(unit)} ops)"


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
