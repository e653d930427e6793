"""Terms that all files of Intel Neural Compressor share: properties of weights and activations, and what they mean."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

from pytest_qsens.configs.documents import as_text
from pytest_qsens.configs.neural_compressor_smoothing import Smoothed, read_smoothing
from pytest_qsens.configs.observers import NEURAL_COMPRESSOR
from pytest_qsens.configs.simulated import EMBEDDING
from pytest_qsens.errors import QsensError
from pytest_qsens.quant.op_scheme import ActivationScheme, OpScheme, Unknown, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_qsens.configs.fields import ConfigFields
    from pytest_qsens.ops import Op
    from pytest_qsens.quant.op_scheme import Kind

FORMAT = "neural-compressor"
WRAPPED = ".module"
KEY = re.compile(r"\('(.+)', '(.+)'\)")
UNQUANTIZED = ("fp32", "bf16", "fp16")
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


def approach_of(fields: ConfigFields, default: str) -> str:
    """Read ``approach``: static, dynamic, weight_only or auto."""
    name = fields.known("approach", tuple(_APPROACHES), default)
    return _APPROACHES[name]


def read_recipes(fields: ConfigFields, key: str, approach: str) -> Smoothed | None:
    """Note what recipes change beside rounding, and return how layers are smoothed."""
    recipes = fields.inner(key)
    if recipes is None:
        return None
    smoothed = read_smoothing(recipes, approach)
    for name in recipes.unread():
        if name in ("fast_bias_correction", "weight_correction", "layer_wise_quant"):
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
    return smoothed


_RECIPES_WITHOUT_EFFECT = (
    "gemm_to_matmul",
    "graph_optimization_level",
    "add_qdq_pair_to_weight",
    "optypes_to_exclude_output_quant",
    "dedicated_qdq_pair",
)

_PROPERTIES = ("dtype", "scheme", "granularity", "algorithm", "bits", "group_size")


def properties(fields: ConfigFields, part: str, mode: str) -> dict[str, list[str]]:
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
            check(key, each, where)
    algorithm = found.get("algorithm", [""])[0]
    if algorithm not in _ALGORITHMS["dynamic" if part == "weight" or mode != "static" else "static"]:
        fields.problem(
            "algorithm", f"{algorithm!r} changes numbers and is not simulated: scales are found in another way"
        )
    fields.skip("quant_mode")
    fields.finish()
    return found


_ALGORITHMS = {
    "static": ("", "placeholder", *NEURAL_COMPRESSOR),
    "dynamic": ("", "minmax", "placeholder", "RTN", "rtn"),
}
"""Ways to find scales that are simulated."""

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


def check(key: str, value: str, where: str) -> None:
    """Check the value of a property.

    Raises:
        QsensError: If Neural Compressor has no such value; with the place.

    """
    known = {
        "dtype": (*_DTYPES, "int", *UNQUANTIZED),
        "scheme": _SCHEMES,
        "granularity": tuple(_GRANULARITIES),
    }.get(key)
    if known is not None and value not in known:
        raise QsensError(f"{where}: {value!r} is not one of {', '.join(known)}")
    if key in ("bits", "group_size") and not re.fullmatch(r"-1|[1-9]\d{0,8}", value):
        raise QsensError(f"{where}: {value!r} is not possible, a whole number from 1 on, or -1, is")


def of_op(op: Op, weight: Mapping[str, str], activation: Mapping[str, str], approach: str) -> OpScheme | Unknown | None:
    """Scheme that properties of an op's weight and activation mean."""
    dtypes = weight.get("dtype", "fp32"), activation.get("dtype", "fp32")
    if dtypes[0] in UNQUANTIZED:
        if dtypes[1] not in UNQUANTIZED:
            return Unknown(f"w16a{dtypes[1]}", "only activations are quantized, which torch's kernels do not do")
        return None
    if "bits" in weight or "group_size" in weight:
        return OpScheme(weight_only(weight))
    found = WeightScheme(_DTYPES[dtypes[0]], _granularity(weight, "channel"), (), weight.get("scheme") == "sym")
    if dtypes[1] in UNQUANTIZED:
        embedding = op.type == "embedding" and weight.get("scheme") == "asym_float" and dtypes[0] == "uint8"
        return EMBEDDING if embedding and found.granularity == "channel" else OpScheme(found)
    kind: Kind = "dynamic" if approach == "dynamic" else "static"
    observer = NEURAL_COMPRESSOR.get(activation.get("algorithm", ""), "") if kind == "static" else ""
    symmetric = activation.get("scheme") == "sym"
    inputs = ActivationScheme(_DTYPES[dtypes[1]], kind, _granularity(activation, "tensor"), (), symmetric, observer)
    return OpScheme(found, inputs, kind == "static")


def _granularity(settings: Mapping[str, str], default: str) -> Any:  # noqa: ANN401  # a `Granularity`
    return _GRANULARITIES.get(settings.get("granularity", ""), default)


def weight_only(weight: Mapping[str, str]) -> WeightScheme:
    """Scheme of a weight that is rounded alone, with bits and a group size."""
    dtype, group = weight["dtype"], int(weight.get("group_size", "32"))
    name = f"int{min(int(weight.get('bits', '4')), 16)}" if dtype == "int" else _DTYPES[dtype]
    granularity: Literal["channel", "group"] = "channel" if group == -1 else "group"
    return WeightScheme(name, granularity, () if group == -1 else (group,), weight.get("scheme", "sym") == "sym")
