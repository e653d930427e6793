"""Carry gradients of a graph's output back to the calls of its ops, a segment at a time.

The values of a segment are computed again with autograd watching, and gradients leave it where values enter it, so
that memory is that of one segment and of the gradients between two. What is differentiated is the function that the
graph computes, not what a training run would see of it: ``detach`` passes gradients on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pytest_qsens import profile
from pytest_qsens.errors import first_line
from pytest_qsens.graph.calls import Call, bind, unquantized
from pytest_qsens.graph.closure import closure, downstream
from pytest_qsens.graph.footprint import size
from pytest_qsens.graph.narrow import EMBEDDING, LINEAR
from pytest_qsens.graph.schedule import reader_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from torch.fx import Node

    from pytest_qsens.graph.delta import Weights
    from pytest_qsens.graph.replay import Run

aten = torch.ops.aten

_FLAT: frozenset[Any] = frozenset(
    {
        *(aten.round.default, aten.round.decimals, aten.floor.default, aten.ceil.default, aten.trunc.default),
        *(aten.sign.default, aten.sgn.default, aten.floor_divide.default, aten.heaviside.default),
        *(aten.round_.default, aten.floor_.default, aten.ceil_.default, aten.trunc_.default, aten.sign_.default),
    }
)
"""Functions with a derivative of zero wherever they have one: it says nothing about what a change does."""

Probe = Callable[[], Tensor]
"""Makes the gradient of the output that a backward pass starts from, of the output's shape."""


class Gradient(NamedTuple):
    """What a backward pass brings to one call of an op.

    Attributes:
        node: The call.
        probe: Number of the pass.
        region: The same for calls that are told of together.
        call: Its arguments.
        value: What it gives in the run.
        output: Gradient of its output.
        input: Gradient of its input, for itself and not for others that read the same; ``None`` for an embedding.

    """

    node: Node
    probe: int
    region: int
    call: Call
    value: Tensor
    output: Tensor
    input: Tensor | None


