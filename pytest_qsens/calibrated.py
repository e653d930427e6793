"""A calibrated model, ready to score its ops. Knows nothing of pytest."""

from __future__ import annotations

import math
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from pytest_qsens import profile
from pytest_qsens.engine_setup import Setup
from pytest_qsens.engines.availability import KERNEL_ENGINES, check_added, check_engine, check_group, check_products
from pytest_qsens.graph import unlisted
from pytest_qsens.graph.narrow import mapped_bytes
from pytest_qsens.interactions import encode
from pytest_qsens.memory import default_memory
from pytest_qsens.metrics import Score
from pytest_qsens.models.spec import ready
from pytest_qsens.noise import SEEDS, distinguishable, spread
from pytest_qsens.op_results import NAMED, measured_result, why_left_out, without_score
from pytest_qsens.ops import CACHED, TOTAL, Op
from pytest_qsens.preparation import digest
from pytest_qsens.quant.assignment import Assignment
from pytest_qsens.quant.schemes import scheme_named
from pytest_qsens.reach import Reach
from pytest_qsens.reference import Reference
from pytest_qsens.results import WITHOUT, OpResult
from pytest_qsens.samples import Sums
from pytest_qsens.threads import reproducible_sums
from pytest_qsens.wording import first_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from pytest_qsens.artifact import Artifact
    from pytest_qsens.engines import Engine, Unit
    from pytest_qsens.estimate import Estimate
    from pytest_qsens.models.spec import ModelSpec
    from pytest_qsens.profile import Phase
    from pytest_qsens.quant.calibration import Calibration
    from pytest_qsens.quant.simulate import Simulator
    from pytest_qsens.results import Mode, Scores
    from pytest_qsens.samples import Rows
    from pytest_qsens.sketches import Sketcher

_QUANTIZED = {
    "isolated": "only this {} is",
    "fallback": "everything but this {} is",
    "added": "this {} is, beside all that the config says,",
}
_CHANGE: dict[Mode, tuple[str, int]] = {"fallback": ("gain", 1), "added": ("loss", -1)}
"""Mode → what the difference to the whole model is called, and its sign: positive is what speaks for full precision."""


