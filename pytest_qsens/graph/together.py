"""Carry several changes through a graph side by side, each with its own values, as a replay computes them.

At some calls the changes wait for each other, so that a weight is read once for all of them. If the graph ends in a
linear layer, of whose output nothing but rows is taken, errors are found without its output as a whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from pytest_qsens.graph.footprint import Footprint
from pytest_qsens.graph.narrow import LINEAR
from pytest_qsens.graph.replay import Follower, advance
from pytest_qsens.graph.schedule import Level, Schedule, Step, reader_of
from pytest_qsens.metrics import squared_distances

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from pytest_qsens.graph.replay import Change, Run
    from pytest_qsens.samples import Rows, Sums
    from pytest_qsens.sketches import Sketcher

aten = torch.ops.aten


class Head(NamedTuple):
    """A linear layer at the end, of whose output nothing but rows is taken."""

    node: Node
    source: Node
    """Its input."""
    rows: tuple[Node, ...]
    """Nodes after it that take rows."""
    schedule: Schedule
    """Of replays up to its input."""


class Together(ABC):
    """Several changes to a run at once.

    Args:
        run: What they change.
        reference: The output that errors are differences to.
        shared: Linear calls that are taken for all changes at once, see `settled_calls` → the argument that changes.
        rows: Of each sample; ``None`` takes the batch for one.
        sketcher: Of the differences to the reference; ``None`` sketches nothing.

    Attributes:
        run: As given.
        reference: As given.
        rows: Of each sample.
        sketcher: As given.

    """

    def __init__(
        self,
        run: Run,
        reference: Tensor,
        shared: Mapping[Node, Node],
        rows: Rows | None,
        sketcher: Sketcher | None = None,
    ) -> None:
        self.run = run
        self.reference = reference
        self.rows: Rows = rows or [1]
        self.sketcher = sketcher
        self._shared = shared
        self._schedule = run.schedule(run.graph.output, shared)
        self._head = self._find_head()

    def bytes_per_change(self) -> int:
        """About the memory that each of several changes takes while they go side by side, of any op."""
        most = self._most(self._schedule)
        if self._head is not None:
            most = max(most, self._most(self._head.schedule), self._head_bytes(self._head))
        return most

    def _most(self, schedule: Schedule) -> int:
        footprint = Footprint(self.run.graph.nodes, schedule.touched(self.run.call_nodes).active)
        return footprint.most(side_by_side(schedule), self._stacked_bytes, self._beside_bytes)

    def outputs(self, changes: Sequence[Change]) -> Iterator[Tensor]:
        """Compute the output of the graph with each of these changes."""
        return self._follow(changes, self._schedule, self.run.graph.output)

    def errors(self, changes: Sequence[Change]) -> list[Sums]:
        """Compute each change's sum of squared differences to the reference."""
        head = self._head
        found: dict[int, Sums] = {}
        if head is not None:
            before = [change for change in changes if head.schedule.shows(change)]
            values = self._follow(before, head.schedule, head.source)
            found |= zip(map(id, before), self._head_errors(values, head), strict=True)
        others = [change for change in changes if id(change) not in found]
        for change, output in zip(others, self.outputs(others), strict=True):
            found[id(change)] = squared_distances(self.reference, output, self.rows, self.sketcher)
        return [found[id(change)] for change in changes]

    @abstractmethod
    def _form(self, node: Node) -> torch.dtype:
        """Return the dtype in which a shared call takes what changes."""

    @abstractmethod
    def _stacked(self, values: Sequence[Tensor], clean: Tensor, dtype: torch.dtype) -> Tensor:
        """Put the values of the argument that changes side by side, ``(changes, *value)``."""

    @abstractmethod
    def _products(self, step: Step, stacked: Tensor) -> Iterator[Tensor]:
        """Compute the values of a shared call from what `_stacked` gives."""

    @abstractmethod
    def _stacked_bytes(self, node: Node) -> int:
        """Bytes that each change takes in what `_stacked` gives for a shared call."""

    @abstractmethod
    def _beside_bytes(self, node: Node) -> int:
        """Bytes that each change takes while `_products` runs, beside what is stacked and the result."""

    def _head_bytes(self, head: Head) -> int:  # noqa: ARG002 - for others
        """Bytes that each change takes in `_head_errors`, where it takes them all at once."""
        return 0

    @abstractmethod
    def _head_errors(self, values: Iterable[Tensor], head: Head) -> Iterable[Sums]:
        """Compute the sum of squared differences to the reference for each of some inputs of the head."""

    def _rows(self, value: Tensor, head: Head) -> Tensor:
        """Take the rows that are scored from an input or output of the head."""
        for node in head.rows:
            (_, *rest), options = reader_of(node, self.run.order)(self.run.clean)
            value = node.target(value, *rest, **options)  # type: ignore[operator] # a call
        return value

    def _follow(self, changes: Sequence[Change], schedule: Schedule, target: Node) -> Iterator[Tensor]:
        """Compute this node's value with each change."""
        if not changes:
            return  # and compute nothing again that was dropped
        followers = [Follower(self.run, change, schedule.touched(change)) for change in changes]
        together = side_by_side(schedule)
        for level in together:
            advance(self.run, level, followers, self._take_shared)
        while followers:  # by itself from here on: outputs can be large
            follower = followers.pop(0)
            for level in schedule.levels[len(together) :]:
                advance(self.run, level, [follower], self._take_shared)
            yield follower.value(target)

    def _take_shared(self, steps: Sequence[Step], followers: Sequence[Follower]) -> None:
        """Take shared calls of the same argument for all changes."""
        source = self.run.order[self._shared[steps[0].node]]
        clean: Tensor = self.run.clean[source]
        changed = [f for f in followers if f.values[source] is not clean] if clean.numel() else []
        stacks: dict[torch.dtype, Tensor] = {}
        for step in steps:
            through = [f for f in changed if f.active[step.position] and step.node not in f.change]
            if through:
                dtype = self._form(step.node)
                if dtype not in stacks:
                    stacks[dtype] = self._stacked([f.values[source] for f in changed], clean, dtype)
                stack = stacks[dtype]
                if len(through) < len(changed):
                    stack = stack[[f in through for f in changed]]
                for follower, value in zip(through, self._products(step, stack), strict=True):
                    follower.put(step, value)
            for follower in followers:
                if follower not in through:
                    follower.take(step)

    def _find_head(self) -> Head | None:
        rows: list[Node] = []
        node = self.run.graph.output
        while (
            node.target in _TAKES_ROWS
            and node not in self.run.groups  # else it holds what is written later
            and _leaves_last_dimension(node)
            and not any(map(self._schedule.can_change, node.all_input_nodes[1:]))
        ):
            rows.insert(0, node)
            node = node.all_input_nodes[0]
        if node.target not in (aten.linear.default, LINEAR) or node not in self._shared:
            return None
        outputs, inputs = self.run.graph.constants[node.all_input_nodes[1]].shape
        if outputs <= inputs:
            return None
        source = self._shared[node]
        return Head(node, source, tuple(rows), self.run.schedule(source, self._shared))


