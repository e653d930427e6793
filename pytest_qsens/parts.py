"""How much of a tensor is worked on at a time, where all of it at once would need too much memory, or leave a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def rows_within(values: int, tensor: Tensor) -> int:
    """Return how many entries of a tensor's first dimension hold at most so many values; 1 at least."""
    return max(1, values // max(1, tensor.shape[1:].numel()))
