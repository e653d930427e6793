"""Carry the changes that several ops make through a graph side by side.

Every change has its own values, computed as in a replay. Where a layer is linear in the one argument that changes, the
changes wait for each other: their differences to the clean value go through it together, W·δ. Nothing cancels in that
product, so that bf16 with fp32 accumulation is enough if the weight is bf16 to begin with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from pytest_qsens import profile
from pytest_qsens.graph.schedule import Level, Schedule, Step, Touched, Values, reader_of
from pytest_qsens.metrics import squared_distance

if TYPE_CHECKING:
    from pytest_qsens.graph.replay import Change, Run

aten = torch.ops.aten

_WORTH_NARROWING = 2**18
"""Values in a weight from which bf16 products pay. It takes many values for their rounding to average out, too."""


_GRAM_ROWS = 4096
"""Rows of a weight multiplied at a time: what rounding each part to the weight's dtype does averages out over parts."""


class LinearMap(NamedTuple):
    """How differences go through a call that is linear in one of its arguments.

    Attributes:
        argument: Position of that argument.
        weight: Position of the other factor, which must be a constant.
        apply: ``(differences (changes, *argument), weight, all arguments)`` → differences of the output
            ``(changes, *output)``.

    """

    argument: int
    weight: int
    apply: Callable[[Tensor, Tensor, Sequence[Any]], Tensor]


def _convolve(convolution: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Sequence[Any]], Tensor]:
    def apply(delta: Tensor, weight: Tensor, args: Sequence[Any]) -> Tensor:
        leading = delta.shape[: delta.dim() - weight.dim() + 1]  # changes and, if there is one, the batch
        return convolution(delta.flatten(0, len(leading) - 1), weight, None, *args[3:]).unflatten(0, leading)

    return apply


RULES: dict[Any, LinearMap] = {
    aten.linear.default: LinearMap(0, 1, lambda delta, weight, _: functional.linear(delta, weight)),
    aten.addmm.default: LinearMap(1, 2, lambda delta, weight, _: delta @ weight),
    aten.mm.default: LinearMap(0, 1, lambda delta, weight, _: delta @ weight),
    aten.conv1d.default: LinearMap(0, 1, _convolve(aten.conv1d.default)),
    aten.conv2d.default: LinearMap(0, 1, _convolve(aten.conv2d.default)),
    aten.conv3d.default: LinearMap(0, 1, _convolve(aten.conv3d.default)),
}
"""ATen op → how differences go through it. Everything else is computed from values, as in a replay."""


class _Head(NamedTuple):
    """A linear layer at the end, of whose output nothing but rows is taken."""

    source: Node
    """Its input."""
    rows: tuple[Node, ...]
    """Nodes after it that take rows."""
    gram: Tensor
    """WᵀW, float64: the squared length of W·δ is δᵀ(WᵀW)δ."""


class _Follower:
    """One change on its way through the graph."""

    def __init__(self, run: Run, change: Change, touched: Touched) -> None:
        self.change = change
        self.touched = touched
        self.values: Values = run.clean.copy()
        self._run = run

    def take(self, step: Step) -> None:
        if self.touched.active[step.position]:
            self._run.take(step, self.values, self.change, self.touched)

    def put(self, step: Step, value: Tensor) -> None:
        self.values[step.position] = value
        for position in step.dead:
            self.values[position] = None


