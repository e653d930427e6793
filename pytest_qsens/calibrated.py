"""A calibrated model, ready to score its ops. Knows nothing of pytest."""

from __future__ import annotations

import hashlib
import time
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch.utils._pytree import tree_map

from pytest_qsens import profile
from pytest_qsens.engines.availability import KERNEL_ENGINES, check_engine
from pytest_qsens.engines.delta import DeltaEngine
from pytest_qsens.engines.eager import EagerEngine
from pytest_qsens.engines.replay import ReplayEngine
from pytest_qsens.errors import QsensError, first_line, told
from pytest_qsens.graph.capture import CaptureRefused, run_model
from pytest_qsens.graph.intercept import OpInterceptor, unchanged_state
from pytest_qsens.memory import default_memory
from pytest_qsens.metrics import Score, energy
from pytest_qsens.noise import SEEDS, distinguishable, spread
from pytest_qsens.ops import TOTAL, Op
from pytest_qsens.quant.calibration import Calibration
from pytest_qsens.quant.schemes import SCHEMES
from pytest_qsens.quant.simulate import Simulator
from pytest_qsens.results import IDENTICAL, OpResult
from pytest_qsens.threads import one_thread, reproducible_sums

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from torch import Tensor, nn

    from pytest_qsens.engines import Engine
    from pytest_qsens.engines.fx import FxEngine
    from pytest_qsens.engines.inc import IncEngine
    from pytest_qsens.graph.calls import Call
    from pytest_qsens.models.spec import Batch, ModelSpec
    from pytest_qsens.profile import Phase
    from pytest_qsens.quant.schemes import Scheme
    from pytest_qsens.results import Mode, Scores, Status

_NOT_FINITE = "the output holds NaN or infinite values"
_QUANTIZED = {"isolated": "only this op is", "fallback": "everything but this op is"}