class CalibratedModel:
    """One model, quantized in one way, calibrated once; scores one op at a time. Make it with `calibrate`.

    Attributes:
        reference_seconds: Wall seconds of one unquantized forward of all evaluation batches.
        reach: Which ops can be measured, and why the others cannot.

    """

    def __init__(
        self,
        assignment: Assignment,
        calibration: Calibration,
        simulator: Simulator,
        engine: Engine,
        *,
        logits: bool,
        engine_reason: str | None,
        reference_seconds: float,
        rows: Sequence[Rows],
        sketchers: Sequence[Sketcher | None],
    ) -> None:
        self._engine_reason = engine_reason
        self.reference_seconds = reference_seconds
        self._assignment = assignment
        self._calibration = calibration
        self._simulator = simulator
        self._engine = engine
        self.reach = Reach(assignment, calibration, engine)
        self._reference = Reference(engine, logits=logits, rows=rows, sketchers=sketchers)
        self._sketches: dict[Unit, str] = {}
        self._joint: dict[int | None, Scores | str] = {}
        self._profiler = profile.current

    @property
    def engine(self) -> str:
        """Name of the engine in use."""
        return self._engine.name

    @property
    def engine_reason(self) -> str | None:
        """Why another engine than the usual one is used, as far as it is known by now."""
        return self._engine_reason or self._engine.distrusted

    @cached_property
    def reference_digest(self) -> str:
        """Hash of the unquantized outputs' bits: equal for the same model and data on the same machine."""
        with self._profiled("reference"):
            return digest(self._engine.references)

    @property
    def functional_ops(self) -> tuple[OpResult, ...]:
        """Products of activations that nothing quantizes here."""
        return tuple(  # in words that fit every scheme and config: runs under the same schemes share what is cached
            without_score(Op(name, kind), "unquantizable", reason=f"{kind} products are not quantized")
            for name, kind in self._engine.functional
            if name not in self._assignment.names
        )

    @property
    def unlisted_attention(self) -> list[str]:
        """Sentences about attention that ran in modules whose keys and values are no ops, if some are quantized."""
        return unlisted.told(self._calibration.attending)

    def score(self, op: Op, modes: Sequence[Mode]) -> OpResult:
        """Measure one op, or group, in each of the modes; one that has no score says why.

        A group is measured with the members that can be, and says which were not.
        """
        return self._sized(op, self.reach.refused(op) or self._scored(op, modes))

    def _sized(self, op: Op, result: OpResult) -> OpResult:
        """Tell how much a cache stores of a token, of keys and values that the calibration data reached."""
        known = [found for member in op.ops if (found := self._calibration.per_token.get(member.name)) is not None]
        wanted = sum(member.type in CACHED for member in op.ops)
        if not wanted or len(known) < wanted:
            return result
        return replace(result, kv_values=sum(values for values, _ in known), kv_heads=sum(heads for _, heads in known))

    def _scored(self, op: Op, modes: Sequence[Mode]) -> OpResult:
        unit = self.reach.flipped(op)
        start = time.perf_counter()
        with self._profiled(self._engine.phase), torch.no_grad():
            estimates = {mode: found for mode in modes if (found := self._engine.estimate(op.name, mode)) is not None}
            measured = {
                mode: self._estimated(estimates[mode], mode) if mode in estimates else self._measure(op, unit, mode)
                for mode in modes
            }
            notes = [self._engine.why_measured(op.name, mode) for mode in modes]
        failures = [
            f"{values} when {_QUANTIZED[mode].format('group' if op.members else 'op')} quantized"
            for mode, values in measured.items()
            if isinstance(values, str)
        ]
        notes += [self._note] if measured.keys() - {"isolated"} else []
        note = "; ".join(dict.fromkeys(filter(None, notes))) or None
        result = measured_result(op, measured, failures, note, time.perf_counter() - start)
        if without := self.reach.left_out(op):
            left_out = f"{WITHOUT}{why_left_out(op, without)}"
            result = replace(result, reason="; ".join(filter(None, (result.reason, left_out))))
        result = replace(result, sketch=self._sketches.pop(unit, None))
        size = self._reference.size.energy
        intervals = {mode: (found["sse"].low / size, found["sse"].high / size) for mode, found in estimates.items()}
        return replace(result, status="estimated", intervals=intervals) if intervals and not failures else result

    def estimated(self, op: Op, mode: Mode) -> OpResult | None:
        """Tell what is known of an op without measuring it, if anything is; the first call estimates all ops.

        Those that were measured to correct the estimates are known exactly.
        """
        with self._profiled(self._engine.phase), torch.no_grad():
            found = self._engine.estimate(op.name, mode)
            refused = self._engine.why_measured(op.name, mode)
        return self.score(op, (mode,)) if found is not None or refused is None else None

    def watch(self, check: Callable[[], None]) -> None:
        """Call this between the steps of estimating all ops: what it raises ends that."""
        self._engine.watch(check)

    def measure_exactly(self, ops: Collection[str]) -> None:
        """Measure these ops, when they are scored next, and together, instead of estimating them."""
        self._engine.measure_exactly(ops)

    def measured_with(self, op: Op, mode: Mode, others: Iterable[Op]) -> list[Op]:
        """Return those of ``others`` that were measured together with what was just scored: they take no time now."""
        found = self._engine.measured_with(self.reach.flipped(op), mode)
        return [other for other in others if self.reach.flipped(other) in found] if found else []

    def total(self) -> OpResult:
        """Measure the model with everything quantized at once."""
        start = time.perf_counter()
        # no weights are kept: each is used once, and all of them may not fit into the memory
        with self._profiled(self._engine.phase), torch.no_grad(), self._simulator.passing():
            joint = self._joint_scores()
        failures = [f"{joint} when everything is quantized"] if isinstance(joint, str) else []
        return measured_result(Op(TOTAL, TOTAL), {"isolated": joint}, failures, self._note, time.perf_counter() - start)

    @property
    def _note(self) -> str | None:
        """What has to be said of every score with everything else quantized, if something has."""
        without = self._assignment.unsimulated
        left_out = f"without {first_of(without, NAMED)}, whose schemes cannot be simulated" if without else None
        return "; ".join(filter(None, (self._engine.note, left_out))) or None

    @contextmanager
    def _profiled(self, phase: Phase) -> Iterator[None]:
        with profile.running(self._profiler), profile.phase(phase):
            yield

    def _measure(self, op: Op, unit: Unit, mode: Mode) -> Scores | str:
        if mode == "isolated":
            # a group that spans blocks would keep as many weights as the model has blocks
            with self._simulator.passing() if op.spans_blocks else nullcontext():
                score = self._measured_with_others(lambda: self._engine.together(*unit)) or self._reference.summed(
                    self._engine.isolated(*unit), sketching=True
                )
                result = score if isinstance(score, str) else self._reference.related(score)
            if not isinstance(score, str) and not isinstance(result, str) and score.sketch is not None:
                self._sketches[unit] = encode(score.sketch.numpy() / math.sqrt(self._reference.size.energy))
            for name in () if self._joint else unit:  # nothing else needs these weights quantized
                self._simulator.forget(name)
            return result
        joint = self._joint_scores()
        result = self._all_but(unit, None)
        if not isinstance(result, str) and not isinstance(joint, str):
            change, sign = _CHANGE[mode]
            result[change] = sign * (_number(joint["nmse"]) - _number(result["nmse"]))
            if self._engine.perturbs:
                self._add_noise(unit, result, change, sign)
        return result

    def _estimated(self, estimate: Mapping[str, Estimate], mode: Mode) -> Scores | str:
        score = Score(logits=False)
        score.add_error(Sums(estimate["sse"].value, ()))
        result = self._reference.related(score)
        if not isinstance(result, str):
            if "kl" in estimate:
                result["kl"] = estimate["kl"].value
            joint = self._joint_scores() if mode == "fallback" else None
            if joint is not None and not isinstance(joint, str):
                result["gain"] = _number(joint["nmse"]) - _number(result["nmse"])
        return result

    def _all_but(self, unit: Unit, seed: int | None) -> Scores | str:
        score = self._measured_with_others(lambda: self._engine.all_but(*unit, seed=seed)) or self._reference.summed(
            self._engine.fallback(*unit, seed=seed)
        )
        return score if isinstance(score, str) else self._reference.related(score)

    def _measured_with_others(self, measure: Callable[[], Score | None]) -> Score | None:
        """Score an op with others at once, if the engine can; where that fails, the op by itself shows why."""
        try:
            return measure()
        except Exception:  # noqa: BLE001 - as in `Reference.summed`
            return None

    def _add_noise(self, unit: Unit, result: Scores, change: str, sign: int) -> None:
        """Say how far the score, and its difference to the whole, move when values move in their last digits."""
        draws, changes = [_number(result["nmse"])], [_number(result[change])]
        for seed in SEEDS:
            joint, other = self._joint_scores(seed), self._all_but(unit, seed)
            if not isinstance(joint, str) and not isinstance(other, str):
                draws.append(_number(other["nmse"]))
                changes.append(sign * (_number(joint["nmse"]) - _number(other["nmse"])))
        if len(draws) == 1 + len(SEEDS):
            result["noise"] = spread(draws)
            result[f"{change}_noise"] = spread(changes)
            result["distinguishable"] = distinguishable(changes)

    def _joint_scores(self, seed: int | None = None) -> Scores | str:
        if seed not in self._joint:
            score = self._reference.summed(self._engine.joint(seed))
            self._joint[seed] = score if isinstance(score, str) else self._reference.related(score)
        return self._joint[seed]


