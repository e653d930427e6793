"""A calibrated model, ready to score its ops. Knows nothing of pytest."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from pytest_qsens import profile
from pytest_qsens.engines.availability import KERNEL_ENGINES, check_added, check_engine, check_group, check_products
from pytest_qsens.engines.delta import DeltaEngine
from pytest_qsens.engines.eager import EagerEngine
from pytest_qsens.engines.probe import ProbeEngine
from pytest_qsens.engines.replay import ReplayEngine, clean_share
from pytest_qsens.errors import QsensError, first_line
from pytest_qsens.graph.narrow import keep_narrow, make_wide, mapped_bytes
from pytest_qsens.interactions import encode
from pytest_qsens.memory import default_memory
from pytest_qsens.metrics import Score, energies
from pytest_qsens.noise import SEEDS, distinguishable, spread
from pytest_qsens.ops import TOTAL, WEIGHTLESS, Op
from pytest_qsens.preparation import digest, placed, prepare, put_together, taken_apart
from pytest_qsens.quant.assignment import Assignment
from pytest_qsens.quant.calibration import Calibration
from pytest_qsens.quant.schemes import scheme_named
from pytest_qsens.quant.simulate import Simulator
from pytest_qsens.results import IDENTICAL, WITHOUT, OpResult
from pytest_qsens.samples import Rows, Sums, rows_of
from pytest_qsens.sketches import Sketcher, make_sketchers
from pytest_qsens.threads import reproducible_sums, threads_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from pytest_qsens.artifact import Artifact
    from pytest_qsens.engines import Engine, Unit
    from pytest_qsens.engines.fx import FxEngine
    from pytest_qsens.engines.inc import IncEngine
    from pytest_qsens.engines.replay import Captured
    from pytest_qsens.estimate import Estimate
    from pytest_qsens.models.spec import ModelSpec
    from pytest_qsens.preparation import Prepared
    from pytest_qsens.profile import Phase
    from pytest_qsens.results import Mode, Scores, Status

_NOT_FINITE = "the output holds NaN or infinite values"
_QUANTIZED = {
    "isolated": "only this {} is",
    "fallback": "everything but this {} is",
    "added": "this {} is, beside all that the config says,",
}
_CHANGE: dict[Mode, tuple[str, int]] = {"fallback": ("gain", 1), "added": ("loss", -1)}
"""Mode → what the difference to the whole model is called, and its sign: positive is what speaks for full precision."""

_NAMED = 3
"""Members of a group that are named for one reason."""


class CalibratedModel:
    """One model, quantized in one way, calibrated once; scores one op at a time. Make it with `calibrate`.

    Attributes:
        reference_seconds: Wall seconds of one unquantized forward of all evaluation batches.

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
        self._logits = logits
        self._rows = rows
        self._sketchers = sketchers
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
            _result(Op(name, kind), "unquantizable", reason=f"{kind} products are not quantized")
            for name, kind in self._engine.functional
            if name not in self._assignment.names
        )

    def score(self, op: Op, modes: Sequence[Mode]) -> OpResult:
        """Measure one op, or group, in each of the modes; one that has no score says why.

        A group is measured with the members that can be, and says which were not.
        """
        return self.refused(op) or self._scored(op, modes)

    def refused(self, op: Op) -> OpResult | None:
        """Say of an op, or group, that has no score why that is."""
        if self._flipped(op):
            return None
        without = self._left_out(op)
        statuses = {status for status, _ in without.values()}
        gravest: tuple[Status, ...] = ("unexercised", "unquantizable", "unquantized")
        return _result(op, next(status for status in gravest if status in statuses), reason=_told(op, without))

    def _left_out(self, op: Op) -> dict[str, tuple[Status, str]]:
        """Members that cannot be measured → why."""
        return {member.name: why for member in op.ops if (why := self._why_not(member, op)) is not None}

    def _scored(self, op: Op, modes: Sequence[Mode]) -> OpResult:
        unit = self._flipped(op)
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
        result = _measured(op, measured, failures, note, time.perf_counter() - start)
        if without := self._left_out(op):
            result = replace(result, reason="; ".join(filter(None, (result.reason, f"{WITHOUT}{_told(op, without)}"))))
        result = replace(result, sketch=self._sketches.pop(unit, None))
        size = self._reference_size.energy
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
        found = self._engine.measured_with(self._flipped(op), mode)
        return [other for other in others if self._flipped(other) in found] if found else []

    def _flipped(self, op: Op) -> Unit:
        """Names of what is quantized, or not, when a score is measured."""
        return tuple(member.name for member in op.ops if self._why_not(member, op) is None)

    def _why_not(self, op: Op, group: Op) -> tuple[Status, str] | None:
        """Tell the status of an op that cannot be measured, by itself or in a group, and the reason."""
        refusal = self._assignment.refusal(op, group)
        if refusal is not None:
            return refusal
        why = self._calibration.refused.get(op.name) or self._engine.out_of_reach.get(op.name)
        if why is not None:
            return "unquantizable", why
        if op.name not in self._engine.exercised:
            return "unexercised", "the evaluation data never reached it"
        if op.name not in self._calibration.reached:
            return "unexercised", "the calibration data never reached it, so it has no scales"
        return None

    def total(self) -> OpResult:
        """Measure the model with everything quantized at once."""
        start = time.perf_counter()
        # no weights are kept: each is used once, and all of them may not fit into the memory
        with self._profiled(self._engine.phase), torch.no_grad(), self._simulator.passing():
            joint = self._joint_scores()
        failures = [f"{joint} when everything is quantized"] if isinstance(joint, str) else []
        return _measured(Op(TOTAL, TOTAL), {"isolated": joint}, failures, self._note, time.perf_counter() - start)

    @property
    def _note(self) -> str | None:
        """What has to be said of every score with everything else quantized, if something has."""
        without = self._assignment.unsimulated
        told = None
        if without:
            told = f"without {_some(without)}, whose schemes cannot be simulated"
        return "; ".join(filter(None, (self._engine.note, told))) or None

    @contextmanager
    def _profiled(self, phase: Phase) -> Iterator[None]:
        with profile.running(self._profiler), profile.phase(phase):
            yield

    def _measure(self, op: Op, unit: Unit, mode: Mode) -> Scores | str:
        if mode == "isolated":
            # a group that spans blocks would keep as many weights as the model has blocks
            with self._simulator.passing() if op.spans_blocks else nullcontext():
                score = self._measured_with_others(lambda: self._engine.together(*unit)) or self._summed(
                    self._engine.isolated(*unit), sketching=True
                )
                result = score if isinstance(score, str) else self._related(score)
            if not isinstance(score, str) and not isinstance(result, str) and score.sketch is not None:
                self._sketches[unit] = encode(score.sketch.numpy() / math.sqrt(self._reference_size.energy))
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
        result = self._related(score)
        if not isinstance(result, str):
            if "kl" in estimate:
                result["kl"] = estimate["kl"].value
            joint = self._joint_scores() if mode == "fallback" else None
            if joint is not None and not isinstance(joint, str):
                result["gain"] = _number(joint["nmse"]) - _number(result["nmse"])
        return result

    def _all_but(self, unit: Unit, seed: int | None) -> Scores | str:
        score = self._measured_with_others(lambda: self._engine.all_but(*unit, seed=seed)) or self._summed(
            self._engine.fallback(*unit, seed=seed)
        )
        return score if isinstance(score, str) else self._related(score)

    def _measured_with_others(self, measure: Callable[[], Score | None]) -> Score | None:
        """Score an op with others at once, if the engine can; where that fails, the op by itself shows why."""
        try:
            return measure()
        except Exception:  # noqa: BLE001 - as in `_summed`
            return None

    def _related(self, score: Score) -> Scores | str:
        found = score.related(*self._reference_size)
        return _NOT_FINITE if found is None else found | dict(self._engine.reported)

    @cached_property
    def _reference_size(self) -> _Size:
        with profile.phase("scoring"):
            pairs = zip(self._engine.references, self._rows, strict=True)
            sizes = [(energies(reference, rows), reference.numel()) for reference, rows in pairs]
        return _Size(
            sum(size.whole for size, _ in sizes),
            sum(count for _, count in sizes),
            [energy for size, _ in sizes for energy in size.samples],
        )

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
            score = self._summed(self._engine.joint(seed))
            self._joint[seed] = score if isinstance(score, str) else self._related(score)
        return self._joint[seed]

    def _summed(self, outputs: Iterator[Tensor], *, sketching: bool = False) -> Score | str:
        """Compare what an engine computes with the reference; why that cannot be done, if it cannot."""
        try:
            score = Score(logits=self._logits)
            given = zip(self._engine.references, outputs, self._rows, self._sketchers, strict=True)
            for reference, output, rows, sketcher in given:
                score.add(reference, output, rows, sketcher if sketching else None)
        except Exception as error:  # noqa: BLE001 - quantized values can make a model raise anything
            return f"the model fails ({first_line(error)})"
        return score


