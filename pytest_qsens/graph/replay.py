"""Run a captured graph once, then again only downstream of what changed, bit for bit the same.

Some graphs write in place. Nodes whose tensors share a storage that is written into form a *group*; the kept value of
a member is what the storage held at the end, not when the member was used. So a replay that touches any member of a
group executes that group whole and in order, starting from copies of its roots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import Parameter

from pytest_qsens import profile
from pytest_qsens.graph.schedule import Arguments, Schedule, Step, Touched, Values, reader_of

if TYPE_CHECKING:
    from pytest_qsens.graph.capture import Graph

Override = Callable[..., Tensor]
"""Takes the arguments of a call node, positional and keyword, and returns its value."""

Change = Mapping[Node, Override]
"""What some call nodes compute instead."""


class Run:
    """One execution of a graph whose values are kept.

    ``overrides`` replace what chosen call nodes compute, in the run itself and in every replay. Values stay alive as
    long as the run does.
    """

    def __init__(self, graph: Graph, overrides: Change | None = None) -> None:
        self.graph = graph
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.call_nodes = tuple(node for nodes in graph.calls.values() for node in nodes)
        overrides = overrides or {}
        self._calls: list[Any] = [overrides.get(node, node.target) for node in graph.nodes]
        # what op calls were given when they ran, where it was overwritten later
        self._overwritten: dict[Node, Arguments] = {}
        self._written = {node: written for node in graph.nodes if (written := _written_arguments(node))}
        self._values: Values = [None] * len(graph.nodes)
        self._execute()
        self.groups = self._find_groups()
        self.output: Tensor = self.values(graph.output).clone()

    def values(self, node: Node) -> Any:  # noqa: ANN401 - tensors, tuples of them, numbers
        """Value of a node at the end of the run."""
        return self._values[self.order[node]]

    def arguments(self, node: Node) -> Arguments:
        """Return what an op call was given when it ran."""
        return self._overwritten.get(node) or reader_of(node, self.order)(self._values)

    @property
    def clean(self) -> Values:
        """All values at the end of the run, in the order of the graph's nodes; not to be changed."""
        return self._values

    def is_original(self, node: Node) -> bool:
        """Whether a node computes what it did in the model."""
        return self._calls[self.order[node]] is node.target

    def is_settled(self, node: Node, at: Node) -> bool:
        """Whether the value of ``node`` is not written into after ``at``."""
        position = self.order[at]
        return all(self._last_write[group] < position for group in self.groups.get(node, ()))

    def replay(self, overrides: Change) -> Tensor:
        """Output of the graph if the given op calls were computed otherwise; the rest as in this run."""
        values = self._values.copy()
        touched = self._schedule.touched(overrides)
        for level in self._schedule.levels:
            for step in level.steps:
                if touched.active[step.position]:
                    self.take(step, values, overrides, touched)
        position = self.order[self.graph.output]
        result: Tensor = values[position] if touched.active[position] else self.output
        return result

    def take(self, step: Step, values: Values, overrides: Change, touched: Touched) -> None:
        """Compute one value of a replay, and drop those that nothing needs any more."""
        node = step.node
        if node in overrides:
            kept = self._overwritten.get(node) if node in touched.first else None
            args, kwargs = kept or step.read(values)
            call = overrides[node]
        elif node.op == "call_function":
            args, kwargs = step.read(values)
            call = self._calls[step.position]
        else:  # the root of a group that is written into
            call, args, kwargs = _copy, (self._root(node),), {}
        timer = profile.current
        values[step.position] = call(*args, **kwargs) if timer is None else timer.call(node, call, args, kwargs)
        for position in step.dead:
            values[position] = None

    @cached_property
    def _last_write(self) -> dict[tuple[Node, ...], int]:
        """Group → position of the last node that writes into it."""
        return {
            group: self.order[node]
            for node, written in self._written.items()
            for target in written
            for group in self.groups.get(target, ())
        }

    @cached_property
    def _schedule(self) -> Schedule:
        return Schedule(self.graph.nodes, self.groups, self.call_nodes, self.graph.output)

    def _execute(self) -> None:
        kept: dict[int, list[Node]] = {}  # storage → op call nodes that read it
        calls = set(self.call_nodes)
        for position, node in enumerate(self.graph.nodes):
            if node.op != "call_function":
                root = self._root(node)
                # the graph may write into anything but parameters, which capture has checked
                self._values[position] = root if isinstance(root, Parameter) else _copy(root)
                continue
            args, kwargs = reader_of(node, self.order)(self._values)
            if node in calls:
                for storage in _storages((args, kwargs)):
                    kept.setdefault(storage, []).append(node)
            for written in self._written.get(node, ()):
                for storage in _storages(self.values(written)):
                    for reader in kept.pop(storage, ()):
                        self._overwritten.setdefault(reader, _copy(self.arguments(reader)))
            call, timer = self._calls[position], profile.current
            self._values[position] = call(*args, **kwargs) if timer is None else timer.call(node, call, args, kwargs)

    def _root(self, node: Node) -> Any:  # noqa: ANN401 - as `values`
        return self.graph.inputs[node] if node.op == "placeholder" else self.graph.constants[node]

    def _find_groups(self) -> dict[Node, tuple[tuple[Node, ...], ...]]:
        members: dict[int, dict[Node, None]] = {}
        for node in self.graph.nodes:
            for storage in _storages(self.values(node)):
                members.setdefault(storage, {})[node] = None
        written = {s for targets in self._written.values() for node in targets for s in _storages(self.values(node))}
        groups: dict[Node, tuple[tuple[Node, ...], ...]] = {}
        for storage in sorted(written):
            group = tuple(members[storage])
            for node in group:
                groups[node] = (*groups.get(node, ()), group)
        return groups


def _written_arguments(node: Node) -> tuple[Node, ...]:
    """Return the argument nodes of a call whose tensors it writes into."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return ()
    written: list[Node] = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            written += value if isinstance(value, list | tuple) else [value]  # type: ignore[list-item] # other values are dropped
    return tuple(item for item in written if isinstance(item, Node))


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _storages(value: object) -> set[int]:
    """Storages of the tensors in ``value``; empty ones share the null address and alias nothing."""
    return {pointer for tensor in _tensors(value) if (pointer := tensor.untyped_storage().data_ptr())}


def _copy(value: Any) -> Any:  # noqa: ANN401 - a value of any node
    """Copy the tensors in ``value``; dense strides are kept, so that kernels take the same path."""
    if isinstance(value, Tensor):
        return torch.clone(value)
    if isinstance(value, list | tuple):
        return type(value)(_copy(item) for item in value)
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return value
