"""Sketches of changes of a model's output: small enough to be kept, with products that are those of the changes.

A count sketch (Charikar, Chen, Farach-Colton, Finding frequent items in data streams, 2002): every value of the output,
of all batches, is added to one of k sums, with a sign, both given by a hash of its place. Products of sketches
are unbiased estimates of products of changes a and b, of variance at most (‖a‖²‖b‖² + (a·b)²) / k. An output with more
columns than k is sketched by columns first; through a linear layer at the end that takes its weight, and no logits are
made. An output of at most k values is kept as it is.

The hash depends on nothing but the place: sketches of any two runs on the same data can be multiplied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from pytest_qsens import profile
from pytest_qsens.interactions import DIMENSIONS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_ROWS = 4096
"""Rows of a weight taken to fp32 at a time."""


class Sketcher:
    """Sketches changes of the output of one batch; those of all batches add up.

    Args:
        number: Of the batch.
        start: How many values come before those of this batch, if all of them are kept.
        shape: Of the output.
        dimensions: Sums to make.
        kept: Whether all values of all batches are as many as there are sums, or fewer.
        weights: Summed rows of weights that changes go through, the same for all batches: by identity, as the model
            keeps its weights.

    """

    def __init__(
        self, number: int, start: int, shape: Sequence[int], dimensions: int, *, kept: bool, weights: dict[int, Tensor]
    ) -> None:
        self._dimensions = dimensions
        self._channels = shape[-1] if shape else 1
        self._columns: tuple[Tensor, Tensor] | None = None
        if self._channels > dimensions:
            self._columns = _hashed(self._channels, 0, dimensions)
        size = torch.Size(shape).numel() // max(1, self._channels) * min(self._channels, dimensions)
        if kept:
            self._places, self._signs = torch.arange(start, start + size), torch.ones(size)
        else:
            self._places, self._signs = _hashed(size, 1 + number, dimensions)
        self._weights = weights

    def __call__(self, change: Tensor) -> Tensor:
        """Sketch a change of the output; float64, on the CPU."""
        rows = change.reshape(-1, self._channels).cpu()
        if self._columns is not None:
            rows = _summed_columns(rows, *self._columns, self._dimensions)
        return self._sums(rows)

    @profile.phase("scoring")
    def through(self, change: Tensor, weight: Tensor) -> Tensor:
        """Sketch the change of an output that is linear in what changes.

        Args:
            change: Of its input, ``(*, in)``.
            weight: ``(columns of the output, in)``.

        """
        key = id(weight)
        if key not in self._weights:
            self._weights[key] = weight.cpu().float() if self._columns is None else self._summed_rows(weight)
        return self._sums(change.reshape(-1, change.shape[-1]).cpu().float() @ self._weights[key].t())

    def _sums(self, values: Tensor) -> Tensor:
        found = torch.zeros(self._dimensions, dtype=torch.float64)
        return found.index_add_(0, self._places, values.reshape(-1).double() * self._signs)

    def _summed_rows(self, weight: Tensor) -> Tensor:
        assert self._columns is not None  # noqa: S101 - for mypy: else the weight is taken as it is
        found = torch.zeros(self._dimensions, weight.shape[1])
        parts = (torch.split(values, _ROWS) for values in (weight, *self._columns))
        for part, places, signs in zip(*parts, strict=True):
            found.index_add_(0, places, part.cpu().float() * signs[:, None].float())
        return found


def make_sketchers(shapes: Sequence[Sequence[int]], dimensions: int = DIMENSIONS) -> list[Sketcher]:
    """Make those of all batches.

    Args:
        shapes: Of their outputs.
        dimensions: Sums to make, unless the outputs have fewer values.

    """
    sizes = [torch.Size(shape).numel() for shape in shapes]
    kept = sum(sizes) <= dimensions
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    weights: dict[int, Tensor] = {}
    return [
        Sketcher(number, start, shape, min(dimensions, max(1, sum(sizes))), kept=kept, weights=weights)
        for number, (start, shape) in enumerate(zip(starts, shapes, strict=True))
    ]


def _summed_columns(rows: Tensor, places: Tensor, signs: Tensor, dimensions: int) -> Tensor:
    found = torch.zeros(rows.shape[0], dimensions)
    return found.index_add_(1, places, rows.float() * signs.float())


def _hashed(count: int, seed: int, dimensions: int) -> tuple[Tensor, Tensor]:
    """Place and sign, float64, for each of so many values: SplitMix64 (Steele, Lea, Flood, 2014) of their numbers."""
    with np.errstate(over="ignore"):
        bits = np.arange(count, dtype=np.uint64) + np.uint64(seed) * np.uint64(0xD1342543DE82EF95)
        bits = (bits + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    places = ((bits >> np.uint64(11)) % np.uint64(dimensions)).astype(np.int64)
    signs = 1.0 - 2.0 * (bits & np.uint64(1)).astype(np.float64)
    return torch.from_numpy(places), torch.from_numpy(signs)
