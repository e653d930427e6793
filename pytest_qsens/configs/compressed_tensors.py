"""compressed-tensors: ``quantization_config`` of a ``config.json``, as llm-compressor and vLLM have it.

Semantics are those of compressed-tensors 0.20: ``apply_quantization_config`` and ``utils.match``. A target is an exact
name, a regular expression after ``re:`` that must match from the start, or the name of a class. ``ignore`` comes before
all of them; then exact names, regular expressions, classes, each in the order of the alphabet, not of the file. Only
linear layers and embeddings are quantized.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, cast

from pytest_qsens.configs.documents import as_text
from pytest_qsens.configs.fields import ConfigFields
from pytest_qsens.configs.observers import LLM_COMPRESSORS_DEFAULT, check_averaging, named_by_llm_compressor
from pytest_qsens.configs.rules import Config, Pattern, Problem, Rule, regex
from pytest_qsens.errors import QsensError
from pytest_qsens.ops import CACHED
from pytest_qsens.quant.op_scheme import ActivationScheme, OpScheme, Unknown, WeightScheme, parse

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pytest_qsens.configs.documents import Document
    from pytest_qsens.quant.op_scheme import Granularity, Kind

NAME = "compressed-tensors"
TITLE = "compressed-tensors (config.json with 'quantization_config', or that object alone: 'config_groups')"

QUANTIZED = ("linear", "embedding")
_REGEX = "re:"
_STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")

PRESETS: dict[str, str | None] = {
    "UNQUANTIZED": None,
    "W8A8": "w8a8_dynamic",
    "INT8": "w8a8_dynamic",
    "W4A16_ASYM": "w4a16_g128_asym",
    "W4AFP8": "w4afp8_dynamic_g128",
    "FP8": "fp8_static_tensor",
    "FP8_DYNAMIC": "fp8_dynamic",
    "FP8_BLOCK": "fp8_dynamic_block128x128_act_g128",
    "NVFP4": "nvfp4_local",
    "NVFP4A16": "wnvfp4a16",
    "MXFP4": "mxfp4_dynamic",
    "MXFP4A16": "wmxfp4a16",
    "MXFP4XFP8": "wmxfp4afp8_dynamic_act_g128",
    "MXFP6A16": "wmxfp6a16",
    "MXFP6A8": "wmxfp6amxfp8_dynamic",
    "MXFP8": "mxfp8_dynamic",
    "MXFP8A16": "wmxfp8a16",
    **{f"W{w}A{a}": f"w{w}a{a}_dynamic_g128" for w, a in ((2, 4), (2, 8), (3, 4), (3, 8), (4, 4), (4, 8))},
    **{f"W{w}A8": f"w{w}a8_dynamic_g128" for w in (5, 6, 7)},
    **{f"W{w}A16": f"w{w}a16_g128" for w in (2, 3, 4, 5, 6, 7, 8)},
}
"""Schemes that compressed-tensors 0.20 knows by name, in capital letters."""


def detect(document: Document) -> bool:
    """Whether a file is of this format."""
    inside = _inside(document.value)
    return inside is not None and "config_groups" in inside and inside.get("quant_method", NAME) == NAME


def _inside(value: object) -> dict[str, object] | None:
    if not isinstance(value, dict):
        return None
    if "config_groups" in value:
        return value
    for key in ("quantization_config", "compression_config"):
        if isinstance(value.get(key), dict):
            return cast("dict[str, object]", value[key])
    return None


def read(document: Document) -> Config:
    """Read a file.

    Raises:
        QsensError: If a value is of a wrong type, or compressed-tensors would not take it.

    """
    problems: list[Problem] = []
    value, where = document.value, str(document.path)
    inside = _inside(value)
    if inside is None:
        raise QsensError(f"{where}: there are no 'config_groups' in it.")
    if inside is not value:
        key = "quantization_config" if isinstance(value.get("quantization_config"), dict) else "compression_config"
        where = f"{where}, '{key}'"
    fields = ConfigFields(inside, where, problems)
    fields.skip("quant_method", "format", "quantization_status", "global_compression_ratio", "version", "producer")
    cached = read_cache(fields, "kv_cache_scheme")
    for key in ("sparsity_config", "moe_sparsity_config", "transform_config"):
        fields.changes_numbers(key, "weights or activations are changed beside being rounded", {})
    entries = fields.table("config_groups")
    groups = [read_group(*entry, problems) for entry in entries]
    ignore = fields.texts_of("ignore")
    fields.finish()
    about = "quantization_config of compressed-tensors"
    rules = (*attention_rules(entries, ignore, cached), *cached, *ordered(groups, ignore, problems))
    return Config(str(document.path), NAME, about, rules, tuple(problems))


def read_cache(fields: ConfigFields, key: str, default: str = LLM_COMPRESSORS_DEFAULT) -> list[Rule]:
    """Read how keys and values of all attention modules are quantized; no rule if they are not.

    ``default`` is the observer of a tool that names none, by its name in llm-compressor.
    """
    if fields.peek(key) in (None, "NONE", "none"):
        fields.take(key)
        return []
    inside = fields.inner(key)
    return [] if inside is None else [cache_rule(_cache(inside, default), key, inside.where)]


def cache_rule(scheme: OpScheme | Unknown, label: str, where: str) -> Rule:
    """Return the rule of a scheme of all keys and values."""
    return Rule(Pattern("any", "", types=CACHED), scheme, label, where)


def _cache(fields: ConfigFields, default: str = LLM_COMPRESSORS_DEFAULT) -> OpScheme | Unknown:
    dtype, strategy, size, symmetric, dynamic = _arguments(fields)
    kind: Kind = "local" if dynamic == "local" else "dynamic" if dynamic else "static"
    observer = _observer(fields, kind, default)
    if observer == "mse":  # was told; keys and values have none that is near
        observer = "minmax"
    fields.changes_numbers("actorder", "keys and values have none", False)
    fields.finish()
    if strategy == "tensor_group" and dtype != "nvfp4":
        return Unknown(f"{dtype} tensor_group", f"keys and values are {dtype} with scales of groups and of the tensor")
    if strategy == "token":
        return Unknown(f"{dtype} token", "keys and values have a scale for each head of each sample, not of each token")
    granularity: Granularity = "tensor"
    if strategy in ("group", "tensor_group"):
        granularity = "group"
    elif strategy == "attn_head":
        granularity = "head"
    elif strategy != "tensor":
        raise QsensError(f"{fields.where}: keys and values have no strategy {strategy!r}.")
    observer = "" if observer == "minmax" else observer  # the usual one, whatever the dtype
    return OpScheme(None, cache=ActivationScheme(dtype, kind, granularity, size, symmetric, observer))


Group = tuple[list[tuple[str, str]], "OpScheme | Unknown | None", str]
"""Targets with their places, what is done to them, and the group's name."""