class DeltaRun:
    """Several changes to a clean run at once.

    Args:
        run: The clean run.
        narrow: Whether bf16 products are faster than fp32 here.

    """

    def __init__(self, run: Run, *, narrow: bool) -> None:
        self._run = run
        self._use_narrow = narrow
        self._narrow: dict[Node, Tensor | None] = {}
        self._together = {
            node: node.args[rule.argument]
            for node in run.graph.nodes
            if (rule := RULES.get(node.target)) is not None and self._is_linear(node, rule)
        }
        self._head = self._find_head()
        self._to_output = self._schedule(run.graph.output)
        self._to_head = None if self._head is None else self._schedule(self._head.source)

    def outputs(self, changes: Sequence[Change]) -> Iterator[Tensor]:
        """Compute the output of the graph with each of these changes."""
        return self._follow(changes, self._to_output, self._run.graph.output)

    def errors(self, changes: Sequence[Change]) -> list[float]:
        """Compute each change's sum of squared differences to the clean output."""
        head, schedule = self._head, self._to_head
        short = [] if head is None or schedule is None else [c for c in changes if schedule.shows(c)]
        found = {}
        if short:
            found |= dict(zip(map(id, short), self._head_errors(short, head, schedule), strict=True))
        others = [change for change in changes if id(change) not in found]
        for change, output in zip(others, self.outputs(others), strict=True):
            found[id(change)] = squared_distance(self._run.output, output)
        return [found[id(change)] for change in changes]

    def _head_errors(self, changes: Sequence[Change], head: _Head, schedule: Schedule) -> Iterator[float]:
        clean = self._run.values(head.source)
        for value in self._follow(changes, schedule, head.source):
            delta = value - clean
            for node in head.rows:
                (_, *rest), options = reader_of(node, self._run.order)(self._run.clean)
                delta = node.target(delta, *rest, **options)  # type: ignore[operator] # a call
            yield _squared_length(delta.reshape(-1, delta.shape[-1]), head.gram)

    def _schedule(self, target: Node) -> Schedule:
        run = self._run
        return Schedule(run.graph.nodes, run.groups, run.call_nodes, target, self._together)

    def _follow(self, changes: Sequence[Change], schedule: Schedule, target: Node) -> Iterator[Tensor]:
        """Compute this node's value with each change."""
        followers = [_Follower(self._run, change, schedule.touched(change)) for change in changes]
        last = max((i for i, level in enumerate(schedule.levels) if level.together), default=0)
        for level in schedule.levels[:last]:
            self._advance(level, followers)
        position = self._run.order[target]
        while followers:  # by itself from here on: outputs can be large
            follower = followers.pop(0)
            for level in schedule.levels[last:]:
                self._advance(level, [follower])
            yield follower.values[position]

    def _advance(self, level: Level, followers: Sequence[_Follower]) -> None:
        for follower in followers:  # one after the other, so that values stay in the processor's cache
            for step in level.steps:
                follower.take(step)
        timer = profile.current
        for steps in level.together:
            if timer is None:
                self._multiply(steps, followers)
            else:
                timer.within("differences", self._multiply, steps, followers)

    def _multiply(self, steps: Sequence[Step], followers: Sequence[_Follower]) -> None:
        """Take steps that are linear in the same argument for all changes."""
        source = self._run.order[self._together[steps[0].node]]
        clean: Tensor = self._run.clean[source]
        changed = [f for f in followers if f.values[source] is not clean] if clean.numel() else []
        deltas: dict[torch.dtype, Tensor] = {}
        for step in steps:
            through = [f for f in changed if f.touched.active[step.position] and step.node not in f.change]
            if through:
                rule = RULES[step.node.target]
                weight = self._weight(step.node.args[rule.weight])  # type: ignore[arg-type] # a node
                if weight.dtype not in deltas:
                    deltas[weight.dtype] = _differences([f.values[source] for f in changed], clean, weight.dtype)
                delta = deltas[weight.dtype]
                if len(through) < len(changed):
                    delta = delta[[f in through for f in changed]]
                args, _ = step.read(self._run.clean)
                before: Tensor = self._run.clean[step.position]
                given, timer = (delta, weight, args), profile.current
                products = (
                    rule.apply(*given) if timer is None else timer.call(step.node, rule.apply, given, {}, linear=True)
                )
                for follower, product in zip(through, products, strict=True):
                    follower.put(step, product.float().add_(before))
            for follower in followers:
                if follower not in through:
                    follower.take(step)

    def _is_linear(self, node: Node, rule: LinearMap) -> bool:
        """Whether only that argument can change, and the values of the clean run are still those it saw and made."""
        run = self._run
        argument, weight = node.args[rule.argument], node.args[rule.weight]
        others = [other for other in node.all_input_nodes if other is not argument]
        return (
            isinstance(argument, Node)
            and all(other in run.graph.constants and other not in run.groups for other in others)
            and weight in others
            and not node.kwargs
            and node not in run.groups
            and run.is_settled(argument, node)
            and run.is_original(node)
        )

    def _weight(self, node: Node) -> Tensor:
        weight: Tensor = self._run.values(node)
        if not self._use_narrow or weight.numel() < _WORTH_NARROWING:
            return weight
        if node not in self._narrow:
            self._narrow[node] = _narrowed(weight)
        found = self._narrow[node]
        return weight if found is None else found

    def _find_head(self) -> _Head | None:
        rows: list[Node] = []
        node = self._run.graph.output
        while node.target in _TAKES_ROWS and _leaves_last_dimension(node):
            rows.insert(0, node)
            node = node.all_input_nodes[0]
        if node.target is not aten.linear.default or node not in self._together:
            return None
        weight = self._weight(node.args[1])  # type: ignore[arg-type] # a node
        if weight.shape[0] <= weight.shape[1]:
            return None
        return _Head(node.args[0], tuple(rows), _gram(weight))  # type: ignore[arg-type] # a node


def _narrowed(weight: Tensor) -> Tensor | None:
    """Return the weight in bf16 if it loses nothing; part by part, as its like in fp32 may be large."""
    found = torch.empty_like(weight, dtype=torch.bfloat16)
    rows = max(1, _WORTH_NARROWING // weight.shape[1:].numel())
    for narrow, part in zip(found.split(rows), weight.split(rows), strict=True):
        if not torch.equal(narrow.copy_(part).float(), part):
            return None
    return found


@profile.phase("scoring")
def _squared_length(delta: Tensor, gram: Tensor) -> float:
    """Sum of (W·δ)² over the rows δ."""
    rows = delta.double()
    with profile.phase("scoring", product=True):
        products = rows @ gram
    return float((products * rows).sum().clamp_min(0))  # what should be zero can come out below


@profile.phase("scoring", product=True)
def _gram(weight: Tensor) -> Tensor:
    """WᵀW of ``(out, in)``, summed in float64 over parts of the rows."""
    found = weight.new_zeros((weight.shape[1], weight.shape[1]), dtype=torch.float64)
    for rows in weight.split(_GRAM_ROWS):
        found += rows.t() @ rows
    return found


def _differences(values: Sequence[Tensor], clean: Tensor, dtype: torch.dtype) -> Tensor:
    """Differences to the clean value, ``(values, *value)``."""
    found = clean.new_empty((len(values), *clean.shape), dtype=dtype)
    for row, value in zip(found, values, strict=True):
        row.copy_(value - clean)
    return found


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
