"""A model with torch's own int8 kernels, prepared, calibrated and packed once, where each op can be switched.

`torch.ao.quantization.quantize_fx` decides what it quantizes node by node, from the node's own configuration: leaving
one op in fp32 changes nothing but the edges around that op. And a scale is that of the tensor it was observed on, in
the unquantized model. So the graph with one op in fp32 is the fully quantized one, in which this op runs its float
module and the values are rounded, or not, on its edges. Nothing has to be copied, prepared or packed again for it.
"""

from __future__ import annotations

import inspect
import re
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import Embedding as QuantizedEmbedding
from torch.ao.quantization import QConfig, QConfigMapping, float_qparams_weight_only_qconfig
from torch.ao.quantization.fx.tracer import QuantizationTracer
from torch.ao.quantization.fx.utils import assert_and_get_unique_device
from torch.ao.quantization.observer import (
    HistogramObserver,
    ObserverBase,
    PerChannelMinMaxObserver,
    default_per_channel_weight_observer,
)
from torch.ao.quantization.qconfig_mapping import get_default_qconfig_mapping
from torch.ao.quantization.quantization_mappings import get_default_qconfig_propagation_list
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.fx import GraphModule, Interpreter, Node, symbolic_trace
from torch.fx.node import map_arg

from pytest_qsens.noise import perturbed
from pytest_qsens.quant.calibration import QParams

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

LEFT_ALONE = (nn.LayerNorm, nn.InstanceNorm3d, nn.Dropout)
"""What Intel Neural Compressor keeps in fp32 although torch has kernels (its pytorch_cpu.yaml says: accuracy)."""


