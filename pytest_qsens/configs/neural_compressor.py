"""Intel Neural Compressor: ``PostTrainingQuantConfig``, what its strategy chose, and ``qconfig.json`` of 3.x.

Semantics are those of neural-compressor 3.7.1 (``strategy/utils/tuning_space.py``). Keys of ``op_type_dict`` and of
``op_name_dict`` are regular expressions for the whole type or name. Types come before names, each in the order of the
file, and what comes later replaces what it says something about. Files that were written by a run name every op; names
of layers that were traced alone end with ``.module``, which is dropped here.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pytest_qsens.configs.documents import as_text
from pytest_qsens.configs.fields import ConfigFields
from pytest_qsens.configs.rules import CLASS_OF, Config, Decision, Pattern, Problem, Rule, regex
from pytest_qsens.configs.simulated import EMBEDDING
from pytest_qsens.errors import QsensError
from pytest_qsens.files import typed
from pytest_qsens.ops import Op
from pytest_qsens.quant.op_scheme import ActivationScheme, OpScheme, Unknown, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_qsens.configs.documents import Document
    from pytest_qsens.quant.op_scheme import Kind

NAME = "neural-compressor"
TITLE = "Intel Neural Compressor ('op_name_dict', 'op_type_dict'; best_configure with 'op'; qconfig.json)"

_WRAPPED = ".module"
_KEY = re.compile(r"\('(.+)', '(.+)'\)")
_IPEX = "q_op_infos"
_PTQ_KEYS = ("op_name_dict", "op_type_dict")
_UNQUANTIZED = ("fp32", "bf16", "fp16")
_APPROACHES = {
    "static": "static",
    "post_training_static_quant": "static",
    "dynamic": "dynamic",
    "post_training_dynamic_quant": "dynamic",
    "weight_only": "weight_only",
    "post_training_weight_only": "weight_only",
    "auto": "auto",
    "post_training_auto_quant": "auto",
}


def detect(document: Document) -> bool:
    """Whether a file is of this format."""
    value = document.value
    if not isinstance(value, dict):
        return False
    return (
        any(isinstance(value.get(key), dict) for key in _PTQ_KEYS)
        or (isinstance(value.get("op"), dict) and "approach" in value)
        or _is_qconfig(value)
    )


def _is_qconfig(value: dict[Any, Any]) -> bool:
    return bool(value) and (
        all(isinstance(key, str) and _KEY.fullmatch(key) for key in value) or (" " in value and _IPEX in as_text(value))
    )


def read(document: Document) -> Config:
    """Read a file.

    Raises:
        QsensError: If a value is of a wrong type, or is none that Neural Compressor has.

    """
    value: dict[Any, Any] = typed(document.value, dict, str(document.path))
    if any(key in value for key in _PTQ_KEYS) or ("approach" in value and "op" not in value):
        return _given(document)
    if "op" in value:
        return _chosen(document)
    if " " in value:
        raise QsensError(
            f"{document.path}: this is what Intel Extension for PyTorch writes; it numbers ops and does not name them "
            "all. Give the op_name_dict that the run was given."
        )
    return _qconfig(document)


# What a run is given: PostTrainingQuantConfig


@dataclass(frozen=True)
class _Settings:
    """What one entry says about an op: property → possible values, in this order of preference."""

    rule: Rule
    weight: Mapping[str, list[str]]
    activation: Mapping[str, list[str]]


@dataclass(frozen=True)
class PostTraining(Config):
    """Entries in the order in which Neural Compressor merges them, on top of what it does by default."""

    settings: tuple[_Settings, ...] = ()
    approach: str = "static"

    def decide(self, op: Op) -> Decision:
        """Follow ``TuningSpace._merge_op_cfg``, which takes activations before weights.

        What is said without a precision (fp32, bf16) quantizes an op again that an earlier word took out, and with all
        choices there are. Of the choices named, Neural Compressor takes that which comes first in its own list; those
        that it has not are left out without a word.
        """
        default = Rule(Pattern("any", ""), None, f"default of approach {self.approach}", self.path, expected=False)
        found = [entry for entry in self.settings if entry.rule.pattern.matches(op)]
        matching = (*(entry.rule for entry in reversed(found)), default)
        choices = _choices(op, self.approach)
        if not choices:
            return Decision(op, None, default, matching)
        left: dict[str, dict[str, list[str]]] | None = copy.deepcopy(choices)
        deciding = default
        for entry in found:
            for part, given in (("activation", entry.activation), ("weight", entry.weight)):
                if given:
                    left = _merged(left, choices, part, given, self.approach)
                    deciding = entry.rule
        if left is None:
            return Decision(op, None, deciding, matching)
        firsts = [{key: of[0] for key, of in left[part].items()} for part in ("weight", "activation")]
        return Decision(op, _of_op(op, firsts[0], firsts[1], self.approach), deciding, matching)


def _merged(
    left: dict[str, dict[str, list[str]]] | None,
    choices: dict[str, dict[str, list[str]]],
    part: str,
    given: Mapping[str, list[str]],
    approach: str,
) -> dict[str, dict[str, list[str]]] | None:
    """Choices that are left after a word about one part of an op; ``None``: it is not quantized."""
    if set(given.get("dtype", ())) & set(_UNQUANTIZED):
        return None
    left = copy.deepcopy(choices) if left is None else left
    for key, values in given.items():
        both = [choice for choice in choices[part].get(key, ()) if choice in values]
        if approach == "weight_only":  # its lists are longer than those here
            left[part][key] = both or values[:1]
        elif both and key != "dtype":
            left[part][key] = both
    return left


def _choices(op: Op, approach: str) -> dict[str, dict[str, list[str]]]:
    """List what the PyTorch FX adaptor can do to an op, the default first (adaptor/pytorch_cpu.yaml)."""
    if op.type not in CLASS_OF or (approach == "dynamic" and op.type.startswith("conv")):
        return {}
    if approach == "weight_only":
        weight = {"dtype": ["int"], "bits": ["4"], "group_size": ["32"], "scheme": ["sym", "asym"]}
        return {"weight": weight, "activation": {"dtype": ["fp32"]}} if op.type == "linear" else {}
    if op.type == "embedding":
        weight = {"dtype": ["uint8"], "scheme": ["asym_float"], "granularity": ["per_channel"]}
        return {"weight": weight, "activation": {"dtype": ["fp32"]}}
    schemes = ["asym", "sym"] if approach == "static" else ["asym"]
    return {
        "weight": {"dtype": ["int8"], "scheme": ["sym"], "granularity": ["per_channel"]},
        "activation": {"dtype": ["uint8"], "scheme": schemes, "granularity": ["per_tensor"]},
    }


_ANYWHERE = {
    "weight": {"dtype": ("int8", "uint8"), "scheme": ("sym", "asym_float"), "granularity": ("per_channel",)},
    "activation": {"dtype": ("int8", "uint8"), "scheme": ("asym", "sym"), "granularity": ("per_tensor",)},
}
"""Choices that some op has, of static and dynamic approaches."""


def _given(document: Document) -> Config:
    problems: list[Problem] = []
    fields = ConfigFields(document.value, str(document.path), problems)
    approach = _approach(fields, "static")
    if approach == "auto":
        fields.problems.append(
            Problem(
                str(document.path), "approach 'auto' chooses between static and dynamic as it tunes; static is taken"
            )
        )
        approach = "static"
    fields.skip("device", "backend", "domain", "model_name", "inputs", "outputs", "example_inputs", "quant_format")
    fields.skip("calibration_sampling_size", "accuracy_criterion", "tuning_criterion", "ni_workload_name")
    _recipes(fields, "recipes")
    fields.changes_numbers("reduce_range", "activations use 7 of 8 bits", False)
    fields.changes_numbers("quant_level", "levels below 1 tune what is quantized", 1, "auto")
    fields.changes_numbers("excluded_precisions", "ops get other precisions", [], ["bf16"])
    settings = [
        _entry(
            ConfigFields(entry, where, problems), Pattern("class_regex", regex(key, where)), f"op_type {key}", approach
        )
        for key, entry, where in fields.table("op_type_dict")
    ]
    for key, entry, where in fields.table("op_name_dict"):
        # its name for a layer that it traces alone ends with .module, and for others does not
        pattern = Pattern("regex", regex(key, where), ("", _WRAPPED))
        settings.append(_entry(ConfigFields(entry, where, problems), pattern, f"op_name {key}", approach))
        if re.escape(key).replace(r"\.", ".") == key and not key.endswith(_WRAPPED):
            problems.append(
                Problem(
                    where,
                    f"{key!r} is no match where Neural Compressor traces the layer alone and calls it "
                    f"'{key}{_WRAPPED}': it then quantizes it without a word. Write '{key}({_WRAPPED})?' to be safe",
                )
            )
    fields.finish()
    rules = tuple(entry.rule for entry in settings)
    about = "PostTrainingQuantConfig of Neural Compressor"
    return PostTraining(str(document.path), NAME, about, rules, tuple(problems), tuple(settings), approach)


def _approach(fields: ConfigFields, default: str) -> str:
    name = fields.known("approach", tuple(_APPROACHES), default)
    return _APPROACHES[name]


def _recipes(fields: ConfigFields, key: str) -> None:
    recipes = fields.inner(key)
    if recipes is None:
        return
    for name in recipes.unread():
        if name in ("smooth_quant", "fast_bias_correction", "weight_correction", "layer_wise_quant"):
            recipes.changes_numbers(name, "weights or activations are changed before they are rounded", False)
        elif name.endswith("_args"):
            recipes.changes_numbers(name, "options of a recipe", {})
        elif name in ("first_conv_or_matmul_quantization", "last_conv_or_matmul_quantization"):
            recipes.changes_numbers(name, "the first or the last op stays in fp32", True)
        elif name == "pre_post_process_quantization":
            recipes.changes_numbers(name, "ops before and after the main part stay in fp32", True)
        else:
            recipes.skip(*[name] if name in _RECIPES_WITHOUT_EFFECT else [])
    recipes.finish()


_RECIPES_WITHOUT_EFFECT = (
    "gemm_to_matmul",
    "graph_optimization_level",
    "add_qdq_pair_to_weight",
    "optypes_to_exclude_output_quant",
    "dedicated_qdq_pair",
)

_PROPERTIES = ("dtype", "scheme", "granularity", "algorithm", "bits", "group_size")


def _entry(fields: ConfigFields, pattern: Pattern, label: str, approach: str) -> _Settings:
    parts: dict[str, dict[str, list[str]]] = {}
    for part, anywhere in _ANYWHERE.items():
        inner = fields.inner(part)
        parts[part] = {} if inner is None else _properties(inner, part, approach)
        if inner is None or approach == "weight_only":
            continue
        for key, known in anywhere.items():
            without = [value for value in parts[part].get(key, ()) if value not in (*known, *_UNQUANTIZED)]
            if without:
                inner.problem(key, f"{as_text(without)}: Neural Compressor has no such choice here and leaves it out")
    fields.finish()
    rule = Rule(pattern, None, label, fields.where, partial=True)
    return _Settings(rule, parts["weight"], parts["activation"])


def _properties(fields: ConfigFields, part: str, mode: str) -> dict[str, list[str]]:
    """Read the properties of a weight or an activation: property → values, in the order of the file."""
    found = {}
    for key in _PROPERTIES:
        value, where = fields.take(key), fields.at(key)
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        if not values or any(type(each) not in (str, int) for each in values):
            raise QsensError(f"{where}: a text or a list of texts is needed, found {as_text(value)}")
        if len(values) > 1:
            fields.problem(key, f"{as_text(value)}: Neural Compressor tries one after the other as it tunes")
        found[key] = [str(each) for each in values]
        for each in found[key]:
            _check(key, each, where)
    algorithm = found.get("algorithm", [""])[0]
    if algorithm not in _ALGORITHMS["dynamic" if part == "weight" or mode != "static" else "static"]:
        fields.problem(
            "algorithm", f"{algorithm!r} changes numbers and is not simulated: scales are found in another way"
        )
    fields.skip("quant_mode")
    fields.finish()
    return found


_ALGORITHMS = {"static": ("", "kl", "placeholder"), "dynamic": ("", "minmax", "placeholder", "RTN", "rtn")}
"""Ways to find scales that are simulated; ``kl`` is torch's `HistogramObserver`."""

