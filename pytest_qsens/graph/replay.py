"""Run a captured graph once, then again only downstream of what changed, bit for bit the same.

Some graphs write in place. Nodes whose tensors share a storage that is written into form a *group*; the kept value of
a member is what the storage held at the end, not when the member was used. So a replay that touches any member of a
group executes that group whole and in order, starting from copies of its roots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg
from torch.nn import Parameter

if TYPE_CHECKING:
    from pytest_qsens.graph.capture import Graph

Override = Callable[..., Tensor]
"""Takes the arguments of a call node, positional and keyword, and returns its value."""


@dataclass(frozen=True)
class _Step:
    node: Node
    first_change: bool
    """Whether this is an overridden call that no other change reaches: its arguments are those it had in the run."""
    dead: tuple[Node, ...]
    """Values that no later step reads."""


class Run:
    """One execution of a graph whose values are kept.

    ``overrides`` replace what chosen call nodes compute, in the run itself and in every replay. Values stay alive as
    long as the run does.
    """

    def __init__(self, graph: Graph, overrides: Mapping[Node, Override] | None = None) -> None:
        self.graph = graph
        self._overrides = dict(overrides or {})
        self._call_nodes = {node for nodes in graph.calls.values() for node in nodes}
        # what op calls were given when they ran, even if it was overwritten later
        self._arguments: dict[Node, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._written = {node: written for node in graph.nodes if (written := _written_arguments(node))}
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        self._values: dict[Node, Any] = {}
        self._execute()
        self._groups = self._find_groups()
        self.output: Tensor = self._values[graph.output].clone()

    def values(self, node: Node) -> Any:  # noqa: ANN401 - tensors, tuples of them, numbers
        """Value of a node at the end of the run."""
        return self._values[node]

    def arguments(self, node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what an op call was given when it ran."""
        return self._arguments[node]

    def shares_written_storage(self, nodes: Iterable[Node]) -> bool:
        """Whether any of these nodes' values lie in memory that the graph writes into."""
        return not self._groups.keys().isdisjoint(nodes)

    def replay(self, overrides: Mapping[Node, Override]) -> Tensor:
        """Output of the graph if the given op calls were computed otherwise; the rest as in this run."""
        fresh: dict[Node, Any] = {}

        def value(node: Node) -> Any:  # noqa: ANN401 - as `values`
            return fresh[node] if node in fresh else self._values[node]

        for step in self._plan(frozenset(overrides)):
            node = step.node
            if node in overrides:
                kept = step.first_change
                args, kwargs = self._arguments[node] if kept else map_arg((node.args, node.kwargs), value)
                fresh[node] = overrides[node](*args, **kwargs)
            elif node.op == "call_function":
                fresh[node] = self._call(node, value)
            else:  # the root of a group that is written into
                fresh[node] = _copy(self._root(node))
            for dead in step.dead:
                fresh.pop(dead, None)
        result: Tensor = fresh.get(self.graph.output, self.output)
        return result

    def _execute(self) -> None:
        kept: dict[int, list[Node]] = {}  # storage → op call nodes that read it
        for node in self.graph.nodes:
            if node.op != "call_function":
                root = self._root(node)
                # the graph may write into anything but parameters, which capture has checked
                self._values[node] = root if isinstance(root, Parameter) else _copy(root)
                continue
            if node in self._call_nodes:
                arguments = map_arg((node.args, node.kwargs), self._values.__getitem__)
                self._arguments[node] = arguments
                for storage in _storages(arguments):
                    kept.setdefault(storage, []).append(node)
            for written in self._written.get(node, ()):
                for storage in _storages(self._values[written]):
                    for reader in kept.pop(storage, ()):
                        self._arguments[reader] = _copy(self._arguments[reader])
            self._values[node] = self._call(node, self._values.__getitem__)

    def _call(self, node: Node, value: Callable[[Node], Any]) -> Any:  # noqa: ANN401 - as `values`
        args, kwargs = map_arg(node.args, value), map_arg(node.kwargs, value)
        function: Callable[..., Any] = self._overrides.get(node, node.target)  # type: ignore[arg-type] # a call
        return function(*args, **kwargs)

    def _root(self, node: Node) -> Any:  # noqa: ANN401 - as `values`
        return self.graph.inputs[node] if node.op == "placeholder" else self.graph.constants[node]

    def _find_groups(self) -> dict[Node, tuple[tuple[Node, ...], ...]]:
        members: dict[int, dict[Node, None]] = {}
        for node in self.graph.nodes:
            for storage in _storages(self._values[node]):
                members.setdefault(storage, {})[node] = None
        written = {s for targets in self._written.values() for node in targets for s in _storages(self._values[node])}
        groups: dict[Node, tuple[tuple[Node, ...], ...]] = {}
        for storage in sorted(written):
            group = tuple(members[storage])
            for node in group:
                groups[node] = (*groups.get(node, ()), group)
        return groups

    def _plan(self, changed: frozenset[Node]) -> Iterator[_Step]:
        """Yield the steps of a replay in order: everything downstream of ``changed``, groups whole."""
        dirty = set(changed)
        todo = list(changed)
        while todo:  # a group with one new value is new as a whole
            node = todo.pop()
            new = [user for user in node.users if user.op == "call_function"]
            new += [member for group in self._groups.get(node, ()) for member in group if member.op == "call_function"]
            todo += (fresh := set(new) - dirty)
            dirty |= fresh
        first = {node for node in changed if dirty.isdisjoint(node.all_input_nodes)}
        needed = set(dirty)
        todo = list(dirty)
        while todo:  # a group that is read is executed again, to have the values of that moment
            node = todo.pop()
            touched = (node,) if node in first else (node, *node.all_input_nodes)
            members = {member for t in touched for group in self._groups.get(t, ()) for member in group}
            todo += (fresh := members - needed)
            needed |= fresh
        steps = sorted(needed, key=self._order.__getitem__)
        last_reader: dict[Node, Node] = {}
        for node in steps:
            last_reader[node] = node
            for argument in node.all_input_nodes:
                if argument in needed:
                    last_reader[argument] = node
        dead: dict[Node, list[Node]] = {}
        for node, reader in last_reader.items():
            if node is not self.graph.output:
                dead.setdefault(reader, []).append(node)
        for node in steps:
            yield _Step(node, node in first, tuple(dead.get(node, ())))


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
