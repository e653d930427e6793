"""The engine that estimates: all ops together by backward passes, corrected by a few that are measured."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pytest_qsens import profile
from pytest_qsens.engines.delta import DeltaEngine
from pytest_qsens.estimate import MEASURED, Estimate, Estimator, Evidence, shifted, spread_over
from pytest_qsens.graph.backward import Backward
from pytest_qsens.graph.calls import unquantized
from pytest_qsens.graph.probes import Error, ProbedErrors, common_samples, fisher_root, signs
from pytest_qsens.metrics import Score, energy
from pytest_qsens.results import CANNOT

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from pytest_qsens.engines import Unit
    from pytest_qsens.engines.delta import Verdict
    from pytest_qsens.engines.replay import Captured
    from pytest_qsens.graph.backward import Gradient, Probe
    from pytest_qsens.graph.calls import Call
    from pytest_qsens.graph.replay import Run
    from pytest_qsens.quant.simulate import Simulator
    from pytest_qsens.results import Mode, Scores

_PASSES = {1: 4, 2: 3, 16: 2}
"""Independent samples, at least so many → backward passes for the squared error, and as many for the divergence."""

_REGION_SHARE = 16
"""The part of the memory for the values that are computed at a time: one in so many. Autograd keeps several of each."""

FIRST_SEED = 20260301

SEED = FIRST_SEED
"""Of the first probe; benchmarks try others."""

NO_GRADIENT = "no gradient reaches it"


class Estimates(NamedTuple):
    """What is estimated of the ops that are going to be scored, in one mode.

    Attributes:
        found: Op → ``sse``, and ``kl`` if that is compared, with their intervals; not of ops that are measured.
        refused: Ops that are measured because gradients cannot tell what they do → why.

    """

    found: Mapping[str, Mapping[str, Estimate]]
    refused: Mapping[str, str]


class _Sums(NamedTuple):
    """What passes through all batches have brought, by op.

    Attributes:
        squares: Of J·δ.
        divergence: Half of that under the Fisher information, per position; empty if it is not asked for.
        products: Of J·δ with what an additional pass started from.
        refused: As in `Estimates`; of those ops there is nothing else.

    """

    squares: Mapping[str, Evidence]
    divergence: Mapping[str, Evidence]
    products: Mapping[str, float]
    refused: Mapping[str, str]


class ProbeEngine(DeltaEngine):
    """Estimates the ops that are going to be scored, all at once, when the first is asked for.

    Some are measured, as engine ``delta`` does: those that correct the others, and those that gradients say nothing
    of. The same ops are chosen, and the same probes drawn, in every process.
    """

    name: str = "probe"

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
        super().__init__(captured, simulator, quantizable, memory, expected, verdict, logits=logits)
        self._region = memory // _REGION_SHARE
        self._wanted = [op for wave in self._waves for (op,) in wave]  # groups are refused
        self._estimates: dict[Mode, Estimates] = {}

    def estimates(self, mode: Mode) -> Estimates:
        """Estimate all ops that are going to be scored, once."""
        if mode not in self._estimates:
            with profile.phase("replay"):
                found = self._isolated_estimates() if mode == "isolated" else self._fallback_estimates()
            self._estimates[mode] = found
        return self._estimates[mode]

    def estimate(self, op: str, mode: Mode) -> Mapping[str, Estimate] | None:
        """Estimate of an op, ``sse`` and maybe ``kl``; ``None`` if it is measured."""
        return self.estimates(mode).found.get(op)

    def why_measured(self, op: str, mode: Mode) -> str | None:
        """Why gradients cannot tell what an op does, if that is so."""
        why = self.estimates(mode).refused.get(op)
        return None if why is None else f"{CANNOT}{why}"

    def _distrust(self, why: str) -> None:
        super()._distrust(why)
        self.name = "probe"  # whatever measures those that correct the others

    def _isolated_estimates(self) -> Estimates:
        self.check()
        sums = self._sum(self._clean, None, self._rounding)
        estimator = Estimator(sums.squares)
        chosen = spread_over(estimator.values, MEASURED)
        scores = self._exact(chosen, self._measure_alone, self.isolated)
        exact = {op: found for op, score in scores.items() if (found := score.related(1.0, 1)) is not None}
        by_metric = {"sse": estimator.corrected(_of_metric(exact, "sse"))}
        if self._logits:
            by_metric["kl"] = Estimator(sums.divergence).corrected(_of_metric(exact, "kl"))
        estimates = _without(by_metric, chosen, sums.refused)
        self._alone.add(_by_unit(scores), self._left(estimates))
        return estimates

    def _fallback_estimates(self) -> Estimates:
        joint = self._joint_runs(None)
        errors = [run.output - clean.output for run, clean in zip(joint, self._clean, strict=True)]
        sums = self._sum(joint, errors, self._restoring)
        base = sum(map(energy, errors))
        squares = Estimator(sums.squares).values
        raw = {op: base + 2 * sums.products[op] + square for op, square in squares.items()}
        scale = {op: math.sqrt(square * (square + base)) for op, square in squares.items()}
        chosen = spread_over(raw, MEASURED)
        scores = self._exact(chosen, self._measure_others(None), self.fallback)
        exact = {op: score.sse for op, score in scores.items() if score.finite}
        estimates = _without({"sse": shifted(raw, scale, exact)}, chosen, sums.refused)
        if self.distrusted is None:
            self._with_others(None).add(_by_unit(scores), self._left(estimates))
        return estimates

    def _left(self, estimates: Estimates) -> list[list[Unit]]:
        """Ops to be measured, a wave at a time."""
        waves = ([unit for unit in wave if unit[0] not in estimates.found] for wave in self._waves)
        return [wave for wave in waves if wave]

    def _exact(
        self,
        ops: Sequence[str],
        together: Callable[[Sequence[Unit]], Mapping[Unit, Score]],
        alone: Callable[[str], Iterable[Tensor]],
    ) -> Mapping[str, Score]:
        """Measure some ops, together if differences are trusted."""
        if self.distrusted is None:
            return {op: score for (op,), score in together([(op,) for op in ops]).items()}
        found = {op: Score(logits=self._logits) for op in ops}
        for op, score in found.items():
            for reference, output in zip(self.references, alone(op), strict=True):
                score.add(reference, output)
        return found

    def _sum(
        self,
        runs: Sequence[Run],
        starts: Sequence[Tensor] | None,
        error: Callable[[str, Gradient], Error],
    ) -> _Sums:
        """Run backward passes through all batches and add up what they bring.

        Args:
            runs: Of all batches.
            starts: What one more pass starts from in each of them.
            error: Computes the error of a call.

        """
        fisher = self._logits and starts is None
        positions = sum(run.output.numel() // run.output.shape[-1] for run in runs)
        samples = [common_samples(run.graph.inputs.values()) for run in runs]
        count = min(passes for least, passes in _PASSES.items() if sum(size or 1 for size in samples) >= least)
        collected = _Collected(count, fisher=fisher)
        for number, run in enumerate(runs):
            seeds = [SEED + 2 * count * number + i for i in range(2 * count)]
            probes: list[Probe] = [partial(signs, run.output, seed) for seed in seeds[:count]]
            probes += [partial(fisher_root, run.output, seed) for seed in seeds[count:] if fisher]
            probes += [partial(_same, starts[number])] if starts is not None else []
            ops = {node: op for op in self._wanted for node in run.graph.calls.get(op, ())}
            errors = ProbedErrors(ops, error, len(probes), samples[number])
            backward = Backward(run, self._weights, self._region)
            with self._simulator.passing():
                backward.passes(probes, errors.watch)
            run.release_all()
            collected.add(errors, {ops[node]: why for node, why in backward.blocked.items() if node in ops})
            collected.matter(op for node, op in ops.items() if backward.matters(node))
        return collected.sums(self._wanted, positions)

    def _rounding(self, op: str, gradient: Gradient) -> Error:
        """Tell what quantizing an op does, everything else unquantized."""
        return self._error(op, gradient.call, gradient.value)

    def _restoring(self, op: str, gradient: Gradient) -> Error:
        """Tell what not quantizing an op does, everything else quantized."""
        error = self._error(op, gradient.call, unquantized(gradient.call), gradient.value)
        return Error(error.whole.neg(), *(None if part is None else part.neg() for part in error[1:]))

    def _error(self, op: str, call: Call, clean: Tensor, quantized: Tensor | None = None) -> Error:
        whole = (self._simulator.output(op, call, convolved=torch.float32) if quantized is None else quantized) - clean
        if call.kind == "embedding":
            return Error(whole)
        rounding = self._simulator.input_error(op, call)
        if call.kind == "linear":
            return Error(whole, self._weights.product(rounding, call.weight), rounding)
        return Error(whole, unquantized(replace(call, x=rounding, bias=None)), rounding)


class _Collected:
    """Adds up what passes through one batch after the other have brought."""

    def __init__(self, passes: int, *, fisher: bool) -> None:
        self._signs = slice(0, passes)
        self._fisher = slice(passes, 2 * passes) if fisher else None
        self._random = slice(0, 2 * passes if fisher else passes)
        self._squares: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._products: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._refused: dict[str, str] = {}
        self._mattering: set[str] = set()

    def add(self, errors: ProbedErrors, refused: Mapping[str, str]) -> None:
        """Take what one batch has brought."""
        for op, squares in errors.squares().items():
            self._squares[op].append(squares)
        for op, products in errors.products().items():
            self._products[op].append(products)
        self._refused |= refused

    def matter(self, ops: Iterable[str]) -> None:
        """Note ops that the output depends on."""
        self._mattering.update(ops)

    def sums(self, ops: Iterable[str], positions: int) -> _Sums:
        """Tell what all batches have brought of these ops."""
        refused = {op: self._refused[op] for op in ops if op in self._refused}
        refused |= {op: NO_GRADIENT for op in ops if op not in refused and not self._says(op)}
        told = [op for op in ops if op not in refused]
        fisher = self._fisher
        return _Sums(
            {op: self._evidence(op, self._signs, 1) for op in told},
            {op: self._evidence(op, fisher, 0.5 / positions) for op in told} if fisher is not None else {},
            {op: sum(float(found[-1].sum()) for found in self._products[op]) for op in told},
            {op: why for op, why in refused.items() if op in self._mattering},
        )

    def _says(self, op: str) -> bool:
        """Whether there are numbers above zero to go by."""
        squares = torch.stack([found[self._random] for found in self._squares[op]] or [torch.zeros(1)]).sum(0)
        return bool(((squares > 0) & squares.isfinite()).all())

    def _evidence(self, op: str, passes: slice, factor: float) -> Evidence:
        products = torch.cat([found[passes].flatten() for found in self._products[op]])
        return Evidence(
            [(found[passes] * factor).tolist() for found in self._squares[op]],
            (products.square() * factor).tolist(),
        )


def _by_unit(scores: Mapping[str, Score]) -> dict[Unit, Score]:
    return {(op,): score for op, score in scores.items()}


def _same(value: Tensor) -> Tensor:
    return value


def _of_metric(scores: Mapping[str, Scores], metric: str) -> dict[str, float]:
    return {op: value for op, found in scores.items() if (value := found[metric]) is not None}


def _without(
    by_metric: Mapping[str, Mapping[str, Estimate]], measured: Sequence[str], refused: Mapping[str, str]
) -> Estimates:
    """Put together what is estimated of each op, but for those that are measured."""
    ops = [op for op in by_metric["sse"] if op not in measured]
    found = {op: {metric: values[op] for metric, values in by_metric.items()} for op in ops}
    return Estimates(found, refused)