class CalibratedModel:
    """One model under one scheme, calibrated once; scores one op at a time. Make it with `calibrate`.

    Attributes:
        reference_seconds: Wall seconds of one unquantized forward of all evaluation batches.

    """

    def __init__(
        self,
        scheme: Scheme,
        calibration: Calibration,
        simulator: Simulator,
        engine: Engine,
        *,
        logits: bool,
        engine_reason: str | None,
        reference_seconds: float,
    ) -> None:
        self._engine_reason = engine_reason
        self.reference_seconds = reference_seconds
        self._scheme = scheme
        self._calibration = calibration
        self._simulator = simulator
        self._engine = engine
        self._logits = logits
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
        digest = hashlib.sha256()
        with self._profiled("reference"):
            for output in self._engine.references:
                digest.update(output.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def functional_ops(self) -> tuple[OpResult, ...]:
        """Products of activations, which no scheme quantizes yet."""
        return tuple(
            _result(Op(name, kind), "unquantizable", reason=f"{self._scheme.name} does not quantize {kind} products")
            for name, kind in self._engine.functional
        )

    def score(self, op: Op, modes: Sequence[Mode]) -> OpResult:
        """Measure one op in each of the modes; an op that has no score says why."""
        refusal = self._scheme.refusal(op.type)
        refusal = refusal or self._engine.out_of_reach.get(op.name)
        if refusal is not None:
            return _result(op, "unquantizable", reason=refusal)
        if op.name not in self._engine.exercised:
            return _result(op, "unexercised", reason="the evaluation data never reached it")
        if op.name not in self._calibration.reached:
            return _result(op, "unexercised", reason="the calibration data never reached it, so it has no scales")
        start = time.perf_counter()
        with self._profiled(self._engine.phase), torch.no_grad():
            measured = {mode: self._measure(op.name, mode) for mode in modes}
        failures = [
            f"{values} when {_QUANTIZED[mode]} quantized"
            for mode, values in measured.items()
            if isinstance(values, str)
        ]
        note = self._engine.note if "fallback" in measured else None
        return _measured(op, measured, failures, note, time.perf_counter() - start)

    def total(self) -> OpResult:
        """Measure the model with everything quantized at once."""
        start = time.perf_counter()
        with self._profiled(self._engine.phase), torch.no_grad():
            joint = self._joint_scores()
        failures = [f"{joint} when everything is quantized"] if isinstance(joint, str) else []
        return _measured(
            Op(TOTAL, TOTAL), {"isolated": joint}, failures, self._engine.note, time.perf_counter() - start
        )

    @contextmanager
    def _profiled(self, phase: Phase) -> Iterator[None]:
        with profile.running(self._profiler), profile.phase(phase):
            yield

    def _measure(self, op: str, mode: Mode) -> Scores | str:
        if mode == "isolated":
            result = self._measured_with_others(lambda: self._engine.together(op)) or self._scores(
                self._engine.isolated(op)
            )
            if not self._joint:  # nothing else needs this weight quantized
                self._simulator.forget(op)
            return result
        joint = self._joint_scores()
        result = self._all_but(op, None)
        if not isinstance(result, str) and not isinstance(joint, str):
            result["gain"] = _number(joint["nmse"]) - _number(result["nmse"])
            if self._engine.perturbs:
                self._add_noise(op, result)
        return result

    def _all_but(self, op: str, seed: int | None) -> Scores | str:
        return self._measured_with_others(lambda: self._engine.all_but(op, seed)) or self._scores(
            self._engine.fallback(op, seed)
        )

    def _measured_with_others(self, measure: Callable[[], Score | None]) -> Scores | str | None:
        """Score an op with others at once, if the engine can; where that fails, the op by itself shows why."""
        try:
            score = measure()
        except Exception:  # noqa: BLE001 - as in `_scores`
            return None
        return None if score is None else self._related(score)

    def _related(self, score: Score) -> Scores | str:
        found = score.related(*self._reference_size)
        return _NOT_FINITE if found is None else found

    @cached_property
    def _reference_size(self) -> tuple[float, int]:
        """Sum of squares and number of values of the reference."""
        with profile.phase("scoring"):
            sizes = [(energy(reference), reference.numel()) for reference in self._engine.references]
            return sum(size for size, _ in sizes), sum(count for _, count in sizes)

    def _add_noise(self, op: str, result: Scores) -> None:
        """Say how far the score, and the gain, move when values move in their last digits."""
        draws, gains = [_number(result["nmse"])], [_number(result["gain"])]
        for seed in SEEDS:
            joint, other = self._joint_scores(seed), self._all_but(op, seed)
            if not isinstance(joint, str) and not isinstance(other, str):
                draws.append(_number(other["nmse"]))
                gains.append(_number(joint["nmse"]) - _number(other["nmse"]))
        if len(draws) == 1 + len(SEEDS):
            result["noise"] = spread(draws)
            result["distinguishable"] = distinguishable(gains)

    def _joint_scores(self, seed: int | None = None) -> Scores | str:
        if seed not in self._joint:
            self._joint[seed] = self._scores(self._engine.joint(seed))
        return self._joint[seed]

    def _scores(self, outputs: Iterator[Tensor]) -> Scores | str:
        """Score what an engine computes; why there is no score, if there is none."""
        try:
            score = Score(logits=self._logits)
            for reference, output in zip(self._engine.references, outputs, strict=True):
                score.add(reference, output)
        except Exception as error:  # noqa: BLE001 - quantized values can make a model raise anything
            return f"the model fails ({first_line(error)})"
        found = self._related(score)
        return found if isinstance(found, str) else found | dict(self._engine.reported)


def _number(value: float | None) -> float:
    return 0.0 if value is None else value


def _result(op: Op, status: Status, *, reason: str) -> OpResult:
    return OpResult(op.name, op.type, op.block, status, reason)


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
        seconds=seconds,
    )


