"""What is different where a plan is of keys and values of attention, and not of layers."""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING

from pytest_qsens.errors import QsensError
from pytest_qsens.groups import Fused, grouped
from pytest_qsens.ops import CACHED, STATES
from pytest_qsens.plans.problem import Candidate, own_error
from pytest_qsens.quant.op_scheme import parse
from pytest_qsens.wording import first_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from pytest_qsens.ops import Op
    from pytest_qsens.plans.problem import Unit
    from pytest_qsens.results import OpResult

QUERIES = "q"

OF_ONE_MODULE = Fused("*:{q,k,v}")
"""What is chosen together where queries can be quantized, too: attention then multiplies what is of low precision."""


def is_of_cache(scheme: str) -> bool:
    """Whether a scheme, by its name, is of keys and values."""
    parts = parse(scheme)
    return parts is not None and parts.cache is not None


def quantizes_queries(scheme: str) -> bool:
    """Whether a scheme, by its name, is of queries, too."""
    parts = parse(scheme)
    return parts is not None and parts.queries


def of_one_scheme(group: Op, ops: Sequence[Op], fused: Sequence[Fused]) -> list[tuple[str, ...]]:
    """Find which keys and values of a module get one scheme, where its queries stay as they are.

    Args:
        group: Queries, keys and values of the module.
        ops: Those of all modules.
        fused: Patterns of what gets one scheme.

    Raises:
        QsensError: If a pattern is of several modules.

    """
    found = []
    for each in grouped([op for op in ops if op.type in CACHED], "fused", fused):
        names = each.member_names or (each.name,)
        if not set(names).isdisjoint(group.member_names or (group.name,)):
            modules = dict.fromkeys(name.rpartition(":")[0] for name in names)
            if len(modules) > 1:
                raise QsensError(
                    f"--fused joins keys and values of {len(modules)} modules, {' and '.join([*modules][:2])} for two, "
                    "and a module whose queries can be quantized is chosen for by itself. Give patterns of single "
                    f"modules, such as '*:{{k,v}}', or leave results of attn_... out"
                )
            found.append(names)
    return found


def combined(
    parts: Sequence[tuple[str, ...]],
    candidates: Sequence[Sequence[Candidate]],
    values: Sequence[int | None],
    full: float,
) -> Iterator[Candidate]:
    """Combine what is chosen for keys and for values of a module: every two, and each with the others as they are.

    Args:
        parts: Names of what gets one scheme.
        candidates: Of each part.
        values: That each part stores of a token.
        full: Bits of a value that is not quantized.

    """
    sizes = [0 if size is None else size for size in values]
    for choice in product(*([None, *of_part] for of_part in candidates)):
        taken = [candidate for candidate in choice if candidate is not None]
        if not taken:
            continue
        bits = [full if candidate is None else candidate.bits for candidate in choice]
        sketches = [candidate.sketch for candidate in taken]
        known = [sketch for sketch in sketches if sketch is not None]
        schemes = {
            op: str(candidate.scheme)
            for names, candidate in zip(parts, choice, strict=True)
            if candidate is not None
            for op in names
        }
        own = math.fsum(candidate.own for candidate in taken)
        joint = sum(known[1:], known[0]) if len(known) == len(taken) else None
        if joint is not None:
            own = own_error(own, known)
        mean = math.fsum(size * each for size, each in zip(sizes, bits, strict=True)) / (sum(sizes) or 1)
        yield Candidate(taken[0].unit, schemes, mean, math.fsum(c.nmse for c in taken), own, joint)


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
