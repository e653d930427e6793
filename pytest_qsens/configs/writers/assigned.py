"""What every writer takes, and how it refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pytest_qsens.ops import CACHED, STATES
from pytest_qsens.quant.op_scheme import BLOCK_OF

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pytest_qsens.ops import Op
    from pytest_qsens.quant.op_scheme import ActivationScheme, OpScheme, WeightScheme


class Assigned(NamedTuple):
    """An op, and how it is to be quantized; ``None``: not at all."""

    op: Op
    scheme: OpScheme | None


class Inexpressible(Exception):  # noqa: N818 - not an error until no other way is left
    """A format has no way to say this of this op; ``why`` names the property in the way."""

    def __init__(self, one: Assigned, why: str) -> None:
        super().__init__(why)
        self.one = one
        self.why = why


def by_scheme(assigned: Iterable[Assigned]) -> dict[OpScheme | None, list[Assigned]]:
    """Ops of each scheme, both in the order in which they come."""
    found: dict[OpScheme | None, list[Assigned]] = {}
    for one in assigned:
        found.setdefault(one.scheme, []).append(one)
    return found


def names(assigned: Iterable[Assigned]) -> list[str]:
    """Names of the ops."""
    return [one.op.name for one in assigned]


def split(assigned: Iterable[Assigned]) -> tuple[list[Assigned], list[Assigned]]:
    """Tell layers from keys and values of attention."""
    layers, states = list[Assigned](), list[Assigned]()
    for one in assigned:
        (states if one.op.type in STATES else layers).append(one)
    return layers, states


def of_all(states: Sequence[Assigned]) -> ActivationScheme | None:
    """How keys and values are quantized, in a file that says it of all attention modules at once.

    Raises:
        Inexpressible: If not all of them are quantized alike, or queries are, too.

    """
    queries = [one for one in states if one.op.type not in CACHED and one.scheme is not None]
    if queries:
        raise Inexpressible(queries[0], "it says nothing of queries beside keys and values")
    schemes = by_scheme(one for one in states if one.op.type in CACHED)
    if len(schemes) > 1:
        _, different = list(schemes.values())[:2]
        raise Inexpressible(different[0], "it says one thing of the keys and values of all attention modules")
    scheme = next(iter(schemes), None)
    return None if scheme is None else scheme.cache


def most_common(assigned: Sequence[Assigned]) -> OpScheme | None:
    """Scheme that most of them have, of equals the first; ``None`` if there are no ops."""
    return max(by_scheme(assigned).items(), key=lambda item: len(item[1]), default=(None, []))[0]


def obstacle_of_blocks(part: WeightScheme | ActivationScheme) -> str | None:
    """Why a number format has no such scale: its standard says how many elements share one."""
    block = BLOCK_OF.get(part.dtype)
    if block is None or (part.granularity, part.size) == ("group", (block,)):
        return None
    return f"{part.dtype} has groups of {block}"
