"""Where a graph is narrow: between its narrow places, values can be dropped and computed again when they are needed."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from pytest_qsens.graph.closure import downstream

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from torch.fx import Node


_BRANCH = 8
"""At most so many calls lie between the two places where a residual stream is read, experts aside."""


class Segment(NamedTuple):
    """The nodes between two cuts.

    Attributes:
        end: Position of its last node.
        inner: Positions of its values that nothing after the segment reads, in order.

    """

    end: int
    inner: tuple[int, ...]


def find_segments(nodes: Sequence[Node], order: Mapping[Node, int], calls: Collection[Node]) -> tuple[Segment, ...]:
    """Cut a graph where at most one value that depends on any of ``calls`` is read later, but for long-lived ones.

    Those, such as the embedded text while an image is encoded, or an encoder's output in every layer of a decoder, are
    kept. So is what depends on no call, such as masks and positions; it is small and belongs to no segment.
    """
    dependent = downstream(calls)
    last_use = {argument: order[node] for node in nodes for argument in node.all_input_nodes}
    made = list(accumulate(node in calls for node in nodes))
    lasting = {node for node, last in last_use.items() if made[last] - made[order[node]] > _BRANCH}
    segments: list[Segment] = []
    inside: list[Node] = []
    crossing: set[Node] = set()
    for node in nodes:
        position = order[node]
        if node in dependent:
            inside.append(node)
            if node not in lasting:
                crossing.add(node)
        crossing -= {other for other in (node, *node.all_input_nodes) if last_use.get(other, -1) <= position}
        if inside and len(crossing) <= 1:
            inner = tuple(order[other] for other in inside if last_use.get(other, -1) <= position)
            segments.append(Segment(position, inner))
            inside = []
    return tuple(segments)
