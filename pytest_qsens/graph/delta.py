"""Carry the differences that several ops make through a graph together.

Each change is followed by itself to the first value that everything later depends on it through alone: the end of its
block, in a transformer. From there the changes go on side by side. Between linear layers, values are computed anew in
fp32; a linear layer maps the difference of its input to that of its output, W·δ, where nothing cancels, so that bf16
with fp32 accumulation is enough if the weight is bf16 to begin with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.node import map_arg
from torch.nn import functional

from pytest_qsens.metrics import squared_distance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch.fx import Node

    from pytest_qsens.graph.replay import Override, Run

aten = torch.ops.aten

_WORTH_NARROWING = 2**18
"""Values in a weight from which bf16 products pay. It takes many values for their rounding to average out, too."""


class _Head(NamedTuple):
    """A linear layer at the end, of whose output nothing but rows is taken."""

    source: Node
    """Its input."""
    rows: tuple[Node, ...]
    """Nodes after it that take rows."""
    gram: Tensor
    """WᵀW, float64: the squared length of W·δ is δᵀ(WᵀW)δ."""


class DeltaRun:
    """Differences to a clean run.

    Args:
        run: The clean run.
        narrow: Whether bf16 products are faster than fp32 here.

    """

    def __init__(self, run: Run, *, narrow: bool) -> None:
        self._run = run
        self._use_narrow = narrow
        self._order = {node: i for i, node in enumerate(run.graph.nodes)}
        self._narrow: dict[Node, Tensor | None] = {}
        self._head = self._find_head()

    def can_follow(self, nodes: Iterable[Node]) -> bool:
        """Whether nothing downstream of these nodes is written in place."""
        return not self._run.shares_written_storage(self._downstream(nodes))

    def outputs(self, changes: Sequence[Mapping[Node, Override]]) -> Tensor:
        """Return the outputs of the graph with each of these changes: fp32, ``(changes, *output)``."""
        return self._values(changes, self._run.graph.output)

    def errors(self, changes: Sequence[Mapping[Node, Override]]) -> Tensor:
        """Return each change's sum of squared differences to the clean output: float64, ``(changes,)``."""
        head = self._head
        roots = {node for change in changes for node in change}
        if head is None or not roots.isdisjoint(self._downstream([head.source])):
            outputs = self.outputs(changes)
            distances = [squared_distance(self._run.output, output) for output in outputs]
            return torch.tensor(distances, dtype=torch.float64)
        delta = self._values(changes, head.source) - self._run.values(head.source)

        def take_rows(value: Tensor) -> Tensor:
            new: dict[Node, Any] = {}
            for node in head.rows:
                new[node] = value
                value = node.target(value, *self._arguments(node, new)[0][1:])  # type: ignore[operator] # a call
            return value

        rows = torch.vmap(take_rows)(delta).flatten(1, -2).double()
        return ((rows @ head.gram) * rows).sum((1, 2)).clamp_min(0)  # what should be zero can come out below

    def _values(self, changes: Sequence[Mapping[Node, Override]], target: Node) -> Tensor:
        needed = self._upstream(target)
        roots = {node for change in changes for node in change}
        steps = [node for node in self._downstream(roots) if node in needed]
        if not steps:
            return torch.stack([self._run.values(target)] * len(changes))
        cut = self._cut(steps, roots, target)
        position = self._order[cut]
        values: list[Tensor] = []
        for change in changes:
            new: dict[Node, Any] = {}
            for node in self._downstream(change):
                if node in needed and self._order[node] <= position:
                    self._step(node, new, change)
            values.append(new.get(cut, self._run.values(cut)))
        rest = [node for node in steps if self._order[node] > position]

        def follow(value: Tensor) -> Tensor:
            new: dict[Node, Any] = {cut: value}
            for node in rest:
                self._step(node, new, {})
            found: Tensor = new[target]
            return found

        stacked = torch.stack(values)
        return torch.vmap(follow)(stacked) if rest else stacked

    def _arguments(self, node: Node, new: Mapping[Node, Any]) -> tuple[Any, Any]:
        return map_arg((node.args, node.kwargs), lambda a: new[a] if a in new else self._run.values(a))

    def _step(self, node: Node, new: dict[Node, Any], change: Mapping[Node, Override]) -> None:
        if node in change:
            args, kwargs = (
                self._run.arguments(node)
                if new.keys().isdisjoint(node.all_input_nodes)
                else (self._arguments(node, new))
            )
            new[node] = change[node](*args, **kwargs)
            return
        rule = RULES.get(node.target)
        if rule is not None and rule(self, node, new):
            return
        args, kwargs = self._arguments(node, new)
        new[node] = node.target(*args, **kwargs)  # type: ignore[operator] # a call

    def linear(self, node: Node, new: dict[Node, Any]) -> bool:
        """W·δ, if the weight is as it was."""
        x, weight_node, *_ = node.args
        if x not in new or any(argument in new for argument in node.all_input_nodes[1:]):
            return False
        weight = self._weight(weight_node)  # type: ignore[arg-type] # a node
        delta = (new[x] - self._run.values(x)).to(weight.dtype)  # type: ignore[index, arg-type] # a node
        new[node] = self._run.values(node) + functional.linear(delta, weight)
        return True

    def _weight(self, node: Node) -> Tensor:
        weight: Tensor = self._run.values(node)
        if not self._use_narrow or weight.numel() < _WORTH_NARROWING:
            return weight
        if node not in self._narrow:
            narrow = weight.to(torch.bfloat16)
            self._narrow[node] = narrow if torch.equal(narrow.float(), weight) else None
        found = self._narrow[node]
        return weight if found is None else found

    def _find_head(self) -> _Head | None:
        rows: list[Node] = []
        node = self._run.graph.output
        while node.target in _TAKES_ROWS and _leaves_last_dimension(node):
            rows.insert(0, node)
            node = node.all_input_nodes[0]
        if node.target is not aten.linear.default or node.args[1] not in self._run.graph.constants:
            return None
        weight = self._run.values(node.args[1])  # type: ignore[arg-type] # a node
        if weight.shape[0] <= weight.shape[1]:
            return None
        return _Head(node.args[0], tuple(rows), weight.double().t() @ weight.double())  # type: ignore[arg-type] # a node

    def _downstream(self, start: Iterable[Node]) -> list[Node]:
        """Nodes that depend on these, in order, with them."""
        dirty = set(start)
        todo = list(dirty)
        while todo:
            fresh = {user for user in todo.pop().users if user.op == "call_function"} - dirty
            todo += fresh
            dirty |= fresh
        return sorted(dirty, key=self._order.__getitem__)

    def _upstream(self, target: Node) -> set[Node]:
        """Nodes that this one depends on, with it."""
        found = {target}
        todo = [target]
        while todo:
            fresh = set(todo.pop().all_input_nodes) - found
            todo += fresh
            found |= fresh
        return found

    def _cut(self, steps: Sequence[Node], roots: set[Node], target: Node) -> Node:
        """Return the first value after all changes that all later steps depend on them through alone."""
        dirty = set(steps)
        readers = {node: sum(user in dirty for user in node.users) for node in steps}
        open_values: set[Node] = set()
        missing = len(roots & dirty)
        for node in steps:
            missing -= node in roots
            for argument in node.all_input_nodes:
                if argument in open_values:
                    readers[argument] -= 1
                    if not readers[argument]:
                        open_values.discard(argument)
            if readers[node]:
                open_values.add(node)
            if not missing and open_values <= {node} and isinstance(self._run.values(node), Tensor):
                return node
        return target


_TAKES_ROWS = {aten.index.Tensor, aten.slice.Tensor, aten.select.int}


def _leaves_last_dimension(node: Node) -> bool:
    dimensions = node.all_input_nodes[0].meta["val"].dim()
    if node.target is aten.index.Tensor:
        indices: Any = node.args[1]
        return len(indices) < dimensions and not any(i is None for i in indices)
    dim = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type] # a number
    last: bool = dim % dimensions == dimensions - 1
    return not last


RULES: dict[Any, Callable[[DeltaRun, Node, dict[Node, Any]], bool]] = {aten.linear.default: DeltaRun.linear}
"""ATen op → how a difference goes through it; what is not here is computed anew."""