_DTYPES = {
    **{f"{sign}int{bits}": f"int{bits}" for sign in ("", "u") for bits in range(1, 9)},
    "nf4": "nf4",
    "fp4": "fp4_e2m1",
    "fp4_e2m1": "fp4_e2m1",
    "fp4_e2m1_bnb": "fp4_e2m1",
    "fp8_e4m3": "fp8_e4m3",
    "fp8_e4m3fn": "fp8_e4m3",
    "fp8_e5m2": "fp8_e5m2",
}
_SCHEMES = ("sym", "asym", "asym_float")
_GRANULARITIES = {"per_channel": "channel", "per_tensor": "tensor"}


def _check(key: str, value: str, where: str) -> None:
    known = {
        "dtype": (*_DTYPES, "int", *_UNQUANTIZED),
        "scheme": _SCHEMES,
        "granularity": tuple(_GRANULARITIES),
    }.get(key)
    if known is not None and value not in known:
        raise QsensError(f"{where}: {value!r} is not one of {', '.join(known)}")
    if key in ("bits", "group_size") and not re.fullmatch(r"-1|[1-9]\d{0,8}", value):
        raise QsensError(f"{where}: {value!r} is not possible, a whole number from 1 on, or -1, is")


def _of_op(
    op: Op, weight: Mapping[str, str], activation: Mapping[str, str], approach: str
) -> OpScheme | Unknown | None:
    dtypes = weight.get("dtype", "fp32"), activation.get("dtype", "fp32")
    if dtypes[0] in _UNQUANTIZED:
        if dtypes[1] not in _UNQUANTIZED:
            return Unknown(f"w16a{dtypes[1]}", "only activations are quantized, which torch's kernels do not do")
        return None
    if "bits" in weight or "group_size" in weight:
        return OpScheme(_weight_only(weight))
    found = WeightScheme(_DTYPES[dtypes[0]], _granularity(weight, "channel"), (), weight.get("scheme") == "sym")
    if dtypes[1] in _UNQUANTIZED:
        embedding = op.type == "embedding" and weight.get("scheme") == "asym_float" and dtypes[0] == "uint8"
        return EMBEDDING if embedding and found.granularity == "channel" else OpScheme(found)
    kind: Kind = "dynamic" if approach == "dynamic" else "static"
    inputs = ActivationScheme(
        _DTYPES[dtypes[1]], kind, _granularity(activation, "tensor"), (), activation.get("scheme") == "sym"
    )
    return OpScheme(found, inputs, kind == "static")


