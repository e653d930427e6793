"""How much memory each of several changes takes while they go through a graph side by side."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch.fx import Node

    from pytest_qsens.graph.schedule import Level, Step

aten = torch.ops.aten

_MAY_COPY = {
    aten.contiguous.default,
    aten.flatten.using_ints,
    aten.reshape.default,
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.other,
}
"""Operators that give a view of their argument where its layout, dtype and device allow it."""


class Footprint:
    """The bytes that one change holds, step after step, if it reaches all of these nodes.

    Values that it does not compute are those of the run, and take nothing. A view keeps alive the memory that it lies
    in.

    Args:
        nodes: Of the graph, in order.
        active: By position: whether the change computes it.

    Attributes:
        live: Bytes held now.

    """

    def __init__(self, nodes: Sequence[Node], active: Sequence[int]) -> None:
        self.live = 0
        self._nodes = nodes
        self._active = active
        order = {node: i for i, node in enumerate(nodes)}
        self._owners: list[int] = []  # by position: where its memory comes from
        for position, node in enumerate(nodes):
            viewed = _viewed(node)
            self._owners.append(position if viewed is None else self._owners[order[viewed]])
        self._held: defaultdict[int, set[int]] = defaultdict(set)  # owner → positions of values that lie in it

    def take(self, step: Step) -> None:
        """Compute a value."""
        if not self._active[step.position]:
            return
        owner = self._owners[step.position]
        if self._active[owner]:
            if not self._held[owner]:
                self.live += value_bytes(self._nodes[owner])
            self._held[owner].add(step.position)

    def drop(self, step: Step) -> None:
        """Drop what no later step reads."""
        for position in step.dead if self._active[step.position] else ():
            owner = self._owners[position]
            if position in self._held[owner]:
                self._held[owner].remove(position)
                if not self._held[owner]:
                    self.live -= value_bytes(self._nodes[owner])

    def most(self, levels: Iterable[Level], stacked: Callable[[Node], int], beside: Callable[[Node], int]) -> int:
        """Go through levels; returns the most bytes that it holds where the changes wait for each other.

        Args:
            levels: What goes side by side.
            stacked: Bytes of a change's part of what a call takes for all of them.
            beside: Bytes of its part of what is there while the call is computed, beside that and the result.

        """
        most = 0
        for level in levels:
            for step in level.steps:
                self.take(step)
                self.drop(step)
            for steps in level.together:
                stack = max((stacked(step.node) for step in steps if self._active[step.position]), default=0)
                for step in steps:
                    self.take(step)
                    most = max(most, self.live + stack + (beside(step.node) if self._active[step.position] else 0))
                    self.drop(step)
            most = max(most, self.live)
        return most


def size(node: Node) -> int:
    """Bytes of the memory that computing a node's value takes; a view takes none."""
    return 0 if node.op != "call_function" or _viewed(node) is not None else value_bytes(node)


def value_bytes(node: Node) -> int:
    """Bytes of the tensors in a node's value."""
    return sum(value.nbytes for value in tree_leaves(node.meta.get("val")) if isinstance(value, Tensor))


def _viewed(node: Node) -> Node | None:
    """Return the node in whose memory a value lies, if it has none of its own."""
    if node.op != "call_function" or not node.all_input_nodes:
        return None
    argument = node.all_input_nodes[0]
    schema = getattr(node.target, "_schema", None)
    if schema is None:  # an item of several values
        return argument
    if not any(value.alias_info is not None for value in schema.returns):
        return None
    return None if node.target in _MAY_COPY and not _fits(argument.meta.get("val"), node.meta.get("val")) else argument


def _fits(argument: Any, value: Any) -> bool:  # noqa: ANN401 - what a node holds
    """Whether a value can be a view of the argument."""
    tensors = isinstance(argument, Tensor) and isinstance(value, Tensor)
    return tensors and argument.dtype == value.dtype and argument.is_contiguous()
