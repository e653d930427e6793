"""ONNX Runtime: the nodes that its quantization is to leave out, and what else ``quantize_static`` is told.

``nodes_to_exclude`` holds exact names of nodes. torch.onnx names a node after the module that it comes from:
``/model/layers.0/self_attn/q_proj/MatMul`` is the product of the op ``model.layers.0.self_attn.q_proj``, and
``/mlp/mlp.0/Gemm`` that of ``mlp.0`` in a Sequential.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_qsens.configs.documents import as_text
from pytest_qsens.configs.fields import ConfigFields
from pytest_qsens.configs.rules import CLASS_OF, Config, Pattern, Problem, Rule
from pytest_qsens.errors import QsensError
from pytest_qsens.files import typed
from pytest_qsens.quant.observer_names import percentile_name
from pytest_qsens.quant.op_scheme import ActivationScheme, NotTold, OpScheme, Unknown, WeightScheme

if TYPE_CHECKING:
    from pytest_qsens.configs.documents import Document
from pytest_qsens.quant.op_scheme import Granularity

NAME = "onnxruntime"
TITLE = "ONNX Runtime (JSON or YAML with 'nodes_to_exclude', or names of nodes as a list or one a line)"

_EXCLUDE = "nodes_to_exclude"
_NODE = re.compile(r"/(?P<modules>(?:[^/]+/)*)(?P<kind>[A-Za-z]+)(?:_\d+)?")
_PRODUCTS = {
    "MatMul": ("linear",),
    "Gemm": ("linear",),
    "Conv": ("conv1d", "conv2d", "conv3d"),
    "Gather": ("embedding",),
}
"""Kind of node → types of op whose own product it is; others of a module are its bias, reshapes, activations."""

_ARGUMENTS = (
    "per_channel",
    "weight_type",
    "activation_type",
    "reduce_range",
    "extra_options",
    "quant_format",
    "calibrate_method",
)


def detect(document: Document) -> bool:
    """Whether a file is of this format."""
    value = document.value
    if isinstance(value, list):
        return bool(value) and all(isinstance(name, str) and name.startswith("/") for name in value)
    return isinstance(value, dict) and _EXCLUDE in value


def read(document: Document) -> Config:
    """Read a file.

    Raises:
        QsensError: If a value is of a wrong type, or is none that ONNX Runtime has.

    """
    problems: list[Problem] = []
    value = {_EXCLUDE: document.value} if isinstance(document.value, list) else document.value
    fields = ConfigFields(typed(value, dict, str(document.path)), str(document.path), problems)
    if fields.peek(_EXCLUDE) is None:
        raise QsensError(f"{document.path}: there is no {_EXCLUDE!r} in it.")
    rest = _rest(fields)
    nodes = fields.texts_of(_EXCLUDE)
    fields.skip("model_input", "model_output", "use_external_data_format", "calibration_providers")
    for key in ("nodes_to_quantize", "op_types_to_quantize"):
        fields.changes_numbers(key, "only these are quantized; exclusions alone are read", [])
    fields.finish()
    places = [f"{document.path}, node {number} of {_EXCLUDE}" for number in range(1, len(nodes) + 1)]
    read_nodes = [_rule(name, where, problems) for (name, _), where in zip(nodes, places, strict=True)]
    rules = [rule for rule in read_nodes if rule is not None]
    label = "the rest, of which the file says nothing" if isinstance(rest, Unknown) else "the rest"
    embedding = rest
    if isinstance(rest, OpScheme) and rest.weight is not None:  # its Gather has one scale, per_channel or not
        embedding = OpScheme(replace(rest.weight, granularity="tensor"))
    others = tuple(kind for kind in CLASS_OF if kind != "embedding")
    for scheme, types in ((embedding, ("embedding",)), (rest, others)):
        rules.append(Rule(Pattern("any", "", types=types), scheme, label, str(document.path), expected=False))
    return Config(str(document.path), NAME, "exclusions of ONNX Runtime", tuple(rules), tuple(problems))


def _rule(name: str, where: str, problems: list[Problem]) -> Rule | None:
    match = _NODE.fullmatch(name)
    if match is None or not match["modules"]:
        problems.append(
            Problem(
                where,
                f"{name!r} does not tell its module. Names that do look like "
                "/model/layers.0/self_attn/q_proj/MatMul; torch.onnx.export writes them with dynamo=False",
            )
        )
        return None
    types = _PRODUCTS.get(match["kind"])
    if types is None:
        problems.append(
            Problem(
                where,
                f"{name!r} is no product of an op ({', '.join(_PRODUCTS)} are): leaving it out changes nothing here",
            )
        )
        return None
    scopes = match["modules"].strip("/").split("/")
    # a Sequential is a scope of its own, and its name is repeated in those of its children: mlp/mlp.0
    module = ".".join(
        scope for scope, inner in zip(scopes, [*scopes[1:], ""], strict=True) if not inner.startswith(f"{scope}.")
    )
    return Rule(Pattern("name", module, types=types), None, f"{_EXCLUDE}: {name}", where)


_NOT_TOLD = "the file says what is not quantized, and not how the rest is; pytest takes --qsens-scheme beside it"


def _rest(fields: ConfigFields) -> OpScheme | Unknown:
    """How everything is quantized that is not left out; defaults are those of ``quantize_static``."""
    if not any(fields.peek(key) is not None for key in _ARGUMENTS):
        return NotTold("not told", _NOT_TOLD)
    options = fields.inner("extra_options") or ConfigFields({}, fields.where, fields.problems)
    weight_type, activation_type = _type(fields, "weight_type", "QInt8"), _type(fields, "activation_type", "QUInt8")
    per_channel = fields.flag("per_channel", default=False)
    fields.changes_numbers("reduce_range", "weights use 7 of 8 bits", False)
    weight_symmetric = options.flag("WeightSymmetric", default="U" not in weight_type)
    activation_symmetric = options.flag("ActivationSymmetric", default=False)
    observer = _observer(fields, options)
    for name in options.unread():
        if name.startswith(("SmoothQuant", "Calib")):
            options.changes_numbers(name, "activations are scaled or calibrated in a way of their own", False)
    options.skip(
        "EnableSubgraph",
        "ForceQuantizeNoInputCheck",
        "DedicatedQDQPair",
        "AddQDQPairToWeight",
        "QDQKeepRemovableActivations",
    )
    options.finish()
    fields.take("extra_options")
    fields.skip("quant_format")  # outputs are quantized in both
    granularity: Granularity = "channel" if per_channel else "tensor"
    dtypes = [name.removeprefix("Q").removeprefix("U").lower() for name in (weight_type, activation_type)]
    floats = {"float8e4m3fn": "fp8_e4m3"}
    weight = WeightScheme(floats.get(dtypes[0], dtypes[0]), granularity, (), weight_symmetric)
    inputs = ActivationScheme(floats.get(dtypes[1], dtypes[1]), "static", "tensor", (), activation_symmetric, observer)
    return OpScheme(weight, inputs, output=True)


PERCENTILE = 99.999
"""What ``Percentile`` keeps where ``CalibPercentile`` is not given."""


def _observer(fields: ConfigFields, options: ConfigFields) -> str:
    """Read ``calibrate_method``, a name or what Python prints of it; that of ``quantize_static`` if there is none."""
    value = fields.optional_text("calibrate_method")
    if value is None:
        return "minmax"
    name = value.removeprefix("CalibrationMethod.")
    if name not in _METHODS:
        raise QsensError(f"{fields.at('calibrate_method')}: {value!r} is not one of {', '.join(_METHODS)}")
    if name == "Percentile":
        share = options.optional_number("CalibPercentile")
        share = PERCENTILE if share is None else round(share, 9)  # as many digits as a name has
        if not 50 <= share < 100:
            raise QsensError(f"{options.at('CalibPercentile')}: {share:g} is not possible, from 50 to below 100 is")
        return percentile_name(share)
    why = _METHODS[name]
    if why is not None:
        fields.problem("calibrate_method", f"{value!r} changes numbers and is not simulated: {why}")
    return "minmax"


_METHODS = {
    "MinMax": None,
    "Percentile": None,
    "Entropy": "it compares no thresholds unless it is given more bins than levels. Ours is 'entropy'",
    "Distribution": "scales are made of the mean and the deviation",
}
"""Method → what is in the way."""

_TYPES = ("QInt4", "QUInt4", "QInt8", "QUInt8", "QInt16", "QUInt16", "QFLOAT8E4M3FN")


def _type(fields: ConfigFields, key: str, default: str) -> str:
    value = fields.optional_text(key)
    if value is None:
        return default
    name = value.removeprefix("QuantType.")
    if name not in _TYPES:
        raise QsensError(f"{fields.at(key)}: {as_text(value)} is not one of {', '.join(_TYPES)}")
    return name