def calibrate(
    spec: ModelSpec,
    ops: Sequence[Op],
    scheme: str,
    *,
    engine: str = "auto",
    device: str = "cpu",
    divergence: bool = True,
    expected: Collection[str] | None = None,
    memory: int | None = None,
    workers: int = 1,
) -> CalibratedModel:
    """Load nothing, but run everything once: calibration, capture, reference.

    The profiler that runs meanwhile (`pytest_qsens.profile`) times what is scored later, too.

    Args:
        spec: Model and batches. The model is switched to evaluation mode and fp32 and stays so.
        ops: The ops of the model, as listed at collection.
        scheme: Name in `SCHEMES`.
        engine: ``delta``, ``replay``, ``eager``, or ``auto``: delta unless the model's graph cannot be captured;
            ``fx`` or ``inc`` for int8 kernels.
        device: A torch device.
        divergence: Whether logits are compared as distributions, too, which takes all of them.
        expected: Names of the ops that are going to be scored, if that is known: an engine that measures several
            together leaves out the others, unless that are all.
        memory: Bytes for values that could be computed again; half of what is free if it is not given.
        workers: How many processes share what is free.

    Raises:
        QsensError: If the engine cannot measure the scheme or needs what is not installed, the model cannot be run or
            is not deterministic, its reference output is not finite or all zero, no finite value calibrates an op, or
            ``delta`` or ``replay`` is asked for and refused.

    """
    check_engine(engine, scheme, device)
    reproducible_sums()
    model = spec.model if isinstance(spec.model, torch.nn.Module) else spec.model()
    model = model.to(device).float().eval().requires_grad_(False)
    chosen = SCHEMES[scheme]
    logits = spec.logits and divergence
    calibration = Calibration(chosen, ranges=engine not in KERNEL_ENGINES)
    simulator = Simulator(chosen, calibration)
    batches = [_placed(batch, device) for batch in spec.evaluation]
    calibrating = [_placed(batch, device) for batch in spec.calibration]
    with torch.no_grad():
        with profile.phase("calibration"), one_thread():
            for number, batch in enumerate(calibrating, 1):
                _observe(model, batch, number, spec, calibration)
        references = _References(model, batches, spec)
        quantizable = [op.name for op in ops if op.name in calibration.reached and chosen.refusal(op.type) is None]
        built: Engine
        reason = None
        if engine in KERNEL_ENGINES:
            references.finish()
            with profile.phase("calibration"):
                built = _kernel_engine(engine)(model, batches, spec.output, quantizable, calibrating)
        else:
            wanted = [op for op in quantizable if expected is None or op in expected] or quantizable
            limit = default_memory(workers, device) if memory is None else memory
            built, reason = _build_engine(
                engine, model, batches, references, spec, simulator, quantizable, limit, wanted, logits=logits
            )
    return CalibratedModel(
        chosen,
        calibration,
        simulator,
        built,
        logits=logits,
        engine_reason=reason,
        reference_seconds=references.seconds,
    )


def _kernel_engine(name: str) -> type[FxEngine | IncEngine]:
    if name == "inc":
        from pytest_qsens.engines.inc import IncEngine

        return IncEngine
    from pytest_qsens.engines.fx import FxEngine

    return FxEngine


@profile.phase("capture")
def _build_engine(
    name: str,
    model: nn.Module,
    batches: Sequence[Batch],
    references: _References,
    spec: ModelSpec,
    simulator: Simulator,
    quantizable: Sequence[str],
    memory: int,
    expected: Sequence[str],
    *,
    logits: bool,
) -> tuple[Engine, str | None]:
    reason = None
    if name != "eager":
        try:
            with unchanged_state(model):
                if name == "replay":
                    return ReplayEngine(model, batches, references, spec.output, simulator, quantizable, memory), None
                built = DeltaEngine(
                    model, batches, references, spec.output, simulator, quantizable, memory, expected, logits=logits
                )
                return built, None
        except CaptureRefused as refused:
            reason = f"capture refused: {refused}"
            if name != "auto":
                raise QsensError(f"engine {name} cannot be used, {reason}. Use the eager engine, or auto.") from refused
    references.finish()
    return EagerEngine(model, batches, spec.output, simulator, quantizable), reason


