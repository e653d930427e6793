"""Configs of torchao 0.18 for a layer each: what they round, and what of it is not simulated."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, cast

from pytest_qsens.configs.documents import as_text
from pytest_qsens.configs.fields import ConfigFields
from pytest_qsens.errors import QsensError
from pytest_qsens.quant.op_scheme import ActivationScheme, OpScheme, Unknown, WeightScheme
from pytest_qsens.quant.scaling_modes import SCALING_MODES

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_qsens.configs.rules import Problem
    from pytest_qsens.ops import Op
    from pytest_qsens.quant.op_scheme import Granularity

_TILE = 16
"""What sizes of weights have to be multiples of, for float8 and NVFP4 kernels."""


def depends_on_sizes(scheme: OpScheme) -> bool:
    """Whether torchao quantizes weights of some sizes alone."""
    weight = scheme.weight
    return weight is not None and (
        weight.dtype == "nvfp4" or (weight.dtype.startswith("fp8") and scheme.activation is not None)
    )


def sizes_in_the_way(scheme: OpScheme, op: Op) -> str | None:
    """Why torchao does not quantize a weight of these sizes; ``None`` if it does, or they are not known."""
    weight = scheme.weight
    if op.features is None or op.elements is None or weight is None or not depends_on_sizes(scheme):
        return None
    sizes = (op.elements // op.features, op.features)
    whole = all(size % _TILE == 0 for size in sizes)
    found = f"sizes are no multiples of {_TILE}, as those of {sizes[0]} x {sizes[1]} are not"
    if weight.dtype == "nvfp4":
        return None if whole else f"torchao refuses NVFP4 for weights whose {found}"
    if weight.granularity == "block" and any(size % part for size, part in zip(sizes, weight.size, strict=True)):
        blocks = f"{weight.size[0]} x {weight.size[1]}"
        return f"torchao refuses blocks of {blocks} for weights of {sizes[0]} x {sizes[1]}, which they do not divide"
    if weight.granularity == "tensor" and sizes == (128, 128):
        return "torchao takes the scale of a weight of 128 x 128 for that of a block, and fails once it runs"
    return None if whole else f"torchao leaves weights unquantized, without a word, whose {found}"


UNKNOWN_SIZES = (
    "result files do not tell the sizes of weights, and torchao leaves some sizes unquantized, or refuses them, under "
    "float8 and NVFP4. `qsens config FILE --model MODEL` with what was written names such ops"
)
"""What is told where a file is written for torchao, and ops come from a result."""


def opened(value: object, where: str, problems: list[Problem]) -> tuple[str, ConfigFields]:
    """Take the name and the fields of one object of ``config_to_dict``."""
    fields = ConfigFields(value, where, problems)
    name = fields.text("_type")
    fields.skip("_version")
    data = fields.inner("_data")
    if data is None:
        raise QsensError(f"{fields.at('_data')}: an object is needed, found nothing")
    fields.finish()
    return name, data


def scheme_of(name: str, data: ConfigFields) -> OpScheme | Unknown | None:
    """Read one config of torchao by its name; what changes numbers beside rounding becomes a problem.

    Raises:
        QsensError: If a value is of a wrong type, or torchao would not take it.

    """
    reader = _READERS.get(name)
    if reader is None:
        return Unknown(name, f"{name} is no config of torchao that is known here")
    data.skip("set_inductor_config", "intx_packing_format", "mm_config", "kernel_preference", "use_triton_kernel")
    data.skip("alg_id", "int4_tile_packed_ntile", "version")
    scheme = reader(data)
    data.changes_numbers("reduce_range", "activations and weights use 7 of 8 bits", False)
    data.finish()
    return scheme


def _tagged(fields: ConfigFields, key: str, default: str) -> str:
    """Name in an enum or dtype that was written as ``{"_type": ..., "_data": name}``."""
    value = fields.take(key)
    if value is None:
        return default
    inner = ConfigFields(value, fields.at(key), fields.problems)
    inner.text("_type")
    return inner.text("_data")


def _choice(fields: ConfigFields, key: str, default: str) -> str:
    """Name in an enum whose members are texts, which torchao takes as a text, too; in small letters."""
    is_text = isinstance(fields.peek(key), str)
    return (fields.text(key) if is_text else _tagged(fields, key, default)).lower()


def _granularity(value: object, where: str, problems: list[Problem]) -> tuple[Granularity, tuple[int, ...]]:
    """Read a granularity of weights: rows of them are output channels."""
    name, data = opened(value, where, problems)
    size: tuple[int, ...] = ()
    if name in ("PerRow", "PerAxis"):
        for key, usual in (("dim", -1), ("axis", 0)):
            number = data.integer(key)
            if number is not None and number != usual:
                raise QsensError(f"{data.at(key)}: {number} is not {usual}, the only one that torchao takes there.")
    elif name == "PerGroup":
        group = data.integer("group_size")
        if group is None or group < 1:
            raise QsensError(f"{data.at('group_size')}: a whole number from 1 on is needed, found {as_text(group)}")
        size = (group,)
    elif name == "PerBlock":
        block = data.take("block_size")
        if type(block) is not list or len(block) != 2 or any(type(n) is not int or not 0 < n < 10**9 for n in block):
            raise QsensError(f"{data.at('block_size')}: two sizes are needed, found {as_text(block)}")
        size = tuple(block)
        if block[0] == 1:
            name, size = "PerGroup", (block[1],)
    elif name not in ("PerTensor", "PerToken"):
        raise QsensError(f"{where}: {name!r} is no granularity of torchao.")
    data.finish()
    return cast("Granularity", _GRANULARITIES[name]), size


_GRANULARITIES = {
    "PerRow": "channel",
    "PerAxis": "channel",
    "PerToken": "token",
    "PerTensor": "tensor",
    "PerGroup": "group",
    "PerBlock": "block",
}


def _both(fields: ConfigFields, default: Granularity) -> list[tuple[Granularity, tuple[int, ...]]]:
    """Granularity of activations and of weights, which may be one for both."""
    value, where = fields.take("granularity"), fields.at("granularity")
    if value is None:
        found: list[tuple[Granularity, tuple[int, ...]]] = [(default, ()), (default, ())]
    elif isinstance(value, list):
        if len(value) != 2:
            raise QsensError(f"{where}: two are needed, of activations and of weights, found {len(value)}")
        found = [_granularity(entry, where, fields.problems) for entry in value]
    else:
        found = [_granularity(value, where, fields.problems)] * 2
    activation, size = found[0]
    return [("token" if activation == "channel" else activation, size), found[1]]


def _weight_dtype(fields: ConfigFields, default: str) -> str:
    return _dtype(_tagged(fields, "weight_dtype", default), fields.at("weight_dtype"))


_DTYPES = {
    **{f"int{bits}": f"int{bits}" for bits in range(1, 9)},
    "float8_e4m3fn": "fp8_e4m3",
    "float8_e5m2": "fp8_e5m2",
    "float4_e2m1fn_x2": "fp4_e2m1",
}


def _dtype(name: str, where: str) -> str:
    if name not in _DTYPES:
        raise QsensError(f"{where}: {name!r} is no dtype that is known here. Known: {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def _symmetric(fields: ConfigFields, key: str, default: str) -> bool:
    name = _tagged(fields, key, default)
    if name not in ("SYMMETRIC", "ASYMMETRIC", "SYMMETRIC_NO_CLIPPING_ERR"):
        raise QsensError(f"{fields.at(key)}: {name!r} is no mapping type of torchao.")
    if name == "SYMMETRIC_NO_CLIPPING_ERR":
        fields.problem(
            key, f"{name} changes numbers and is not simulated: scales are larger so that nothing is clipped"
        )
    return name != "ASYMMETRIC"


def _algorithm(fields: ConfigFields, key: str, *usual: str) -> None:
    name = _choice(fields, key, "")
    if name and name not in usual:
        fields.problem(key, f"{name} changes numbers and is not simulated: scales are found in another way")


def _int8_weight_only(fields: ConfigFields) -> OpScheme:
    fields.skip("group_size")  # of version 1, which torchao 0.18 refuses
    return OpScheme(WeightScheme("int8", *_of_weight(fields, "granularity", "channel")))


def _of_weight(fields: ConfigFields, key: str, default: Granularity, *size: int) -> tuple[Granularity, tuple[int, ...]]:
    value = fields.take(key)
    return (default, size) if value is None else _granularity(value, fields.at(key), fields.problems)


def _int4_weight_only(fields: ConfigFields) -> OpScheme:
    packing = _choice(fields, "int4_packing_format", "plain")
    group = fields.integer("group_size")
    group = 128 if group is None else group
    if group < 1:
        raise QsensError(f"{fields.at('group_size')}: {group} is not possible, at least 1 is needed.")
    _algorithm(fields, "int4_choose_qparams_algorithm", "tinygemm")
    if packing not in ("plain", "preshuffled", "tile_packed_to_4d", "plain_int32"):
        raise QsensError(f"{fields.at('int4_packing_format')}: {packing!r} is no packing format of torchao.")
    if packing != "plain_int32":  # which other accelerators have, with zero points as those here
        fields.problem(
            "int4_packing_format",
            f"{packing} changes numbers and is not simulated: zero points are no integers, and ranges need not hold 0. "
            "Integer ones are taken, whose error is within 10 % of it where weights are normally distributed",
        )
    return OpScheme(WeightScheme("int4", "group", (group,), symmetric=False))


def _intx_weight_only(fields: ConfigFields) -> OpScheme:
    return _intx(fields, "weight_dtype", "granularity", "mapping_type", "scale_dtype", "channel")


def _intx(
    fields: ConfigFields, dtype: str, granularity: str, mapping: str, scale: str, default: Granularity, *size: int
) -> OpScheme:
    bits = _dtype(_tagged(fields, dtype, "int8"), fields.at(dtype))
    extent = _of_weight(fields, granularity, default, *size)
    symmetric = _symmetric(fields, mapping, "SYMMETRIC")
    if fields.peek(scale) is not None:
        fields.problem(scale, f"{_tagged(fields, scale, '')} changes numbers and is not simulated: scales are rounded")
    fields.skip(scale)
    _algorithm(fields, "intx_choose_qparams_algorithm", "affine")
    return OpScheme(WeightScheme(bits, *extent, symmetric=symmetric))


def _int8_dynamic_intx(fields: ConfigFields) -> OpScheme:
    symmetric = _symmetric(fields, "act_mapping_type", "ASYMMETRIC")
    if symmetric:
        fields.problem("act_mapping_type", "torchao fails on it once it quantizes. Write ASYMMETRIC")
    scheme = _intx(
        fields, "weight_dtype", "weight_granularity", "weight_mapping_type", "weight_scale_dtype", "group", 32
    )
    return replace(scheme, activation=ActivationScheme("int8", "dynamic", "token", symmetric=symmetric))


def _int8_int8(kind: Literal["static", "dynamic"]) -> Callable[[ConfigFields], OpScheme]:
    def read(fields: ConfigFields) -> OpScheme:
        activation, weight = _both(fields, "channel")
        symmetric = _symmetric(fields, "act_mapping_type", "SYMMETRIC")
        fields.skip("step")
        fields.changes_numbers("weight_only_decode", "activations of one token are not quantized", False)
        fields.changes_numbers("act_quant_scale", "the scale of activations is given, not calibrated")
        fields.changes_numbers("act_quant_zero_point", "the zero point of activations is given, not calibrated")
        return OpScheme(WeightScheme("int8", *weight), ActivationScheme("int8", kind, *activation, symmetric=symmetric))

    return read


def _float8_weight_only(fields: ConfigFields) -> OpScheme:
    return OpScheme(WeightScheme(_weight_dtype(fields, "float8_e4m3fn"), *_of_weight(fields, "granularity", "channel")))


def _float8_float8(fields: ConfigFields) -> OpScheme:
    packing = _choice(fields, "packing_format", "plain")
    if packing != "plain":
        fields.problem("packing_format", f"{packing} changes numbers and is not simulated: 2 of 4 weights are kept")
    activation, weight = _both(fields, "tensor")
    dtype = _dtype(_tagged(fields, "activation_dtype", "float8_e4m3fn"), fields.at("activation_dtype"))
    for key in ("activation_value_lb", "activation_value_ub"):
        fields.changes_numbers(key, "the values that scales are made of are limited")
    return OpScheme(
        WeightScheme(_weight_dtype(fields, "float8_e4m3fn"), *weight), ActivationScheme(dtype, "dynamic", *activation)
    )


def _float8_int4(fields: ConfigFields) -> OpScheme:
    packing = _choice(fields, "int4_packing_format", "preshuffled")
    told = "weights are quantized by MSLK, with scales of largest / 8"
    told += ", which are rounded to E4M3" * (packing == "preshuffled")
    fields.problem("int4_packing_format", f"{packing} changes numbers and is not simulated: {told}")
    return OpScheme(WeightScheme("int4", "group", (128,)), ActivationScheme("fp8_e4m3", "dynamic", "token"))


_MX = {"fp8_e4m3": "mxfp8", "fp4_e2m1": "mxfp4"}


def _mx(fields: ConfigFields) -> OpScheme | Unknown:
    size = fields.integer("block_size")
    size = 32 if size is None else size
    dtypes = [
        _dtype(_tagged(fields, key, "float8_e4m3fn"), fields.at(key)) for key in ("weight_dtype", "activation_dtype")
    ]
    mode = _tagged(fields, "scaling_mode", "RCEIL")
    if mode.lower() not in SCALING_MODES:
        raise QsensError(f"{fields.at('scaling_mode')}: {mode!r} is no way of torchao to find scales of MX formats.")
    if dtypes[0] != dtypes[1]:
        raise QsensError(f"{fields.where}: {' and '.join(dtypes)} differ. torchao takes one dtype for both; give one.")
    if size < 1 or dtypes[0] not in _MX:
        return Unknown("MX", f"elements of {dtypes[0]} in blocks of {size} are no format that is known here")
    dtype = _MX[dtypes[0]]
    return OpScheme(
        WeightScheme(dtype, "group", (size,), scaling_mode=mode.lower()),
        ActivationScheme(dtype, "dynamic", "group", (size,), scaling_mode=mode.lower()),
    )


def _of_tensor(fields: ConfigFields) -> None:
    what = "scales of blocks are E4M3 with no scale of the tensor above them"
    fields.changes_numbers("use_dynamic_per_tensor_scale", what, True)


def _nvfp4_weight_only(fields: ConfigFields) -> OpScheme:
    _of_tensor(fields)
    return OpScheme(WeightScheme("nvfp4", "group", (16,)))


def _nvfp4(fields: ConfigFields) -> OpScheme:
    step = _choice(fields, "step", "")
    kind: Literal["dynamic", "local"] = "dynamic"
    if not step:
        _of_tensor(fields)
    elif step in ("prepare", "convert"):
        kind = "local"  # observed between the two; the flag for dynamic ones is then off, whatever is given
        fields.skip("use_dynamic_per_tensor_scale")
    else:
        raise QsensError(f"{fields.at('step')}: {as_text(step)} is no step of torchao.")
    return OpScheme(WeightScheme("nvfp4", "group", (16,)), ActivationScheme("nvfp4", kind, "group", (16,)))


_READERS: dict[str, Callable[[ConfigFields], OpScheme | Unknown]] = {
    "Int8WeightOnlyConfig": _int8_weight_only,
    "Int4WeightOnlyConfig": _int4_weight_only,
    "IntxWeightOnlyConfig": _intx_weight_only,
    "Int8DynamicActivationInt8WeightConfig": _int8_int8("dynamic"),
    "Int8StaticActivationInt8WeightConfig": _int8_int8("static"),
    "Int8DynamicActivationIntxWeightConfig": _int8_dynamic_intx,
    "Float8WeightOnlyConfig": _float8_weight_only,
    "Float8DynamicActivationFloat8WeightConfig": _float8_float8,
    "Float8DynamicActivationInt4WeightConfig": _float8_int4,
    "MXDynamicActivationMXWeightConfig": _mx,
    "NVFP4DynamicActivationNVFP4WeightConfig": _nvfp4,
    "NVFP4WeightOnlyConfig": _nvfp4_weight_only,
}
