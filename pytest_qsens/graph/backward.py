"""Carry gradients of a graph's output back to the calls of its ops, a segment at a time.

The values of a segment are computed again with autograd watching, and gradients leave it where values enter it, so
that memory is that of one segment and of the gradients between two. What is differentiated is the function that the
graph computes, not what a training run would see of it: ``detach`` passes gradients on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pytest_qsens import profile
from pytest_qsens.errors import first_line
from pytest_qsens.graph.calls import Call, bind, convolution_gradient
from pytest_qsens.graph.closure import closure, downstream
from pytest_qsens.graph.footprint import size
from pytest_qsens.graph.narrow import EMBEDDING, LINEAR
from pytest_qsens.graph.schedule import reader_of
from pytest_qsens.ops import STATES

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


_VALUES_PER_NODE = 4
"""Gradients that a pass holds at a time, in sizes of what it goes through: autograd's own, and those that are taken."""


class Gradient(NamedTuple):
    """What backward passes bring to one call of an op.

    Attributes:
        node: The call.
        passes: Numbers of the passes; if not all, others come later, before any of another region.
        region: The same for calls that are told of together.
        call: Its arguments.
        value: What it gives in the run.
        output: Gradients of its output, ``(passes, *output)``.
        input: Gradients of its input, for itself and not for others that read the same, ``(passes, *input)``; ``None``
            for an embedding, and for keys and values.

    """

    node: Node
    passes: range
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
        memory: Bytes of values to compute at a time, if segments are that small, and a few times as many of gradients.
        watched: Calls of ops that gradients are wanted at; ``None`` for all.

    Attributes:
        blocked: Op calls whose gradient says nothing, or not all, of what a change does → why: on the way to the output
            is what cannot be differentiated. More can be found while `passes` goes on.

    """

    def __init__(self, run: Run, weights: Weights, memory: int, watched: Collection[Node] | None = None) -> None:
        self._run = run
        self._weights = weights
        self._memory = memory
        self._watched = frozenset(run.call_nodes if watched is None else watched)
        self._dependent = downstream(self._watched)
        self._wanted = closure([run.graph.output], lambda node: node.all_input_nodes)
        self._groups = self._find_groups()
        self._written = frozenset(chain.from_iterable(self._groups))
        self._sizes = list(map(size, run.graph.nodes))
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
            probes: Where they start; each gives the same whenever it is called.
            watch: Is told of the gradients at every watched call that they reach; all of one region, then the one
                before it.

        """
        output = self._run.graph.output
        pending: dict[Node, list[Tensor]] = {}  # those of some passes, then those of others
        for region in reversed(self._regions):
            arrived = {node: torch.cat(pending.pop(node)) for node in list(pending) if self._run.order[node] in region}
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
                pending[node] = [torch.cat(pending[node]) + torch.cat(gradients)] if node in pending else gradients

    def _through(
        self,
        region: range,
        arrived: Mapping[Node, Tensor],
        starts: Sequence[Probe] | None,
        count: int,
        watch: Callable[[Gradient], None],
    ) -> dict[Node, list[Tensor]]:
        """Carry gradients from what leaves a region to what enters it."""
        run = self._run
        segments = {segment for position in region if (segment := run.segment_of[position]) is not None}
        tracer = _Tracer(run, self._weights, self._dependent, self._written, self._watched)
        found: dict[Node, list[Tensor]] = {}
        try:
            run.require(segments)
            with torch.enable_grad():
                values = tracer.run(region, self._wanted)
            together = self._together(region, count)
            first = 0
            while first < count:
                passes = range(first, min(first + together, count))
                sources = [(values[node], gradients[first : passes.stop]) for node, gradients in arrived.items()]
                if starts is not None:
                    started = torch.stack([starts[number]() for number in passes])
                    sources.append((values[run.graph.output], started))
                try:
                    entering, gradients_of_ops = tracer.carry(sources, passes)
                except RuntimeError:  # some operators can be differentiated for one pass at a time only
                    if together == 1:
                        raise
                    together = 1
                    continue
                for node, gradient in entering.items():
                    found.setdefault(node, []).append(gradient)
                for brought in gradients_of_ops:
                    watch(brought)
                first = passes.stop
        finally:
            run.release(segments)
        return found

    def _together(self, region: range, count: int) -> int:
        """How many passes go through a region together."""
        held = sum(self._sizes[region.start : region.stop])
        return max(1, min(count, _VALUES_PER_NODE * self._memory // max(1, held)))

    def _culprit(self, region: range) -> str:
        """Name the first call of a region that cannot be differentiated by itself."""
        for position in region:
            node = self._run.graph.nodes[position]
            if node.op != "call_function" or node not in self._dependent or node not in self._wanted:
                continue
            tracer = _Tracer(self._run, self._weights, self._dependent, frozenset(), frozenset())
            try:
                with torch.enable_grad():
                    values = tree_leaves(tracer.run(range(position, position + 1), {node})[node])
                real = [(value, torch.ones_like(value)[None]) for value in values if isinstance(value, Tensor)]
                tracer.carry(real, range(1))
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
        sizes = list(accumulate(self._sizes))
        start, before = 0, 0
        for end, following in pairwise([*cuts, len(sizes) - 1]):
            if sizes[following] - before > self._memory:
                yield range(start, end + 1)
                start, before = end + 1, sizes[end]
        yield range(start, len(sizes))


class _Tap(NamedTuple):
    """Where gradients are taken: tensors that an op call seems to read, of the shapes of its input and its output."""

    node: Node
    call: Call
    value: Tensor
    input: Tensor | None
    output: Tensor


class _Tracer:
    """Computes a region with autograd watching.

    Attributes:
        leaves: Nodes from before the region that changes come in by → their values, which gradients are taken of.

    """

    def __init__(
        self,
        run: Run,
        weights: Weights,
        dependent: Collection[Node],
        written: Collection[Node],
        watched: Collection[Node],
    ) -> None:
        self._run = run
        self._weights = weights
        self._dependent = dependent
        self._written = written
        self._watched = watched
        self._ops = frozenset(run.call_nodes)
        self._start = 0
        self._taps: list[_Tap] = []
        self.leaves: dict[Node, Tensor] = {}

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

    def carry(
        self, sources: Sequence[tuple[Tensor, Tensor]], passes: range
    ) -> tuple[dict[Node, Tensor], list[Gradient]]:
        """Carry gradients back through what was computed.

        Args:
            sources: Values, and the gradients that passes bring to them, ``(passes, *value)``.
            passes: Their numbers.

        Returns:
            Gradients of leaves, ``(passes, *value)``, and at watched calls, the last first; those that are reached.

        """
        reached = [(value, gradient) for value, gradient in sources if value.requires_grad]
        taps = chain.from_iterable((tap.output, tap.input) for tap in self._taps)
        taken = [*self.leaves.values(), *(tap for tap in taps if tap is not None)]
        if not reached or not taken:
            return {}, []
        several = len(passes) > 1
        gradients = torch.autograd.grad(
            [value for value, _ in reached],
            taken,
            [gradient if several else gradient[0] for _, gradient in reached],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=several,
        )
        found = {
            id(value): gradient if several else gradient[None]
            for value, gradient in zip(taken, gradients, strict=True)
            if gradient is not None
        }
        entering = {node: found[id(leaf)] for node, leaf in self.leaves.items() if id(leaf) in found}
        of_taps = [(tap, found.get(id(tap.output)), found.get(id(tap.input))) for tap in reversed(self._taps)]
        watched = [
            Gradient(tap.node, passes, self._start, tap.call, tap.value, output, entered)
            for tap, output, entered in of_taps
            if output is not None
        ]
        return entering, watched

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
        if node.target is aten.batch_norm.default and node not in self._run.groups and not args[5]:  # does not train
            return self._batch_norm(node, args)
        target: Any = aten.alias.default if node.target is aten.detach.default else node.target
        return profile.call(node, target, args, kwargs)

    def _op(self, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """Compute a call of an op, or take what the run has, with taps for its gradients if they are wanted."""
        call = bind(node.target, args, kwargs)
        with torch.no_grad():
            # what the run has of a group was written into since; so will be what is returned here
            written = node in self._run.groups
            value: Tensor = self._run.call(node)(*args, **kwargs) if written else self._run.values(node)
        input_tap = output_tap = None
        if node in self._watched:
            input_tap = None if call.kind in ("embedding", *STATES) else _tap(call.x)
            output_tap = _tap(value)
            self._taps.append(_Tap(node, call, value, input_tap, output_tap))
        through = partial(_input_gradient, call, self._weights)
        found: Tensor = _OpCall.apply(  # type: ignore[no-untyped-call] # torch's
            call.x, input_tap, output_tap, value.clone if written else value.detach, through
        )
        return found

    def _batch_norm(self, node: Node, args: Sequence[Any]) -> Tensor:
        """Take what the run has; autograd's own operator prepares for training, too, and takes passes one by one."""
        x, weight, _, _, variance, _, _, epsilon, _ = args
        scale = torch.rsqrt(variance + epsilon)
        scale = (scale if weight is None else scale * weight).view(-1, *[1] * (x.dim() - 2))
        value: Tensor = self._run.values(node)
        found: Tensor = _OpCall.apply(x, None, None, value.detach, scale.mul)  # type: ignore[no-untyped-call] # torch's
        return found


class _OpCall(torch.autograd.Function):
    """A call whose gradient is computed by a function."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's
        _x: Tensor,
        _input_tap: Tensor | None,
        _output_tap: Tensor | None,
        value: Callable[[], Tensor],
        through: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Return the value; the input and the taps make it need a gradient."""
        ctx.through = through
        return value()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's
        """Compute the gradient of the input, which its tap gets for itself."""
        of_x, of_input, of_output = ctx.needs_input_grad[:3]
        found = ctx.through(gradients[0]) if of_x or of_input else None
        return found if of_x else None, found if of_input else None, gradients[0] if of_output else None, None, None


def _tap(value: Tensor) -> Tensor:
    """Make a tensor of the same shape that takes no memory."""
    return value.new_zeros(()).expand(value.shape).requires_grad_()


def _input_gradient(call: Call, weights: Weights, gradient: Tensor) -> Tensor:
    """Multiply the gradient of an op's output by its Jacobian with respect to its input; fp32."""
    if call.kind in STATES:
        return gradient
    if call.kind == "linear":
        return weights.transposed(gradient, call.weight)
    return convolution_gradient(call, gradient)


def _is_real(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()
