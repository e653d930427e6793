"""Carry the changes that several ops make through a graph side by side.

Every change has its own values, computed as in a replay. Where a layer is linear in the one argument that changes, the
changes wait for each other: their differences to the clean value go through it together, W·δ. Nothing cancels in that
product, so that bf16 with fp32 accumulation is enough if the weight is bf16 to begin with.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from pytest_qsens import profile
from pytest_qsens.graph.replay import Follower, advance
from pytest_qsens.graph.schedule import Schedule, Step, reader_of
from pytest_qsens.metrics import squared_distance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

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
        apply: ``(differences, weight)`` → differences of the output; those of several changes lie in the first
            dimension of both. A change's results must not depend on how many there are.

    """

    argument: int
    weight: int
    apply: Callable[[Tensor, Tensor], Tensor]


RULES: dict[Any, LinearMap] = {
    aten.linear.default: LinearMap(0, 1, functional.linear),
    aten.addmm.default: LinearMap(1, 2, torch.matmul),
}
"""ATen op → how differences go through it. Everything else is computed from values, as in a replay.

Convolutions are not here: what their kernels give for one sample depends on how many there are.
"""


class _Head(NamedTuple):
    """A linear layer at the end, of whose output nothing but rows is taken."""

    source: Node
    """Its input."""
    rows: tuple[Node, ...]
    """Nodes after it that take rows."""
    weight: Tensor
    schedule: Schedule
    """Of replays up to its input."""


class Weights:
    """Weights in the form in which differences are multiplied by them, made once for all batches.

    Args:
        narrow: Whether bf16 products are faster than fp32 here.

    """

    def __init__(self, *, narrow: bool) -> None:
        self._narrow = narrow
        self._narrowed: dict[int, Tensor] = {}  # by identity: the model keeps its weights
        self._grams: dict[int, Tensor] = {}

    def narrowed(self, weight: Tensor) -> Tensor:
        """Return a weight in bf16 if that loses nothing and pays, else as it is."""
        if not self._narrow or weight.numel() < _WORTH_NARROWING:
            return weight
        key = id(weight)
        if key not in self._narrowed:
            found = _narrowed(weight)
            self._narrowed[key] = weight if found is None else found
        return self._narrowed[key]

    def gram(self, weight: Tensor) -> Tensor:
        """WᵀW, float64: the squared length of W·δ is δᵀ(WᵀW)δ."""
        key = id(weight)
        if key not in self._grams:
            self._grams[key] = _gram(self.narrowed(weight))
        return self._grams[key]


