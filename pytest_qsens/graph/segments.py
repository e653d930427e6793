"""Where a graph is narrow: between its narrow places, values can be dropped and computed again when they are needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pytest_qsens.graph.closure import downstream

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from torch.fx import Node


class Segment(NamedTuple):
    """The nodes between two cuts.

    Attributes:
        end: Position of its last node.
        inner: Positions of its values that nothing after the segment reads, in order.

    """

    end: int
    inner: tuple[int, ...]


def find_segments(nodes: Sequence[Node], order: Mapping[Node, int], calls: Collection[Node]) -> tuple[Segment, ...]:
    """Cut a graph where at most one value that depends on any of ``calls`` is read later.

    What depends on none of them, such as masks and positions, is small, belongs to no segment, and is to be kept.
    """
    dependent = downstream(calls)
    last_use = {argument: order[node] for node in nodes for argument in node.all_input_nodes}
    segments: list[Segment] = []
    inside: list[Node] = []
    crossing: set[Node] = set()
    for node in nodes:
        position = order[node]
        if node in dependent:
            inside.append(node)
            crossing.add(node)
        crossing -= {other for other in (node, *node.all_input_nodes) if last_use.get(other, -1) <= position}
        if inside and len(crossing) <= 1:
            inner = tuple(order[other] for other in inside if last_use.get(other, -1) <= position)
            segments.append(Segment(position, inner))
            inside = []
    return tuple(segments)