def read_group(name: str, value: object, where: str, problems: list[Problem]) -> Group:
    """Read one entry of ``config_groups``: a scheme with its targets, or targets of a scheme known by name."""
    if isinstance(value, list):
        fields = ConfigFields({"targets": value}, where, problems)
        return fields.texts_of("targets"), preset(name, where), name
    fields = ConfigFields(value, where, problems)
    targets = fields.texts_of("targets")
    fields.skip("format")
    scheme = read_scheme(fields)
    fields.finish()
    return targets, scheme, name


def attention_rules(
    entries: Sequence[tuple[str, object, str]], ignore: Iterable[tuple[str, str]], cached: Sequence[Rule]
) -> list[Rule]:
    """Read which entries of ``config_groups`` mean attention modules, and quantize queries, keys and values.

    They go before the scheme of the cache, which remains where a module is ignored, or where what matches first is no
    target of attention. A class is that of attention modules if its name says so.
    """
    targets: dict[str, tuple[OpScheme | Unknown | None, str, str]] = {}
    for name, value, where in entries:
        fields = ConfigFields(value if isinstance(value, dict) else {"targets": value}, where, [])  # told elsewhere
        inputs = value.get("input_activations") if isinstance(value, dict) and not value.get("weights") else None
        scheme = None
        if isinstance(inputs, dict):
            scheme = _cache(ConfigFields(inputs, fields.at("input_activations"), fields.problems))
        targets |= {text: (scheme, f"{name}: {text}", place) for text, place in fields.texts_of("targets")}
    if all(scheme is None for scheme, _, _ in targets.values()):
        return []
    rest = cached[0].scheme if cached else None
    rules = [
        rule for text, where in ignore for rule in _of_attention(_of_module(text), rest, None, f"ignore: {text}", where)
    ]
    for text in sorted(targets, key=lambda text: (_rank(text), text)):
        scheme, label, place = targets[text]
        pattern = _of_module(text)
        if scheme is not None:
            narrow = replace(pattern, kind="module_narrow") if pattern.kind == "module_start" else pattern
            queries = scheme if isinstance(scheme, Unknown) else replace(scheme, queries=True)
            rules += _of_attention(narrow, scheme, queries, label, place, _rank(text))
        if pattern.kind == "module_start" or (pattern.kind == "module" and scheme is None):
            rules += _of_attention(pattern, rest, None, label, place)
    return rules


