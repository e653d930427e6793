"""From a model and one real batch to an ATen-level graph. All that is semi-private in torch.fx is used here only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from pytest_qsens.graph.attention import StateHooks
from pytest_qsens.graph.calls import Call, is_op_call, is_vmapped, weight_argument
from pytest_qsens.graph.closure import downstream
from pytest_qsens.graph.functional import functional_kinds
from pytest_qsens.graph.marks import FACTORS, MARKS
from pytest_qsens.graph.products import ProductHooks
from pytest_qsens.graph.scopes import ModuleScopes, OpIndex

if TYPE_CHECKING:
    from pytest_qsens.models.spec import Batch

Output = Callable[[Any, "Batch"], Tensor]

OWNER = "qsens_owner"
_STATE = "qsens_state"
_PRODUCT = "qsens_product"


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
        out_of_reach: Op name → why nothing can be put in its place, although it takes part.
        functional: ``(owner:kind, kind)`` of products of activations that no module owns.

    """

    nodes: tuple[Node, ...]
    inputs: dict[Node, Tensor]
    constants: dict[Node, Any]
    output: Node
    calls: dict[str, tuple[Node, ...]]
    out_of_reach: dict[str, str]
    functional: tuple[tuple[str, str], ...]


def run_model(model: nn.Module, batch: Batch, output: Output) -> Tensor:
    """Run the scored forward, on a copy of the batch, which the model may write into.

    Fused kernels of attention modules are off: what they are given depends on who is watching, and so would the bits.
    """
    copied: Batch = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, dict(batch))
    return _forward(model, copied, output)