class _Leaf(nn.Module):
    """Makes a graph of a module that is traced as a leaf, such as a single linear."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = self.module(x)
        return value


class _Rounded:
    """A value on an edge that is quantized, for those who need it rounded, and those who need it as it was."""

    def __init__(self, real: Tensor, scale: float, zero_point: int, dtype: torch.dtype = torch.quint8) -> None:
        self.real = real
        self._scale, self._zero_point, self._dtype = scale, zero_point, dtype
        self._integers: Tensor | None = None

    @property
    def integers(self) -> Tensor:
        if self._integers is None:
            self._integers = torch.quantize_per_tensor(self.real, self._scale, self._zero_point, self._dtype)
        return self._integers


def _integers(value: object) -> object:
    return value.integers if isinstance(value, _Rounded) else value


def _real(value: object) -> object:
    if isinstance(value, _Rounded):
        return value.real
    return value.dequantize() if isinstance(value, Tensor) and value.is_quantized else value


class _Int8Run(Interpreter):
    """Runs a fully quantized graph with some of the ops in fp32."""

    def __init__(self, graph: GraphModule, twins: Mapping[str, nn.Module]) -> None:
        super().__init__(graph)
        self._twins = twins
        self.in_fp32: Collection[str] = ()
        self.seed: int | None = None

    def run_node(self, n: Node) -> Any:  # noqa: ANN401 - whatever a node gives
        """Give values that are to be rounded as `_Rounded`; everything but an op in fp32 gets them rounded."""
        if n.op == "call_module" and n.target in self._twins:
            return self._run_op(n, str(n.target))
        if n.op == "call_function" and n.target is torch.quantize_per_tensor:
            x, scale, zero_point, dtype = map_arg(n.args, self.env.__getitem__)
            return _Rounded(x, scale, zero_point, dtype)
        if n.op == "call_method" and n.target == "dequantize":
            value = _real(self.env[n.args[0]])  # type: ignore[index] # a node
            packed = n.args[0].target in self._twins and not isinstance(self.env[n.args[0]], _Rounded)
            return self._moved(value) if packed else value
        return super().run_node(n)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401 - as torch has it
        """Give the float weight where the graph looks at an op's, as that of Qwen2.5-VL's patch embedding does."""
        owner, _, name = target.rpartition(".")
        twin = self._twins.get(owner)
        if twin is None:
            return super().get_attr(target, args, kwargs)
        return getattr(twin[0] if isinstance(twin, nn.Sequential) else twin, name)

    def _run_op(self, n: Node, target: str) -> object:
        packed: Any = self.submodules[target]
        weight_only = isinstance(packed, QuantizedEmbedding)
        if target not in self.in_fp32:
            output = super().run_node(n)
            return self._moved(output) if weight_only else output
        output = self._moved(self._twins[target](*map_arg(n.args, lambda a: _real(self.env[a]))))
        return output if weight_only else _Rounded(output, packed.scale, packed.zero_point)

    def _moved(self, value: Any) -> Any:  # noqa: ANN401 - a tensor
        return value if self.seed is None else perturbed(value, self.seed)

    def fetch_args_kwargs_from_env(self, n: Node) -> tuple[Any, Any]:
        """Round what is to be rounded."""
        return map_arg((n.args, n.kwargs), lambda a: _integers(self.env[a]))


class _FloatRun(Interpreter):
    """Runs an unquantized graph with some of the ops quantized, from fp32 to fp32."""

    def __init__(
        self, graph: GraphModule, packed: Mapping[str, nn.Module], inputs: Mapping[str, QParams]
    ) -> None:
        super().__init__(graph)
        self._packed = packed
        self._inputs = inputs
        self.quantized: Collection[str] = ()

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401 - as torch has it
        """Quantize the input of an op, call its kernel, and give its output in fp32."""
        if target not in self.quantized:
            return super().call_module(target, args, kwargs)
        if target in self._inputs:
            qparams = self._inputs[target]
            args = (torch.quantize_per_tensor(args[0], qparams.scale, qparams.zero_point, torch.quint8), *args[1:])
        return _real(self._packed[target](*args, **kwargs))


class _Part(nn.Module):
    """A module that FX can trace: it observes, and once it is packed, takes the original's place in the model.

    Attributes:
        ops: Name in the part's graph → name of the op.
        inputs: Name in the part's graph → scale and zero point of the op's input.
        packed: Name in the part's graph → the op's kernel with its packed weight.

    """

    def __init__(self, original: nn.Module, ops: Mapping[str, str], qconfigs: QConfigMapping) -> None:
        super().__init__()
        self.__dict__["_original"] = original  # not a submodule of this one
        self.ops = dict(ops)
        self.inputs: dict[str, QParams] = {}
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
            return getattr(original.module if isinstance(original, _Leaf) else original, name)

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
        unquantized = _without_observers(self.prepared, observers)
        int8 = convert_fx(self.prepared)
        del self.prepared
        twins = {target: unquantized.get_submodule(target) for target in self.ops}
        self.packed = {target: int8.get_submodule(target) for target in self.ops}
        self._int8 = _Int8Run(int8, twins)
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
        if isinstance(module, torch.ao.nn.intrinsic._FusedModule):  # noqa: SLF001 - the base of what FX fuses
            result.set_submodule(name, nn.Sequential(*module))  # conversion puts its own layer into the fused module
    return result


class KernelModel:
    """A model whose traceable parts run torch's int8 kernels while it is `installed`.

    Args:
        model: Module in fp32 and evaluation mode. It is not copied.
        ops: Names of the ops to quantize: linears, convolutions and embeddings that the calibration data reaches.
        calibrate: Runs the calibration batches through the module that it is given.

    Attributes:
        refused: Op → why torch cannot quantize it.

    """

    def __init__(self, model: nn.Module, ops: Collection[str], calibrate: Callable[[nn.Module], object]) -> None:
        self._model = model
        self._parts: dict[str, _Part] = {}
        self.refused: dict[str, str] = {}
        with _quiet(), _no_traces(model):
            for name, original in _traceable(model):
                self._add(name, original, ops)
            with self.installed():
                calibrate(self.root)
            for part in self._parts.values():
                part.pack()
        found = {op for part in self._parts.values() for op in part.ops.values()}
        for op in set(ops) - found:
            self.refused.setdefault(op, "torch's FX quantization finds no module to trace around it")

    @property
    def root(self) -> nn.Module:
        """What to call in place of the model."""
        return self._parts.get("", self._model)

    @property
    def input_qparams(self) -> dict[str, QParams]:
        """Scale and zero point of each op's input; none of embeddings."""
        return {part.ops[target]: qparams for part in self._parts.values() for target, qparams in part.inputs.items()}

    @property
    def output_qparams(self) -> dict[str, QParams]:
        """Scale and zero point of each op's output; none of embeddings."""
        return {
            part.ops[target]: QParams(float(packed.scale), int(packed.zero_point))
            for part in self._parts.values()
            for target, packed in part.packed.items()
            if not isinstance(packed, QuantizedEmbedding)
        }

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Put the parts in their places in the model, and the model's own modules back at the end."""
        places = [(*_parent(self._model, name), part) for name, part in self._parts.items() if name]
        own = [getattr(parent, attribute) for parent, attribute, _ in places]
        try:
            for parent, attribute, part in places:
                setattr(parent, attribute, part)
            with _quiet():
                yield
        finally:
            for (parent, attribute, _), module in zip(places, own, strict=True):
                setattr(parent, attribute, module)

    def switch(self, quantized: Collection[str], *, others: bool, seed: int | None = None) -> None:
        """Choose the ops that are quantized from now on.

        Args:
            quantized: Their names.
            others: Whether what torch quantizes beside the ops is quantized too: additions and poolings, in models
                that can be traced as a whole.
            seed: Moves the outputs of all ops in their last digits (`pytest_qsens.noise`), where they are fp32.

        """
        for part in self._parts.values():
            part.switch(quantized, others=others, seed=seed)

    def _add(self, name: str, original: nn.Module, ops: Collection[str]) -> None:
        names = {"module": name} if isinstance(original, _Leaf) else {
            target: f"{name}.{target}" if name else target for target, _ in original.named_modules()
        }
        chosen = {target: op for target, op in names.items() if op in ops}
        if not chosen:
            return
        part = _Part(original, chosen, _qconfigs(original, chosen, whole=not name))
        called = [node.target for node in part.prepared.graph.nodes if node.op == "call_module"]
        for target, op in chosen.items():
            if called.count(target) != 1:
                self.refused[op] = f"torch's FX quantization has one scale for it, and sees {called.count(target)} calls"
                del part.ops[target]
        self._parts[name] = part


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, attribute = name.rpartition(".")
    return model.get_submodule(parent), attribute


