"""From a model and one real batch to an ATen-level graph. All that is semi-private in torch.fx is used here only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from pytest_qsens.graph.calls import is_op_call, weight_argument
from pytest_qsens.graph.functional import functional_kinds
from pytest_qsens.graph.scopes import ModuleScopes, OpIndex

if TYPE_CHECKING:
    from pytest_qsens.models.spec import Batch

Output = Callable[[Any, "Batch"], Tensor]

_OWNER = "qsens_owner"


class CaptureRefused(Exception):  # noqa: N818 - not an error: the eager engine takes over
    """The graph of this model would not be right for every quantized variant; the message says why."""


@dataclass(frozen=True)
class Graph:
    """The captured forward of one batch: nodes in execution order.

    Attributes:
        nodes: Placeholders, constants and calls, without the output node.
        inputs: Placeholder → its value.
        constants: ``get_attr`` node → parameter, buffer or lifted constant, the model's own objects.
        output: The node whose value is the scored output.
        calls: Op name → the nodes that call it.
        inlined: Op name → the operator that uses its weight in place of its own forward; nothing can be swapped there.
        functional: ``(owner:kind, kind)`` of products of activations that no module owns.

    """

    nodes: tuple[Node, ...]
    inputs: dict[Node, Tensor]
    constants: dict[Node, Any]
    output: Node
    calls: dict[str, tuple[Node, ...]]
    inlined: dict[str, str]
    functional: tuple[tuple[str, str], ...]


def run_model(model: nn.Module, batch: Batch, output: Output) -> Tensor:
    """Run the scored forward as it is."""
    return output(model(**batch), batch)


def capture(model: nn.Module, batch: Batch, output: Output) -> Graph:
    """Capture the scored forward of ``batch`` (tensors on the model's device).

    The graph is specialized on this batch: sizes and values that do not depend on any op are constants in it.

    Raises:
        CaptureRefused: If tracing fails, or a value computed by an op decides shapes or control flow.

    """
    leaves, tree = tree_flatten(dict(batch))
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def forward(*tensors: Tensor) -> Tensor:
        values = list(leaves)
        for position, tensor in zip(positions, tensors, strict=True):
            values[position] = tensor
        return run_model(model, tree_unflatten(values, tree), output)

    inputs = [leaves[i].clone() for i in positions]
    marks: list[Node | None] = []
    scopes = ModuleScopes(model, lambda _: marks.append(_last_node()), lambda name: _own_nodes_since(marks.pop(), name))
    versions = {name: tensor._version for name, tensor in _state(model)}  # noqa: SLF001 - torch has no public name
    try:
        # grad mode stays on, with no parameter requiring grad: under no_grad the graph gets _set_grad_enabled nodes
        with torch.enable_grad(), scopes:
            module = make_fx(forward, tracing_mode="real", pre_dispatch=True, _error_on_data_dependent_ops=False)(
                *inputs
            )
    except Exception as error:  # whatever the model or the tracer raises, the eager engine can still score it
        message = str(error).strip().partition("\n")[0]
        raise CaptureRefused(f"tracing failed: {type(error).__name__}: {message}") from error
    changed = [name for name, tensor in _state(model) if tensor._version != versions[name]]  # noqa: SLF001
    if changed:
        raise CaptureRefused(f"the forward changes the model's own state in place ({changed[0]})")

    *nodes, result = module.graph.nodes
    output_node = result.args[0]
    if not isinstance(output_node, Node):
        raise CaptureRefused("the scored output is not a tensor")
    placeholders = [node for node in nodes if node.op == "placeholder"]
    constants = {node: _attribute(module, str(node.target)) for node in nodes if node.op == "get_attr"}
    index = OpIndex(model)
    calls = _op_calls(index, nodes, constants)
    op_nodes = {node for call in calls.values() for node in call}
    dependent = _downstream(nodes, op_nodes)
    _refuse_data_dependence(nodes, dependent)
    originals = [leaves[i] for i in positions]
    inlined = _weight_users(index, nodes, constants)
    return Graph(
        nodes=tuple(nodes),
        inputs=dict(zip(placeholders, originals, strict=True)),
        constants=constants,
        output=output_node,
        calls=calls,
        inlined={op: str(node.target) for node, op in inlined.items() if op not in calls},
        functional=_functional(nodes, dependent - op_nodes - set(inlined)),
    )


def _state(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _graph_being_traced() -> torch.fx.Graph:
    mode = get_proxy_mode()
    if mode is None:
        raise RuntimeError("no proxy mode is active: make_fx of this torch version works differently")
    graph: torch.fx.Graph = mode.tracer.graph
    return graph


def _last_node() -> Node | None:
    return next(iter(reversed(_graph_being_traced().nodes)), None)


def _own_nodes_since(mark: Node | None, module: str) -> None:
    """Give the nodes made since ``mark`` to ``module``, unless a module inside it has them already."""
    for node in reversed(_graph_being_traced().nodes):
        if node is mark:
            return
        node.meta.setdefault(_OWNER, module)


def _attribute(module: nn.Module, path: str) -> Any:  # noqa: ANN401 - parameters, buffers, constants
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _op_calls(index: OpIndex, nodes: list[Node], constants: dict[Node, Any]) -> dict[str, tuple[Node, ...]]:
    calls: dict[str, tuple[Node, ...]] = {}
    for node in nodes:
        if node.op == "call_function" and is_op_call(node.target):
            weight = constants.get(weight_argument(node.target, node.args, node.kwargs))
            op = index.called(node.meta.get(_OWNER, ""), weight)
            if op is not None:
                calls[op] = (*calls.get(op, ()), node)
    return calls


def _downstream(nodes: list[Node], start: set[Node]) -> set[Node]:
    """Nodes that depend on the value of any of ``start``, those included."""
    found = set(start)
    for node in nodes:
        if any(argument in found for argument in node.all_input_nodes):
            found.add(node)
    return found


def _refuse_data_dependence(nodes: list[Node], dependent: set[Node]) -> None:
    """Refuse a graph in which a value computed by an op became a Python number or a shape."""
    for node in nodes:
        if not any(argument in dependent for argument in node.all_input_nodes):
            continue
        tags = getattr(node.target, "tags", ())
        mask = node.target is torch.ops.aten.index.Tensor and any(
            isinstance(i, Node) and i in dependent and i.meta["val"].dtype in (torch.bool, torch.uint8)
            for i in node.args[1]  # type: ignore[union-attr] # the list of indices
        )
        # index.Tensor is tagged for the sake of masks; integer indices give a static shape
        tagged = torch.Tag.data_dependent_output in tags or (
            torch.Tag.dynamic_output_shape in tags and node.target is not torch.ops.aten.index.Tensor
        )
        if mask or tagged or node.target is torch.ops.aten.item.default:
            where = node.meta.get(_OWNER) or "the model"
            raise CaptureRefused(f"{node.target} in {where} makes shapes or control flow depend on activations")


def _weight_users(index: OpIndex, nodes: list[Node], constants: dict[Node, Any]) -> dict[Node, str]:
    """Nodes that combine an op's weight, as it is or reshaped, with something else: node → op."""
    weights: dict[Node, str] = {}
    users: dict[Node, str] = {}
    for node in nodes:
        if node in constants:
            op = index.owner(constants[node])
            if op is not None:
                weights[node] = op
        elif len(node.all_input_nodes) == 1 and node.all_input_nodes[0] in weights:
            weights[node] = weights[node.all_input_nodes[0]]
        else:
            users.update((node, weights[argument]) for argument in node.all_input_nodes if argument in weights)
    return users


def _functional(nodes: list[Node], candidates: set[Node]) -> tuple[tuple[str, str], ...]:
    found: list[tuple[str, str]] = []
    seen: Counter[str] = Counter()
    for node in nodes:
        if node.op != "call_function" or node not in candidates:
            continue
        for kind in functional_kinds(node.target):
            name = f"{node.meta.get(_OWNER, '')}:{kind}"
            found.append((f"{name}_{seen[name]}" if seen[name] else name, kind))
            seen[name] += 1
    return tuple(found)