def _granularity(settings: Mapping[str, str], default: str) -> Any:  # noqa: ANN401  # a `Granularity`
    return _GRANULARITIES.get(settings.get("granularity", ""), default)


def _weight_only(weight: Mapping[str, str]) -> WeightScheme:
    dtype, group = weight["dtype"], int(weight.get("group_size", "32"))
    name = f"int{min(int(weight.get('bits', '4')), 16)}" if dtype == "int" else _DTYPES[dtype]
    granularity: Literal["channel", "group"] = "channel" if group == -1 else "group"
    return WeightScheme(name, granularity, () if group == -1 else (group,), weight.get("scheme", "sym") == "sym")


# What a run chose: best_configure


def _chosen(document: Document) -> Config:
    problems: list[Problem] = []
    fields = ConfigFields(document.value, str(document.path), problems)
    approach = _approach(fields, "static")
    fields.skip("framework", "calib_sampling_size", "calib_iteration", "trial_number", "get_attr", "fx_sub_module_list")
    fields.skip("woq_tuning_cfg", "sub_module_list", "bf16_ops_list", "is_oneshot", "advance", "op_hash", "model_wise")
    fields.changes_numbers("reduce_range", "activations use 7 of 8 bits", False)
    fields.changes_numbers("smoothquant_scale_info", "activations are scaled", {})
    fields.changes_numbers("recipe_cfgs_smooth_quant", "activations are scaled", False)
    _recipes(fields, "recipe_cfgs")
    where = fields.at("op")
    entries: dict[object, object] = typed(fields.take("op"), dict, where)
    fields.finish()
    rules = []
    for key, value in entries.items():
        name, kind = _op_key(key, where)
        inner = ConfigFields(value, f"{where}, {as_text(name)}", problems)
        weight, _ = _chosen_properties(inner.inner("weight"), "weight", approach)
        activation, mode = _chosen_properties(inner.inner("activation"), "activation", approach)
        inner.skip("pattern")
        inner.finish()
        op_type = next((each for each, cls in CLASS_OF.items() if cls == kind), "")
        scheme = _of_op(Op(name, op_type), weight, activation, mode)
        rules.append(_by_name(name, scheme, inner.where))
    return _listed(document, "configuration that Neural Compressor's strategy chose", rules, problems)


