"""Ranges of the channels of weights and inputs, and what rounding loses of their values."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from pytest_qsens.details import OUTLIER
from pytest_qsens.graph.calls import channel_rows, filled, finite_rows
from pytest_qsens.inspection.found import Channel, ChannelSummary, Lost
from pytest_qsens.parts import rows_within
from pytest_qsens.quant.formats import E2M1_MAX, E4M3_MAX, RoundedWeight, round_weight
from pytest_qsens.quant.integers import fake_quantized
from pytest_qsens.quant.op_scheme import BLOCK_OF, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from pytest_qsens.graph.calls import Call
    from pytest_qsens.quant.calibration import Calibration
    from pytest_qsens.quant.op_scheme import ActivationScheme
    from pytest_qsens.quant.schemes import Scheme
    from pytest_qsens.quant.simulate import Simulator

_LISTED = 8
"""Outlier channels that are named."""

_PART = 2**20
"""Values taken through several steps at a time."""

_SLACK = 1e-4
"""Steps by which fp32 may miss the bounds of a format."""


def channels_of(largest: Tensor) -> ChannelSummary:
    """Summarize the largest magnitudes of channels, ``(channels,)``."""
    values = largest.double().cpu()
    alive = values[values > 0]
    median = float(alive.median()) if alive.numel() else 0.0
    beyond = (values > OUTLIER * median).nonzero().view(-1) if median else values.new_empty(0, dtype=torch.int64)
    order = beyond[values[beyond].argsort(descending=True, stable=True)][:_LISTED]
    return ChannelSummary(
        len(values),
        float(values.min()),
        median,
        float(values.max()),
        len(values) - alive.numel(),
        len(beyond),
        tuple(Channel(int(i), float(values[i]), float(values[i]) / median) for i in order),
    )


def weight_channels(weight: Tensor) -> tuple[ChannelSummary, ChannelSummary]:
    """Summarize a weight ``(out, in, ...)`` by output and by input channel; of an embedding, by row and by column."""
    outputs = torch.empty(len(weight))
    inputs = torch.zeros(weight.shape[1])
    for start, part in parts_of(weight):
        magnitude = part.float().abs().flatten(2) if part.dim() > 2 else part.float().abs()[..., None]
        outputs[start : start + len(part)] = magnitude.flatten(1).amax(1)
        inputs = torch.maximum(inputs, magnitude.amax((0, 2)))
    return channels_of(outputs), channels_of(inputs)


def parts_of(values: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Split a tensor along its first dimension, each part with the number of its first entry."""
    rows = rows_within(_PART, values)
    return ((start, values[start : start + rows]) for start in range(0, len(values), rows))


class Seen:
    """Ranges of the channels of what has passed.

    Attributes:
        low: Least value of each channel so far; ``None`` before anything has passed.
        high: Largest one.

    """

    def __init__(self) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Add ``(rows, channels)``, finite."""
        if not rows.numel():
            return
        low, high = rows.amin(0).cpu(), rows.amax(0).cpu()
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    @property
    def span(self) -> tuple[float, float]:
        """Least and largest of all values."""
        assert self.low is not None  # noqa: S101 - something has passed
        assert self.high is not None  # noqa: S101
        return float(self.low.min()), float(self.high.max())

    @property
    def channels(self) -> ChannelSummary:
        """Summary of the channels."""
        assert self.low is not None  # noqa: S101 - something has passed
        assert self.high is not None  # noqa: S101
        return channels_of(torch.maximum(-self.low, self.high))


class _Bounds(NamedTuple):
    """Codes of a format: the least and the largest, and half a step there."""

    least: float
    most: float
    half: float


def _bounds(dtype: str, *, stored_twice: bool = False) -> _Bounds:
    if dtype in ("fp8_e4m3", "mxfp8"):
        return _Bounds(-E4M3_MAX, E4M3_MAX, 16.0)
    if dtype in ("mxfp4", "nvfp4"):
        times = 2.0 if stored_twice else 1.0
        return _Bounds(-E2M1_MAX * times, E2M1_MAX * times, times)
    half = 2.0 ** (int(dtype.removeprefix("int")) - 1)
    return _Bounds(-half, half - 1, 0.5)


def _beyond(codes: Tensor, bounds: _Bounds) -> int:
    reach = bounds.half + _SLACK
    return int(((codes < bounds.least - reach) | (codes > bounds.most + reach)).sum())


def beyond_blocks(values: Tensor, scheme: WeightScheme) -> int:
    """Count what is clipped in ``(rows, columns)`` when scales are of the values themselves."""
    whole = round_weight(values, scheme)
    bounds = _bounds(scheme.dtype, stored_twice=True)
    found = 0
    for start, part in parts_of(values):
        rows = slice(start, start + len(part))
        rounded = RoundedWeight(
            whole.values[rows], whole.scale[rows], None if whole.zero_point is None else whole.zero_point[rows]
        )
        codes = part.float().view(*rounded.scale.shape, -1) / rounded.scale[..., None]
        if rounded.zero_point is not None:
            codes += rounded.zero_point[..., None]
        found += _beyond(codes, bounds)
    return found


class Losses:
    """Counts what rounding loses in one tensor, call by call."""

    def __init__(self, part: str) -> None:
        self._part = part
        self._values = self._nonzero = self._away = 0
        self._clipped: int | None = 0

    def add(self, exact: Tensor, error: Tensor, clipped: int | None) -> None:
        """Add values, what rounding adds to them, and how many of them are clipped, if that is known."""
        nonzero = exact != 0
        self._values += exact.numel()
        self._nonzero += int(nonzero.sum())
        self._away += int((nonzero & (error == -exact)).sum())
        self._clipped = None if clipped is None or self._clipped is None else self._clipped + clipped

    @property
    def found(self) -> Lost:
        """All of it."""
        values = max(1, self._values)
        clipped = None if self._clipped is None else self._clipped / values
        return Lost(self._part, self._values, clipped, self._away / max(1, self._nonzero))


def lost_in_weight(op: str, call: Call, scheme: Scheme, simulator: Simulator, calibration: Calibration) -> Lost:
    """Count what rounding loses of an op's weight; what is clipped is what is rounded, so of a smoothed one."""
    found = Losses("weight")
    for start, error in simulator.weight_errors(op, call, rows_within(_PART, call.weight)):
        found.add(call.weight[start : start + len(error)].float(), error, 0)
    lost = found.found
    clipped = _clipped_weight(op, call, scheme, calibration)
    return Lost(lost.part, lost.values, clipped / max(1, lost.values), lost.rounded_away)