def _rank(text: str) -> int:
    """Place in the order in which targets of attention hold: names, expressions, classes."""
    return 1 if text.startswith(_REGEX) else 2 if _is_class_of_attention(text) else 0


def _is_class_of_attention(text: str) -> bool:
    return "attention" in text.lower() and text.isidentifier()


def _of_module(text: str) -> Pattern:
    kind: Literal["module", "module_start", "any"] = "any" if _is_class_of_attention(text) else "module"
    return Pattern("module_start" if text.startswith(_REGEX) else kind, text.removeprefix(_REGEX))


def _of_attention(
    pattern: Pattern,
    scheme: OpScheme | Unknown | None,
    queries: OpScheme | Unknown | None,
    label: str,
    where: str,
    rank: int | None = None,
) -> list[Rule]:
    """Rules for keys and values, and for queries, of the modules that a pattern means."""
    return [
        Rule(replace(pattern, types=types), each, label, where, rank=rank)
        for types, each in ((CACHED, scheme), (("q",), queries))
    ]


def preset(name: str, where: str) -> OpScheme | None:
    """Scheme that compressed-tensors knows by this name.

    Raises:
        QsensError: If there is none.

    """
    if name.upper() not in PRESETS:
        raise QsensError(f"{where}: {name!r} is no scheme of compressed-tensors. It has {', '.join(PRESETS)}.")
    own = PRESETS[name.upper()]
    return None if own is None else parse(own)


def read_scheme(fields: ConfigFields) -> OpScheme | Unknown | None:
    """Read ``weights``, ``input_activations`` and ``output_activations``."""
    weights, inputs, outputs = (fields.inner(key) for key in ("weights", "input_activations", "output_activations"))
    weight = None if weights is None else _weight(weights)
    activation = None if inputs is None else _activation(inputs)
    if outputs is not None:
        after = _activation(outputs)
        if isinstance(after, ActivationScheme) and after.kind != "static":
            return Unknown("dynamic output", "outputs are requantized with dynamic scales (simulated: static)")
        if isinstance(activation, ActivationScheme) and after != activation:
            outputs.problem("strategy", "outputs are requantized in another way than inputs, which is not simulated")
    for part in (weight, activation):
        if isinstance(part, Unknown):
            return part
    assert not isinstance(weight, Unknown) and not isinstance(activation, Unknown)  # noqa: PT018, S101  # for mypy
    scheme = OpScheme(weight, activation, outputs is not None)
    return None if scheme == OpScheme(None) else scheme


def _weight(fields: ConfigFields) -> WeightScheme | Unknown:
    dtype, strategy, size, symmetric, dynamic = _arguments(fields)
    _observer(fields, None)
    fields.changes_numbers("actorder", "columns are quantized in an order of their own", False)
    fields.finish()
    if dynamic or strategy in ("token", "attn_head"):
        raise QsensError(f"{fields.where}: weights have no strategy {strategy!r} with dynamic {as_text(dynamic)}.")
    if strategy == "tensor_group" and dtype != "nvfp4":
        return Unknown(f"{dtype} tensor_group", f"weights are {dtype} with scales of groups and of the tensor")
    granularity: Granularity = "group" if strategy == "tensor_group" else cast("Granularity", strategy)
    return WeightScheme(dtype, granularity, size, symmetric)


def _activation(fields: ConfigFields) -> ActivationScheme | Unknown:
    dtype, strategy, size, symmetric, dynamic = _arguments(fields)
    kind: Kind = "local" if dynamic == "local" else "dynamic" if dynamic else "static"
    observer = _observer(fields, kind)
    fields.changes_numbers("actorder", "activations have none", False)
    fields.finish()
    if strategy == "attn_head":
        return Unknown("attn_head", "activations have a scale per attention head, which is not simulated")
    if strategy == "tensor_group" and dtype != "nvfp4":
        return Unknown(f"{dtype} tensor_group", f"activations are {dtype} with scales of groups and of the tensor")
    granularity: Granularity = "group" if strategy == "tensor_group" else cast("Granularity", strategy)
    return ActivationScheme(dtype, kind, granularity, size, symmetric, observer)


def _observer(fields: ConfigFields, kind: Kind | None, default: str = LLM_COMPRESSORS_DEFAULT) -> str:
    """Read ``observer``; without a kind, as that of a weight."""
    name = fields.optional_text("observer")
    if name is None and kind in ("static", "local"):
        name = default
    found = named_by_llm_compressor(fields, "observer", name, kind)
    check_averaging(fields, found)
    return found


