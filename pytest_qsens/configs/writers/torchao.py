"""torchao: ``FqnToConfig``, each op by its name.

There is no ``_default``: torchao 0.18 warns that it will go. What is not named is not quantized.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.configs.torchao_schemes import sizes_in_the_way
from pytest_qsens.configs.writers.assigned import Inexpressible
from pytest_qsens.configs.writers.dump import Row
from pytest_qsens.quant.op_scheme import INTEGERS, ActivationScheme, OpScheme, WeightScheme
from pytest_qsens.quant.scaling_modes import SCALING_MODES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_qsens.configs.writers.assigned import Assigned

_INTEGERS = INTEGERS[:8]
_DTYPES = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
_MX = {"mxfp8": "float8_e4m3fn", "mxfp4": "float4_e2m1fn_x2"}
_NVFP4 = WeightScheme("nvfp4", "group", (16,))
_NVFP4_BOTH = (_NVFP4, ActivationScheme("nvfp4", "dynamic", "group", (16,)))
_FLOAT8_INT4 = (WeightScheme("int4", "group", (128,)), ActivationScheme("fp8_e4m3", "dynamic", "token"))
_FLOAT8_PAIRS = (
    ("tensor", (), "tensor", ()),
    ("token", (), "channel", ()),
    ("group", (128,), "block", (128, 128)),
)
"""Activations and weights whose scales torchao's float8 kernels take together."""


def write(assigned: Sequence[Assigned]) -> dict[str, object]:
    """Give each op its config, ``null`` if it is not quantized.

    Raises:
        Inexpressible: If torchao has no config for a scheme, or not for this type of op.

    """
    entries = {one.op.name: None if one.scheme is None else Row(_config(one, one.scheme)) for one in assigned}
    return {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": entries}}


def _config(one: Assigned, scheme: OpScheme) -> dict[str, object]:
    weight, activation = scheme.weight, scheme.activation
    if one.op.type.startswith("conv"):
        raise Inexpressible(one, "convolutions of torchao are not those of every size")
    if scheme.output:
        raise Inexpressible(one, "outputs are requantized, which no config of torchao does")
    if weight is None:
        raise Inexpressible(one, "weights are not quantized, which they are in every config of torchao")
    if weight.size == (1,):
        raise Inexpressible(one, "torchao fails on groups of 1")
    why = sizes_in_the_way(scheme, one.op)
    if why is not None:
        raise Inexpressible(one, why)
    found = _weight_only(weight) if activation is None else _both(one, weight, activation)
    if found is None:
        raise Inexpressible(one, "none of its configs rounds to these dtypes with scales of these extents")
    return found


def _weight_only(weight: WeightScheme) -> dict[str, object] | None:
    if weight.dtype == "int8" and weight.symmetric and weight.granularity in ("channel", "tensor", "group"):
        return _named("Int8WeightOnlyConfig", 2, granularity=_granularity(weight))
    if weight.dtype in _INTEGERS and weight.granularity in ("channel", "group"):
        return _named(
            "IntxWeightOnlyConfig",
            2,
            weight_dtype=_dtype(weight.dtype),
            granularity=_granularity(weight, "PerAxis"),
            mapping_type=_mapping(symmetric=weight.symmetric),
        )
    if weight.dtype in _DTYPES and weight.symmetric and weight.granularity in ("channel", "tensor", "group"):
        return _named(
            "Float8WeightOnlyConfig", 2, weight_dtype=_dtype(_DTYPES[weight.dtype]), granularity=_granularity(weight)
        )
    return _named("NVFP4WeightOnlyConfig", 1) if weight == _NVFP4 else None


def _both(one: Assigned, weight: WeightScheme, activation: ActivationScheme) -> dict[str, object] | None:
    if activation.kind == "static":
        raise Inexpressible(one, "its configs hold the scales of static activations themselves, and none are known")
    if activation.kind == "local":
        raise Inexpressible(one, "activations have scales of two kinds, static and dynamic")
    if activation.dtype == "int8":
        return _int8(weight, activation) if activation.granularity in ("token", "tensor") else None
    return _floats(one, weight, activation) if weight.symmetric and activation.symmetric else None


def _floats(one: Assigned, weight: WeightScheme, activation: ActivationScheme) -> dict[str, object] | None:
    extent = (activation.granularity, activation.size, weight.granularity, weight.size)
    if activation.dtype in _DTYPES and weight.dtype in _DTYPES and extent in _FLOAT8_PAIRS:
        return _named(
            "Float8DynamicActivationFloat8WeightConfig",
            2,
            activation_dtype=_dtype(_DTYPES[activation.dtype]),
            weight_dtype=_dtype(_DTYPES[weight.dtype]),
            granularity=[_granularity(activation), _granularity(weight)],
        )
    if (weight, activation) == _FLOAT8_INT4:
        raise Inexpressible(one, "its config for these lets MSLK quantize weights, with scales of largest / 8, not 7.5")
    mode = weight.scaling_mode
    if (weight.dtype, mode) == (activation.dtype, activation.scaling_mode) and weight.dtype in _MX:
        if extent != ("group", (32,), "group", (32,)):
            return None
        return _named(
            "MXDynamicActivationMXWeightConfig",
            1,
            block_size=32,
            activation_dtype=_dtype(_MX[activation.dtype]),
            weight_dtype=_dtype(_MX[weight.dtype]),
            # torchao's own is RCEIL
            scaling_mode={"_type": "ScaleCalculationMode", "_data": (mode or SCALING_MODES[0]).upper()},
        )
    return _named("NVFP4DynamicActivationNVFP4WeightConfig", 1) if (weight, activation) == _NVFP4_BOTH else None


def _int8(weight: WeightScheme, activation: ActivationScheme) -> dict[str, object] | None:
    mapping = _mapping(symmetric=activation.symmetric)
    if weight.dtype == "int8" and weight.symmetric and weight.granularity in ("channel", "tensor"):
        return _named(
            "Int8DynamicActivationInt8WeightConfig",
            2,
            granularity=[_granularity(activation), _granularity(weight)],
            act_mapping_type=mapping,
        )
    # torchao takes symmetric activations here, and fails once it quantizes
    if (
        weight.dtype in _INTEGERS
        and weight.granularity in ("channel", "group")
        and (activation.granularity, activation.symmetric) == ("token", False)
    ):
        return _named(
            "Int8DynamicActivationIntxWeightConfig",
            2,
            weight_dtype=_dtype(weight.dtype),
            weight_granularity=_granularity(weight, "PerAxis"),
            weight_mapping_type=_mapping(symmetric=weight.symmetric),
            act_mapping_type=mapping,
        )
    return None


def _granularity(part: WeightScheme | ActivationScheme, of_channel: str = "PerRow") -> dict[str, object]:
    if part.granularity == "group" and isinstance(part, WeightScheme):
        return _named("PerGroup", 1, group_size=part.size[0])
    if part.granularity in ("group", "block"):
        return _named("PerBlock", 1, block_size=[*part.size] if len(part.size) == 2 else [1, part.size[0]])
    if part.granularity == "tensor":
        return _named("PerTensor", 1)
    return _named(of_channel, 1, **({"axis": 0} if of_channel == "PerAxis" else {"dim": -1}))


def _mapping(*, symmetric: bool) -> dict[str, object]:
    return {"_type": "MappingType", "_data": "SYMMETRIC" if symmetric else "ASYMMETRIC"}


def _dtype(name: str) -> dict[str, object]:
    return {"_type": "torch.dtype", "_data": name}


def _named(name: str, version: int, **fields: object) -> dict[str, object]:
    return {"_type": name, "_version": version, "_data": fields}