def side_by_side(schedule: Schedule) -> Sequence[Level]:
    """Return the levels that all changes go through before the next one: up to where they wait for the last time."""
    return schedule.levels[: max((i for i, level in enumerate(schedule.levels) if level.together), default=0)]


def settled_calls(run: Run, calls: Mapping[Node, tuple[int, int]]) -> dict[Node, Node]:
    """Find calls that change with one of their arguments alone: call → that argument.

    Args:
        run: Whose values must be those that the calls saw and made.
        calls: Call → positions of the argument that changes, and of the weight.

    """
    found: dict[Node, Node] = {}
    for node, (position, weight_position) in calls.items():
        if node.kwargs or node in run.groups:
            continue
        argument, weight = node.args[position], node.args[weight_position]
        others = [other for other in node.all_input_nodes if other is not argument]
        if (
            isinstance(argument, Node)
            and weight in others
            and _are_constant(others, run)
            and run.is_settled(argument, node)
        ):
            found[node] = argument
    return found


def _are_constant(nodes: Collection[Node], run: Run) -> bool:
    return all(node in run.graph.constants and node not in run.groups for node in nodes)


_TAKES_ROWS = {aten.index.Tensor, aten.slice.Tensor, aten.select.int}


def _leaves_last_dimension(node: Node) -> bool:
    value = node.all_input_nodes[0].meta["val"]
    if node.target is aten.index.Tensor:
        indices: Any = node.args[1]
        taken = sum(i.meta["val"].dim() if i.meta["val"].dtype in _MASKS else 1 for i in indices if i is not None)
        return taken < value.dim() and not any(i is None for i in indices)
    dim = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type] # a number
    last: bool = dim % value.dim() == value.dim() - 1
    return not last


_MASKS = (torch.bool, torch.uint8)