def _chosen_properties(fields: ConfigFields | None, part: str, approach: str) -> tuple[dict[str, str], str]:
    """Read what was chosen for a weight or an activation, and whether it is static or dynamic."""
    if fields is None:
        return {}, approach
    mode = "dynamic" if (fields.optional_text("quant_mode") or approach) == "dynamic" else "static"
    fields.skip("scale", "zero_point", "compute_dtype")
    return {key: values[0] for key, values in _properties(fields, part, mode).items()}, mode


def _op_key(key: object, where: str) -> tuple[str, str]:
    """Name and type of an op: a tuple in YAML, the text of one in JSON."""
    if isinstance(key, tuple) and len(key) == 2 and all(isinstance(part, str) for part in key):
        return key
    match = _KEY.fullmatch(key) if isinstance(key, str) else None
    if match is None:
        raise QsensError(f"{where}: {as_text(key)} is no name of an op, as \"('fc1', 'Linear')\" is")
    return match[1], match[2]


def _by_name(name: str, scheme: OpScheme | Unknown | None, where: str) -> Rule:
    own = name.removesuffix(_WRAPPED)
    return Rule(Pattern("name", own), scheme, own, where)


def _listed(document: Document, about: str, rules: list[Rule], problems: list[Problem]) -> Config:
    if not rules:
        raise QsensError(f"{document.path}: there is no op in it. Nothing would be said about any.")
    seen: set[str] = set()
    for rule in rules:
        if rule.pattern.text in seen:
            raise QsensError(f"{rule.where}: {rule.pattern.text!r} is there twice. Keep one of the two entries.")
        seen.add(rule.pattern.text)
    return Config(str(document.path), NAME, about, tuple(rules), tuple(problems))


