"""A calibrated model, ready to score its ops. Knows nothing of pytest."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch.utils._pytree import tree_map

from pytest_qsens.engines.eager import EagerEngine
from pytest_qsens.engines.replay import ReplayEngine
from pytest_qsens.errors import QsensError
from pytest_qsens.graph.capture import CaptureRefused, run_model
from pytest_qsens.graph.intercept import OpInterceptor, unchanged_state
from pytest_qsens.metrics import scores
from pytest_qsens.ops import TOTAL, Op
from pytest_qsens.quant.calibration import Calibration
from pytest_qsens.quant.schemes import SCHEMES
from pytest_qsens.quant.simulate import Simulator
from pytest_qsens.results import OpResult
from pytest_qsens.threads import one_thread, reproducible_sums

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    from pytest_qsens.engines import Engine
    from pytest_qsens.graph.calls import Call
    from pytest_qsens.models.spec import Batch, ModelSpec
    from pytest_qsens.quant.schemes import Scheme
    from pytest_qsens.results import Mode, Scores, Status

_IDENTICAL = "identical to the reference"
_NOT_FINITE = "the output holds NaN or infinite values"


class CalibratedModel:
    """One model under one scheme, calibrated once; scores one op at a time. Make it with `calibrate`.

    Attributes:
        engine_reason: Why another engine than the exact replay is used, or ``None``.
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
        self.engine_reason = engine_reason
        self.reference_seconds = reference_seconds
        self._scheme = scheme
        self._calibration = calibration
        self._simulator = simulator
        self._engine = engine
        self._logits = logits
        self._joint: Scores | None = None
        self._joint_known = False

    @property
    def engine(self) -> str:
        """Name of the engine in use."""
        return self._engine.name

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
        by = self._engine.inlined.get(op.name)
        if refusal is None and by is not None:
            refusal = f"its weight is used by {by} outside of its own forward"
        if refusal is not None:
            return _result(op, "unquantizable", reason=refusal)
        if op.name not in self._engine.exercised:
            return _result(op, "unexercised", reason="the evaluation data never reached it")
        if op.name not in self._calibration.reached:
            return _result(op, "unexercised", reason="the calibration data never reached it, so it has no scales")
        start = time.perf_counter()
        with torch.no_grad():
            measured = {mode: self._measure(op.name, mode) for mode in modes}
        seconds = time.perf_counter() - start
        return _measured(op, measured, seconds)

    def total(self) -> OpResult:
        """Measure the model with everything quantized at once."""
        start = time.perf_counter()
        with torch.no_grad():
            joint = self._joint_scores()
        return _measured(Op(TOTAL, TOTAL), {"isolated": joint}, time.perf_counter() - start)

    def _measure(self, op: str, mode: Mode) -> Scores | None:
        if mode == "isolated":
            result = self._scores(self._engine.isolated(op))
            if not self._joint_known:  # nothing else needs this weight quantized
                self._simulator.forget(op)
            return result
        joint = self._joint_scores()
        result = self._scores(self._engine.fallback(op))
        if result is not None and joint is not None:
            result["gain"] = _number(joint["nmse"]) - _number(result["nmse"])
        return result

    def _joint_scores(self) -> Scores | None:
        if not self._joint_known:
            self._joint = self._scores(self._engine.joint())
            self._joint_known = True
        return self._joint

    def _scores(self, outputs: Iterator[Tensor]) -> Scores | None:
        return scores(zip(self._engine.references, outputs, strict=True), logits=self._logits)


def _number(value: float | None) -> float:
    return 0.0 if value is None else value


def _result(op: Op, status: Status, *, reason: str) -> OpResult:
    return OpResult(op.name, op.type, op.block, status, reason)


def _measured(op: Op, measured: dict[Mode, Scores | None], seconds: float) -> OpResult:
    bad = [mode for mode, values in measured.items() if values is None]
    if bad:
        what = "everything" if op.name == TOTAL or bad == ["fallback"] else "only this op"
        return OpResult(
            op.name, op.type, op.block, "failed", f"{_NOT_FINITE} when {what} is quantized", seconds=seconds
        )
    identical = all(values is not None and values["sse"] == 0 for values in measured.values())
    return OpResult(
        op.name,
        op.type,
        op.block,
        "measured",
        _IDENTICAL if identical else None,
        isolated=measured.get("isolated"),
        fallback=measured.get("fallback"),
        seconds=seconds,
    )


