"""Activation ranges: observers of torch.ao over the calibration batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.ao.quantization.observer import (
    HistogramObserver,
    MinMaxObserver,
    PerChannelMinMaxObserver,
    UniformQuantizationObserverBase,
)

from pytest_qsens import profile
from pytest_qsens.errors import QsensError
from pytest_qsens.graph.calls import finite_rows
from pytest_qsens.ops import STATES
from pytest_qsens.quant.schemes import all_of, scheme_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

    from pytest_qsens.graph.calls import Call
    from pytest_qsens.quant.schemes import Scheme, Schemes


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


class _StateRange:
    """Least and largest value of what shares a scale in keys or values, ``(N, heads, tokens, dim)``."""

    def __init__(self, granularity: str) -> None:
        self._granularity = granularity
        self._observer: UniformQuantizationObserverBase
        self._observer = PerChannelMinMaxObserver() if granularity in ("head", "channel") else MinMaxObserver()

    def observe(self, values: Tensor) -> None:
        if self._granularity == "head":
            values = values.movedim(1, 0)
        elif self._granularity == "channel":
            values = values.permute(1, 3, 0, 2).flatten(0, 1)
        self._observer(values)

    def state(self) -> Mapping[str, Tensor]:
        found: Mapping[str, Tensor] = self._observer.state_dict()
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._observer.load_state_dict(state)

    def extremes(self, dim: int) -> tuple[Tensor, Tensor]:
        """Both, and zero between them, of a shape that goes with keys or values of so many features."""
        state = self.state()
        low, high = state["min_val"].clamp(max=0), state["max_val"].clamp(min=0)
        shape = {"head": (-1, 1, 1), "channel": (-1, 1, dim)}.get(self._granularity, ())
        return low.view(shape), high.view(shape)


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
        schemes: What needs ranges, of every op or of each; an op without a scheme needs none.
        ranges: Whether to observe those it needs; otherwise only what is reached is noted.
        states: Names of the keys and values to be observed.

    Attributes:
        states: As given.
        ranges: Whether any are observed.
        reached: Ops that computed something.
        refused: Ops that the scheme cannot quantize for the shape of their weights → why.

    """

    def __init__(self, schemes: Schemes, *, ranges: bool = True, states: Collection[str] = ()) -> None:
        self._schemes = schemes
        self.states = states
        self.ranges = ranges and any(scheme.needs_ranges for scheme in all_of(schemes))
        self._inputs: dict[str, _Range] = {}
        self._outputs: dict[str, _Range] = {}
        self._states: dict[str, _StateRange] = {}
        self.reached: set[str] = set()
        self.refused: dict[str, str] = {}

    def observe(self, op: str, call: Call, output: Tensor) -> None:
        """Record one call, unless it computes nothing.

        Rows with NaN or infinite values, which attention makes at padded positions, are left out.

        Raises:
            QsensError: If there is no other row.

        """
        if not output.numel():
            return
        self.reached.add(op)
        scheme = scheme_of(self._schemes, op)
        if scheme is None:
            return
        in_groups = call.kind == "linear" or scheme.rows
        refusal = scheme.refusal_of_features(call.weight.shape[-1]) if in_groups else None
        if not scheme.means(call.kind):
            refusal = scheme.refusal(call.kind)
        elif call.kind in STATES:
            refusal = scheme.refusal_of_state(call.x.shape)
        if refusal is not None:
            self.refused[op] = refusal
            return
        if call.kind == "embedding" or not self.ranges or not scheme.needs_ranges:
            return
        if call.kind in STATES:
            finite = finite_rows(call.x, call.kind)
            values = call.x if finite is None else call.x.masked_fill(~finite[..., None], 0)  # no scale is of less
            self._state(op, scheme).observe(values)
            return
        self._input(op, scheme).observe(_finite(call.x, call.kind, f"input of {op}"))
        if scheme.parts.output:
            self._output(op).observe(_finite(output, call.kind, f"output of {op}"))

    def _input(self, op: str, scheme: Scheme) -> _Range:
        return self._inputs.setdefault(op, _input_range(scheme))

    def _state(self, op: str, scheme: Scheme) -> _StateRange:
        assert scheme.parts.cache is not None  # noqa: S101 - no other is given to keys and values
        return self._states.setdefault(op, _StateRange(scheme.parts.cache.granularity))

    def _output(self, op: str) -> _Range:
        return self._outputs.setdefault(op, _histogram(symmetric=False))

    def state(self) -> dict[str, Tensor]:
        """All that was observed, beside `reached` and `refused`; see `from_state`."""
        kinds: dict[str, Mapping[str, _Range | _StateRange]]
        kinds = {"input": self._inputs, "output": self._outputs, "state": self._states}
        return {
            f"{kind}/{op}/{name}": value
            for kind, ranges in kinds.items()
            for op, observed in ranges.items()
            for name, value in observed.state().items()
        }

    @classmethod
    def from_state(
        cls, schemes: Schemes, reached: Collection[str], refused: Mapping[str, str], state: Mapping[str, Tensor]
    ) -> Calibration:
        """Make one of what another observed.

        Args:
            schemes: What needed ranges.
            reached: Ops that were reached.
            refused: Those that cannot be quantized.
            state: From `state`; other tensors may be among them.

        """
        found = cls(schemes)
        found.reached.update(reached)
        found.refused.update(refused)
        observed: dict[tuple[str, str], dict[str, Tensor]] = {}
        for key, value in state.items():
            kind, _, rest = key.partition("/")
            op, _, name = rest.rpartition("/")
            observed.setdefault((kind, op), {})[name] = value
        for (kind, op), buffers in observed.items():
            scheme = scheme_of(schemes, op)
            if scheme is not None and kind == "state":
                found._state(op, scheme).restore(buffers)
            elif scheme is not None and kind in ("input", "output"):
                (found._input(op, scheme) if kind == "input" else found._output(op)).restore(buffers)
        return found

    def input_qparams(self, op: str) -> QParams:
        """Scale and zero point of an op's input, uint8; 128 is that of symmetric ones."""
        return self._inputs[op].qparams()

    def largest_input(self, op: str) -> float:
        """Largest magnitude in an op's input, for scales of floats."""
        return self._inputs[op].largest()

    def extremes(self, op: str, dim: int) -> tuple[Tensor, Tensor]:
        """Least and largest of what shares a scale in keys or values of so many features."""
        return self._states[op].extremes(dim)

    def output_qparams(self, op: str) -> QParams:
        """Scale and zero point of an op's output, uint8."""
        return self._outputs[op].qparams()
