"""A captured graph in builtin values and tensors, and back: so that one process captures and the others read."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.fx import Graph as FxGraph
from torch.fx import Node
from torch.utils._pytree import tree_flatten

from pytest_qsens.graph.capture import OWNER, Graph
from pytest_qsens.graph.narrow import stored

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from pytest_qsens.models.spec import Batch

_MODULES = ("_operator", "math")
"""Where functions in graphs come from, beside operators of torch's dispatcher and the switch of gradients."""

_SWITCH = ("torch._C", "_set_grad_enabled")

_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_FORMATS = {
    str(value): value for value in vars(torch).values() if isinstance(value, torch.memory_format | torch.layout)
}


class NotSerializable(Exception):  # noqa: N818 - not an error: every process captures for itself
    """The graph holds something that is none of the usual; the message says what."""


def to_builtin(graph: Graph, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Take a graph apart: into what JSON can hold, and the constants that are not the model's own.

    Raises:
        NotSerializable: If a node's operator or one of its arguments is of an unknown kind.

    """
    own = {id(tensor): name for name, tensor in _own_tensors(model).items()}
    number = {node: i for i, node in enumerate(graph.nodes)}
    tensors: dict[str, Tensor] = {}

    def constant(node: Node) -> Any:  # noqa: ANN401 - a name, or a builtin value
        value = graph.constants[node]
        if not isinstance(value, Tensor):
            return {"value": _argument(value, number)}
        if id(value) in own:
            return {"own": own[id(value)]}
        name = str(len(tensors))
        base = value.detach()[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in value.stride())]
        tensors[name] = base.contiguous().clone()
        return {"tensor": name, "shape": list(value.shape), "stride": list(base.stride())}

    nodes = []
    for node in graph.nodes:
        told: dict[str, Any] = {"op": node.op, "name": node.name, "owner": node.meta.get(OWNER)}
        told["val"] = _form(node.meta.get("val"), number)
        if node.op == "call_function":
            told["target"] = _target(node.target)
            told["args"] = _argument(node.args, number)
            told["kwargs"] = _argument(node.kwargs, number)
        elif node.op == "get_attr":
            told["constant"] = constant(node)
        nodes.append(told)
    content = {
        "nodes": nodes,
        "output": number[graph.output],
        "calls": {op: [number[node] for node in called] for op, called in graph.calls.items()},
        "out_of_reach": graph.out_of_reach,
        "functional": [list(item) for item in graph.functional],
    }
    return content, tensors


def from_builtin(content: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module, batch: Batch) -> Graph:
    """Put a graph together again, for the same model and the same batch.

    Raises:
        NotSerializable: If an operator is not known here.
        KeyError, IndexError, TypeError, ValueError: If the content is damaged.

    """
    own = _own_tensors(model)
    inputs = iter([leaf for leaf in tree_flatten(dict(batch))[0] if isinstance(leaf, Tensor)])
    made = FxGraph()
    nodes: list[Node] = []
    placed: dict[Node, Tensor] = {}
    constants: dict[Node, Any] = {}
    for told in content["nodes"]:
        args: Any = ()
        kwargs: Any = {}
        target: Any = told["name"]
        if told["op"] == "call_function":
            target, args, kwargs = _function(told["target"]), _value(told["args"], nodes), _value(told["kwargs"], nodes)
        node = made.create_node(told["op"], target, args, kwargs, told["name"])
        if told["op"] == "placeholder":
            placed[node] = next(inputs)
        elif told["op"] == "get_attr":
            constants[node] = _constant(told["constant"], own, tensors, nodes)
        if told["owner"] is not None:
            node.meta[OWNER] = told["owner"]
        node.meta["val"] = _value(told["val"], nodes)
        nodes.append(node)
    return Graph(
        nodes=tuple(nodes),
        inputs=placed,
        constants=constants,
        output=nodes[content["output"]],
        calls={op: tuple(nodes[i] for i in called) for op, called in content["calls"].items()},
        out_of_reach=dict(content["out_of_reach"]),
        functional=tuple((name, kind) for name, kind in content["functional"]),
    )


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of the model that graphs refer to: name → as it is stored."""
    return {name: stored(value) for name, value in (*model.named_parameters(), *model.named_buffers())}


def _constant(
    told: Mapping[str, Any], own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], nodes: list[Node]
) -> Any:  # noqa: ANN401 - as `Graph.constants`
    if "own" in told:
        return own[told["own"]]
    if "tensor" not in told:
        return _value(told["value"], nodes)
    kept = tensors[told["tensor"]]  # kernels choose their way by strides, so these are restored
    return torch.empty_strided(kept.shape, told["stride"], dtype=kept.dtype).copy_(kept).expand(told["shape"])


