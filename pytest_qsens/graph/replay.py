"""Run a captured graph once, then again only downstream of what changed, bit for bit the same.

Some graphs write in place. Nodes whose tensors share a storage that is written into form a *group*; the kept value of
a member is what the storage held at the end, not when the member was used. So a replay that touches any member of a
group executes that group whole and in order, starting from copies of its roots.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import Parameter

from pytest_qsens import profile
from pytest_qsens.graph.schedule import Arguments, Groups, Level, Schedule, Step, Touched, Values, reader_of
from pytest_qsens.graph.segments import find_segments

if TYPE_CHECKING:
    from pytest_qsens.graph.capture import Graph

Override = Callable[..., Tensor]
"""Takes the arguments of a call node, positional and keyword, and returns its value."""

Change = Mapping[Node, Override]
"""What some call nodes compute instead."""


class Run:
    """One execution of a graph whose values are kept, or dropped and computed again where memory is short.

    Args:
        graph: What to run.
        overrides: Replace what chosen call nodes compute, in the run itself and in every replay.
        memory: Bytes of values to keep, from the end of the graph, which every replay needs; those of products, which
            are slow to compute again, are the last to be dropped. Values that lie in memory that the graph writes into
            are kept in any case, as are those at the narrow places between segments.
        groups: Those of another run of the graph, if there was one. Where the graph writes in place, it takes them to
            drop values before all are there.

    """

    def __init__(
        self,
        graph: Graph,
        overrides: Change | None = None,
        memory: int | None = None,
        groups: Groups | None = None,
    ) -> None:
        self.graph = graph
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.call_nodes = tuple(node for nodes in graph.calls.values() for node in nodes)
        overrides = overrides or {}
        self._calls: list[Any] = [overrides.get(node, node.target) for node in graph.nodes]
        self._segments = find_segments(graph.nodes, self.order, set(self.call_nodes))
        self.segment_of: list[int | None] = [None] * len(graph.nodes)
        for i, segment in enumerate(self._segments):
            for position in segment.inner:
                self.segment_of[position] = i
        self._products = {position for position, node in enumerate(graph.nodes) if profile.is_product(node)}
        self._dropped: dict[int, tuple[int, ...]] = {}  # segment → positions
        self._restored: set[int] = set()
        # what op calls were given when they ran, where it was overwritten later
        self._overwritten: dict[Node, Arguments] = {}
        self._written = {node: written for node in graph.nodes if (written := _written_arguments(node))}
        self._values: Values = [None] * len(graph.nodes)
        self.groups: Groups = groups or {}
        self._execute(memory, while_running=bool(groups) or not self._written)
        found = self._find_groups()
        if groups and not _same_groups(groups, found):  # a kernel that copied in the other run, or did not
            self.groups = {}
            self.__dict__.pop("_fixed_segments", None)  # known only if something was dropped
            self._dropped.clear()
            self._overwritten.clear()
            self._execute(memory, while_running=False)
            found = self._find_groups()
        self.groups = found
        if self._written and memory is not None:
            self._keep(memory, [self._sizes(i) for i in range(len(self._segments))])

    def values(self, node: Node) -> Any:  # noqa: ANN401 - tensors, tuples of them, numbers
        """Value of a node at the end of the run."""
        self._restore([node])
        return self._values[self.order[node]]

    def arguments(self, node: Node) -> Arguments:
        """Arguments of a call, with the values that they have at the end of the run."""
        self._restore(node.all_input_nodes)
        return reader_of(node, self.order)(self._values)

    @property
    def output(self) -> Tensor:
        """Output of the graph."""
        output: Tensor = self.values(self.graph.output)
        return output

    @property
    def clean(self) -> Values:
        """Values at the end of the run, in the order of the graph's nodes, without those dropped; not to be changed."""
        return self._values

    def require(self, segments: Iterable[int]) -> list[int]:
        """Compute dropped values again; returns the positions of all that are not kept for good."""
        wanted = self._dropped.keys() & segments
        for i in sorted(wanted - self._restored):
            for position in self._dropped[i]:
                self._compute(position)
            self._restored.add(i)
        return [position for i in wanted for position in self._dropped[i]]

    def release(self, segments: Iterable[int]) -> list[int]:
        """Drop again what was computed again; returns the positions."""
        done = sorted(self._restored.intersection(segments))
        return [position for i in done for position in self._drop(i, self._dropped[i])]

    def release_all(self) -> None:
        """Drop all that was computed again."""
        self.release(tuple(self._restored))

    @property
    def ends(self) -> tuple[int, ...]:
        """Positions of the last nodes of all segments, in order."""
        return tuple(segment.end for segment in self._segments)

    def call(self, node: Node) -> Override:
        """Return what a node computes in this run."""
        found: Override = self._calls[self.order[node]]
        return found

    def is_original(self, node: Node) -> bool:
        """Whether a node computes what it did in the model."""
        return self._calls[self.order[node]] is node.target

    def is_settled(self, node: Node, at: Node) -> bool:
        """Whether the value of ``node`` is not written into after ``at``."""
        position = self.order[at]
        return all(self._last_write[group] < position for group in self.groups.get(node, ()))

    def replay(self, overrides: Change) -> Tensor:
        """Output of the graph if the given op calls were computed otherwise; the rest as in this run."""
        follower = Follower(self, overrides, self._schedule.touched(overrides))
        for level in self._schedule.levels:
            advance(self, level, [follower])
        return follower.value(self.graph.output)

    def take(self, step: Step, values: Values, overrides: Change, first: Collection[Node]) -> None:
        """Compute one value of a replay, and drop those that nothing needs any more."""
        node = step.node
        if node in overrides:
            kept = self._overwritten.get(node) if node in first else None
            args, kwargs = kept or step.read(values)
            call = overrides[node]
        elif node.op == "call_function":
            args, kwargs = step.read(values)
            call = self._calls[step.position]
        else:  # the root of a group that is written into
            call, args, kwargs = _copy, (self._root(node),), {}
        values[step.position] = profile.call(node, call, args, kwargs)
        for position in step.dead:
            values[position] = None

    def schedule(self, target: Node, together: Mapping[Node, Node] | None = None) -> Schedule:
        """Prepare replays that compute the value of ``target``; ``together`` as for `Schedule`."""
        return Schedule(self.graph.nodes, self.groups, self.call_nodes, target, self.segment_of, together)

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
    def _fixed_segments(self) -> frozenset[int | None]:
        """Segments that touch memory which the graph writes into."""
        return frozenset(
            self.segment_of[self.order[node]]
            for node in self.graph.nodes
            if self._written
            and (node in self._written or not self.groups.keys().isdisjoint((node, *node.all_input_nodes)))
        )

    @cached_property
    def _schedule(self) -> Schedule:
        return self.schedule(self.graph.output)

    def _execute(self, memory: int | None, *, while_running: bool) -> None:
        reading: dict[object, list[Node]] = {}  # memory → op call nodes that read it
        calls = set(self.call_nodes)
        ends = {segment.end for segment in self._segments}
        sizes: list[tuple[int, int]] = []
        for position, node in enumerate(self.graph.nodes):
            if node.op != "call_function":
                root = self._root(node)
                # the graph may write into anything but parameters, which capture has checked
                self._values[position] = root if isinstance(root, Parameter) else _copy(root)
                continue
            if self._written and node in calls:
                for memory_read in self._memory_of(node.all_input_nodes):
                    reading.setdefault(memory_read, []).append(node)
            for memory_written in self._memory_of(self._written.get(node, ())):
                for reader in reading.pop(memory_written, ()):
                    if reader not in self._overwritten:
                        self._overwritten[reader] = _copy(reader_of(reader, self.order)(self._values))
            self._compute(position)
            if position in ends and memory is not None and while_running:
                sizes.append(self._sizes(len(sizes)))
                self._keep(memory, sizes)

    def _memory_of(self, nodes: Iterable[Node]) -> set[object]:
        """Where values lie: by their groups if these are known, as memory of dropped values is used again."""
        if self.groups:
            return {group for node in nodes for group in self.groups.get(node, ())}
        return {storage for node in nodes for storage in _storages(self._values[self.order[node]])}

    def _restore(self, nodes: Iterable[Node]) -> None:
        self.require({segment for node in nodes if (segment := self.segment_of[self.order[node]]) is not None})

    def _compute(self, position: int) -> None:
        node = self.graph.nodes[position]
        args, kwargs = reader_of(node, self.order)(self._values)
        self._values[position] = profile.call(node, self._calls[position], args, kwargs)

    def _sizes(self, segment: int) -> tuple[int, int]:
        """Bytes of a segment's products, and of its other values."""

        def storages(positions: Iterable[int]) -> dict[int, int]:
            found = (self._values[position] for position in positions)
            held = (tensor.untyped_storage() for value in found for tensor in _tensors(value))
            return {storage.data_ptr(): storage.nbytes() for storage in held}

        every = storages(self._segments[segment].inner)
        products = storages(self._products.intersection(self._segments[segment].inner))
        return sum(products.values()), sum(every.values()) - sum(products.values())

    def _keep(self, memory: int, sizes: Sequence[tuple[int, int]]) -> None:
        """Drop the earliest segments until the rest fits into the memory: first all but products, then these."""
        inner = [segment.inner for segment in self._segments]
        held = sum(others for i, (_, others) in enumerate(sizes) if i not in self._dropped)
        held += sum(products for i, (products, _) in enumerate(sizes) if self._dropped.get(i) != inner[i])
        for whole in (False, True):
            for i, (products, others) in enumerate(sizes[:-1]):
                if held <= memory:
                    return
                if i in self._fixed_segments:
                    continue
                if i not in self._dropped:
                    held -= others
                    self._drop(i, tuple(position for position in inner[i] if position not in self._products))
                if whole and self._dropped[i] != inner[i]:
                    held -= products
                    self._drop(i, inner[i])

    def _drop(self, segment: int, positions: tuple[int, ...]) -> tuple[int, ...]:
        self._dropped[segment] = positions
        self._restored.discard(segment)
        for position in positions:
            self._values[position] = None
        return positions

    def _root(self, node: Node) -> Any:  # noqa: ANN401 - as `values`
        return self.graph.inputs[node] if node.op == "placeholder" else self.graph.constants[node]

    def _find_groups(self) -> dict[Node, tuple[tuple[Node, ...], ...]]:
        members: dict[int, dict[Node, None]] = {}
        for node in self.graph.nodes if self._written else ():
            for storage in _storages(self._values[self.order[node]]):
                members.setdefault(storage, {})[node] = None
        written = {
            storage
            for targets in self._written.values()
            for node in targets
            for storage in _storages(self._values[self.order[node]])
        }
        groups: dict[Node, tuple[tuple[Node, ...], ...]] = {}
        for storage in sorted(written):
            group = tuple(members[storage])
            for node in group:
                groups[node] = (*groups.get(node, ()), group)
        return groups