class Backward:
    """Backward passes through a run.

    Args:
        run: Where op calls compute something else than in the model (`Run`, ``overrides``), the derivative is that of
            the original call at the values of the run: the straight-through estimator.
        weights: How gradients are multiplied by weights.
        memory: Bytes of values to compute at a time, if segments are that small.

    Attributes:
        blocked: Op calls whose gradient says nothing, or not all, of what a change does → why: on the way to the output
            is what cannot be differentiated. More can be found while `passes` goes on.

    """

    def __init__(self, run: Run, weights: Weights, memory: int) -> None:
        self._run = run
        self._weights = weights
        self._memory = memory
        self._dependent = downstream(run.call_nodes)
        self._wanted = closure([run.graph.output], lambda node: node.all_input_nodes)
        self._groups = self._find_groups()
        self._written = frozenset(chain.from_iterable(self._groups))
        self._regions = list(self._find_regions())
        self.blocked: dict[Node, str] = {}
        for node in run.graph.nodes:
            if node.target in _FLAT and node in self._dependent & self._wanted and _is_real(node):
                self._block([node], f"the derivative of {node.target} is zero")

    def matters(self, node: Node) -> bool:
        """Whether the output depends on a node."""
        return node in self._wanted

    def passes(self, probes: Sequence[Probe], watch: Callable[[Gradient], None]) -> None:
        """Run one backward pass for each probe, all of them together.

        Args:
            probes: Where they start; each is called once.
            watch: Is told of every gradient that reaches a call of an op; all of one segment, then the one before it.

        """
        output = self._run.graph.output
        pending: dict[Node, list[Tensor | None]] = {}
        for region in reversed(self._regions):
            arrived = {node: pending.pop(node) for node in list(pending) if self._run.order[node] in region}
            starts = probes if self._run.order[output] in region else None
            if not arrived and starts is None:
                continue
            outputs = [*arrived, *([output] if starts is not None else [])]
            try:
                found = self._through(region, arrived, starts, len(probes), watch)
            except RuntimeError as error:
                self._block(outputs, f"{self._culprit(region)} cannot be differentiated ({first_line(error)})")
                continue
            for node, gradients in found.items():
                known = pending.get(node, [None] * len(probes))
                pending[node] = [_sum(one, other) for one, other in zip(gradients, known, strict=True)]

    def _through(
        self,
        region: range,
        arrived: Mapping[Node, Sequence[Tensor | None]],
        starts: Sequence[Probe] | None,
        count: int,
        watch: Callable[[Gradient], None],
    ) -> dict[Node, list[Tensor | None]]:
        """Carry gradients from what leaves a region to what enters it."""
        run = self._run
        segments = {segment for position in region if (segment := run.segment_of[position]) is not None}
        tracer = _Tracer(run, self._weights, self._dependent, self._written, watch)
        found: dict[Node, list[Tensor | None]] = {}
        try:
            run.require(segments)
            with torch.enable_grad():
                values = tracer.run(region, self._wanted)
            found = {node: [None] * count for node in tracer.leaves}
            for probe in range(count):
                tracer.probe = probe
                sources = [(values[node], gradients[probe]) for node, gradients in arrived.items()]
                if starts is not None:
                    sources.append((values[run.graph.output], starts[probe]()))
                sources = [(value, g) for value, g in sources if g is not None and value.requires_grad]
                if not sources:
                    continue
                gradients = torch.autograd.grad(
                    [value for value, _ in sources],
                    tracer.inputs,
                    [gradient for _, gradient in sources],
                    retain_graph=probe + 1 < count,
                    allow_unused=True,
                )
                for node, gradient in zip(tracer.leaves, gradients, strict=False):  # the anchor's comes last
                    found[node][probe] = gradient
        finally:
            run.release(segments)
        return {node: gradients for node, gradients in found.items() if any(g is not None for g in gradients)}

    def _culprit(self, region: range) -> str:
        """Name the first call of a region that cannot be differentiated by itself."""
        for position in region:
            node = self._run.graph.nodes[position]
            if node.op != "call_function" or node not in self._dependent or node not in self._wanted:
                continue
            tracer = _Tracer(self._run, self._weights, self._dependent, frozenset(), lambda _: None)
            try:
                with torch.enable_grad():
                    values = tree_leaves(tracer.run(range(position, position + 1), {node})[node])
                for value in values:
                    if isinstance(value, Tensor) and value.requires_grad:
                        torch.autograd.grad(
                            value, tracer.inputs, torch.ones_like(value), retain_graph=True, allow_unused=True
                        )
            except RuntimeError:
                return str(node.target)
        return "a part of the model"

    def _block(self, nodes: Iterable[Node], reason: str) -> None:
        """Note that no gradient can be trusted that would come through these nodes."""
        before = closure(nodes, lambda node: node.all_input_nodes)
        for call in self._run.call_nodes:
            if call in before:
                self.blocked.setdefault(call, reason)

    def _find_groups(self) -> list[tuple[Node, ...]]:
        """Find groups of values in memory that is written into which changes reach, or which what they reach reads."""
        every = dict.fromkeys(chain.from_iterable(self._run.groups.values()))
        return [group for group in every if not self._dependent.isdisjoint(self._touching(group))]

    def _touching(self, group: Iterable[Node]) -> Iterator[Node]:
        for node in group:
            yield node
            yield from (user for user in node.users if user in self._run.order)

    def _find_regions(self) -> Iterator[range]:
        """Positions between two cuts; no cut separates memory that is written into, or a tuple, from what reads it."""
        run = self._run
        inseparable = [list(self._touching(group)) for group in self._groups]
        inseparable += [
            list(self._touching([node]))
            for node in run.graph.nodes
            if node in self._dependent and not isinstance(node.meta.get("val"), Tensor)
        ]
        spans = []
        for nodes in inseparable:
            places = [run.order[node] for node in nodes if node.op == "call_function"]
            spans.append((min(places), max(places)))
        cuts = [end for end in run.ends if not any(low <= end < high for low, high in spans)]
        sizes = list(accumulate(map(size, run.graph.nodes)))
        start, before = 0, 0
        for end, following in pairwise([*cuts, len(sizes) - 1]):
            if sizes[following] - before > self._memory:
                yield range(start, end + 1)
                start, before = end + 1, sizes[end]
        yield range(start, len(sizes))


