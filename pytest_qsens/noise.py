"""How far scores of a quantized model move when nothing but the last digits of its values do.

With everything quantized, a value next to a rounding boundary takes the other integer for any reason at all, and what
follows takes others in turn. A difference smaller than that says nothing about an op.
"""

from __future__ import annotations

import math
import statistics
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pytest_qsens.uncertainty import STUDENT_T

if TYPE_CHECKING:
    from collections.abc import Sequence

SEEDS = (1, 2, 3)
RELATIVE = 1e-6
_KEPT = 2**24
"""Values up to which drawn factors are kept for the next call."""


def perturbed(value: Tensor, seed: int) -> Tensor:
    """Multiply every element by 1 + `RELATIVE` times a seeded normal number; the value's shape and dtype stay."""
    return value * factors(value, seed)


def factors(value: Tensor, seed: int) -> Tensor:
    """Return what `perturbed` multiplies a value by."""
    draw = _factors if value.numel() <= _KEPT else _factors.__wrapped__
    return draw(value.shape, value.dtype, value.device, seed)


@lru_cache(maxsize=32)  # a model has few shapes, and drawing takes longer than the product
def _factors(shape: torch.Size, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return 1 + RELATIVE * torch.randn(shape, generator=generator, dtype=dtype, device=device)


def spread(draws: Sequence[float]) -> float:
    """Sample standard deviation of a score as it is and under every seed."""
    return statistics.stdev(draws)


def distinguishable(draws: Sequence[float]) -> bool:
    """Whether the mean of these differences is not zero: Student's t test, two-sided at 95 %."""
    return abs(statistics.fmean(draws)) > STUDENT_T * spread(draws) / math.sqrt(len(draws))
