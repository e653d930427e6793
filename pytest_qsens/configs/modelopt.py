"""ModelOpt: ``hf_quant_config.json`` of an exported checkpoint, ``quant_cfg``, and what AutoQuantize is told.

Semantics are those of ModelOpt 0.47. ``exclude_modules`` are wildcards of Python's fnmatch for names of modules; with
``MIXED_PRECISION`` the layers are named one by one. AutoQuantize takes no layer into its search that a wildcard of
``disabled_layers`` matches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qsens.configs.compressed_tensors_states import cache_rule, read_cache
from pytest_qsens.configs.documents import as_text
from pytest_qsens.configs.fields import ConfigFields
from pytest_qsens.configs.modelopt_quantizers import read_quant_cfg
from pytest_qsens.configs.rules import CLASS_OF, Config, Pattern, Problem, Rule
from pytest_qsens.errors import QsensError
from pytest_qsens.files import typed
from pytest_qsens.quant.op_scheme import NotTold, OpScheme, Unknown, parse

if TYPE_CHECKING:
    from pytest_qsens.configs.documents import Document

NAME = "modelopt"
TITLE = "ModelOpt (hf_quant_config.json: 'quantization'; 'quant_cfg'; AutoQuantize's 'disabled_layers')"

_AUTO = "AutoQuantize"

ALGORITHMS: dict[str, str | None] = {
    "FP8": "fp8_static_tensor",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8_dynamic",
    "FP8_PB_WO": "wfp8a16_block128x128",
    "FP8_PB_REAL": "wfp8a16_block128x128",
    "W4A16_AWQ": "w4a16_g{}",
    "W4A8_AWQ": None,
    "W8A16": "w8a16",
    "W8A8_SQ_PER_CHANNEL": "w8a8_static_act_sym_minmax",
    "NVFP4": "nvfp4_local",
    "NVFP4_AWQ": "nvfp4_local",
    "NVFP4_SVD": None,
    "W4A16_NVFP4": "wnvfp4a16",
    "W4A8_NVFP4_FP8": "wnvfp4afp8_static",
    "W4A8_MXFP4_FP8": "wmxfp4afp8_static",
    "MXFP8": "mxfp8_dynamic",
    "MXFP4": "mxfp4_dynamic",
}
"""``quant_algo`` → canonical name, with the group size in it; ``None``: what `OpScheme` has no terms for."""

CACHE_ALGORITHMS: dict[str, str | None] = {
    "FP8": "kv_fp8",
    "INT8": "kv_int8",
    "NVFP4": "kv_nvfp4_local",
    "NVFP4_AFFINE": None,
}
"""``kv_cache_quant_algo`` → canonical name; ``None``: what `OpScheme` has no terms for."""

_GROUP_SIZES = {"W4A16_AWQ": 128, "W4A8_AWQ": 128, "MXFP8": 32, "MXFP4": 32, "W4A8_MXFP4_FP8": 32}
_USUAL_GROUP = 16
_NO_TERMS = {
    "W4A8_AWQ": "weights are rounded twice, to int4 and to fp8_e4m3",
    "NVFP4_SVD": "a low-rank part of the weights is kept apart",
}
_SMOOTHED = {
    "W4A16_AWQ": "weights are scaled by AWQ",
    "W4A8_AWQ": "weights are scaled by AWQ",
    "NVFP4_AWQ": "weights are scaled by AWQ",
    "W8A8_SQ_PER_CHANNEL": "SmoothQuant may have moved scales from activations to weights; the file does not say",
    "NVFP4_SVD": "weights are scaled",
}
_MIXED = "MIXED_PRECISION"


def detect(document: Document) -> bool:
    """Whether a file is of this format."""
    value = document.value
    if not isinstance(value, dict):
        return False
    return _quantization(value) is not None or "quant_cfg" in value or _search(value) is not None


def _quantization(value: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]] | None:
    for path in (("quantization",), ("quantization_config", "quantization"), ("quantization_config",), ()):
        inside: Any = value
        for key in path:
            inside = inside.get(key) if isinstance(inside, dict) else None
        if isinstance(inside, dict) and "quant_algo" in inside:
            return inside, path
    return None


def _search(value: dict[str, Any]) -> tuple[dict[str, Any], str] | None:
    for inside, place in ((value.get("auto_quantize"), "auto_quantize"), (value, "")):
        if isinstance(inside, dict) and "disabled_layers" in inside:
            return inside, place
    return None


def read(document: Document) -> Config:
    """Read a file.

    Raises:
        QsensError: If a value is of a wrong type, or names an algorithm that ModelOpt has not.

    """
    value: dict[str, Any] = typed(document.value, dict, str(document.path))
    problems: list[Problem] = []
    exported = _quantization(value)
    if exported is not None:
        return _exported(document, *exported, problems)
    if "quant_cfg" in value:
        return read_quant_cfg(document, NAME)
    searched = _search(value)
    if searched is None:
        raise QsensError(
            f"{document.path}: there is neither 'quantization' nor 'quant_cfg' nor 'disabled_layers' in it."
        )
    return _searched(document, *searched, problems)


def _exported(document: Document, inside: dict[str, Any], path: tuple[str, ...], problems: list[Problem]) -> Config:
    where = ", ".join([str(document.path), *map(repr, path)])
    fields = ConfigFields(inside, where, problems)
    if path == ("quantization",):
        outer = ConfigFields(document.value, str(document.path), problems)
        outer.skip("producer", "quantization")
        outer.finish()
    # groups and a scheme of the cache repeat, in other words, what the algorithms say
    fields.skip("producer", "quant_method", "config_groups")
    cached = _cache(fields) or read_cache(fields, "kv_cache_scheme", "static_minmax")
    fields.skip("kv_cache_scheme")  # the same in other words
    excluded = [*fields.texts_of("exclude_modules"), *fields.texts_of("ignore")]
    layers = fields.table("quantized_layers")
    rules = [*cached]
    rules += [Rule(Pattern("wildcard", text), None, f"excluded: {text}", place) for text, place in excluded]
    algorithm = fields.optional_text("quant_algo")
    if algorithm == _MIXED:
        for name, entry, place in layers:
            layer = ConfigFields(entry, place, problems)
            scheme = _algorithm(layer, layer.text("quant_algo"))
            layer.finish()
            rules.append(Rule(Pattern("name", name), scheme, f"quantized_layers: {name}", place))
    elif algorithm is not None:
        if layers:
            fields.problem("quantized_layers", f"ignored: quant_algo is {algorithm!r}, not {_MIXED!r}")
        scheme = _algorithm(fields, algorithm)
        rules.append(
            Rule(Pattern("any", "", types=("linear",)), scheme, f"quant_algo {algorithm}", fields.at("quant_algo"))
        )
    fields.finish()
    return Config(str(document.path), NAME, "exported checkpoint of ModelOpt", tuple(rules), tuple(problems))


def _cache(fields: ConfigFields) -> list[Rule]:
    """Read ``kv_cache_quant_algo``; no rule if it is not there, or ``NONE``."""
    name = fields.optional_text("kv_cache_quant_algo")
    if name is None or name.upper() == "NONE":
        return []
    where = fields.at("kv_cache_quant_algo")
    if name.upper() not in CACHE_ALGORITHMS:
        raise QsensError(
            f"{where}: {name!r} is no algorithm of ModelOpt for a cache. Known: {', '.join(CACHE_ALGORITHMS)}, NONE."
        )
    own = CACHE_ALGORITHMS[name.upper()]
    scheme = None if own is None else parse(own)
    shifted = Unknown(name, "keys and values are shifted before they are rounded")
    return [cache_rule(scheme or shifted, f"kv_cache_quant_algo {name}", where)]


def _algorithm(fields: ConfigFields, name: str) -> OpScheme | Unknown | None:
    algorithm = name.upper()
    if algorithm not in ALGORITHMS:
        raise QsensError(
            f"{fields.at('quant_algo')}: {name!r} is no algorithm of ModelOpt. Known: {', '.join(ALGORITHMS)}."
        )
    usual = _GROUP_SIZES.get(algorithm, _USUAL_GROUP)
    size = fields.integer("group_size") or usual
    if size < 1:
        raise QsensError(f"{fields.at('group_size')}: {size} is not possible, at least 1 is needed.")
    template = ALGORITHMS[algorithm]
    if fields.flag("has_zero_point", default=False):
        fields.problem("has_zero_point", "true changes numbers and is not simulated: weights have zero points")
    told = fields.peek("pre_quant_scale") is not None
    smoothed = fields.flag("pre_quant_scale", default=False)
    if smoothed or (algorithm in _SMOOTHED and not told):
        fields.problem(
            "quant_algo", f"{name!r} changes numbers beside rounding: {_SMOOTHED.get(algorithm, 'inputs are scaled')}"
        )
    fields.skip("lora_rank")
    if template is None:
        return Unknown(algorithm, _NO_TERMS[algorithm])
    if "{}" in template:
        return parse(template.format(size))
    if size != usual:
        return Unknown(f"{algorithm} g{size}", f"groups of {size}, where {algorithm} has {usual}")
    return parse(template)


def _searched(document: Document, inside: dict[str, Any], place: str, problems: list[Problem]) -> Config:
    where = f"{document.path}, {place!r}" if place else str(document.path)
    fields = ConfigFields(inside, where, problems)
    if place:
        outer = ConfigFields(document.value, str(document.path), problems)
        outer.skip("imports", "metadata", place)
        outer.finish()
    disabled = fields.take("disabled_layers")
    entries = [disabled] if isinstance(disabled, str) else typed(disabled, list, fields.at("disabled_layers"))
    rules = []
    for number, entry in enumerate(entries, 1):
        at = f"{fields.at('disabled_layers')}, entry {number}"
        if isinstance(entry, dict) and "$import" in entry:
            problems.append(Problem(at, f"{as_text(entry)} is not followed. Write the wildcards of that file out"))
            continue
        text: str = typed(entry, str, at)
        rules.append(Rule(Pattern("wildcard", text), None, f"disabled_layers: {text}", at))
    fields.skip("constraints", "auto_quantize_method", "method", "score_size", "num_score_steps", "num_calib_steps")
    fields.skip("candidate_formats", "quantization_formats", "cost_excluded_layers", "cost", "cost_model", "verbose")
    fields.changes_numbers("kv_cache", "keys and values of attention are quantized, which is not measured")
    fields.finish()
    undecided = NotTold(
        f"{_AUTO}'s choice",
        f"{_AUTO} chooses the scheme; give the config that it chose (get_auto_quantize_config), or pytest "
        "--qsens-scheme beside it",
    )
    rules.append(
        Rule(
            Pattern("any", "", types=tuple(name for name in CLASS_OF if name != "embedding")),
            undecided,
            "searched",
            where,
        )
    )
    return Config(str(document.path), NAME, "search space of ModelOpt's AutoQuantize", tuple(rules), tuple(problems))
