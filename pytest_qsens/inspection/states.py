"""Keys, values and queries of attention: their heads, what rounding them loses, and what else could round them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pytest_qsens.graph.calls import channel_rows, finite_rows
from pytest_qsens.inspection.found import Head
from pytest_qsens.inspection.ranges import beyond_blocks
from pytest_qsens.quant.formats import round_between
from pytest_qsens.quant.op_scheme import BLOCK_OF, INTEGERS, WeightScheme

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qsens.graph.calls import Call
    from pytest_qsens.inspection.ranges import Losses
    from pytest_qsens.quant.calibration import Calibration
    from pytest_qsens.quant.op_scheme import ActivationScheme
    from pytest_qsens.quant.schemes import Scheme
    from pytest_qsens.quant.simulate import Simulator

_HUGE = 1e30
"""Beyond the range of any static scale, and within that of fp32."""

_SLACK = 1e-4
"""Steps by which fp32 may miss the bounds of a format."""


class Heads:
    """Follows the largest magnitude of every head, and the error that rounding makes in it."""

    def __init__(self) -> None:
        self._largest: Tensor | None = None
        self._sse: Tensor | None = None

    def add(self, x: Tensor, error: Tensor) -> None:
        """Add values ``(N, heads, tokens, dim)``, finite, and what rounding adds to them; others have no heads."""
        if x.dim() != error.dim() or x.dim() < 4 or not x.numel():
            return
        largest = x.abs().amax((0, 2, 3)).double().cpu()
        sse = error.double().square().sum((0, 2, 3)).cpu()
        if self._largest is None or self._sse is None or len(self._largest) != len(largest):
            self._largest, self._sse = largest, sse
        else:
            self._largest, self._sse = torch.maximum(self._largest, largest), self._sse + sse

    @property
    def found(self) -> tuple[Head, ...]:
        """All of them, in their order; none where there are none."""
        if self._largest is None or self._sse is None:
            return ()
        whole = float(self._sse.sum())
        pairs = zip(self._largest.tolist(), self._sse.tolist(), strict=True)
        return tuple(Head(i, largest, sse / whole if whole else 0.0) for i, (largest, sse) in enumerate(pairs))


def add_lost_state(
    found: Losses, heads: Heads, op: str, call: Call, scheme: Scheme, simulator: Simulator, calibration: Calibration
) -> None:
    """Count what rounding loses of keys or values; tokens that are not finite are left out."""
    cache = scheme.parts.cache
    assert cache is not None  # noqa: S101 - no other is given to keys and values
    finite = finite_rows(call.x, call.kind)
    x = call.x if finite is None else call.x.masked_fill(~finite[..., None], 0)
    rounded = simulator.output(op, call)
    error = (rounded if finite is None else rounded.masked_fill(~finite[..., None], 0)) - x
    heads.add(x, error)
    kept, lost = (values if finite is None else values[finite] for values in (x, error))
    found.add(kept, lost, _clipped(op, call.x if finite is None else x, cache, calibration))


def _clipped(op: str, x: Tensor, cache: ActivationScheme, calibration: Calibration) -> int | None:
    """Count values beyond the largest number that they can become by more than half a step; ``None``: not known."""
    if cache.kind == "local":
        return None
    if cache.kind == "dynamic":
        # the largest value that shares a scale is the largest number, but where scales are powers of two
        blocks = WeightScheme(cache.dtype, "group", cache.size)
        return beyond_blocks(channel_rows(x, "linear"), blocks) if cache.dtype in BLOCK_OF else 0
    low, high = (seen.to(x.device) for seen in calibration.extremes(op, x.shape[-1]))
    least, most = (round_between(torch.full_like(low, end), cache, low, high) for end in (-_HUGE, _HUGE))
    if cache.dtype in INTEGERS:
        half = (most - least) / (2 ** int(cache.dtype.removeprefix("int")) - 1) / 2
    else:
        half = most * (16 / 448)  # E4M3: numbers next to the largest, 448, are 32 apart
    reach = half * (1 + 2 * _SLACK)
    return int(((x < least - reach) | (x > most + reach)).sum())
