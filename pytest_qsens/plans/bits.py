"""How many bits a weight takes under a scheme."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pytest_qsens.errors import QsensError
from pytest_qsens.quant.op_scheme import BLOCK_OF, INTEGERS, parse

if TYPE_CHECKING:
    from pytest_qsens.quant.op_scheme import WeightScheme

_FLOATS = {
    **dict.fromkeys(("fp8_e4m3", "fp8_e5m2", "mxfp8", "mxint8"), 8),
    **dict.fromkeys(("fp6_e2m3", "fp6_e3m2", "mxfp6"), 6),
    **dict.fromkeys(("fp4_e2m1", "nf4", "mxfp4", "nvfp4"), 4),
}
_SCALE = 16
"""Bits of a scale of a group or a block, fp16 or bf16 as engines keep them; formats with shared scales have 8."""


def scheme_bits(name: str, unquantized: float) -> float:
    """Bits of one weight with its share of the scales of groups; those of channels and tensors are left out.

    >>> scheme_bits("w4a16_g128_asym", 16), scheme_bits("mxfp4", 16), scheme_bits("w16a8_static", 16)
    (4.15625, 4.25, 16)

    Args:
        name: Canonical name of a scheme (docs/configs.md).
        unquantized: Bits of a weight that is not quantized.

    Raises:
        QsensError: If it is none.

    """
    scheme = parse(name)
    if scheme is None:
        raise QsensError(f"nothing is known about the size of weights under {name!r}, which is no name of a scheme")
    return unquantized if scheme.weight is None else _weight_bits(scheme.weight)


def _weight_bits(weight: WeightScheme) -> float:
    integer = weight.dtype in INTEGERS
    bits = int(weight.dtype.removeprefix("int")) if integer else _FLOATS[weight.dtype]
    if not weight.size:
        return bits
    scale = 8 if weight.dtype in BLOCK_OF else _SCALE
    zero_point = bits if integer and not weight.symmetric else 0
    return bits + (scale + zero_point) / math.prod(weight.size)