class Follower:
    """One change on its way through the graph, with its own values."""

    def __init__(self, run: Run, change: Change, touched: Touched) -> None:
        self.change = change
        self.active = touched.active
        self.values: Values = run.clean.copy()
        self._first = touched.first
        self._run = run

    def take(self, step: Step) -> None:
        """Compute a value as the graph does, if the change reaches it."""
        if self.active[step.position]:
            self._run.take(step, self.values, self.change, self._first)

    def put(self, step: Step, value: Tensor) -> None:
        """Set a value that was computed elsewhere."""
        self.values[step.position] = value
        for position in step.dead:
            self.values[position] = None

    def value(self, node: Node) -> Tensor:
        """Value at the end: the clean one if the change does not reach it."""
        position = self._run.order[node]
        found: Tensor = self.values[position] if self.active[position] else self._run.values(node)
        return found

    def update(self, positions: Iterable[int]) -> None:
        """See that clean values were computed again, or dropped."""
        for position in positions:
            if not self.active[position]:
                self.values[position] = self._run.clean[position]


def advance(
    run: Run,
    level: Level,
    followers: Sequence[Follower],
    multiply: Callable[[Sequence[Step], Sequence[Follower]], None] | None = None,
) -> None:
    """Take the steps of one level for all followers; ``multiply`` takes those that go together."""
    restored = run.require(level.segments)
    for follower in followers:  # one after the other, so that values stay in the processor's cache
        follower.update(restored)
        for step in level.steps:
            follower.take(step)
    timer = profile.current
    for steps in level.together:
        if multiply is not None:  # whoever has steps that go together
            multiply(steps, followers) if timer is None else timer.within("differences", multiply, steps, followers)
    released = run.release(level.done)
    for follower in followers:
        follower.update(released)


def _written_arguments(node: Node) -> tuple[Node, ...]:
    """Return the argument nodes of a call whose tensors it writes into."""
    schema = getattr(node.target, "_schema", None)
    # `detach_` leaves values as they are; it comes with every `torch.tensor(...)` in a forward
    if schema is None or not schema.is_mutable or node.target is torch.ops.aten.detach_.default:
        return ()
    written: list[Node] = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            written += value if isinstance(value, list | tuple) else [value]  # type: ignore[list-item] # other values are dropped
    return tuple(item for item in written if isinstance(item, Node))


def _same_groups(one: Groups, other: Groups) -> bool:
    """Whether the same nodes share memory; they come in the order of addresses."""
    return {node: set(groups) for node, groups in one.items()} == {node: set(groups) for node, groups in other.items()}


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