def _arguments(fields: ConfigFields) -> tuple[str, str, tuple[int, ...], bool, bool | str]:
    """Read ``QuantizationArgs``: dtype, strategy, size of a group or block, symmetric, dynamic."""
    bits = fields.integer("num_bits")
    bits = 8 if bits is None else bits
    kind = fields.known("type", ("int", "float"), "int")
    symmetric = fields.flag("symmetric", default=True)
    group = fields.integer("group_size")
    block = _block(fields)
    strategy = fields.known("strategy", _STRATEGIES, "")
    if not strategy:  # inferred, as compressed-tensors does it
        strategy = "tensor" if group is None else "group" if group > 0 else "channel"
    if (strategy in ("group", "tensor_group")) != (group is not None and group > 0):
        raise QsensError(f"{fields.where}: strategy {strategy!r} does not go with group_size {as_text(group)}.")
    if (strategy == "block") != (block is not None):
        raise QsensError(f"{fields.where}: strategy {strategy!r} does not go with block_structure {as_text(block)}.")
    dynamic = fields.take("dynamic")
    if type(dynamic) is not bool and dynamic not in (None, "local"):
        raise QsensError(f"{fields.at('dynamic')}: true, false or 'local' is needed, found {as_text(dynamic)}")
    scale = fields.optional_text("scale_dtype")
    fields.skip("zp_dtype")
    dtype = _dtype(fields, bits, kind, strategy, group, scale)
    size = tuple(block) if block is not None else (group,) if group is not None and group > 0 else ()
    return dtype, strategy, size, symmetric, bool(dynamic) if dynamic != "local" else "local"


def _block(fields: ConfigFields) -> list[int] | None:
    value = fields.take("block_structure")
    if value is None:
        return None
    if isinstance(value, str):
        value = [int(part) if part.isdecimal() and len(part) < 10 else part for part in value.split("x")]
    if type(value) is not list or len(value) != 2 or any(type(n) is not int or not 0 < n < 10**9 for n in value):
        raise QsensError(f"{fields.at('block_structure')}: [rows, columns] is needed, found {as_text(value)}")
    return value


def _dtype(fields: ConfigFields, bits: int, kind: str, strategy: str, group: int | None, scale: str | None) -> str:
    if kind == "int":
        if not 1 <= bits <= 16:
            raise QsensError(f"{fields.at('num_bits')}: {bits} is not possible for integers, 1 to 16 are")
        return f"int{bits}"
    floats = {8: "fp8_e4m3", 6: "fp6_e2m3", 4: "fp4_e2m1"}
    if bits not in floats:
        raise QsensError(f"{fields.at('num_bits')}: there are floats of 4, 6 and 8 bits, not of {bits}")
    if strategy == "group" and group == 32 and scale is not None and scale.removeprefix("torch.") == "uint8":
        return f"mxfp{bits}"  # scales are powers of two, kept as their exponents
    if strategy == "tensor_group" and bits == 4 and group == 16:
        return "nvfp4"
    return floats[bits]


def ordered(groups: Sequence[Group], ignore: Iterable[tuple[str, str]], problems: list[Problem]) -> list[Rule]:
    """Rules in the order in which compressed-tensors matches."""
    rules = [
        Rule(Pattern("any", "", types=("conv1d", "conv2d", "conv3d")), None, "convolution", "", expected=False),
    ]
    rules += [
        Rule(pattern, None, f"ignore: {text}", where) for text, where in ignore for pattern in patterns(text, where)
    ]
    of_target: dict[str, tuple[OpScheme | Unknown | None, str, str]] = {}
    for targets, scheme, name in groups:
        for text, where in targets:
            if text in of_target and of_target[text][0] != scheme:
                problems.append(
                    Problem(where, f"{text!r} is a target of {of_target[text][1]!r}, too: the last one holds, {name!r}")
                )
            of_target[text] = (scheme, name, where)
    found = []
    for text, (scheme, name, where) in of_target.items():
        found += [Rule(pattern, scheme, f"{name}: {text}", where) for pattern in patterns(text, where)]
    order = ("name", "regex_start", "class")
    found.sort(key=lambda rule: (order.index(rule.pattern.kind), rule.pattern.text))
    # vLLM takes the first in the file where compressed-tensors takes the first in the alphabet
    return rules + [_with_rank(rule, order.index(rule.pattern.kind)) for rule in found]


def _with_rank(rule: Rule, rank: int) -> Rule:
    return Rule(rule.pattern, rule.scheme, rule.label, rule.where, rule.expected, rank)


def patterns(text: str, where: str) -> list[Pattern]:
    """Take a target or an entry of ``ignore`` apart: an expression, or a name, of a module or of a class."""
    if text.startswith(_REGEX):
        return [Pattern("regex_start", regex(text.removeprefix(_REGEX), where))]
    return [Pattern("name", text), Pattern("class", text)]
