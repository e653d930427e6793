"""What quantizes an op that is inspected: what did so in the run of the result, or what would have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.configs.simulated import simulating
from pytest_qsens.ops import STATES
from pytest_qsens.plans.bits import cache_bits, scheme_bits
from pytest_qsens.quant.op_scheme import ActivationScheme, OpScheme, named
from pytest_qsens.quant.schemes import CACHE_SCHEMES, SCHEMES, scheme_named, simulated

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_qsens.ops import Op
    from pytest_qsens.quant.schemes import Scheme


UNQUANTIZED_BITS = 16.0
"""Of a weight that is left as it is."""


def usual_alternatives(name: str, op_type: str) -> tuple[str, ...]:
    """Name the schemes that an op is measured under beside its own where none are asked for.

    Args:
        name: Canonical name of its own.
        op_type: Of keys and values: those of the same numbers with any scales, and the usual ones.

    """
    cache = named(name, "scheme").cache
    if op_type not in STATES or cache is None:
        return tuple(SCHEMES if op_type not in STATES else CACHE_SCHEMES)
    queries = named(name, "scheme").queries
    parts = [*_scales_of(cache.dtype), *(scheme.parts.cache for scheme in CACHE_SCHEMES.values())]
    found = [OpScheme(None, cache=part, queries=queries) for part in parts if part is not None]
    return tuple(dict.fromkeys(each.name for each in found if simulated(each) is not None))


def _scales_of(dtype: str) -> Iterator[ActivationScheme]:
    for symmetric in (True, False):
        for granularity in ("tensor", "head", "channel"):
            yield ActivationScheme(dtype, "static", granularity, (), symmetric)
        yield ActivationScheme(dtype, "dynamic", "token", (), symmetric)


def bits_of(name: str, op_type: str, head_dim: int | None) -> float:
    """Bits of a weight under a scheme; of keys and values, those of a value in a cache."""
    return cache_bits(name, head_dim) if op_type in STATES else scheme_bits(name, UNQUANTIZED_BITS)


def scheme_for(name: str, op: Op, where: str, *, by_config: bool) -> tuple[Scheme | None, str]:
    """Which scheme an op is quantized with.

    Args:
        name: Canonical name.
        op: The op.
        where: What the name is a value for.
        by_config: Whether a config gives the op its scheme: what it says of an embedding is of rows.

    Returns:
        The scheme and an empty text; or ``None`` and why the op cannot be quantized so.

    Raises:
        QsensError: If there is no scheme of this name, or nothing simulates it.

    """
    if by_config and op.type == "embedding":
        scheme, reason = simulating(named(name, where), op)
    else:
        scheme, reason = scheme_named(name, where), ""
    refusal = None if scheme is None else scheme.refusal(op.type, op.features)
    return (scheme, reason) if refusal is None else (None, refusal)