def _traceable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of what is quantized as one graph: the model, or else its largest traceable modules.

    The rules are those of Intel Neural Compressor (`PyTorch_FXAdaptor.fuse_fx_model`), since what is in one graph
    decides what is fused and what is quantized beside the ops.
    """
    try:
        QuantizationTracer([], []).trace(model)
    except Exception:  # noqa: BLE001 - whatever the model raises when it meets proxies
        yield from _traceable_inside(model, "")
    else:
        yield "", model


def _traceable_inside(model: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    leaves = get_default_qconfig_propagation_list() - {nn.Sequential}
    for child, module in model.named_children():
        name = f"{prefix}.{child}" if prefix else child
        if type(module) in leaves:
            yield name, _Leaf(module)
        elif _looks_for_none(module) or not _can_be_traced(module):
            yield from _traceable_inside(module, name)
        else:
            yield name, module


def _looks_for_none(module: nn.Module) -> bool:
    """Whether the forward asks if something is None: a proxy never is, so the trace could be wrong."""
    try:
        return re.search(r"is( not)? None", inspect.getsource(module.forward)) is not None
    except (OSError, TypeError):
        return False


def _can_be_traced(module: nn.Module) -> bool:
    try:
        symbolic_trace(module)
    except Exception:  # noqa: BLE001 - whatever the module raises when it meets proxies
        return False
    return True


def _qconfigs(original: nn.Module, ops: Collection[str], *, whole: bool) -> QConfigMapping:
    """Return what is quantized and how: in a whole model, all that torch has kernels for; in a part, its ops."""
    # without VNNI instructions the kernels add pairs of products in 16 bits, which must not overflow
    histogram = HistogramObserver.with_args(reduce_range=not torch.cpu._is_vnni_supported())  # noqa: SLF001 - no public name
    symmetric = PerChannelMinMaxObserver.with_args(qscheme=torch.per_channel_symmetric, dtype=torch.qint8)
    mapping = QConfigMapping().set_global(None)
    if whole:
        mapping.set_global(QConfig(histogram, default_per_channel_weight_observer))
        for kind, qconfig in get_default_qconfig_mapping().object_type_qconfigs.items():
            mapping.set_object_type(kind, qconfig)
    for name, module in original.named_modules():
        if name in ops:
            embedding = isinstance(module, nn.Embedding)
            mapping.set_module_name(name, float_qparams_weight_only_qconfig if embedding else QConfig(histogram, symmetric))
        elif whole and isinstance(module, LEFT_ALONE):
            mapping.set_module_name(name, None)
    return mapping


@contextmanager
def _no_traces(model: nn.Module) -> Iterator[None]:
    """Take away what torch.ao leaves on the model's own modules."""
    found = [(module, set(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in found:
            for attribute in set(vars(module)) - attributes:
                delattr(module, attribute)
        # a cache without bound, which keeps every prepared and converted graph alive
        assert_and_get_unique_device.cache_clear()


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # torch.ao.quantization announces its removal in torch 2.10, and is still there in 2.13
        warnings.filterwarnings("ignore", message=r"torch\.ao\.quantization is deprecated", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=r"torch\.quantize_per_tensor.* are deprecated", category=UserWarning)
        yield
