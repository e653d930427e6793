"""compressed-tensors: ``quantization_config`` of a ``config.json``, as llm-compressor and vLLM have it.

Semantics are those of compressed-tensors 0.20: ``apply_quantization_config`` and ``utils.match``. A target is an exact
name, a regular expression after ``re:`` that must match from the start, or the name of a class. ``ignore`` comes before
all of them; then exact names, regular expressions, classes, each in the order of the alphabet, not of the file. Only
linear layers and embeddings are quantized.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from pytest_qsens.configs.compressed_tensors_arguments import MODES, arguments, read_observer
from pytest_qsens.configs.compressed_tensors_states import REGEX, attention_rules, read_cache
from pytest_qsens.configs.documents import as_text
from pytest_qsens.configs.fields import ConfigFields
from pytest_qsens.configs.rules import Config, Pattern, Problem, Rule, regex
from pytest_qsens.errors import QsensError
from pytest_qsens.quant.op_scheme import ActivationScheme, OpScheme, Unknown, WeightScheme, parse

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pytest_qsens.configs.documents import Document
    from pytest_qsens.quant.op_scheme import Granularity, Kind

NAME = "compressed-tensors"
TITLE = "compressed-tensors (config.json with 'quantization_config', or that object alone: 'config_groups')"

QUANTIZED = ("linear", "embedding")

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
    "MXFP4": "mxfp4_dynamic_even",
    "MXFP4A16": "wmxfp4a16_even",
    "MXFP4XFP8": "wmxfp4afp8_dynamic_even_act_g128",
    "MXFP6A16": "wmxfp6a16_even",
    "MXFP6A8": "wmxfp6amxfp8_dynamic_even_act_rceil",
    "MXFP8": "mxfp8_dynamic_rceil",
    "MXFP8A16": "wmxfp8a16_rceil",
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
    dtype, strategy, size, symmetric, dynamic = arguments(fields)
    read_observer(fields, None)
    fields.changes_numbers("actorder", "columns are quantized in an order of their own", False)
    fields.finish()
    if dynamic or strategy in ("token", "attn_head"):
        raise QsensError(f"{fields.where}: weights have no strategy {strategy!r} with dynamic {as_text(dynamic)}.")
    if strategy == "tensor_group" and dtype != "nvfp4":
        return Unknown(f"{dtype} tensor_group", f"weights are {dtype} with scales of groups and of the tensor")
    granularity: Granularity = "group" if strategy == "tensor_group" else cast("Granularity", strategy)
    return WeightScheme(dtype, granularity, size, symmetric, MODES.get(dtype, ""))


def _activation(fields: ConfigFields) -> ActivationScheme | Unknown:
    dtype, strategy, size, symmetric, dynamic = arguments(fields)
    kind: Kind = "local" if dynamic == "local" else "dynamic" if dynamic else "static"
    observer = read_observer(fields, kind)
    fields.changes_numbers("actorder", "activations have none", False)
    fields.finish()
    if strategy == "attn_head":
        return Unknown("attn_head", "activations have a scale per attention head, which is not simulated")
    if strategy == "tensor_group" and dtype != "nvfp4":
        return Unknown(f"{dtype} tensor_group", f"activations are {dtype} with scales of groups and of the tensor")
    granularity: Granularity = "group" if strategy == "tensor_group" else cast("Granularity", strategy)
    return ActivationScheme(dtype, kind, granularity, size, symmetric, observer, MODES.get(dtype, ""))


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
    if text.startswith(REGEX):
        return [Pattern("regex_start", regex(text.removeprefix(REGEX), where))]
    return [Pattern("name", text), Pattern("class", text)]