def _forward(model: nn.Module, batch: Batch, output: Output) -> Tensor:
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(value=False)
    try:
        return output(model(**batch), batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(value=fused)


def capture(model: nn.Module, batch: Batch, output: Output, states: Collection[str] = ()) -> Graph:
    """Capture the scored forward of ``batch`` (tensors on the model's device).

    The graph is specialized on this batch: sizes and values that do not depend on any op are constants in it. Keys and
    values, and factors of products, with the names in ``states`` are calls in it that give them as they are.

    Raises:
        CaptureRefused: If tracing fails, or a value computed by an op decides shapes or control flow.

    """
    leaves, tree = tree_flatten(dict(batch))
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def forward(*tensors: Tensor) -> Tensor:
        values = list(leaves)
        for position, tensor in zip(positions, tensors, strict=True):
            values[position] = tensor
        return _forward(model, tree_unflatten(values, tree), output)

    inputs = [leaves[i].clone() for i in positions]
    marks: list[Node | None] = []
    scopes = ModuleScopes(model, lambda _: marks.append(_last_node()), lambda name: _own_nodes_since(marks.pop(), name))
    versions = {name: tensor._version for name, tensor in _state(model)}  # noqa: SLF001 - torch has no public name
    try:
        # grad mode stays on, with no parameter requiring grad: under no_grad the graph gets _set_grad_enabled nodes
        hooks = StateHooks(model, states, scopes, _marked)
        products = ProductHooks(model, states, scopes, hooks, _marked, _multiplied)
        with torch.enable_grad(), scopes, products, hooks, tracing(TracingContext(FakeTensorMode())):  # else one a node
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
    _refuse_wrapped(constants)
    index = OpIndex(model)
    calls = _op_calls(index, nodes, constants)
    op_nodes = {node for call in calls.values() for node in call}
    dependent = downstream(op_nodes)
    _refuse_data_dependence(nodes, dependent)
    _refuse_autocast(nodes)
    originals = [leaves[i] for i in positions]
    users = _weight_users(index, [node for node in nodes if node not in op_nodes], constants)
    by = {op: str(node.target) for node, ops in users.items() for op in ops}
    out_of_reach = index.out_of_reach(calls, scopes.entered, by, states)
    parameters = {node for node, value in constants.items() if isinstance(value, nn.Parameter)}
    multiplying = dependent | (downstream(parameters) & downstream(placeholders))
    multiplying -= {node for node in nodes if _PRODUCT in node.meta}  # ops, or a part of some
    explained = {node for node, ops in users.items() if ops <= out_of_reach.keys()}
    return Graph(
        nodes=tuple(nodes),
        inputs=dict(zip(placeholders, originals, strict=True)),
        constants=constants,
        output=output_node,
        calls=calls,
        out_of_reach=out_of_reach,
        functional=_functional(nodes, multiplying - op_nodes - explained),
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


def _marked(op: str, kind: str, state: Tensor) -> Tensor:
    """Note in the graph that this is what an op gives."""
    mark = MARKS.get(kind) or FACTORS[kind]
    found: Tensor = mark(state)
    node = _last_node()
    if node is not None and node.target is mark:
        node.meta[_STATE] = op
    return found


def _multiplied(op: str, call: Call | None, multiply: Callable[[], Tensor]) -> Tensor:
    """Note in the graph that this is a product of an op, and where it is caught as a whole, what the op gives."""
    found = multiply()
    node = _last_node()
    if node is not None:
        node.meta[_PRODUCT] = op
        if call is not None and node.target is torch.ops.aten.scaled_dot_product_attention.default:
            node.meta[_STATE] = op
    return found


def _own_nodes_since(mark: Node | None, module: str) -> None:
    """Give the nodes made since ``mark`` to ``module``, unless a module inside it has them already."""
    for node in reversed(_graph_being_traced().nodes):
        if node is mark:
            return
        node.meta.setdefault(OWNER, module)


def _attribute(module: nn.Module, path: str) -> Any:  # noqa: ANN401 - parameters, buffers, constants
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _op_calls(index: OpIndex, nodes: list[Node], constants: dict[Node, Any]) -> dict[str, tuple[Node, ...]]:
    calls: dict[str, tuple[Node, ...]] = {}
    for node in nodes:
        if (state := node.meta.get(_STATE)) is not None:
            calls[state] = (*calls.get(state, ()), node)
        elif node.op == "call_function" and is_op_call(node.target):
            weight = weight_argument(node.target, node.args, node.kwargs)
            shape = weight.meta["val"].shape if "val" in getattr(weight, "meta", {}) else None
            op = index.called(node.meta.get(OWNER, ""), constants.get(weight), shape)
            if op is not None:
                calls[op] = (*calls.get(op, ()), node)
    return calls


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
            where = node.meta.get(OWNER) or "the model"
            raise CaptureRefused(f"{node.target} in {where} makes shapes or control flow depend on activations")


def _refuse_wrapped(constants: dict[Node, Any]) -> None:
    """Refuse a graph with values from inside of ``torch.vmap``, as flex_attention's are where it is not compiled."""
    for node, value in constants.items():
        if is_vmapped(value):
            where = next((user.meta[OWNER] for user in node.users if user.meta.get(OWNER)), "the model")
            raise CaptureRefused(f"torch.vmap runs in {where}, as in flex_attention, and its values are no tensors")


def _refuse_autocast(nodes: list[Node]) -> None:
    """Refuse a graph that switches autocast on: a replay of a part of it would run outside of it."""
    for node in nodes:
        if getattr(node.target, "__name__", "") == "_enter_autocast" and any(a is True for a in node.args[2:3]):
            raise CaptureRefused("the model uses torch.autocast, which a replay of a part of it would leave out")


def _weight_users(index: OpIndex, nodes: list[Node], constants: dict[Node, Any]) -> dict[Node, frozenset[str]]:
    """Nodes that combine ops' weights, as they are or reshaped, with something else: node → ops."""
    weights: dict[Node, frozenset[str]] = {}
    users: dict[Node, frozenset[str]] = {}
    for node in nodes:
        if node in constants:
            if owners := index.owners(constants[node]):
                weights[node] = frozenset(owners)
        elif len(node.all_input_nodes) == 1 and node.all_input_nodes[0] in weights:
            weights[node] = weights[node.all_input_nodes[0]]
        elif used := frozenset[str]().union(*(weights.get(argument, ()) for argument in node.all_input_nodes)):
            users[node] = used
    return users


def _functional(nodes: list[Node], candidates: set[Node]) -> tuple[tuple[str, str], ...]:
    found: list[tuple[str, str]] = []
    seen: Counter[str] = Counter()
    for node in nodes:
        if node.op != "call_function" or node not in candidates:
            continue
        for kind in functional_kinds(node.target):
            name = f"{node.meta.get(OWNER, '')}:{kind}"
            if kind in ("qk", "pv") and seen[name]:
                continue  # one of each however often a module attends, as where they are ops
            found.append((f"{name}_{seen[name]}" if seen[name] else name, kind))
            seen[name] += 1
    return tuple(found)