def _clipped_weight(op: str, call: Call, scheme: Scheme, calibration: Calibration) -> int:
    weight, smoothed_by = scheme.parts.weight, calibration.smoothing(op)
    if weight is None or (call.kind == "embedding" and not scheme.rows):
        return 0
    if smoothed_by is None and call.kind != "embedding":
        return beyond_blocks(call.weight.flatten(1), weight)
    # part by part, as multiplying makes a wide copy, and a table may have a hundred million rows: each has its scales
    factor = torch.ones(()) if smoothed_by is None else smoothed_by.to(call.weight.device)
    return sum(beyond_blocks(part.float() * factor, weight) for _, part in parts_of(call.weight))


def add_lost_input(
    found: Losses, op: str, call: Call, scheme: Scheme, simulator: Simulator, calibration: Calibration
) -> None:
    """Count what rounding loses of an op's input; rows that are not finite are left out."""
    activation = scheme.parts.activation
    if activation is None or not call.x.numel():
        return
    finite = finite_rows(call.x, call.kind)
    x = filled(call.x, finite, 0)
    error = simulator.input_error(op, type(call)(call.kind, x, call.weight, call.bias, call.conv))
    kept = channel_rows(call.x, call.kind)
    shares = channel_rows(filled(error, finite, torch.nan), call.kind)
    found.add(kept, shares, _clipped_input(op, kept, activation, calibration))


def _clipped_input(op: str, rows: Tensor, activation: ActivationScheme, calibration: Calibration) -> int | None:
    smoothed_by = calibration.smoothing(op)
    rows = rows if smoothed_by is None else rows / smoothed_by  # what is clipped is what is rounded
    if activation.kind == "static" and activation.dtype == "int8":
        return clipped_uint8(rows, *calibration.input_qparams(op))
    if activation.kind == "static":
        bounds = _bounds(activation.dtype)
        scale = calibration.largest_input(op) / bounds.most
        return _beyond(rows / scale, bounds) if scale else 0
    if activation.kind == "local":
        return None
    if activation.dtype not in BLOCK_OF:
        return 0  # the largest value of a row, or of the tensor, is the largest number of the format
    return beyond_blocks(
        rows, WeightScheme(activation.dtype, "group", activation.size, scaling_mode=activation.scaling_mode)
    )


def clipped_uint8(values: Tensor, scale: float, zero_point: int) -> int:
    """Count values whose integer is below 0 or above 255."""
    low, high = -zero_point - 0.5 - _SLACK, 255 - zero_point + 0.5 + _SLACK
    codes = values / scale
    return int(((codes < low) | (codes > high)).sum())


def add_lost_output(found: Losses, op: str, output: Tensor, calibration: Calibration) -> None:
    """Count what requantization loses of an op's output; values that are not finite are left out."""
    qparams = calibration.output_qparams(op)
    for _, part in parts_of(output.reshape(-1)):
        kept = part[torch.isfinite(part)]
        found.add(kept, fake_quantized(kept, qparams) - kept, clipped_uint8(kept, *qparams))
