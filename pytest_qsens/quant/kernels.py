"""A model with torch's own int8 kernels, prepared, calibrated and packed once, where each op can be switched."""

from __future__ import annotations

import inspect
import re
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.ao.quantization import QConfig, QConfigMapping, float_qparams_weight_only_qconfig
from torch.ao.quantization.fx.tracer import QuantizationTracer
from torch.ao.quantization.fx.utils import assert_and_get_unique_device
from torch.ao.quantization.observer import (
    HistogramObserver,
    MinMaxObserver,
    PerChannelMinMaxObserver,
    default_per_channel_weight_observer,
)
from torch.ao.quantization.qconfig_mapping import get_default_qconfig_mapping
from torch.ao.quantization.quantization_mappings import get_default_qconfig_propagation_list
from torch.fx import symbolic_trace

from pytest_qsens.quant.switchable import Leaf, Part

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from pytest_qsens.quant.observers import QParams

LEFT_ALONE = (nn.LayerNorm, nn.InstanceNorm3d, nn.Dropout)
"""What Intel Neural Compressor keeps in fp32 although torch has kernels (its pytorch_cpu.yaml says: accuracy)."""

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Convolutions that are no ops, and whose weights it quantizes per tensor."""


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
        self._parts: dict[str, Part] = {}
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
            self.refused.setdefault(op, "torch's FX quantization has no kernel for it, or cannot trace around it")

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
        return {part.ops[target]: qparams for part in self._parts.values() for target, qparams in part.outputs.items()}

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
        names = (
            {"module": name}
            if isinstance(original, Leaf)
            else {target: f"{name}.{target}" if name else target for target, _ in original.named_modules()}
        )
        leaves = get_default_qconfig_propagation_list()
        chosen = {
            target: op
            for target, op in names.items()
            if op in ops and type(original.get_submodule(target)) in leaves  # it goes by the class itself
        }
        if not chosen:
            return
        part = Part(original, chosen, _qconfigs(original, chosen, whole=not name))
        called = [node.target for node in part.prepared.graph.nodes if node.op == "call_module"]
        for target, op in chosen.items():
            calls = called.count(target)
            if not calls:
                self.refused[op] = "torch's tracer does not see it: it is inside of a module that is traced as one call"
            elif calls > 1:
                self.refused[op] = (
                    f"torch's FX quantization has one scale for it, and sees {calls} calls; where other ops are "
                    "measured, it is quantized with the rest"
                )
            if calls != 1:
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
            yield name, Leaf(module)
        elif _looks_for_none(module) or not _can_be_traced(module):
            yield from _traceable_inside(module, name)
        else:
            yield name, module


def dropped_hooks(model: nn.Module) -> list[str]:
    """Names of modules whose forward hooks would not run in a `KernelModel`, nor where torch.ao converts the model.

    Conversion puts kernels in the place of modules, and graphs in the place of what it traces. Hooks on modules that it
    traces through are part of the graph, and those on modules that it leaves as they are run.
    """
    hooked = {name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks}  # noqa: SLF001 - no public name
    if not hooked:
        return []
    tracer = QuantizationTracer([], [])
    kernels = get_default_qconfig_propagation_list()
    replaced: set[str] = set()
    for prefix, part in _traceable(model):
        replaced.add(prefix)
        for target, module in () if isinstance(part, Leaf) else part.named_modules():
            leaf = tracer.is_leaf_module(module, target) and not isinstance(module, LEFT_ALONE)
            # a part of a model has kernels for its ops alone
            if leaf and (not prefix or type(module) in kernels):
                replaced.add(f"{prefix}.{target}" if prefix else target)
    return sorted(hooked & replaced)


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
    per_tensor = MinMaxObserver.with_args(qscheme=torch.per_tensor_symmetric, dtype=torch.qint8)
    mapping = QConfigMapping().set_global(None)
    if whole:
        mapping.set_global(_qconfig(histogram, default_per_channel_weight_observer))
        for kind, qconfig in get_default_qconfig_mapping().object_type_qconfigs.items():
            mapping.set_object_type(kind, qconfig)
    for name, module in original.named_modules():
        if name in ops:
            embedding = isinstance(module, nn.Embedding)
            mapping.set_module_name(
                name, float_qparams_weight_only_qconfig if embedding else _qconfig(histogram, symmetric)
            )
        elif whole and isinstance(module, LEFT_ALONE):
            mapping.set_module_name(name, None)
        elif whole and isinstance(module, TRANSPOSED):
            mapping.set_module_name(name, _qconfig(histogram, per_tensor))
    return mapping


def _qconfig(activation: Any, weight: Any) -> QConfig:  # noqa: ANN401 - what makes observers
    return QConfig(activation=activation, weight=weight)  # type: ignore[no-untyped-call] # torch leaves it untyped


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
        # torch's default configuration, of itself
        warnings.filterwarnings("ignore", message="Please use quant_min and quant_max", category=UserWarning)
        yield