def _number(value: float | None) -> float:
    return 0.0 if value is None else value


def calibrate(
    spec: ModelSpec,
    ops: Sequence[Op],
    scheme: str | Assignment,
    *,
    engine: str = "auto",
    device: str = "cpu",
    divergence: bool = True,
    expected: Collection[Op] | None = None,
    memory: int | None = None,
    workers: int = 1,
    artifact: Artifact | None = None,
    representatives: int | None = None,
    interactions: bool = False,
) -> CalibratedModel:
    """Load nothing, but run everything once: calibration, capture, reference.

    The profiler that runs meanwhile (`pytest_qsens.profile`) times what is scored later, too.

    Args:
        spec: Model and batches. The model is switched to evaluation mode and stays so. It computes in fp32, but the
            weights of its linear layers and embeddings stay as narrow as they are (`pytest_qsens.graph.narrow`).
        ops: The ops of the model, as listed at collection.
        scheme: Name of a scheme, as `scheme_named` takes it, for all ops; or what quantizes each of them.
        engine: ``delta``, ``replay``, ``eager``, or ``auto``: delta unless the model's graph cannot be captured;
            ``probe`` estimates; ``fx`` or ``inc`` for int8 kernels.
        device: A torch device.
        divergence: Whether logits are compared as distributions, too, which takes all of them.
        expected: The ops, or groups of them, that are going to be scored, if that is known: an engine that measures
            several together leaves out the others, unless that are all.
        memory: Bytes for values that could be computed again; by default a third of what the weights leave free.
        workers: How many processes share what is free.
        artifact: Where what is found out is kept; only the first process that needs it then runs calibration and
            capture, for which it takes the threads of all workers, and the others run a graph once.
        representatives: For ``probe``: parts of the depth in each of which one op of every layer type is measured.
        interactions: Whether to sketch what each op, or group, does to the output when it alone is quantized.

    Raises:
        QsensError: If the engine cannot measure the scheme or needs what is not installed, the model cannot be run or
            is not deterministic, its reference output is not finite or all zero, no finite value calibrates an op, or
            ``delta``, ``probe`` or ``replay`` is asked for and refused.

    """
    assignment = Assignment.uniform(scheme_named(scheme, "scheme"), ops) if isinstance(scheme, str) else scheme
    check_engine(engine, assignment.title, device)
    check_added(engine, assignment.added)
    check_products(engine, (op for op in ops if assignment.refusal(op) is None))
    for op in expected or ():
        check_group(engine, op)
    reproducible_sums()
    model = ready(spec, device, wide=engine in KERNEL_ENGINES)  # what those convert must be plain
    limit = default_memory(workers, device, mapped_bytes(model)) if memory is None else memory
    setup = Setup(
        model,
        spec,
        ops,
        assignment,
        engine,
        device,
        limit,
        expected,
        logits=spec.logits and divergence,
        strata=representatives,
        interactions=interactions,
    )
    with torch.no_grad():
        if artifact is None or not setup.captures:
            prepared = setup.find_out()
            built = setup.build(prepared)
        else:
            prepared, built = setup.shared(artifact, workers)
    return CalibratedModel(
        assignment,
        prepared.calibration,
        built.simulator,
        built.engine,
        logits=setup.logits,
        engine_reason=prepared.refusal,
        reference_seconds=prepared.reference_seconds,
        rows=built.rows,
        sketchers=built.sketchers,
    )