def _target(target: Any) -> str:  # noqa: ANN401 - whatever a node calls
    if isinstance(target, torch._ops.OpOverload):  # noqa: SLF001 - its class has no public name
        return f"{target.namespace}::{target._opname}::{target._overloadname}"  # noqa: SLF001
    name = f"{getattr(target, '__module__', None)}::{getattr(target, '__qualname__', None)}"
    try:
        known = _function(name) is target
    except NotSerializable:
        known = False
    if not known:
        raise NotSerializable(f"the operator {target}")
    return name


def _function(name: str) -> Callable[..., Any]:
    match name.split("::"):
        case [module, function] if module in _MODULES or (module, function) == _SWITCH:
            found = getattr(importlib.import_module(module), function, None)
        case [namespace, operator, overload]:
            packet = getattr(getattr(torch.ops, namespace), operator, None)
            found = getattr(packet, overload, None)
        case _:
            found = None
    if found is None:
        raise NotSerializable(f"the operator {name}")
    return found  # type: ignore[no-any-return] # a callable


def _argument(value: Any, number: Mapping[Node, int]) -> Any:  # noqa: ANN401 - anything a node holds
    """Turn an argument into what JSON holds; what it has no form for becomes an object with one key."""
    if value is None or isinstance(value, bool | int | str):
        return value
    for kind, (types, to_json, _) in _LEAVES.items():
        if isinstance(value, types):
            return {kind: to_json(value)}
    if isinstance(value, Node):
        return {"node": number[value]}
    if isinstance(value, list) or type(value) is tuple:
        items = [_argument(item, number) for item in value]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, slice):
        return {"slice": [_argument(part, number) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _argument(item, number) for key, item in value.items()}}
    raise NotSerializable(f"{type(value).__name__} among the arguments")


def _form(value: Any, number: Mapping[Node, int]) -> Any:  # noqa: ANN401 - what the tracer notes of a value
    """Tell of a value its form if it is a tensor, all else as it is."""
    if isinstance(value, Tensor):
        return {"form": [str(value.dtype), list(value.shape), list(value.stride())]}
    if isinstance(value, list | tuple):
        items = [_form(item, number) for item in value]
        return items if isinstance(value, list) else {"tuple": items}
    return _argument(value, number)


def _value(told: Any, nodes: list[Node]) -> Any:  # noqa: ANN401 - anything a node holds
    if isinstance(told, list):
        return [_value(item, nodes) for item in told]
    if not isinstance(told, dict):
        return told
    ((kind, content),) = told.items()
    if kind in _LEAVES:
        return _LEAVES[kind][2](content)
    if kind == "node":
        return nodes[content]
    if kind == "dict":
        return {key: _value(item, nodes) for key, item in content.items()}
    items = [_value(item, nodes) for item in content]
    return tuple(items) if kind == "tuple" else slice(*items)


def _empty(form: Any) -> Tensor:  # noqa: ANN401 - from `_form`
    dtype, shape, stride = form
    return torch.empty_strided(shape, stride, dtype=_DTYPES[dtype], device="meta")


def _untold(value: object) -> NoReturn:
    raise NotSerializable(f"{type(value).__name__} among the arguments")


_LEAVES: dict[str, tuple[Any, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "float": (float, float.hex, float.fromhex),  # also infinite ones, and NaN
    "complex": (complex, lambda value: [value.real, value.imag], lambda parts: complex(*parts)),
    "dtype": (torch.dtype, str, _DTYPES.__getitem__),
    "format": ((torch.memory_format, torch.layout), str, _FORMATS.__getitem__),
    "device": (torch.device, str, torch.device),
    "size": (torch.Size, list, torch.Size),
    "form": (Tensor, _untold, _empty),  # of values; a tensor that is an argument has a node
}
"""Kind → types, to what JSON holds, and back."""
