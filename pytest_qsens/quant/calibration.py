"""Activation ranges: observers of torch.ao over the calibration batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.ao.quantization.observer import HistogramObserver, MinMaxObserver, UniformQuantizationObserverBase

from pytest_qsens import profile
from pytest_qsens.errors import QsensError
from pytest_qsens.graph.calls import finite_rows

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

    from pytest_qsens.graph.calls import Call
    from pytest_qsens.quant.schemes import Scheme


class QParams(NamedTuple):
    """Affine quantization: ``real = (integer - zero_point) * scale``."""

    scale: float
    zero_point: int


class _Range:
    """What was seen of one tensor's values; the search for its scale, which is slow, is made once and when needed."""

    def __init__(self, observer: UniformQuantizationObserverBase) -> None:
        self._observer = observer
        self._qparams: QParams | None = None

    def observe(self, values: Tensor) -> None:
        self._observer(values)

    def state(self) -> Mapping[str, Tensor]:
        found: Mapping[str, Tensor] = self._observer.state_dict()
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._observer.load_state_dict(state)

    @profile.phase("calibration")
    def qparams(self) -> QParams:
        if self._qparams is None:
            scale, zero_point = self._observer.calculate_qparams()  # type: ignore[no-untyped-call] # torch's
            self._qparams = QParams(float(scale), int(zero_point))
        return self._qparams

    def largest(self) -> float:
        """Largest magnitude, of a `MinMaxObserver`."""
        state = self.state()
        return max(0.0, -float(state["min_val"]), float(state["max_val"]))


def _histogram(*, symmetric: bool) -> _Range:
    # uint8 over all of 0..255: what torch's x86 backend and Intel Neural Compressor use on machines with VNNI
    qscheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    return _Range(HistogramObserver(dtype=torch.quint8, qscheme=qscheme, reduce_range=False))


def _input_range(scheme: Scheme) -> _Range:
    """Make what observes an input: a histogram for integers, extremes for floats, whose scales are of the largest."""
    activation = scheme.parts.activation
    if activation is None or activation.dtype != "int8":
        return _Range(MinMaxObserver())
    return _histogram(symmetric=activation.symmetric)


def _finite(values: Tensor, kind: str, what: str) -> Tensor:
    rows = finite_rows(values, kind)
    if rows is None:
        return values
    if not bool(rows.any()):
        raise QsensError(
            f"calibration: the {what} holds NaN or infinite values, so no scale can be found. "
            "Check the weights and the calibration data."
        )
    return values[rows]


class Calibration:
    """What the calibration batches showed at the inputs, and where the scheme needs it at the outputs, of every op.

    Args:
        scheme: What needs ranges.
        ranges: Whether to observe those it needs; otherwise only what is reached is noted.

    Attributes:
        ranges: Whether any are observed.
        reached: Ops that computed something.
        refused: Ops that the scheme cannot quantize for the shape of their weights → why.

    """

    def __init__(self, scheme: Scheme, *, ranges: bool = True) -> None:
        self._scheme = scheme
        self.ranges = ranges and scheme.needs_ranges
        self._inputs: dict[str, _Range] = {}
        self._outputs: dict[str, _Range] = {}
        self.reached: set[str] = set()
        self.refused: dict[str, str] = {}

    def _scheme_of(self, op: str) -> Scheme:  # noqa: ARG002 - one for all
        return self._scheme

    def observe(self, op: str, call: Call, output: Tensor) -> None:
        """Record one call, unless it computes nothing.

        Rows with NaN or infinite values, which attention makes at padded positions, are left out.

        Raises:
            QsensError: If there is no other row.

        """
        if not output.numel():
            return
        self.reached.add(op)
        scheme = self._scheme_of(op)
        refusal = scheme.refusal_of_features(call.weight.shape[-1]) if call.kind == "linear" else None
        if refusal is not None:
            self.refused[op] = refusal
            return
        if call.kind == "embedding" or not self.ranges:
            return
        self._input(op).observe(_finite(call.x, call.kind, f"input of {op}"))
        if scheme.parts.output:
            self._output(op).observe(_finite(output, call.kind, f"output of {op}"))

    def _input(self, op: str) -> _Range:
        return self._inputs.setdefault(op, _input_range(self._scheme_of(op)))

    def _output(self, op: str) -> _Range:
        return self._outputs.setdefault(op, _histogram(symmetric=False))

    def state(self) -> dict[str, Tensor]:
        """All that was observed, beside `reached` and `refused`; see `from_state`."""
        kinds = {"input": self._inputs, "output": self._outputs}
        return {
            f"{kind}/{op}/{name}": value
            for kind, ranges in kinds.items()
            for op, observed in ranges.items()
            for name, value in observed.state().items()
        }

    @classmethod
    def from_state(
        cls, scheme: Scheme, reached: Collection[str], refused: Mapping[str, str], state: Mapping[str, Tensor]
    ) -> Calibration:
        """Make one of what another observed.

        Args:
            scheme: What needed ranges.
            reached: Ops that were reached.
            refused: Those that cannot be quantized.
            state: From `state`; other tensors may be among them.

        """
        found = cls(scheme)
        found.reached.update(reached)
        found.refused.update(refused)
        observed: dict[tuple[str, str], dict[str, Tensor]] = {}
        for key, value in state.items():
            kind, _, rest = key.partition("/")
            op, _, name = rest.rpartition("/")
            observed.setdefault((kind, op), {})[name] = value
        for (kind, op), buffers in observed.items():
            if kind in ("input", "output"):
                (found._input(op) if kind == "input" else found._output(op)).restore(buffers)
        return found

    def input_qparams(self, op: str) -> QParams:
        """Scale and zero point of an op's input, uint8; 128 is that of symmetric ones."""
        return self._inputs[op].qparams()

    def largest_input(self, op: str) -> float:
        """Largest magnitude in an op's input, for scales of floats."""
        return self._inputs[op].largest()

    def output_qparams(self, op: str) -> QParams:
        """Scale and zero point of an op's output, uint8."""
        return self._outputs[op].qparams()