class _Size(NamedTuple):
    """How large the reference is.

    Attributes:
        energy: Sum of its squares.
        values: Number of its values.
        energies: Sum of the squares of each sample.

    """

    energy: float
    values: int
    energies: Sequence[float]


def _number(value: float | None) -> float:
    return 0.0 if value is None else value


def _result(op: Op, status: Status, *, reason: str) -> OpResult:
    return OpResult(op.name, op.type, op.block, status, reason, ops=op.member_names)


def _told(op: Op, without: Mapping[str, tuple[Status, str]]) -> str:
    """Say why an op was not measured, or which members of a group were not, and why."""
    if not op.members:
        _, reason = without[op.name]
        return reason
    by_reason: dict[tuple[Status, str], list[str]] = {}
    for name, why in without.items():
        by_reason.setdefault(why, []).append(name)
    return ", ".join(f"{_some(names)} ({status}: {reason})" for (status, reason), names in by_reason.items())


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:_NAMED])}{f' and {len(names) - _NAMED} more' * (len(names) > _NAMED)}"


def _measured(
    op: Op, measured: dict[Mode, Scores | str], failures: Sequence[str], note: str | None, seconds: float
) -> OpResult:
    found: dict[str, Scores] = {mode: values for mode, values in measured.items() if not isinstance(values, str)}
    identical = not failures and all(values["sse"] == 0 for values in found.values())
    return OpResult(
        op.name,
        op.type,
        op.block,
        "failed" if failures else "measured",
        "; ".join(failures) or (IDENTICAL if identical else note),
        isolated=found.get("isolated"),
        fallback=found.get("fallback"),
        added=found.get("added"),
        seconds=seconds,
        ops=op.member_names,
    )


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
    model = spec.model if isinstance(spec.model, torch.nn.Module) else spec.model()
    model = model.to(device).eval().requires_grad_(False)
    if engine in KERNEL_ENGINES:  # what they convert must be plain
        make_wide(model)
    else:
        keep_narrow(model)
    limit = default_memory(workers, device, mapped_bytes(model)) if memory is None else memory
    setup = _Setup(
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


class _Built(NamedTuple):
    engine: Engine
    simulator: Simulator
    rows: Sequence[Rows]
    sketchers: Sequence[Sketcher | None]


class _Setup:
    """The way from a model to an engine; arguments as for `calibrate`, the model on the device and switched."""

    def __init__(
        self,
        model: nn.Module,
        spec: ModelSpec,
        ops: Sequence[Op],
        assignment: Assignment,
        engine: str,
        device: str,
        memory: int,
        expected: Collection[Op] | None,
        *,
        logits: bool,
        strata: int | None,
        interactions: bool,
    ) -> None:
        self._assignment = assignment
        self._strata = strata
        self._interactions = interactions
        self.logits = logits
        self._engine = engine
        self.captures = engine not in (*KERNEL_ENGINES, "eager")
        self._model = model
        self._spec = spec
        self._ops = ops
        self._states = [op.name for op in ops if op.type in WEIGHTLESS]
        self._expected = expected
        self._batches = [placed(batch, device) for batch in spec.evaluation]
        self._calibrating = [placed(batch, device) for batch in spec.calibration]
        self._memory = memory
        self._share = clean_share(memory, len(self._batches))

    def find_out(self) -> Prepared:
        """Run calibration, reference and capture."""
        return prepare(
            self._model,
            self._spec,
            self._batches,
            self._calibrating,
            Calibration(self._assignment.schemes, ranges=self._engine not in KERNEL_ENGINES, states=self._states),
            self._share if self.captures else None,
        )

    def shared(self, artifact: Artifact, workers: int) -> tuple[Prepared, _Built]:
        """Take what another process found out, or find it out and leave it to others."""
        prepared = self._restored(artifact)
        if prepared is not None:
            return prepared, self.build(prepared)
        with ExitStack() as held:
            try:
                with profile.phase("waiting"):
                    held.enter_context(artifact.locked())
            except QsensError:  # a cache that cannot be written costs time only
                prepared = self.find_out()
                return prepared, self.build(prepared)
            prepared = self._restored(artifact)  # the process that had the lock may have made it
            if prepared is not None:
                return prepared, self.build(prepared)
            with threads_of(workers):
                prepared = self.find_out()
                built = self.build(prepared)
                if isinstance(built.engine, DeltaEngine) and not isinstance(built.engine, ProbeEngine):
                    built.engine.check()  # estimates can do without
            verdict = built.engine.verdict if isinstance(built.engine, DeltaEngine) else None
            content = taken_apart(prepared, self._model, self._calibrating, verdict)
            if content is not None:
                with suppress(OSError, QsensError):  # a full disk costs the others time
                    artifact.write(content)
            return prepared, built

    def _restored(self, artifact: Artifact) -> Prepared | None:
        content = artifact.read()
        if content is None:
            return None
        with profile.phase("capture"):
            schemes = self._assignment.schemes
            return put_together(content, self._model, self._batches, self._calibrating, schemes, self._share)

    def build(self, prepared: Prepared) -> _Built:
        """Make the engine.

        Raises:
            QsensError: If one is asked for that cannot be.

        """
        able = prepared.calibration.reached - prepared.calibration.refused.keys()
        quantizable = [op.name for op in self._ops if op.name in able and self._assignment.refusal(op) is None]
        simulator = Simulator(self._assignment.schemes, prepared.calibration)
        if prepared.captured is None:
            engine = self._forward_engine(prepared, quantizable, simulator)
            return _Built(
                engine, simulator, self._rows(engine.references), self._sketchers(r.shape for r in engine.references)
            )
        rows = self._rows(run.output for run, _ in prepared.captured)
        found = self._sketchers(run.output.shape for run, _ in prepared.captured)
        engine = self._replaying(prepared, prepared.captured, quantizable, simulator, rows, found)
        return _Built(engine, simulator, rows, found)

    def _sketchers(self, shapes: Iterable[Sequence[int]]) -> Sequence[Sketcher | None]:
        listed = [*shapes]
        return [*make_sketchers(listed)] if self._interactions else [None] * len(listed)

    def _rows(self, references: Iterable[Tensor]) -> list[Rows]:
        pairs = zip(self._batches, references, strict=True)
        return [rows_of(batch, reference, self._spec.rows) for batch, reference in pairs]

    def _forward_engine(self, prepared: Prepared, quantizable: list[str], simulator: Simulator) -> Engine:
        if self._engine in KERNEL_ENGINES:
            with profile.phase("calibration"):
                made = _kernel_engine(self._engine)
                return made(self._model, self._batches, self._spec.output, quantizable, self._calibrating)
        if self._engine in ("delta", "probe", "replay"):
            raise QsensError(
                f"engine {self._engine} cannot be used, {prepared.refusal}. Use the eager engine, or auto."
            )
        with profile.phase("capture"):
            batches, output = self._batches, self._spec.output
            added = self._assignment.added
            return EagerEngine(self._model, batches, output, simulator, quantizable, added, self._states)

    def _replaying(
        self,
        prepared: Prepared,
        captured: Sequence[Captured],
        quantizable: list[str],
        simulator: Simulator,
        rows: Sequence[Rows],
        sketchers: Sequence[Sketcher | None],
    ) -> Engine:
        with profile.phase("capture"):
            if self._engine == "replay":
                return ReplayEngine(captured, simulator, quantizable, self._memory, self._assignment.added)
            probe, delta = partial(ProbeEngine, strata=self._strata), partial(DeltaEngine, added=self._assignment.added)
            made = probe if self._engine == "probe" else delta
            return made(
                captured,
                simulator,
                quantizable,
                self._memory,
                self._units(quantizable) or [(op,) for op in quantizable],
                prepared.verdict,
                logits=self.logits,
                rows=rows,
                sketchers=sketchers,
            )

    def _units(self, quantizable: Sequence[str]) -> list[Unit]:
        """List what is going to be scored, in the order of the model; what spans several blocks comes last."""
        places = {name: place for place, name in enumerate(quantizable)}
        units = []
        for op in self._ops if self._expected is None else self._expected:
            able = (member for member in op.ops if member.name in places)  # not the whole model, which is no op
            unit = tuple(member.name for member in able if self._assignment.refusal(member, op) is None)
            units += [(op.spans_blocks, places[unit[0]], unit)] if unit else []
        return [unit for *_, unit in sorted(units)]


def _kernel_engine(name: str) -> type[FxEngine | IncEngine]:
    if name == "inc":
        from pytest_qsens.engines.inc import IncEngine

        return IncEngine
    from pytest_qsens.engines.fx import FxEngine

    return FxEngine
