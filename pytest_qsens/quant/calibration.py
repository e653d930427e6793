"""Activation ranges: observers of torch.ao over the calibration batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.ao.quantization.observer import HistogramObserver

from pytest_qsens import profile
from pytest_qsens.errors import QsensError
from pytest_qsens.graph.calls import finite_rows
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
    """A histogram of one tensor's values; the search for its scale, which is slow, is made once and when needed."""

    def __init__(self) -> None:
        # uint8 over all of 0..255: what torch's x86 backend and Intel Neural Compressor use on machines with VNNI
        self._observer = HistogramObserver(dtype=torch.quint8, qscheme=torch.per_tensor_affine, reduce_range=False)
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
            scale, zero_point = self._observer.calculate_qparams()
            self._qparams = QParams(float(scale), int(zero_point))
        return self._qparams


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

    Attributes:
        ranges: Whether any are observed.
        reached: Ops that computed something.

    """

    def __init__(self, schemes: Schemes, *, ranges: bool = True) -> None:
        self._schemes = schemes
        self.ranges = ranges and any(scheme.activation != "dynamic" for scheme in all_of(schemes))
        self._inputs: dict[str, _Range] = {}
        self._outputs: dict[str, _Range] = {}
        self.reached: set[str] = set()

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
        if call.kind == "embedding" or not self.ranges or scheme is None or scheme.activation == "dynamic":
            return
        self._inputs.setdefault(op, _Range()).observe(_finite(call.x, call.kind, f"input of {op}"))
        if scheme.requantize_output:
            self._outputs.setdefault(op, _Range()).observe(_finite(output, call.kind, f"output of {op}"))

    def _scheme_of(self, op: str) -> Scheme | None:
        return scheme_of(self._schemes, op)

    def state(self) -> dict[str, Tensor]:
        """All that was observed, beside `reached`; see `from_state`."""
        kinds = {"input": self._inputs, "output": self._outputs}
        return {
            f"{kind}/{op}/{name}": value
            for kind, ranges in kinds.items()
            for op, observed in ranges.items()
            for name, value in observed.state().items()
        }

    @classmethod
    def from_state(cls, schemes: Schemes, reached: Collection[str], state: Mapping[str, Tensor]) -> Calibration:
        """Make one of what another observed.

        Args:
            schemes: What needed ranges.
            reached: Ops that were reached.
            state: From `state`; other tensors may be among them.

        """
        found = cls(schemes)
        found.reached.update(reached)
        observed: dict[tuple[str, str], dict[str, Tensor]] = {}
        for key, value in state.items():
            kind, _, rest = key.partition("/")
            op, _, name = rest.rpartition("/")
            observed.setdefault((kind, op), {})[name] = value
        for (kind, op), buffers in observed.items():
            if kind in ("input", "output"):
                ranges = found._inputs if kind == "input" else found._outputs
                ranges.setdefault(op, _Range()).restore(buffers)
        return found

    def input_qparams(self, op: str) -> QParams:
        """Scale and zero point of an op's input, uint8."""
        return self._inputs[op].qparams()

    def output_qparams(self, op: str) -> QParams:
        """Scale and zero point of an op's output, uint8."""
        return self._outputs[op].qparams()
