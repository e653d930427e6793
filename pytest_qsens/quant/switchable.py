"""A graph that torch.ao.quantization has packed once, in which each op can run its int8 kernel or its float module.

`torch.ao.quantization.quantize_fx` decides what it quantizes node by node, from the node's own configuration: leaving
one op in fp32 changes nothing but the edges around that op. And a scale is that of the tensor it was observed on, in
the unquantized model. So the graph with one op in fp32 is the fully quantized one, in which this op runs its float
module and the values are rounded, or not, on its edges. Nothing has to be copied, prepared or packed again for it.

One thing is not reproduced: when `Tensor.reshape` follows an op in fp32, torch takes its result for quantized, and then
does not quantize the op behind it; here that op stays quantized.
"""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.ao.nn.intrinsic.modules.fused import _FusedModule
from torch.ao.nn.quantized import Embedding as QuantizedEmbedding
from torch.ao.quantization.observer import FixedQParamsObserver, HistogramObserver, ObserverBase
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from pytest_qsens.noise import perturbed
from pytest_qsens.quant.observers import QParams

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch.ao.quantization import QConfigMapping


class Leaf(nn.Module):
    """Makes a graph of a module that is traced as a leaf, such as a single linear."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """Call the module."""
        value: Tensor = self.module(x)
        return value


class _Rounded:
    """A value on an edge that is quantized, for those who need it rounded, and those who need it as it was."""

    def __init__(
        self,
        real: Tensor,
        qparams: QParams,
        readers: Mapping[str, QParams] | None = None,
        dtype: torch.dtype = torch.quint8,
    ) -> None:
        self.real = real
        self._qparams, self._readers, self._dtype = qparams, readers or {}, dtype
        self._integers: dict[QParams, Tensor] = {}

    def integers(self, reader: Node) -> Tensor:
        qparams = self._readers.get(_known_as(reader, self._readers), self._qparams)
        if qparams not in self._integers:
            self._integers[qparams] = torch.quantize_per_tensor(
                self.real, qparams.scale, qparams.zero_point, self._dtype
            )
        return self._integers[qparams]


def _known_as(node: Node, names: Collection[str]) -> str:
    """Name the node had before conversion, which puts functions in place of functions, with a number after it."""
    return node.name if node.name in names or node.op != "call_function" else re.sub(r"_\d+$", "", node.name)


def _real(value: Any) -> Any:  # noqa: ANN401 - a value of any node
    if isinstance(value, _Rounded):
        return value.real
    return value.dequantize() if isinstance(value, Tensor) and value.is_quantized else value


def _indices(value: Any) -> Any:  # noqa: ANN401 - a tensor
    """Lay them out as the kernel wants them; expanded position ids are not."""
    return value.contiguous()


class _Int8Run(Interpreter):
    """Runs a fully quantized graph with some of the ops in fp32."""

    def __init__(
        self,
        graph: GraphModule,
        twins: Mapping[str, nn.Module],
        readers: Mapping[str, Mapping[str, QParams]],
        between: Mapping[str, nn.Module],
    ) -> None:
        super().__init__(graph)
        self._twins: Mapping[Any, nn.Module] = twins
        self._readers = readers
        self._between: Mapping[Any, nn.Module] = between
        self.in_fp32: Collection[str] = ()
        self.seed: int | None = None

    def run_node(self, n: Node) -> Any:  # noqa: ANN401 - whatever a node gives
        """Give values that are to be rounded as `_Rounded`; everything but an op in fp32 gets them rounded."""
        if n.op == "call_module" and n.target in self._twins:
            return self._run_op(n, str(n.target))
        if n.op == "call_module" and n.target in self._between:
            return self._run_between(n, str(n.target))
        if n.op == "call_function" and n.target is torch.quantize_per_tensor:
            arguments: Any = map_arg(n.args, self.env.__getitem__)
            value, scale, zero_point, dtype = arguments
            return _Rounded(value, QParams(float(scale), int(zero_point)), dtype=dtype)
        if n.op == "call_method" and n.target == "dequantize":
            (argument,) = n.all_input_nodes
            value = _real(self.env[argument])
            # an op in fp32 has moved its output already
            moves = argument.target in self._twins and argument.target not in self.in_fp32
            return self._moved(value) if moves else value
        return super().run_node(n)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401 - as torch has it
        """Give the float weight where the graph looks at an op's, as that of Qwen2.5-VL's patch embedding does."""
        owner, _, name = target.rpartition(".")
        twin = self._twins.get(owner)
        if twin is None:
            return super().get_attr(target, args, kwargs)
        return getattr(twin[0] if isinstance(twin, nn.Sequential) else twin, name)

    def _run_op(self, n: Node, target: str) -> Any:  # noqa: ANN401 - float or quantized tensor
        packed: Any = self.submodules[target]
        weight_only = isinstance(packed, QuantizedEmbedding)
        if target not in self.in_fp32:
            output = packed(_indices(self.env[n.all_input_nodes[0]])) if weight_only else super().run_node(n)
            return self._moved(output) if weight_only else output
        output = self._moved(self._twins[target](*map_arg(n.args, lambda a: _real(self.env[a]))))
        if weight_only:
            return output
        return _Rounded(output, QParams(float(packed.scale), int(packed.zero_point)), self._readers.get(target))

    def _run_between(self, n: Node, target: str) -> Any:  # noqa: ANN401 - a quantized tensor, or a value to be rounded
        value = self.env[n.all_input_nodes[0]]
        if isinstance(self._between[target], nn.Dropout):
            return value
        if not isinstance(value, _Rounded) and not all(reader.target in self.in_fp32 for reader in n.users):
            return super().run_node(n)
        packed: Any = self.submodules[target]
        return _Rounded(self._between[target](_real(value)), QParams(float(packed.scale), int(packed.zero_point)))

    def _moved(self, value: Any) -> Any:  # noqa: ANN401 - a tensor
        return value if self.seed is None else perturbed(value, self.seed)

    def fetch_args_kwargs_from_env(self, n: Node) -> tuple[Any, Any]:
        """Round what is to be rounded."""

        def rounded(argument: Node) -> Any:  # noqa: ANN401 - a value of any node
            value = self.env[argument]
            return value.integers(n) if isinstance(value, _Rounded) else value

        return map_arg((n.args, n.kwargs), rounded)


class _FloatRun(Interpreter):
    """Runs an unquantized graph with some of the ops quantized, from fp32 to fp32."""

    def __init__(self, graph: GraphModule, packed: Mapping[str, nn.Module], inputs: Mapping[str, QParams]) -> None:
        super().__init__(graph)
        self._packed = packed
        self._inputs = inputs
        self.quantized: Collection[str] = ()

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401 - as torch has it
        """Quantize the input of an op, call its kernel, and give its output in fp32."""
        if target not in self.quantized:
            return super().call_module(target, args, kwargs)
        if isinstance(self._packed[target], QuantizedEmbedding):
            args = (_indices(args[0]),)
        elif target in self._inputs:
            qparams = self._inputs[target]
            args = (torch.quantize_per_tensor(args[0], qparams.scale, qparams.zero_point, torch.quint8), *args[1:])
        return _real(self._packed[target](*args, **kwargs))


class Part(nn.Module):
    """A module that FX can trace: it observes, and once it is packed, takes the original's place in the model.

    Attributes:
        ops: Name in the part's graph → name of the op.
        inputs: Name in the part's graph → scale and zero point of the op's input; none of embeddings.
        outputs: As ``inputs``, of the op's output.
        packed: Name in the part's graph → the op's kernel with its packed weight.

    """

    def __init__(self, original: nn.Module, ops: Mapping[str, str], qconfigs: QConfigMapping) -> None:
        super().__init__()
        self.__dict__["_original"] = original  # not a submodule of this one
        self.ops = dict(ops)
        self.inputs: dict[str, QParams] = {}
        self.outputs: dict[str, QParams] = {}
        self.packed: dict[str, nn.Module] = {}
        self.prepared: GraphModule = prepare_fx(original, qconfigs, ())
        self._signature = inspect.signature(self.prepared.forward)
        self._run: Interpreter | None = None

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the original has
        """Stand in for the original where the model looks into it, as Qwen2.5-VL does for a weight's dtype."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__["_original"]
            return getattr(original.module if isinstance(original, Leaf) else original, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - those of the original
        """Observe, or run with what is switched on."""
        if self._run is None:
            return self.prepared(*args, **kwargs)
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return self._run.run(*bound.arguments.values())

    def pack(self) -> None:
        """Find the scales and pack the weights, each once."""
        modules = self.prepared.named_modules(remove_duplicate=False)  # poolings share the observer of their input
        observers: dict[str, Any] = {name: module for name, module in modules if isinstance(module, ObserverBase)}
        for observer in set(observers.values()):
            _search_once(observer)
        for node in self.prepared.graph.nodes:
            if node.op == "call_module" and node.target in self.ops and node.args[0].target in observers:
                scale, zero_point = observers[node.args[0].target].calculate_qparams()
                self.inputs[node.target] = QParams(float(scale), int(zero_point))
        readers = _readers(self.prepared, self.ops, observers)
        unquantized = _without_observers(self.prepared, observers)
        qconfigs = _qconfigs_by_node(self.prepared)
        int8 = convert_fx(self.prepared)
        del self.prepared
        twins = {target: unquantized.get_submodule(target) for target in self.ops}
        self.packed = {target: int8.get_submodule(target) for target in self.ops}
        for target, packed in self.packed.items():
            kernel: Any = packed
            if not isinstance(packed, QuantizedEmbedding):
                self.outputs[target] = QParams(float(kernel.scale), int(kernel.zero_point))
        self._int8 = _Int8Run(int8, twins, readers, _between(int8, unquantized, qconfigs))
        self._unquantized = _FloatRun(unquantized, self.packed, self.inputs)

    def switch(self, quantized: Collection[str], *, others: bool, seed: int | None) -> None:
        """Choose what is quantized from now on: see `KernelModel.switch`."""
        self._int8.in_fp32 = {target for target, op in self.ops.items() if op not in quantized}
        self._unquantized.quantized = self.ops.keys() - self._int8.in_fp32
        self._int8.seed = seed
        self._run = self._int8 if others else self._unquantized


def _search_once(observer: Any) -> None:  # noqa: ANN401 - an observer of any class
    """Let every reader of the observer's scale share one search for it, which is slow."""
    found = observer.calculate_qparams()
    observer.calculate_qparams = lambda: found


def _qconfigs_by_node(prepared: GraphModule) -> Mapping[str, Any]:
    """Name of a node → how it is to be quantized."""
    found: Mapping[str, Any] = prepared.meta["_observed_graph_module_attrs"].node_name_to_qconfig
    return found


def _between(int8: GraphModule, unquantized: GraphModule, qconfigs: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Find what is quantized unasked: conversion does so with a norm that has quantized neighbours on both sides."""
    called = [node for node in unquantized.graph.nodes if node.op == "call_module" and qconfigs.get(node.name) is None]
    modules = {str(node.target): unquantized.get_submodule(str(node.target)) for node in called}
    return {target: own for target, own in modules.items() if type(int8.get_submodule(target)) is not type(own)}


def _readers(
    prepared: GraphModule, ops: Collection[str], observers: Mapping[str, Any]
) -> dict[str, dict[str, QParams]]:
    """Op → reader of its output → how the reader rounds what comes in fp32, where the op would round it otherwise.

    A sigmoid for example has a fixed scale, meant for its output, which torch takes for its input as well.
    """
    qconfigs = _qconfigs_by_node(prepared)
    found: dict[str, dict[str, QParams]] = {}
    for node in prepared.graph.nodes:
        if node.op != "call_module" or node.target not in observers or node.args[0].target not in ops:
            continue
        for reader in node.users:
            qconfig = None if reader.target in ops else qconfigs.get(reader.name)
            own = None if qconfig is None else qconfig.activation()
            if isinstance(own, HistogramObserver):  # what it would see is what the op's observer saw
                seen = observers[node.target]
                own.histogram, own.min_val, own.max_val = seen.histogram, seen.min_val, seen.max_val
            if isinstance(own, HistogramObserver | FixedQParamsObserver):
                scale, zero_point = own.calculate_qparams()
                found.setdefault(node.args[0].target, {})[reader.name] = QParams(float(scale), int(zero_point))
    return found


def _without_observers(prepared: GraphModule, observers: Collection[str]) -> GraphModule:
    """Return the fused, unquantized graph; conversion changes ``prepared``, and leaves this one as it is."""
    graph = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    for node in prepared.graph.nodes:
        if node.op == "call_module" and node.target in observers:
            copies[node] = copies[node.args[0]]
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    result = GraphModule(prepared, graph)
    for name, module in list(result.named_modules()):
        if isinstance(module, _FusedModule):
            result.set_submodule(name, nn.Sequential(*module))  # conversion puts its own layer into the fused module
    return result