def calibrate(
    spec: ModelSpec, ops: Sequence[Op], scheme: str, *, engine: str = "auto", device: str = "cpu"
) -> CalibratedModel:
    """Load nothing, but run everything once: calibration, capture, reference.

    Args:
        spec: Model and batches. The model is switched to evaluation mode and fp32 and stays so.
        ops: The ops of the model, as listed at collection.
        scheme: Name in `SCHEMES`.
        engine: ``replay``, ``eager``, or ``auto``: replay unless the model's graph cannot be captured.
        device: A torch device.

    Raises:
        QsensError: If the model is not deterministic, its reference output is not finite or all zero, calibration meets
            NaN, or ``replay`` is asked for and refused.

    """
    reproducible_sums()
    model = spec.model if isinstance(spec.model, torch.nn.Module) else spec.model()
    model = model.to(device).float().eval().requires_grad_(False)
    chosen = SCHEMES[scheme]
    calibration = Calibration(chosen)
    simulator = Simulator(chosen, calibration)
    batches = [_placed(batch, device) for batch in spec.evaluation]
    with torch.no_grad():
        with one_thread():
            for batch in spec.calibration:
                _observe(model, _placed(batch, device), spec, calibration)
        seconds = _check_reference(model, batches, spec)
        quantizable = [op.name for op in ops if op.name in calibration.reached and chosen.refusal(op.type) is None]
        built, reason = _build_engine(engine, model, batches, spec, simulator, quantizable)
    return CalibratedModel(
        chosen,
        calibration,
        simulator,
        built,
        logits=spec.logits,
        engine_reason=reason,
        reference_seconds=seconds,
    )


def _build_engine(
    name: str,
    model: nn.Module,
    batches: Sequence[Batch],
    spec: ModelSpec,
    simulator: Simulator,
    quantizable: Sequence[str],
) -> tuple[Engine, str | None]:
    reason = None
    if name != "eager":
        try:
            with unchanged_state(model):
                return ReplayEngine(model, batches, spec.output, simulator, quantizable), None
        except CaptureRefused as refused:
            reason = f"capture refused: {refused}"
            if name == "replay":
                raise QsensError(f"engine replay cannot be used, {reason}. Use the eager engine, or auto.") from refused
    return EagerEngine(model, batches, spec.output, simulator, quantizable), reason


def _placed(batch: Batch, device: str) -> Batch:
    """Move a batch to the device, floating-point tensors in fp32."""

    def place(value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, torch.float32) if value.is_floating_point() else value.to(device)

    placed: Batch = tree_map(place, dict(batch))
    return placed


def _observe(model: nn.Module, batch: Batch, spec: ModelSpec, calibration: Calibration) -> None:
    def handler(op: str, call: Call, run: Callable[[], Tensor]) -> Tensor:
        output = run()
        calibration.observe(op, call, output)
        return output

    with unchanged_state(model), OpInterceptor(model, handler):
        run_model(model, batch, spec.output)


def _check_reference(model: nn.Module, batches: Sequence[Batch], spec: ModelSpec) -> float:
    """Run the unquantized model once; returns the seconds it took."""
    seconds = energy = 0.0
    for number, batch in enumerate(batches, 1):
        start = time.perf_counter()
        with unchanged_state(model):
            reference = run_model(model, batch, spec.output)
        seconds += time.perf_counter() - start
        if not bool(torch.isfinite(reference).all()):
            raise QsensError(
                f"the reference output of evaluation batch {number} holds NaN or infinite values "
                f"({_first_not_finite(model, batch, spec)}). Check the weights and the evaluation data."
            )
        energy += float(reference.double().square().sum())
    if energy == 0:
        raise QsensError("the reference output is zero everywhere, so no error can be related to it")
    return seconds


def _first_not_finite(model: nn.Module, batch: Batch, spec: ModelSpec) -> str:
    found: list[str] = []

    def handler(op: str, _: Call, run: Callable[[], Tensor]) -> Tensor:
        output = run()
        if not bool(torch.isfinite(output).all()):
            found.append(op)
        return output

    with unchanged_state(model), OpInterceptor(model, handler):
        run_model(model, batch, spec.output)
    return f"first in op {found[0]}" if found else "in no op's output, so after the last op"
