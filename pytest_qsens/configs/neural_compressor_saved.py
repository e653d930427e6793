"""What Intel Neural Compressor saves, each op by its name: ``best_configure``, and ``qconfig.json`` of 3.x."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_qsens.configs.documents import as_text
from pytest_qsens.configs.fields import ConfigFields
from pytest_qsens.configs.neural_compressor_smoothing import FOLDED, SHARING, read_alpha
from pytest_qsens.configs.neural_compressor_terms import (
    FORMAT,
    KEY,
    UNQUANTIZED,
    WRAPPED,
    approach_of,
    check,
    of_op,
    properties,
    read_recipes,
    weight_only,
)
from pytest_qsens.configs.observers import NEURAL_COMPRESSOR
from pytest_qsens.configs.rules import CLASS_OF, Config, Pattern, Problem, Rule
from pytest_qsens.errors import QsensError
from pytest_qsens.files import typed
from pytest_qsens.ops import Op
from pytest_qsens.quant.op_scheme import OpScheme, SmoothQuant, Unknown

if TYPE_CHECKING:
    from pytest_qsens.configs.documents import Document


# What a run chose: best_configure


def read_chosen(document: Document) -> Config:
    """Read ``best_configure``; raises as `neural_compressor.read`."""
    problems: list[Problem] = []
    fields = ConfigFields(document.value, str(document.path), problems)
    approach = approach_of(fields, "static")
    fields.skip("framework", "calib_sampling_size", "calib_iteration", "trial_number", "get_attr", "fx_sub_module_list")
    fields.skip("woq_tuning_cfg", "sub_module_list", "bf16_ops_list", "is_oneshot", "advance", "op_hash", "model_wise")
    fields.changes_numbers("reduce_range", "activations use 7 of 8 bits", False)
    fields.changes_numbers("smoothquant_scale_info", "activations are scaled", {})
    fields.changes_numbers("recipe_cfgs_smooth_quant", "activations are scaled", False)
    smoothed = read_recipes(fields, "recipe_cfgs", approach)
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
        scheme = of_op(Op(name, op_type), weight, activation, mode)
        if smoothed is not None:
            if not op_type:  # a norm, say, which is then left alone
                continue
            scheme = smoothed.of(Op(name.removesuffix(WRAPPED), op_type), scheme)
        rules.append(_by_name(name, scheme, inner.where))
    if smoothed is not None:
        problems += smoothed.without_strength((rule.pattern.text, rule.scheme) for rule in rules)
    about = "configuration that Neural Compressor's strategy chose"
    return _listed(document, about + (f"; {SHARING}" if smoothed is not None else ""), rules, problems)


def _chosen_properties(fields: ConfigFields | None, part: str, approach: str) -> tuple[dict[str, str], str]:
    """Read what was chosen for a weight or an activation, and whether it is static or dynamic."""
    if fields is None:
        return {}, approach
    mode = "dynamic" if (fields.optional_text("quant_mode") or approach) == "dynamic" else "static"
    fields.skip("scale", "zero_point", "compute_dtype")
    return {key: values[0] for key, values in properties(fields, part, mode).items()}, mode


def _op_key(key: object, where: str) -> tuple[str, str]:
    """Name and type of an op: a tuple in YAML, the text of one in JSON."""
    if isinstance(key, tuple) and len(key) == 2 and all(isinstance(part, str) for part in key):
        return key
    match = KEY.fullmatch(key) if isinstance(key, str) else None
    if match is None:
        raise QsensError(f"{where}: {as_text(key)} is no name of an op, as \"('fc1', 'Linear')\" is")
    return match[1], match[2]


def _by_name(name: str, scheme: OpScheme | Unknown | None, where: str) -> Rule:
    own = name.removesuffix(WRAPPED)
    return Rule(Pattern("name", own), scheme, own, where)


def _listed(document: Document, about: str, rules: list[Rule], problems: list[Problem]) -> Config:
    if not rules:
        raise QsensError(f"{document.path}: there is no op in it. Nothing would be said about any.")
    seen: set[str] = set()
    for rule in rules:
        if rule.pattern.text in seen:
            raise QsensError(f"{rule.where}: {rule.pattern.text!r} is there twice. Keep one of the two entries.")
        seen.add(rule.pattern.text)
    return Config(str(document.path), FORMAT, about, tuple(rules), tuple(problems))


# What 3.x saves: qconfig.json


def read_qconfig(document: Document) -> Config:
    """Read ``qconfig.json``; raises as `neural_compressor.read`."""
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
    about = "qconfig.json of Neural Compressor 3.x"
    shares = any(isinstance(rule.scheme, OpScheme) and _shares(rule.scheme) for rule in rules)
    return _listed(document, about + (f"; {SHARING}" if shares else ""), rules, problems)


def _shares(scheme: OpScheme) -> bool:
    return scheme.smoothing is not None and scheme.smoothing.shared


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
    if dtype in UNQUANTIZED:
        return None
    where = fields.at("dtype")
    check("dtype", dtype, where)
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
        check(key, settings[key], fields.at(key))
    return OpScheme(weight_only(settings))


def _smoothing(fields: ConfigFields) -> SmoothQuant | None:
    for key in ("init_alpha", "alpha_min", "alpha_max", "alpha_step", "shared_criterion", "do_blockwise"):
        fields.skip(key)
    fields.skip("auto_alpha_args")
    shared = fields.flag("scale_sharing", default=False)
    alpha = read_alpha(fields)
    if fields.flag("folding", default=False):
        fields.problem("folding", f"true: {FOLDED}")
        return None
    if isinstance(alpha, dict):
        raise QsensError(f"{fields.at('alpha')}: a number or 'auto' is needed, found {as_text(alpha)}")
    return None if alpha is None else SmoothQuant(alpha, shared)


def _of_eight_bits(name: str, fields: ConfigFields) -> OpScheme | Unknown | None:
    smoothing = None
    if name == "smooth_quant":
        smoothing = _smoothing(fields)
    sides: list[dict[str, str]] = []
    for prefix in ("w_", "act_"):
        side = {
            "dtype": fields.text(f"{prefix}dtype"),
            "granularity": fields.text(f"{prefix}granularity"),
            "scheme": "sym" if fields.flag(f"{prefix}sym", default=prefix == "w_") else "asym",
        }
        for key in ("dtype", "granularity"):
            check(key, side[key], fields.at(f"{prefix}{key}"))
        sides.append(side)
    algorithm = fields.optional_text("act_algo")
    if name != "pt2e_dynamic_quant" and algorithm is not None:
        sides[1]["algorithm"] = algorithm
        if algorithm not in NEURAL_COMPRESSOR:
            fields.problem("act_algo", f"{algorithm!r} changes numbers and is not simulated: it finds scales otherwise")
    fields.skip(*_WITHOUT_EFFECT)
    fields.finish()
    found = of_op(Op("", "linear"), sides[0], sides[1], "dynamic" if name == "pt2e_dynamic_quant" else "static")
    return replace(found, smoothing=smoothing) if isinstance(found, OpScheme) else found
