"""What a replay does in which order, prepared once for all replays of a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby
from typing import Any, NamedTuple

from torch.fx import Node

from pytest_qsens.graph.closure import closure

Values = list[Any]
"""Values by the position of their node in the graph."""

Arguments = tuple[Sequence[Any], Mapping[str, Any]]
"""Positional and keyword arguments of a call."""

Groups = Mapping[Node, tuple[tuple[Node, ...], ...]]
"""Nodes whose values lie in memory that the graph writes into → the groups of nodes that share it."""


class Step(NamedTuple):
    """One node of the graph.

    Attributes:
        position: Of the node in the graph, and of its value among the values.
        node: The node.
        read: Takes its arguments from values.
        dead: Positions of values that no later step reads.

    """

    position: int
    node: Node
    read: Callable[[Values], Arguments]
    dead: tuple[int, ...]


class Level(NamedTuple):
    """Steps that go one by one, then those that wait for them to be taken for several changes at once.

    Attributes:
        steps: Those that go one by one.
        together: The others; each tuple holds steps that take the same argument.
        segments: Segments of the graph whose values they read.
        done: Those that no later level reads.

    """

    steps: tuple[Step, ...]
    together: tuple[tuple[Step, ...], ...] = ()
    segments: frozenset[int] = frozenset()
    done: frozenset[int] = frozenset()


class Touched(NamedTuple):
    """What a change makes a replay compute.

    Attributes:
        active: By position: whether it is computed.
        first: Changed nodes that no other change reaches: their arguments are those they had in the run.

    """

    active: Sequence[int]
    first: frozenset[Node]


class Schedule:
    """The order of all nodes, levels of those that are taken together, and what each change touches.

    Args:
        nodes: Nodes of the graph, in order.
        groups: Nodes that share memory which is written into: a group with one new value is computed whole.
        calls: Nodes that can be changed.
        output: The node whose value is wanted.
        segments: By position: the segment that a value is dropped with, or ``None``.
        together: Nodes to be taken for several changes at once → the argument that changes.

    """

    def __init__(
        self,
        nodes: Sequence[Node],
        groups: Groups,
        calls: Iterable[Node],
        output: Node,
        segments: Sequence[int | None],
        together: Mapping[Node, Node] | None = None,
    ) -> None:
        self._order = {node: i for i, node in enumerate(nodes)}
        self._groups = groups
        self._bits = {node: 1 << i for i, node in enumerate(calls)}
        self._reach = self._find_reach(nodes)
        self._wanted = self._find_wanted(output)
        self.levels = self._with_segments(self._find_levels(nodes, output, together or {}, segments), segments)

    def touched(self, changed: Collection[Node]) -> Touched:
        """Find what a replay computes if these calls give something else."""
        if self._groups:
            return self._touched_with_groups(changed)
        mask = sum(self._bits[node] for node in changed)
        active = [wanted and bool(reach & mask) for reach, wanted in zip(self._reach, self._wanted, strict=True)]
        return Touched(active, self._first(changed, lambda node: active[self._order[node]]))

    def shows(self, changed: Iterable[Node]) -> bool:
        """Whether the wanted value depends on all of these calls."""
        return all(self._wanted[self._order[node]] for node in changed)

    def can_change(self, node: Node) -> bool:
        """Whether any call that can be changed reaches a node."""
        return bool(self._groups.get(node) or self._reach[self._order[node]])

    def _first(self, changed: Collection[Node], dirty: Callable[[Node], bool]) -> frozenset[Node]:
        return frozenset(node for node in changed if not any(map(dirty, node.all_input_nodes)))

    def _find_reach(self, nodes: Sequence[Node]) -> list[int]:
        """By position: the bits of all calls that it depends on through arguments, its own included."""
        reach: list[int] = []
        for node in nodes:
            bits = self._bits.get(node, 0)
            for argument in node.all_input_nodes:
                bits |= reach[self._order[argument]]
            reach.append(bits)
        return reach

    def _members(self, node: Node) -> Iterator[Node]:
        return (member for group in self._groups.get(node, ()) for member in group)

    def _find_wanted(self, output: Node) -> list[bool]:
        """By position: whether the output depends on it."""
        found = closure([output], lambda node: [*node.all_input_nodes, *self._members(node)])
        return [node in found for node in self._order]

    def _touched_with_groups(self, changed: Collection[Node]) -> Touched:
        def new(node: Node) -> list[Node]:  # a group with one new value is new as a whole
            return [other for other in (*node.users, *self._members(node)) if other.op == "call_function"]

        dirty = closure(changed, new)
        first = self._first(changed, dirty.__contains__)

        def again(node: Node) -> list[Node]:
            """Return groups that are read: they are computed again, to have the values of that moment."""
            read = (node,) if node in first else (node, *node.all_input_nodes)
            return [member for other in read for member in self._members(other)]

        active = closure(dirty, again)
        return Touched(
            [wanted and node in active for node, wanted in zip(self._order, self._wanted, strict=True)], first
        )

    def _find_levels(
        self, nodes: Sequence[Node], output: Node, together: Mapping[Node, Node], segments: Sequence[int | None]
    ) -> list[Level]:
        level: dict[Node, int] = {}
        earliest: dict[tuple[Node, ...], int] = defaultdict(int)  # group → level at which it can be touched next
        for node in nodes:
            touching = {group for other in (node, *node.all_input_nodes) for group in self._groups.get(other, ())}
            after = [level[argument] + (argument in together) for argument in node.all_input_nodes]
            level[node] = max([0, *after, *(earliest[group] for group in touching)])
            for group in touching:
                earliest[group] = level[node] + (node in together)
        ordered = sorted(nodes, key=lambda node: (level[node], node in together, self._order[node]))
        last_reader = {argument: node for node in ordered for argument in (node, *node.all_input_nodes)}
        dead: dict[Node, list[int]] = defaultdict(list)
        for node, reader in last_reader.items():
            if node is not output:
                dead[reader].append(self._order[node])
        levels: list[Level] = []
        # a write into shared memory reaches nodes that no argument leads to
        reached_by_changes = (node for node in ordered if self._groups or self._reach[self._order[node]])
        for (_, shared), some in groupby(reached_by_changes, key=lambda node: (level[node], node in together)):
            members = [Step(self._order[node], node, reader_of(node, self._order), tuple(dead[node])) for node in some]
            if shared:
                by_argument: dict[Node, list[Step]] = defaultdict(list)
                for step in members:
                    by_argument[together[step.node]].append(step)
                levels.append(Level((), tuple(map(tuple, by_argument.values()))))
            else:
                levels += [Level(tuple(steps)) for _, steps in groupby(members, lambda step: segments[step.position])]
        return levels

    def _with_segments(self, levels: Sequence[Level], segments: Sequence[int | None]) -> tuple[Level, ...]:
        """Note at each level which segments it reads, and which of them are not read again."""
        read = [
            frozenset(
                segment
                for step in (*level.steps, *chain.from_iterable(level.together))
                for node in (step.node, *step.node.all_input_nodes)
                if (segment := segments[self._order[node]]) is not None
            )
            for level in levels
        ]
        last = {segment: i for i, found in enumerate(read) for segment in found}
        return tuple(
            level._replace(segments=found, done=frozenset(segment for segment in found if last[segment] == i))
            for i, (level, found) in enumerate(zip(levels, read, strict=True))
        )


def reader_of(node: Node, order: Mapping[Node, int]) -> Callable[[Values], Arguments]:
    """Return what takes the arguments of a node from values; most have no nested ones, and no keywords with nodes."""
    read_args, read_kwargs = _picker(node.args, order), _picker(node.kwargs, order)
    if read_kwargs is None:
        kwargs = dict(node.kwargs)
        if read_args is None:
            return lambda _: (node.args, kwargs)
        return lambda values: (read_args(values), kwargs)
    return lambda values: (node.args if read_args is None else read_args(values), read_kwargs(values))


def _picker(value: Any, order: Mapping[Node, int]) -> Callable[[Values], Any] | None:  # noqa: ANN401 - an argument
    """Return what puts values in the place of nodes; ``None`` if there is none."""
    if isinstance(value, Node):
        position = order[value]
        return lambda values: values[position]
    if isinstance(value, slice):
        parts = _picker((value.start, value.stop, value.step), order)
        return None if parts is None else lambda values: slice(*parts(values))
    if isinstance(value, dict):
        keys, items = tuple(value), _picker(tuple(value.values()), order)
        return None if items is None else lambda values: dict(zip(keys, items(values), strict=True))
    if not isinstance(value, tuple | list):
        return None
    template = list(value)
    direct = [(i, order[item]) for i, item in enumerate(value) if isinstance(item, Node)]
    nested = [
        (i, picker)
        for i, item in enumerate(value)
        if not isinstance(item, Node) and (picker := _picker(item, order)) is not None
    ]
    if not direct and not nested:
        return None

    def pick(values: Values) -> list[Any]:
        filled = template.copy()
        for i, position in direct:
            filled[i] = values[position]
        for i, picker in nested:
            filled[i] = picker(values)
        return filled

    return pick
