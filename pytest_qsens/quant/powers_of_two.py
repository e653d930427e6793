"""Scales that are powers of two (E8M0), as the blocks of MX formats share them, in torchao's four modes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

_LEAST, _MOST = -127, 127
"""Exponents that E8M0 has."""

_MANTISSA = 23
_BIAS = 127


class _Elements(NamedTuple):
    """Numbers of a format: the exponent of its largest power of two, bits of its mantissa, its largest number."""

    exponent: int
    mantissa: int
    most: float


_ELEMENTS = {"mxfp8": _Elements(8, 3, 448.0), "mxfp4": _Elements(2, 1, 6.0)}


def powers_of_two(magnitude: Tensor, dtype: str, mode: str) -> Tensor:
    """Return the scale of each block.

    ``floor`` is that of OCP Microscaling Formats v1.0, 6.3: 2^(floor(log2(x)) - e). ``ceil`` and ``even`` are torchao's
    (``ScaleCalculationMode``): 2^(ceil(log2(x)) - e), and ``floor`` of x rounded to the mantissa of the elements.
    ``rceil`` is 2^ceil(log2(x / m)), as cuBLAS has it (its documentation, "1D Block Scaling"). It is exact here;
    torchao's fp32 logarithm loses the bits of quotients that are a few millionths above a power of two.

    Args:
        magnitude: Largest magnitudes x of the blocks, fp32, not negative, finite.
        dtype: ``mxfp8`` (E4M3: e = 8, m = 448) or ``mxfp4`` (E2M1: e = 2, m = 6).
        mode: One of `SCALING_MODES`; empty is ``floor``.

    Returns:
        fp32, of the same shape.

    """
    elements = _ELEMENTS[dtype]
    if mode == "rceil":
        fraction, exponent = torch.frexp(magnitude / elements.most)
        exponent = torch.where(fraction == 0, _LEAST, exponent - (fraction == 0.5).int())
    else:
        bits = magnitude.view(torch.int32)  # a magnitude has no sign
        if mode == "even":
            bits = bits + (1 << (_MANTISSA - elements.mantissa - 1))
        exponent = (bits >> _MANTISSA) - _BIAS - elements.exponent
        if mode == "ceil":
            exponent = exponent + (bits & ((1 << _MANTISSA) - 1) > 0)
    return torch.ldexp(torch.ones_like(magnitude), exponent.clamp(_LEAST, _MOST))