# What 3.x saves: qconfig.json


def _qconfig(document: Document) -> Config:
    problems: list[Problem] = []
    rules = []
    path = str(document.path)
    for key, value in document.value.items():
        name, _ = _op_key(key, path)
        outer = ConfigFields(value, f"{path}, {as_text(name)}", problems)
        algorithms = outer.unread()
        if len(algorithms) != 1:
            raise QsensError(f"{outer.where}: the config of one algorithm is needed, found {as_text(algorithms)}")
        fields = ConfigFields(outer.take(algorithms[0]), outer.at(algorithms[0]), problems)
        rules.append(_by_name(name, _of_algorithm(algorithms[0], fields), outer.where))
    return _listed(document, "qconfig.json of Neural Compressor 3.x", rules, problems)


_ROUNDING = {
    "gptq": "weights are rounded by GPTQ, not to the nearest",
    "awq": "weights are scaled by AWQ before they are rounded",
    "teq": "weights are scaled by TEQ before they are rounded",
    "hqq": "zero points are found by HQQ",
}
_WITHOUT_EFFECT = (
    "non_tunable_params",
    "white_list",
    "use_layer_wise",
    "use_block_wise",
    "model_path",
    "quant_lm_head",
    "_is_initialized",
    "double_quant_bits",
    "double_quant_dtype",
    "double_quant_use_sym",
    "double_quant_group_size",
    "absorb_layer_dict",
    "absorb_to_layer",
    "folding",
    "percdamp",
    "block_size",
    "true_sequential",
    "static_groups",
    "hybrid_order",
    "fp8_aware",
    "use_auto_scale",
    "use_auto_clip",
    "quant_zero",
    "quant_scale",
    "scale_quant_group_size",
    "excluded_precisions",
    "model_info",
    "w_algo",
    "act_algo",
)


