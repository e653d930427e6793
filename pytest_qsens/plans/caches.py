"""What is different where a plan is of keys and values of attention, and not of layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.groups import Fused
from pytest_qsens.ops import CACHED, STATES
from pytest_qsens.quant.op_scheme import parse
from pytest_qsens.wording import first_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from pytest_qsens.plans.problem import Candidate, Unit
    from pytest_qsens.results import OpResult

QUERIES = "q"

OF_ONE_MODULE = Fused("*:{q,k,v}")
"""What gets one scheme where queries are quantized, too: attention then multiplies what is of low precision."""


def is_of_cache(scheme: str) -> bool:
    """Whether a scheme, by its name, is of keys and values."""
    parts = parse(scheme)
    return parts is not None and parts.cache is not None


def quantizes_queries(scheme: str) -> bool:
    """Whether a scheme, by its name, is of queries, too."""
    parts = parse(scheme)
    return parts is not None and parts.queries


def fused(scheme: str) -> tuple[Fused, ...]:
    """Give the patterns of what gets one scheme, beside those of layers."""
    return (OF_ONE_MODULE,) if quantizes_queries(scheme) else ()


def entries_of(listed: Sequence[OpResult]) -> dict[str, OpResult]:
    """Find the entries of keys and values, and of queries, in a result."""
    return {op.op: op for op in listed if _types(op) <= set(STATES)}


def without_queries(entries: Mapping[str, OpResult]) -> list[OpResult]:
    """Leave out what a cache stores nothing of."""
    return [entry for entry in entries.values() if _types(entry) <= set(CACHED)]


def per_token(names: Sequence[str], files: Sequence[Mapping[str, OpResult]]) -> tuple[int, int] | None:
    """Count the values, and the heads, that a cache stores of a token; ``None`` if no file tells.

    Args:
        names: Of entries.
        files: Entries of each file; one that measured nothing of an op may not know.

    """
    values = heads = 0
    for name in names:
        told = [entry for entries in files if (entry := entries.get(name)) is not None]
        if all(_types(entry) == {QUERIES} for entry in told):
            continue
        known = next((entry for entry in told if entry.kv_values is not None), None)
        if known is None or known.kv_values is None:
            return None
        values, heads = values + known.kv_values, heads + (known.kv_heads or 0)
    return values, heads


def notes(units: Sequence[Unit], candidates: Sequence[Candidate], schemes: Collection[str]) -> Iterator[str]:
    """Tell what is not to be seen in numbers of bits."""
    if any(map(quantizes_queries, schemes)):
        yield (
            "queries are in no cache and count no bits; they are quantized with the keys and values of their module, "
            "or not at all"
        )
    able = {candidate.unit for candidate in candidates}
    unknown = [unit.name for place, unit in enumerate(units) if unit.values is None and place not in able]
    if unknown:
        yield f"bits are without {first_of(unknown, 1)}, whose size the result files do not tell"


def _types(entry: OpResult) -> set[str]:
    return set(entry.type.split("+"))