class _Tracer:
    """Computes a region with autograd watching.

    Attributes:
        leaves: Nodes from before the region that changes come in by → their values, which gradients are taken of.
        probe: Number of the pass that goes on.

    """

    def __init__(
        self,
        run: Run,
        weights: Weights,
        dependent: Collection[Node],
        written: Collection[Node],
        watch: Callable[[Gradient], None],
    ) -> None:
        self._run = run
        self._weights = weights
        self._dependent = dependent
        self._written = written
        self._watch = watch
        self._ops = frozenset(run.call_nodes)
        # makes calls of ops differentiable that have no input to differentiate by, such as embeddings
        self._anchor = torch.zeros((), requires_grad=True, device=run.output.device)
        self._start = 0
        self.leaves: dict[Node, Tensor] = {}
        self.probe = 0

    @property
    def inputs(self) -> list[Tensor]:
        """All that gradients can be taken of, the leaves first."""
        return [*self.leaves.values(), self._anchor]

    def run(self, region: range, wanted: Collection[Node]) -> dict[Node, Any]:
        """Compute the values of a region that changes reach, and what shares memory with them."""
        self._start = region.start
        values: dict[Node, Any] = {}
        for position in region:
            node = self._run.graph.nodes[position]
            active = (node in self._dependent and node in wanted) or node in self._written
            if node.op != "call_function" or not active:
                continue
            for argument in node.all_input_nodes:
                if argument not in values:
                    values[argument] = self._entering(argument)
            values[node] = self._value(node, values)
        return values

    def _entering(self, node: Node) -> Any:  # noqa: ANN401 - a value of any node
        value = self._run.values(node)
        if not isinstance(value, Tensor):
            return value
        if node in self._written:  # what the graph writes into: an input or a constant
            return value.clone()
        if node in self._dependent and value.is_floating_point():
            value = value.detach().requires_grad_()
            self.leaves[node] = value
        return value

    def _value(self, node: Node, values: Mapping[Node, Any]) -> Any:  # noqa: ANN401 - as above
        order = {argument: i for i, argument in enumerate(node.all_input_nodes)}
        args, kwargs = reader_of(node, order)([values[argument] for argument in order])
        if node in self._ops or node.target in (LINEAR, EMBEDDING):
            return self._op(node, args, kwargs)
        target: Any = aten.alias.default if node.target is aten.detach.default else node.target
        return profile.call(node, target, args, kwargs)

    def _op(self, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """Compute a call of an op, or take what the run has, with a gradient that is watched."""
        call = bind(node.target, args, kwargs)

        with torch.no_grad():
            # what the run has of a group was written into since; so will be what is returned here
            written = node in self._run.groups
            value: Tensor = self._run.call(node)(*args, **kwargs) if written else self._run.values(node)
        through = None if call.kind == "embedding" else _InputGradient(call, self._weights)
        back = partial(self._back, node, call, value, through)
        found: Tensor = _OpCall.apply(call.x, self._anchor, value.clone if written else value.detach, back)  # type: ignore[no-untyped-call] # torch's
        return found

    def _back(
        self, node: Node, call: Call, value: Tensor, through: _InputGradient | None, gradient: Tensor
    ) -> Tensor | None:
        found = None if through is None else through(gradient)
        if node in self._ops:
            self._watch(Gradient(node, self.probe, self._start, call, value, gradient, found))
        return found


class _OpCall(torch.autograd.Function):
    """A call whose gradient is computed by a function."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's
        x: Tensor,
        _anchor: Tensor,
        value: Callable[[], Tensor],
        back: Callable[[Tensor], Tensor | None],
    ) -> Tensor:
        """Return the value; ``x`` and the anchor make it need a gradient."""
        ctx.needed = x.requires_grad
        ctx.back = back
        return value()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:  # noqa: ANN401 - torch's
        """Compute the gradient of ``x``."""
        found = ctx.back(gradients[0])
        return (found if ctx.needed else None), None, None, None


class _InputGradient:
    """Multiplies gradients of an op's output by its Jacobian with respect to its input.

    Args:
        call: A linear or a convolution.
        weights: In which dtype to multiply by a narrow weight.

    """

    def __init__(self, call: Call, weights: Weights) -> None:
        self._call = call
        self._weights = weights

    def __call__(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the input, fp32."""
        if self._call.kind == "linear":
            return self._weights.transposed(gradient, self._call.weight)
        x, output = self._convolution
        found: Tensor = torch.autograd.grad(output, x, gradient, retain_graph=True)[0]
        return found

    @cached_property
    def _convolution(self) -> tuple[Tensor, Tensor]:
        x = self._call.x.detach().requires_grad_()
        with torch.enable_grad():
            return x, unquantized(replace(self._call, x=x, bias=None))


def _is_real(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Add up gradients that come from several regions."""
    if one is None or other is None:
        return other if one is None else one
    return one + other