def _placed(batch: Batch, device: str) -> Batch:
    """Move a batch to the device, floating-point tensors in fp32."""

    def place(value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, torch.float32) if value.is_floating_point() else value.to(device)

    placed: Batch = tree_map(place, dict(batch))
    return placed


def _observe(model: nn.Module, batch: Batch, number: int, spec: ModelSpec, calibration: Calibration) -> None:
    def handler(op: str, call: Call, run: Callable[[], Tensor]) -> Tensor:
        output = run()
        calibration.observe(op, call, output)
        return output

    with unchanged_state(model), OpInterceptor(model, handler):
        _run(model, batch, spec, f"calibration batch {number}")


class _References:
    """Outputs of the unquantized model, batch by batch, checked as they come; no batch is run twice.

    Attributes:
        seconds: Wall seconds of the forwards so far.

    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], spec: ModelSpec) -> None:
        self.seconds = 0.0
        self._outputs = self._run(model, batches, spec)

    def __iter__(self) -> Iterator[Tensor]:
        return self._outputs

    def finish(self) -> None:
        """Check the batches that nobody has asked for."""
        for _ in self._outputs:
            pass

    def _run(self, model: nn.Module, batches: Sequence[Batch], spec: ModelSpec) -> Iterator[Tensor]:
        size = 0.0
        for number, batch in enumerate(batches, 1):
            where = f"evaluation batch {number}"
            start = time.perf_counter()
            with profile.phase("reference"), unchanged_state(model):
                reference = _run(model, batch, spec, where)
            self.seconds += time.perf_counter() - start
            if not bool(torch.isfinite(reference).all()):
                raise QsensError(
                    f"the reference output of {where} holds NaN or infinite values "
                    f"({_first_not_finite(model, batch, spec)}). Check the weights and the evaluation data."
                )
            size += energy(reference)
            yield reference
        if size == 0:
            raise QsensError("the reference output is zero everywhere, so no error can be related to it")


def _run(model: nn.Module, batch: Batch, spec: ModelSpec, where: str) -> Tensor:
    """Run the scored forward and check what it gives.

    Raises:
        QsensError: If the model or the spec's ``output`` raises, or gives something that cannot be scored.

    """
    try:
        scored: object = run_model(model, batch, spec.output)
    except QsensError:
        raise
    except Exception as error:
        raise QsensError(
            f"the model cannot be run on {where} (keys {', '.join(batch)}): {told(error)}. "
            "Check the batch, and the `output` function that picks what is scored."
        ) from error
    if not isinstance(scored, torch.Tensor):
        raise QsensError(f"`output` gives {type(scored).__name__} on {where}, not the tensor to score")
    if not scored.is_floating_point() or not scored.numel() or (spec.logits and not scored.dim()):
        raise QsensError(
            f"`output` gives {str(scored.dtype).removeprefix('torch.')} of shape {tuple(scored.shape)} on {where}: "
            "what is scored must be floating point and not empty, and logits need a dimension of classes"
        )
    return scored


def _first_not_finite(model: nn.Module, batch: Batch, spec: ModelSpec) -> str:
    found: list[str] = []

    def handler(op: str, call: Call, run: Callable[[], Tensor]) -> Tensor:
        output = run()
        if not bool(torch.isfinite(call.x).all()):
            found.append(f"already in the input of op {op}")
        elif not bool(torch.isfinite(output).all()):
            found.append(f"first in op {op}")
        return output

    with unchanged_state(model), OpInterceptor(model, handler):
        run_model(model, batch, spec.output)
    return found[0] if found else "in no op's output, so after the last op"
