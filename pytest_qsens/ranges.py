"""How far the weights and inputs of ops reach, channel by channel: for reports. Needs the model, and one forward."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from pytest_qsens.details import Channels, Details, OpRanges
from pytest_qsens.errors import QsensError, told
from pytest_qsens.exhibits import exhibits
from pytest_qsens.graph.calls import channel_rows
from pytest_qsens.graph.capture import run_model
from pytest_qsens.graph.intercept import OpInterceptor, unchanged_state
from pytest_qsens.models.spec import ready
from pytest_qsens.ops import STATES
from pytest_qsens.parts import rows_within
from pytest_qsens.preparation import placed

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from torch import Tensor

    from pytest_qsens.graph.calls import Call
    from pytest_qsens.models.source import ModelSource
    from pytest_qsens.models.spec import ModelSpec

BINS = 240
"""Values that are kept of one op: where it has more channels, each is the largest of some that follow each other."""

OUTLIERS = 5
_PART = 2**22
"""Values of a weight that are looked at together: a table of embeddings may have hundreds of millions."""


def details(source: ModelSource, ops: Collection[str], device: str = "cpu") -> Details:
    """Load a model, run its evaluation data once and look at the calls of some ops; show samples of its data.

    Args:
        source: The model and its data.
        ops: Names of the ops.
        device: A torch device.

    Returns:
        Ranges of the ops that were called; where the model cannot be run, a note says why, in place of an error.

    """
    try:
        spec = source.load()
        data = exhibits(source.samples(), spec)
    except QsensError as error:
        return Details(notes=(f"ranges and data could not be collected: {error}",))
    try:
        return Details(_observed(spec, ops, device), data)
    except Exception as error:  # noqa: BLE001 - scores are there, and a model may raise anything
        return Details(data=data, notes=(f"ranges could not be collected: {told(error)}",))


def _observed(spec: ModelSpec, ops: Collection[str], device: str) -> tuple[OpRanges, ...]:
    if not ops:
        return ()
    observer = RangeObserver(ops)
    model = ready(spec, device)
    for batch in spec.evaluation:
        on_device = placed(batch, device)
        with unchanged_state(model), OpInterceptor(model, observer.handle, observer.states), torch.no_grad():
            run_model(model, on_device, spec.output)
    return observer.ranges()


class RangeObserver:
    """Follows the largest magnitudes of channels over the calls of some ops; `handle` is for an `OpInterceptor`."""

    def __init__(self, ops: Collection[str]) -> None:
        self._ops = ops
        self._kinds: dict[str, str] = {}
        self._weights: dict[str, Tensor] = {}
        self._inputs: dict[str, Tensor] = {}
        self._head_dims: dict[str, int] = {}
        self.states = [op for op in ops if op.rpartition(":")[2] in STATES]

    def handle(self, op: str, call: Call, run: Callable[[], Tensor]) -> Tensor:
        """Look at a call, and let it run."""
        if op in self._ops:
            self._kinds[op] = call.kind
            if call.kind in STATES:
                self._head_dims[op] = call.x.shape[-1]
            elif op not in self._weights:
                self._weights[op] = largest_of_rows(call.weight)
            found = None if call.kind == "embedding" else largest_of_channels(call.x, call.kind)
            if found is not None:
                known = self._inputs.get(op)
                fits = known is not None and known.shape == found.shape  # a module may attend with other heads again
                self._inputs[op] = torch.maximum(known, found) if known is not None and fits else found
        return run()

    def ranges(self) -> tuple[OpRanges, ...]:
        """Tell what was found, in the order in which the ops were asked for."""
        return tuple(
            OpRanges(
                op,
                self._kinds[op],
                channels(self._weights[op]) if op in self._weights else None,
                channels(self._inputs[op]) if op in self._inputs else None,
                self._head_dims.get(op),
            )
            for op in self._ops
            if op in self._kinds
        )


def largest_of_rows(weight: Tensor) -> Tensor:
    """Largest magnitudes ``(out,)`` of each output channel of a weight ``(out, ...)``, fp32."""
    parts = torch.split(weight.flatten(1), rows_within(_PART, weight))
    return torch.cat([part.abs().amax(1).float() for part in parts])


def largest_of_channels(x: Tensor, kind: str) -> Tensor | None:
    """Largest magnitudes ``(in,)`` of each input channel, fp32, of the input of a call, as `Call` describes it.

    Rows (a convolution's samples) that are not finite are left out, as calibration leaves them out; ``None`` if there
    are no others.
    """
    rows = channel_rows(x, kind)
    return rows.abs().amax(0).float() if len(rows) else None


def channels(largest: Tensor) -> Channels:
    """Sum up the largest magnitudes ``(channels,)`` of all channels, in 4 significant digits."""
    values = largest.double().cpu()
    alive = values[values > 0]
    width = math.ceil(len(values) / BINS)
    top = torch.topk(values, min(OUTLIERS, len(values)))
    return Channels(
        count=len(values),
        largest=tuple(_rounded(float(part.max())) for part in torch.split(values, width)),
        median=_rounded(float(alive.median())) if alive.numel() else 0.0,
        outliers=tuple(
            (index, _rounded(value)) for index, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ),
    )


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
