"""The engine that estimates: all ops together by backward passes, corrected by a few that are measured."""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pytest_qsens import profile
from pytest_qsens.engines.delta import DeltaEngine
from pytest_qsens.estimate import (
    MEASURED,
    MEASURED_FALLBACK,
    Estimate,
    Estimator,
    Evidence,
    added,
    depths,
    representatives,
    restored,
    spread_over,
)
from pytest_qsens.graph.backward import Backward
from pytest_qsens.graph.calls import unquantized
from pytest_qsens.graph.marks import MARKS
from pytest_qsens.graph.probes import Error, ProbedErrors, common_samples, fisher_root, signs
from pytest_qsens.metrics import Score, energy
from pytest_qsens.ops import STATES
from pytest_qsens.results import CANNOT, MODES

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
    from pytest_qsens.samples import Rows
    from pytest_qsens.sketches import Sketcher

_PASSES = {1: 4, 2: 3, 16: 2}
"""Independent samples, at least so many → backward passes for the squared error, and as many for the divergence."""

_WHOLE = ("embedding", *STATES)
"""Types of ops whose error is not taken apart into those of an input and a weight."""

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

    Args:
        captured: Every evaluation batch.
        simulator: Gives the outputs of quantized ops.
        quantizable: Names of ops that can be quantized.
        memory: Bytes for values.
        expected: Those that are going to be scored.
        verdict: Whether differences are to be trusted; `check` finds out if it is not known.
        logits: Whether outputs are compared as distributions of classes, too.
        rows: Of each sample of every batch.
        sketchers: As for engine ``delta``.
        strata: Parts of the depth in each of which one op of every layer type is measured; ``None`` measures a few
            over the range.

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
        rows: Sequence[Rows],
        sketchers: Sequence[Sketcher | None],
        strata: int | None = None,
    ) -> None:
        super().__init__(
            captured,
            simulator,
            quantizable,
            memory,
            expected,
            verdict,
            logits=logits,
            rows=rows,
            sketchers=sketchers,
        )
        self._strata = strata
        self._region = memory // _REGION_SHARE
        self._wanted = [op for wave in self._waves for (op,) in wave]  # groups are refused
        self._estimates: dict[Mode, Estimates] = {}
        self._exactly: set[str] = set()
        self._check: Callable[[], None] = _nothing
        self._correcting: Mapping[str, Score] = {}
        self._outputs = sum(run.graph.output.meta["val"].numel() for run in self._clean)

    def estimates(self, mode: Mode) -> Estimates:
        """Estimate all ops that are going to be scored, once."""
        if mode not in self._estimates:
            with profile.phase("replay"):
                found = self._isolated_estimates() if mode == "isolated" else self._fallback_estimates()
            self._estimates[mode] = found
        return self._estimates[mode]

    def estimate(self, op: str, mode: Mode) -> Mapping[str, Estimate] | None:
        """Estimate of an op, ``sse`` and maybe ``kl``; ``None`` if it is measured."""
        return None if op in self._exactly else self.estimates(mode).found.get(op)

    def watch(self, check: Callable[[], None]) -> None:
        """Call this before each op that is measured, and after each that a gradient has reached."""
        self._check = check

    def measure_exactly(self, ops: Collection[str]) -> None:
        """Estimate these no more."""
        self._exactly.update(ops)

    def _wants(self, mode: Mode, unit: Unit) -> bool:
        (op,) = unit
        return op in self._exactly or (mode in self._estimates and op not in self._estimates[mode].found)

    def why_measured(self, op: str, mode: Mode) -> str | None:
        """Why gradients cannot tell what an op does, if that is so."""
        why = self.estimates(mode).refused.get(op)
        return None if why is None else f"{CANNOT}{why}"

    def _distrust(self, why: str, modes: Collection[Mode] = MODES) -> None:
        super()._distrust(why, modes)
        self.name = "probe"  # whatever measures those that correct the others

    def together(self, *ops: str) -> Score | None:
        """Score with only this op quantized: of one that corrects the others, it is known."""
        return self._correcting.get(ops[0]) or super().together(*ops)

    def _isolated_estimates(self) -> Estimates:
        sums = self._sum(self._clean, None, self._rounding)
        estimator = Estimator(sums.squares, self._outputs)
        chosen = self._choose(estimator.values, MEASURED)
        # replays: to find out whether differences are to be trusted would take more
        self._correcting = self._exact(chosen, self.isolated)
        exact = {op: found for op, score in self._correcting.items() if (found := score.related(1.0, 1)) is not None}
        by_metric = {"sse": self._corrected(estimator, _of_metric(exact, "sse"))}
        if self._logits:
            divergence = Estimator(sums.divergence, self._outputs)
            by_metric["kl"] = self._corrected(divergence, _of_metric(exact, "kl"))
        estimates = _without(by_metric, chosen, sums.refused)
        self._alone.add(_by_unit(self._correcting))
        return estimates

    def _fallback_estimates(self) -> Estimates:
        self.check_others()
        joint = self._joint_runs(None)
        errors = [run.output - clean.output for run, clean in zip(joint, self._clean, strict=True)]
        sums = self._sum(joint, errors, self._restoring)
        base = sum(map(energy, errors))
        squares = Estimator(sums.squares, self._outputs).values
        chosen = self._choose(added(base, sums.products, squares), MEASURED_FALLBACK)
        scores = self._exact_others(chosen)
        exact = {op: score.sse for op, score in scores.items() if score.finite}
        estimates = _without({"sse": restored(base, sums.products, squares, exact)}, chosen, sums.refused)
        if self.trusts("fallback"):
            self._with_others(None).add(_by_unit(scores))
        return estimates

    def _corrected(self, estimator: Estimator, exact: Mapping[str, float]) -> Mapping[str, Estimate]:
        if self._strata is None:
            return estimator.corrected(exact)
        return estimator.represented(exact, depths(self._wanted))

    def _choose(self, values: Mapping[str, float], count: int) -> list[str]:
        """Choose the ops that are measured to correct the others."""
        if self._strata is None:
            return spread_over(values, count)
        return [op for op in representatives(depths(self._wanted), self._strata) if op in values]

    def _exact_others(self, ops: Sequence[str]) -> Mapping[str, Score]:
        """Measure with everything but each of these ops quantized: together, or one by one if that fails."""
        if self.trusts("fallback"):
            with suppress(Exception):
                found = self._measure_others(None)([(op,) for op in ops])
                return {op: score for (op,), score in found.items()}
        return self._exact(ops, self.fallback)

    def _exact(self, ops: Sequence[str], outputs: Callable[[str], Iterable[Tensor]]) -> dict[str, Score]:
        """Measure some ops by replays; those that make the model fail are left out."""
        found = {}
        for op in ops:
            self._check()
            score = Score(logits=self._logits)
            with suppress(Exception):  # it is told when the op is scored
                for reference, output, rows in zip(self.references, outputs(op), self._rows, strict=True):
                    score.add(reference, output, rows)
                found[op] = score
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
        with self._simulator.passing(self._region if len(runs) > 1 else 0):  # each batch takes all weights
            for number, run in enumerate(runs):
                seeds = [SEED + 2 * count * number + i for i in range(2 * count)]
                probes: list[Probe] = [partial(signs, run.output, seed) for seed in seeds[:count]]
                probes += [partial(fisher_root, run.output, seed) for seed in seeds[count:] if fisher]
                probes += [partial(_same, starts[number])] if starts is not None else []
                ops = {node: op for op in self._wanted for node in run.graph.calls.get(op, ())}
                errors = ProbedErrors(ops, error, len(probes), samples[number])
                backward = Backward(run, self._weights, self._region, ops)
                backward.passes(probes, partial(self._watched, errors))
                run.release_all()
                collected.add(errors, {ops[node]: why for node, why in backward.blocked.items() if node in ops})
                collected.matter(op for node, op in ops.items() if backward.matters(node))
                collected.states.update(op for node, op in ops.items() if node.target in MARKS.values())
        return collected.sums(self._wanted, positions)

    def _watched(self, errors: ProbedErrors, gradient: Gradient) -> None:
        errors.watch(gradient)
        self._check()

    def _rounding(self, op: str, gradient: Gradient) -> Error:
        """Tell what quantizing an op does, everything else unquantized."""
        call = gradient.call
        if call.kind in _WHOLE:
            return Error(self._simulator.output(op, call).sub_(gradient.value))
        quantized, rounding = self._simulator.rounded(op, call)
        return Error(quantized.sub_(gradient.value).sub_(self._times_weight(call, rounding)), rounding)

    def _restoring(self, op: str, gradient: Gradient) -> Error:
        """Tell what not quantizing an op does, everything else quantized."""
        call = gradient.call
        whole = unquantized(call).sub_(gradient.value)
        if call.kind in _WHOLE:
            return Error(whole)
        rounding = self._simulator.input_error(op, call)
        return Error(whole.add_(self._times_weight(call, rounding)), rounding.neg_())

    def _times_weight(self, call: Call, x: Tensor) -> Tensor:
        if call.kind == "linear":
            return self._weights.product(x, call.weight)
        return unquantized(replace(call, x=x, bias=None))


class _Collected:
    """Adds up what passes through one batch after the other have brought.

    Attributes:
        states: Ops that are keys, values or queries.

    """

    def __init__(self, passes: int, *, fisher: bool) -> None:
        self._signs = slice(0, passes)
        self._fisher = slice(passes, 2 * passes) if fisher else None
        self._random = slice(0, 2 * passes if fisher else passes)
        self._squares: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._products: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._refused: dict[str, str] = {}
        self._mattering: set[str] = set()
        self.states: set[str] = set()

    def add(self, errors: ProbedErrors, refused: Mapping[str, str]) -> None:
        """Take what one batch has brought."""
        for op, (squares, products) in errors.sums().items():
            self._squares[op].append(squares)
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
            drawn=op in self.states,
        )


def _by_unit(scores: Mapping[str, Score]) -> dict[Unit, Score]:
    return {(op,): score for op, score in scores.items()}


def _nothing() -> None:
    pass


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
