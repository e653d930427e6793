"""How many bits a weight, or a value in a cache of keys and values, takes under a scheme."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pytest_qsens.errors import QsensError
from pytest_qsens.quant.op_scheme import BLOCK_OF, INTEGERS, parse

if TYPE_CHECKING:
    from pytest_qsens.quant.op_scheme import ActivationScheme, WeightScheme

_FLOATS = {
    **dict.fromkeys(("fp8_e4m3", "fp8_e5m2", "mxfp8", "mxint8"), 8),
    **dict.fromkeys(("fp6_e2m3", "fp6_e3m2", "mxfp6"), 6),
    **dict.fromkeys(("fp4_e2m1", "nf4", "mxfp4", "nvfp4"), 4),
}
_SCALE = 16
"""Bits of a scale of a group or a block, fp16 or bf16 as engines keep them; formats with shared scales have 8."""


def scheme_bits(name: str, unquantized: float) -> float:
    """Bits of one weight with its share of the scales of groups; those of channels and tensors are left out.

    >>> scheme_bits("w4a16_g128_asym", 16), scheme_bits("wmxfp4a16", 16), scheme_bits("w16a8_static", 16)
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


def cache_bits(name: str, head_dim: float | None) -> float:
    """Bits of one value of keys or values in a cache, with its share of the scales that are stored with every token.

    Scales of groups are, and those of tokens, of which each head has one; those of heads, channels and tensors stay
    the same however long the cache is, and are left out.

    >>> cache_bits("kv_int4_dynamic_g32_asym", 128), cache_bits("kv_int8_dynamic", 64), cache_bits("kv_fp8", 64)
    (4.625, 8.25, 8)

    Args:
        name: Canonical name of a scheme of keys and values.
        head_dim: Values of a token in a head; ``None`` if that is not known, which leaves out the scales of tokens.

    Raises:
        QsensError: If it is none.

    """
    scheme = parse(name)
    if scheme is None or scheme.cache is None:
        raise QsensError(f"nothing is known about the size of a cache under {name!r}, which is no scheme of one")
    bits = _bits(scheme.cache)
    if scheme.cache.size:
        return bits + _scale_bits(scheme.cache) / math.prod(scheme.cache.size)
    by_token = scheme.cache.granularity == "token" and head_dim is not None
    return bits + _scale_bits(scheme.cache) / head_dim if by_token and head_dim else bits


def _weight_bits(weight: WeightScheme) -> float:
    bits = _bits(weight)
    return bits + _scale_bits(weight) / math.prod(weight.size) if weight.size else bits


def _bits(part: WeightScheme | ActivationScheme) -> int:
    return int(part.dtype.removeprefix("int")) if part.dtype in INTEGERS else _FLOATS[part.dtype]


def _scale_bits(part: WeightScheme | ActivationScheme) -> int:
    """Bits of a scale, and of the zero point beside it."""
    scale = 8 if part.dtype in BLOCK_OF else _SCALE
    return scale + (_bits(part) if part.dtype in INTEGERS and not part.symmetric else 0)
