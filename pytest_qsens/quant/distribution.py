"""How values are distributed: a histogram that is the same whatever parts the values come in.

Bins are as wide as a power of two. If a larger value comes, bins are put together in pairs, which is exact, so no count
is ever spread by guess, and the memory does not grow. Zeros are counted apart: every quantizer here gives them back.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

BINS = 4096
"""On either side of zero; more than half of those on one side are in use."""

_BITS = 12
_LEAST_EXPONENT = -100
"""Of the end of the last bin: inverse widths of smaller ones are past all fp32 numbers."""

_CHUNK = 2**20
"""Values taken at a time: their bins are int64."""


class Histogram(NamedTuple):
    """Counts over bins.

    Attributes:
        counts: int64, ``(bins,)``.
        edges: float64, ``(bins + 1,)``.

    """

    counts: Tensor
    edges: Tensor

    @property
    def centers(self) -> Tensor:
        """Middle of each bin, float64."""
        return (self.edges[1:] + self.edges[:-1]) / 2


class Distribution:
    """Counts of the values seen so far.

    Attributes:
        low: Least of the values; ``inf`` if there was none.
        high: Largest of them.
        zeros: How many were zero.

    """

    def __init__(self) -> None:
        self._counts = torch.zeros(2 * BINS, dtype=torch.int64)
        self._exponent = _LEAST_EXPONENT
        self.low, self.high = math.inf, -math.inf
        self.zeros = 0

    def add(self, values: Tensor) -> None:
        """Count values, finite, of any shape, fp32."""
        if not values.numel():
            return
        low, high = torch.stack(torch.aminmax(values)).tolist()
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen(max(-low, high))
        inverse_width = 2.0 ** (_BITS - self._exponent)
        for part in torch.split(values.reshape(-1), _CHUNK):
            zeros = part == 0
            # by magnitude: what is too small for fp32 once it is multiplied still has its sign
            places = part.abs().mul_(inverse_width).clamp_(max=BINS - 1).long()
            bins = torch.where(part < 0, BINS - 1 - places, BINS + places)
            counts = torch.bincount(bins, minlength=2 * BINS).cpu()
            found = int(zeros.sum())
            counts[BINS] -= found
            self._counts += counts
            self.zeros += found

    def _widen(self, largest: float) -> None:
        """Put bins together until this value has one."""
        exponent = math.frexp(largest)[1] if largest else _LEAST_EXPONENT
        steps = exponent - self._exponent
        if steps <= 0:
            return
        self._exponent = exponent
        factor = 2 ** min(steps, _BITS)
        negative, positive = self._counts.view(2, -1, factor).sum(-1)
        self._counts = torch.zeros_like(self._counts)
        self._counts[BINS - len(negative) : BINS] = negative
        self._counts[BINS : BINS + len(positive)] = positive

    def signed(self) -> Histogram:
        """Return the bins from the first to the last that is in use."""
        used = self._counts.nonzero().flatten().tolist() or [BINS]
        first, last = min(used[0], BINS), max(used[-1], BINS - 1)
        return Histogram(self._counts[first : last + 1], self._edges(first - BINS, last + 1 - BINS))

    def folded(self) -> Histogram:
        """Return the bins of magnitudes, from zero to the last that is in use."""
        counts = self._counts[BINS:] + self._counts[:BINS].flip(0)
        used = counts.nonzero().flatten().tolist() or [0]
        return Histogram(counts[: used[-1] + 1], self._edges(0, used[-1] + 1))

    def _edges(self, first: int, last: int) -> Tensor:
        return torch.arange(first, last + 1, dtype=torch.float64) * 2.0 ** (self._exponent - _BITS)

    def state(self) -> dict[str, Tensor]:
        """All of it; see `restore`."""
        return {
            "counts": self._counts,
            "exponent": torch.tensor(self._exponent),
            "zeros": torch.tensor(self.zeros),
            "extremes": torch.tensor([self.low, self.high], dtype=torch.float64),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Become what another one was."""
        self._counts = state["counts"].clone()
        self._exponent, self.zeros = int(state["exponent"]), int(state["zeros"])
        self.low, self.high = state["extremes"].tolist()