def _of_algorithm(name: str, fields: ConfigFields) -> OpScheme | Unknown | None:
    dtype = fields.optional_text("dtype")
    if name in ("rtn", *_ROUNDING):
        return _of_weight_only(name, "int" if dtype is None else dtype, fields)
    if name in ("static_quant", "smooth_quant", "pt2e_dynamic_quant"):
        return _of_eight_bits(name, fields)
    if name == "mixed_precision":
        return None
    return Unknown(name, f"{name} of Neural Compressor is no algorithm that is known here")


def _of_weight_only(name: str, dtype: str, fields: ConfigFields) -> OpScheme | None:
    if dtype in _UNQUANTIZED:
        return None
    where = fields.at("dtype")
    _check("dtype", dtype, where)
    if name in _ROUNDING:
        fields.problems.append(Problem(fields.where, f"{_ROUNDING[name]}, which is not simulated"))
    bits, group = fields.integer("bits"), fields.integer("group_size")
    symmetric = fields.flag("use_sym", default=name != "hqq")
    for key, what in (
        ("use_full_range", "scales are larger"),
        ("use_mse_search", "scales are searched for"),
        ("use_double_quant", "scales are rounded, too"),
        ("act_order", "columns are quantized in an order of their own"),
    ):
        fields.changes_numbers(key, what, False)
    fields.changes_numbers("group_dim", "groups go along outputs", 1)
    fields.skip(*_WITHOUT_EFFECT)
    fields.finish()
    settings = {
        "dtype": dtype,
        "bits": "4" if bits is None else str(bits),
        "group_size": "32" if group is None else str(group),
        "scheme": "sym" if symmetric else "asym",
    }
    for key in ("bits", "group_size"):
        _check(key, settings[key], fields.at(key))
    return OpScheme(_weight_only(settings))


def _of_eight_bits(name: str, fields: ConfigFields) -> OpScheme | Unknown | None:
    if name == "smooth_quant":
        fields.changes_numbers("alpha", "activations are scaled by SmoothQuant before they are rounded")
        for key in ("init_alpha", "alpha_min", "alpha_max", "alpha_step", "shared_criterion", "do_blockwise"):
            fields.skip(key)
        fields.skip("scale_sharing", "auto_alpha_args")
    sides: list[dict[str, str]] = []
    for prefix in ("w_", "act_"):
        side = {
            "dtype": fields.text(f"{prefix}dtype"),
            "granularity": fields.text(f"{prefix}granularity"),
            "scheme": "sym" if fields.flag(f"{prefix}sym", default=prefix == "w_") else "asym",
        }
        for key in ("dtype", "granularity"):
            _check(key, side[key], fields.at(f"{prefix}{key}"))
        sides.append(side)
    fields.skip(*_WITHOUT_EFFECT)
    fields.finish()
    return _of_op(Op("", "linear"), sides[0], sides[1], "dynamic" if name == "pt2e_dynamic_quant" else "static")