class DeltaRun:
    """Several changes to a clean run at once.

    Args:
        run: The clean run.
        weights: Those of the model, in the form in which they are multiplied.

    """

    def __init__(self, run: Run, weights: Weights) -> None:
        self._run = run
        self._weights = weights
        self._together = self._find_linear()
        self._schedule = run.schedule(run.graph.output, self._together)
        self._head = self._find_head()

    def bytes_per_change(self) -> int:
        """About the memory that each of several changes takes while they go side by side."""
        live = most = 0
        for level in self._schedule.levels:
            for step in (*level.steps, *chain.from_iterable(level.together)):
                live += _size(step.node) - sum(_size(self._run.graph.nodes[position]) for position in step.dead)
            if level.together:
                most = max(most, live)
        return most

    def outputs(self, changes: Sequence[Change]) -> Iterator[Tensor]:
        """Compute the output of the graph with each of these changes."""
        return self._follow(changes, self._schedule, self._run.graph.output)

    def errors(self, changes: Sequence[Change]) -> list[float]:
        """Compute each change's sum of squared differences to the clean output."""
        head = self._head
        found: dict[int, float] = {}
        if head is not None:
            before = [change for change in changes if head.schedule.shows(change)]
            found |= zip(map(id, before), self._head_errors(before, head), strict=True)
        others = [change for change in changes if id(change) not in found]
        for change, output in zip(others, self.outputs(others), strict=True):
            found[id(change)] = squared_distance(self._run.output, output)
        return [found[id(change)] for change in changes]

    def _head_errors(self, changes: Sequence[Change], head: _Head) -> Iterator[float]:
        clean = self._run.values(head.source)
        for value in self._follow(changes, head.schedule, head.source):
            delta = value - clean
            for node in head.rows:
                (_, *rest), options = reader_of(node, self._run.order)(self._run.clean)
                delta = node.target(delta, *rest, **options)  # type: ignore[operator] # a call
            yield _squared_length(delta.reshape(-1, delta.shape[-1]), self._weights.gram(head.weight))

    def _follow(self, changes: Sequence[Change], schedule: Schedule, target: Node) -> Iterator[Tensor]:
        """Compute this node's value with each change."""
        followers = [Follower(self._run, change, schedule.touched(change)) for change in changes]
        last = max((i for i, level in enumerate(schedule.levels) if level.together), default=0)
        for level in schedule.levels[:last]:
            advance(self._run, level, followers, self._multiply)
        while followers:  # by itself from here on: outputs can be large
            follower = followers.pop(0)
            for level in schedule.levels[last:]:
                advance(self._run, level, [follower], self._multiply)
            yield follower.value(target)

    def _multiply(self, steps: Sequence[Step], followers: Sequence[Follower]) -> None:
        """Take steps that are linear in the same argument for all changes."""
        source = self._run.order[self._together[steps[0].node]]
        clean: Tensor = self._run.clean[source]
        changed = [f for f in followers if f.values[source] is not clean] if clean.numel() else []
        deltas: dict[torch.dtype, Tensor] = {}
        for step in steps:
            through = [f for f in changed if f.active[step.position] and step.node not in f.change]
            if through:
                rule = RULES[step.node.target]
                weight = self._weights.narrowed(self._run.graph.constants[step.node.args[rule.weight]])  # type: ignore[index] # a node
                if weight.dtype not in deltas:
                    deltas[weight.dtype] = _differences([f.values[source] for f in changed], clean, weight.dtype)
                delta = deltas[weight.dtype]
                if len(through) < len(changed):
                    delta = delta[[f in through for f in changed]]
                before: Tensor = self._run.clean[step.position]
                products = profile.call(step.node, rule.apply, (delta, weight), {}, linear=True)
                for follower, product in zip(through, products, strict=True):
                    follower.put(step, product.to(before.dtype).add_(before))
            for follower in followers:
                if follower not in through:
                    follower.take(step)

    def _find_linear(self) -> dict[Node, Node]:
        """Find calls that are linear in one argument, where nothing else can change: call → argument.

        The values of the clean run must be those that the call saw and made.
        """
        run = self._run
        found: dict[Node, Node] = {}
        for node in run.graph.nodes:
            rule = RULES.get(node.target)
            if rule is None or node.kwargs or node in run.groups or not run.is_original(node):
                continue
            argument, weight = node.args[rule.argument], node.args[rule.weight]
            others = [other for other in node.all_input_nodes if other is not argument]
            if (
                isinstance(argument, Node)
                and weight in others
                and all(other in run.graph.constants and other not in run.groups for other in others)
                and run.is_settled(argument, node)
            ):
                found[node] = argument
        return found

    def _find_head(self) -> _Head | None:
        rows: list[Node] = []
        node = self._run.graph.output
        while (
            node.target in _TAKES_ROWS
            and _leaves_last_dimension(node)
            and not any(map(self._schedule.can_change, node.all_input_nodes[1:]))
        ):
            rows.insert(0, node)
            node = node.all_input_nodes[0]
        if node.target is not aten.linear.default or node not in self._together:
            return None
        source, weight = self._together[node], self._run.graph.constants[node.all_input_nodes[1]]
        if weight.shape[0] <= weight.shape[1]:
            return None
        return _Head(source, tuple(rows), weight, self._run.schedule(source, self._together))


def _size(node: Node) -> int:
    """Bytes of a node's value; a view has none of its own."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or any(value.alias_info is not None for value in schema.returns):
        return 0
    return sum(value.nbytes for value in tree_leaves(node.meta.get("val")) if isinstance(value, Tensor))


def _narrowed(weight: Tensor) -> Tensor | None:
    """Return the weight in bf16 if it loses nothing; part by part, as its like in fp32 may be large."""
    found = torch.empty_like(weight, dtype=torch.bfloat16)
    rows = max(1, _WORTH_NARROWING // weight.shape[1:].numel())
    for narrow, part in zip(torch.split(found, rows), torch.split(weight, rows), strict=True):
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
    for rows in torch.split(weight, _GRAM_ROWS):
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
