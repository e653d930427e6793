"""torchao: ``FqnToConfig``, or one config for all linear layers, as ``torchao.core.config.config_to_dict`` writes it.

Semantics are those of torchao 0.18, ``quantize_`` with ``FqnToConfig``: a key is the exact name of a parameter or a
module, a regular expression after ``re:`` for the whole of such a name, or ``_default``. They hold in this order:
parameter by name, module by name, parameter by expression, module by expression (the first), ``_default``, for linear
layers only. Of expressions for a parameter every one is applied that is not ``None``, whatever comes first in the file;
two of them cannot be.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from glob import escape
from typing import TYPE_CHECKING, Literal, cast

from pytest_qsens.configs.documents import as_text
from pytest_qsens.configs.fields import ConfigFields
from pytest_qsens.configs.rules import Config, Decision, Pattern, Problem, Rule, regex
from pytest_qsens.errors import QsensError
from pytest_qsens.quant.op_scheme import ActivationScheme, OpScheme, Unknown, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_qsens.configs.documents import Document
    from pytest_qsens.ops import Op
    from pytest_qsens.quant.op_scheme import Granularity

NAME = "torchao"
TITLE = "torchao (JSON of config_to_dict: '_type', '_data')"

_MAPS = ("FqnToConfig", "ModuleFqnToConfig")
_REGEX, _DEFAULT, _PARAMETER = "re:", "_default", ".weight"
_PARAMETER_NAME, _MODULE_NAME, _PARAMETER_REGEX, _MODULE_REGEX, _LAST = range(5)


def detect(document: Document) -> bool:
    """Whether a file is of this format."""
    value = document.value
    return isinstance(value, dict) and (("_type" in value and "_data" in value) or _hugging_face(value) is not None)


def _hugging_face(value: dict[str, object]) -> dict[str, object] | None:
    """``quantization_config`` of a ``config.json``, or that object alone."""
    inside = value.get("quantization_config", value)
    return inside if isinstance(inside, dict) and inside.get("quant_method") == NAME else None


def read(document: Document) -> Config:
    """Read a file.

    Raises:
        QsensError: If a value is of a wrong type, or torchao would not take it.

    """
    problems: list[Problem] = []
    value, where = document.value, str(document.path)
    before: list[Rule] = []
    inside = _hugging_face(value) if isinstance(value, dict) else None
    if inside is not None:
        value, where, before = _unwrap(ConfigFields(inside, where, problems))
    name, data = _open(value, where, problems)
    if name in _MAPS:
        rules = (*before, *_rules(data, problems))
        return FqnToConfig(str(document.path), NAME, "FqnToConfig of torchao", rules, tuple(problems))
    rule = Rule(Pattern("any", "", types=("linear",)), _scheme(name, data), f"all linear layers: {name}", where)
    return Config(str(document.path), NAME, "config of torchao", (*before, rule), tuple(problems))


def _unwrap(fields: ConfigFields) -> tuple[object, str, list[Rule]]:
    """Take torchao's config out of transformers' one, and what transformers leaves unquantized."""
    fields.skip("quant_method", "quant_type_kwargs", "untie_embedding_weights")
    quant_type = fields.inner("quant_type")
    if quant_type is None:
        raise QsensError(f"{fields.at('quant_type')}: an object is needed, found nothing")
    value, where = quant_type.take("default"), quant_type.at("default")
    quant_type.finish()
    rules = []
    given = fields.peek("modules_to_not_convert") is not None
    for text, place in fields.texts_of("modules_to_not_convert"):
        # transformers.quantizers.quantizers_utils.should_convert_module, with the name of the weight
        expression = rf"(?:{regex(text, place)})(?:(?<=\.)|(?=\.|$))"
        start = Pattern("regex_start", expression, (_PARAMETER,))
        end = Pattern("wildcard", f"*{escape(text)}", (_PARAMETER,))
        rules += [Rule(pattern, None, f"modules_to_not_convert: {text}", place) for pattern in (start, end)]
    if not fields.flag("include_input_output_embeddings", default=False) and not given:
        rules.append(Rule(Pattern("name", "lm_head"), None, "transformers' default", where, expected=False))
    fields.finish()
    return value, where, rules


def _open(value: object, where: str, problems: list[Problem]) -> tuple[str, ConfigFields]:
    fields = ConfigFields(value, where, problems)
    name = fields.text("_type")
    fields.skip("_version")
    data = fields.inner("_data")
    if data is None:
        raise QsensError(f"{fields.at('_data')}: an object is needed, found nothing")
    fields.finish()
    return name, data


@dataclass(frozen=True)
class FqnToConfig(Config):
    """Rules with the rank of their kind of key."""

    def decide(self, op: Op) -> Decision:
        """Follow ``_fqn_to_config_handler``."""
        found = [rule for rule in self.rules if rule.pattern.matches(op)]
        if not found:
            return Decision(op, None, None)
        first = found[0]
        if first.rank is None:  # transformers comes before torchao
            return Decision(op, first.scheme, first, tuple(found))
        rivals: list[Rule] = []
        if first.rank == _PARAMETER_REGEX or (first.rank == _PARAMETER_NAME and first.scheme is not None):
            expressions = [rule for rule in found if rule.rank == _PARAMETER_REGEX]
            applied = [rule for rule in expressions if rule.scheme is not None]
            if first.rank == _PARAMETER_REGEX and applied:
                # a `None` in front of it has no effect, against torchao's documentation
                rivals = [rule for rule in expressions[: expressions.index(applied[0])] if rule.scheme is None]
                first = applied[0]
            rivals += [rule for rule in applied if rule is not first]  # what is quantized once cannot be again
        return Decision(op, first.scheme, first, tuple(found), tuple(rivals))


def _rules(data: ConfigFields, problems: list[Problem]) -> list[Rule]:
    entries, others = data.table("fqn_to_config"), data.table("module_fqn_to_config")
    if entries and others and [entry[:2] for entry in entries] != [entry[:2] for entry in others]:
        raise QsensError(
            f"{data.where}: 'fqn_to_config' and 'module_fqn_to_config' are not equal. torchao refuses this; keep one."
        )
    data.finish()
    rules = []
    for key, value, where in entries or others:
        scheme = None if value is None else _scheme(*_open(value, where, problems))
        for pattern, rank in _patterns(key, where):
            rules.append(Rule(pattern, scheme, key, where, rank=rank))
    if not rules:
        raise QsensError(f"{data.where}: there is no entry in 'fqn_to_config'. Nothing would be quantized.")
    return sorted(rules, key=lambda rule: rule.rank or 0)


def _patterns(key: str, where: str) -> list[tuple[Pattern, int]]:
    if key == _DEFAULT:
        return [(Pattern("any", "", types=("linear",)), _LAST)]
    if key.startswith(_REGEX):
        text = regex(key.removeprefix(_REGEX), where)
        return [(Pattern("regex", text, (_PARAMETER,)), _PARAMETER_REGEX), (Pattern("regex", text), _MODULE_REGEX)]
    return [(Pattern("name", key, (_PARAMETER,)), _PARAMETER_NAME), (Pattern("name", key), _MODULE_NAME)]


def _scheme(name: str, data: ConfigFields) -> OpScheme | Unknown | None:
    reader = _READERS.get(name)
    if reader is None:
        return Unknown(name, f"{name} is no config of torchao that is known here")
    data.skip("set_inductor_config", "packing_format", "intx_packing_format", "mm_config")
    data.skip("kernel_preference", "use_triton_kernel", "alg_id", "int4_tile_packed_ntile", "version", "step")
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


def _granularity(value: object, where: str, problems: list[Problem]) -> tuple[Granularity, tuple[int, ...]]:
    """Read a granularity of weights: rows of them are output channels."""
    name, data = _open(value, where, problems)
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
    name = _tagged(fields, key, "")
    if name and name not in usual:
        fields.problem(key, f"{name} changes numbers and is not simulated: scales are found in another way")


def _int8_weight_only(fields: ConfigFields) -> OpScheme:
    fields.skip("group_size")  # of version 1, which torchao 0.18 refuses
    return OpScheme(WeightScheme("int8", *_of_weight(fields, "granularity", "channel")))


def _of_weight(fields: ConfigFields, key: str, default: Granularity, *size: int) -> tuple[Granularity, tuple[int, ...]]:
    value = fields.take(key)
    return (default, size) if value is None else _granularity(value, fields.at(key), fields.problems)


def _int4_weight_only(fields: ConfigFields) -> OpScheme:
    packing = _tagged(fields, "int4_packing_format", "PLAIN")
    group = fields.integer("group_size")
    group = 128 if group is None else group
    if group < 1:
        raise QsensError(f"{fields.at('group_size')}: {group} is not possible, at least 1 is needed.")
    # all layouts but this one have a zero point, with TINYGEMM and with HQQ
    _algorithm(fields, "int4_choose_qparams_algorithm", "TINYGEMM")
    return OpScheme(WeightScheme("int4", "group", (group,), symmetric=packing == "PRESHUFFLED"))


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
    _algorithm(fields, "intx_choose_qparams_algorithm", "AFFINE")
    return OpScheme(WeightScheme(bits, *extent, symmetric=symmetric))


def _int8_dynamic_intx(fields: ConfigFields) -> OpScheme:
    symmetric = _symmetric(fields, "act_mapping_type", "ASYMMETRIC")
    scheme = _intx(
        fields, "weight_dtype", "weight_granularity", "weight_mapping_type", "weight_scale_dtype", "group", 32
    )
    return replace(scheme, activation=ActivationScheme("int8", "dynamic", "token", symmetric=symmetric))


def _int8_int8(kind: Literal["static", "dynamic"]) -> Callable[[ConfigFields], OpScheme]:
    def read(fields: ConfigFields) -> OpScheme:
        activation, weight = _both(fields, "channel")
        symmetric = _symmetric(fields, "act_mapping_type", "SYMMETRIC")
        fields.changes_numbers("weight_only_decode", "activations of one token are not quantized", False)
        fields.changes_numbers("act_quant_scale", "the scale of activations is given, not calibrated")
        fields.changes_numbers("act_quant_zero_point", "the zero point of activations is given, not calibrated")
        return OpScheme(WeightScheme("int8", *weight), ActivationScheme("int8", kind, *activation, symmetric=symmetric))

    return read


def _float8_weight_only(fields: ConfigFields) -> OpScheme:
    return OpScheme(WeightScheme(_weight_dtype(fields, "float8_e4m3fn"), *_of_weight(fields, "granularity", "channel")))


def _float8_float8(fields: ConfigFields) -> OpScheme:
    activation, weight = _both(fields, "tensor")
    dtype = _dtype(_tagged(fields, "activation_dtype", "float8_e4m3fn"), fields.at("activation_dtype"))
    for key in ("activation_value_lb", "activation_value_ub"):
        fields.changes_numbers(key, "the values that scales are made of are limited")
    return OpScheme(
        WeightScheme(_weight_dtype(fields, "float8_e4m3fn"), *weight), ActivationScheme(dtype, "dynamic", *activation)
    )


def _float8_int4(fields: ConfigFields) -> OpScheme:
    fields.skip("int4_packing_format")
    return OpScheme(WeightScheme("int4", "group", (128,)), ActivationScheme("fp8_e4m3", "dynamic", "token"))


_MX = {"fp8_e4m3": "mxfp8", "fp4_e2m1": "mxfp4"}


def _mx(fields: ConfigFields) -> OpScheme | Unknown:
    size = fields.integer("block_size")
    size = 32 if size is None else size
    fields.skip("scaling_mode")
    dtypes = [
        _dtype(_tagged(fields, key, "float8_e4m3fn"), fields.at(key)) for key in ("weight_dtype", "activation_dtype")
    ]
    if size < 1 or any(dtype not in _MX for dtype in dtypes):
        return Unknown("MX", f"elements of {' and '.join(dtypes)} in blocks of {size} are no format that is known here")
    weight, activation = (_MX[dtype] for dtype in dtypes)
    return OpScheme(WeightScheme(weight, "group", (size,)), ActivationScheme(activation, "dynamic", "group", (size,)))


def _nvfp4_weight_only(fields: ConfigFields) -> OpScheme:
    fields.skip("use_dynamic_per_tensor_scale")  # of weights, it does not change between calls
    return OpScheme(WeightScheme("nvfp4", "group", (16,)))


def _nvfp4(fields: ConfigFields) -> OpScheme:
    fields.flag("use_dynamic_per_tensor_scale", default=True)
    return OpScheme(WeightScheme("nvfp4", "group", (16,)), ActivationScheme("nvfp4", "dynamic", "group", (16,)))


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
