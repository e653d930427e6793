"""Intel Neural Compressor: what a run is given, what its strategy would have chosen, and ``qconfig.json`` of 3.x."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from pytest_qsens.configs.observers import NEURAL_COMPRESSOR
from pytest_qsens.configs.rules import CLASS_OF
from pytest_qsens.configs.simulated import EMBEDDING
from pytest_qsens.configs.writers.assigned import Assigned, Inexpressible, most_common
from pytest_qsens.configs.writers.dump import Row
from pytest_qsens.quant.op_scheme import INTEGERS, ActivationScheme, OpScheme, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Approach = Literal["static", "dynamic", "weight_only"]

_OFF = Row({"weight": {"dtype": ["fp32"]}, "activation": {"dtype": ["fp32"]}})
_STATIC = {
    OpScheme(
        WeightScheme("int8"),
        ActivationScheme("int8", "static", "tensor", symmetric=symmetric, observer=observer),
        output=True,
    ): (scheme, algorithm)
    for symmetric, scheme in ((False, "asym"), (True, "sym"))
    for algorithm, observer in NEURAL_COMPRESSOR.items()
}
"""What its kernels do with static scales → its names for activations' zero points and observer."""

_USUAL = ("asym", "kl")

_DYNAMIC = OpScheme(WeightScheme("int8"), ActivationScheme("int8", "dynamic", "tensor", symmetric=False))
_GROUPS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_INTEGERS = INTEGERS[:8]
_FLOATS = {"nf4": "nf4", "fp4_e2m1": "fp4_e2m1"}
_FLOATS_OF_RTN = {**_FLOATS, "fp8_e4m3": "fp8_e4m3fn", "fp8_e5m2": "fp8_e5m2"}


def write_given(assigned: Sequence[Assigned]) -> dict[str, object]:
    """Write arguments of ``PostTrainingQuantConfig``: what is not as its approach has it by default, op by op.

    Raises:
        Inexpressible: If it has no such choice, or not together with the others.

    """
    approach = _approach(assigned)
    entries: dict[str, object] = {}
    for one in assigned:
        # a layer that it traces alone is called .module
        name = f"{re.escape(one.op.name)}(\\.module)?"
        if one.scheme is None:
            entries[name] = _OFF
        elif approach == "weight_only":
            weight = _round_to_nearest(_weight_only(one, one.scheme, _FLOATS))
            entries[name] = Row({"weight": {key: [value] for key, value in weight.items()}})
        elif _STATIC.get(one.scheme, _USUAL) != _USUAL:
            properties = zip(("scheme", "algorithm"), _STATIC[one.scheme], _USUAL, strict=True)
            entries[name] = Row({"activation": {key: [own] for key, own, usual in properties if own != usual}})
    return {"approach": approach, "op_name_dict": entries}


def write_chosen(assigned: Sequence[Assigned]) -> dict[str, object]:
    """Write ``best_configure``, in which every op is named, as a model has them that is traced as a whole.

    Raises:
        Inexpressible: If no strategy can choose that.

    """
    approach = _approach(assigned)
    return {
        "approach": "post_training_weight_only" if approach == "weight_only" else f"post_training_{approach}_quant",
        "framework": "pytorch_fx",
        "fx_sub_module_list": None,
        "bf16_ops_list": [],
        "reduce_range": False,
        "op": {(one.op.name, CLASS_OF[one.op.type]): Row(_choice(one, approach)) for one in assigned},
    }


def _choice(one: Assigned, approach: Approach) -> dict[str, object]:
    if one.scheme is None:
        return {"weight": {"dtype": "fp32"}, "activation": {"dtype": "fp32", "quant_mode": "precision"}}
    if approach == "weight_only":
        return {
            "weight": _round_to_nearest(_weight_only(one, one.scheme, _FLOATS)),
            "activation": {"dtype": "fp32", "quant_mode": approach},
        }
    activation = {"algorithm": "placeholder", "dtype": "fp32", "granularity": "per_tensor", "quant_mode": approach}
    weight = {"algorithm": "minmax", "dtype": "int8", "granularity": "per_channel", "scheme": "sym"}
    if one.scheme == EMBEDDING:
        weight |= {"dtype": "uint8", "scheme": "asym_float"}
        activation["scheme"] = "asym"
    else:
        scheme, algorithm = _STATIC[one.scheme] if approach == "static" else ("asym", "minmax")
        activation |= {"algorithm": algorithm, "dtype": "uint8", "scheme": scheme}
    return {"weight": weight, "activation": activation}


def _round_to_nearest(weight: WeightScheme) -> dict[str, object]:
    return {
        "dtype": "int" if weight.dtype in _INTEGERS else _FLOATS[weight.dtype],
        "bits": _bits(weight),
        "group_size": weight.size[0] if weight.size else -1,
        "scheme": "sym" if weight.symmetric else "asym",
        "algorithm": "RTN",
    }


def write_qconfig(assigned: Sequence[Assigned]) -> dict[str, object]:
    """Write ``qconfig.json``: round-to-nearest weights of linear layers, or static quantization.

    Raises:
        Inexpressible: If it is another scheme, or a type of op that these do not quantize.

    """
    quantized = [one for one in assigned if one.scheme is not None]
    static = bool(quantized) and most_common(quantized) in _STATIC
    return {f"('{one.op.name}', '{CLASS_OF[one.op.type]}')": Row(_algorithm(one, static=static)) for one in assigned}


def _algorithm(one: Assigned, *, static: bool) -> dict[str, object]:
    if one.op.type == "embedding" and one.scheme is not None:
        raise Inexpressible(one, "its algorithms do not quantize embeddings")
    if static:
        found = _USUAL if one.scheme is None else _STATIC.get(one.scheme)
        if found is None:
            raise Inexpressible(one, "other ops are quantized with static scales, and a file has one algorithm")
        dtypes = ("fp32", "fp32") if one.scheme is None else ("int8", "uint8")
        weight = {"w_dtype": dtypes[0], "w_sym": True, "w_granularity": "per_channel", "w_algo": "minmax"}
        scheme, algorithm = found
        activation = {"act_dtype": dtypes[1], "act_sym": scheme == "sym", "act_granularity": "per_tensor"}
        return {"static_quant": {**weight, **activation, "act_algo": algorithm}}
    if one.scheme is None:
        return {"rtn": {"dtype": "fp32"}}
    own = _weight_only(one, one.scheme, _FLOATS_OF_RTN)
    return {
        "rtn": {
            "dtype": "int" if own.dtype in _INTEGERS else _FLOATS_OF_RTN[own.dtype],
            "bits": _bits(own),
            "use_sym": own.symmetric,
            "group_size": own.size[0] if own.size else -1,
        }
    }


def _bits(weight: WeightScheme) -> int:
    return int(weight.dtype.removeprefix("int")) if weight.dtype in _INTEGERS else 8 if "8" in weight.dtype else 4


def _approach(assigned: Iterable[Assigned]) -> Approach:
    """How all ops are quantized that are not embeddings.

    Raises:
        Inexpressible: If there are several ways, or one that there is not.

    """
    found: Approach | None = None
    embedding: Assigned | None = None
    for one in assigned:
        if one.scheme is None:
            continue
        if one.op.type == "embedding":
            if one.scheme != EMBEDDING:
                raise Inexpressible(one, f"rows of embeddings are {EMBEDDING.name}")
            embedding = one
            continue
        own = _approach_of(one, one.scheme)
        if found is not None and own != found:
            raise Inexpressible(one, f"other ops are quantized with approach {found!r}, and a file has one approach")
        found = own
    if found == "weight_only" and embedding is not None:
        raise Inexpressible(embedding, "other ops have weight-only schemes, and with these it quantizes no embedding")
    return found or "static"


def _approach_of(one: Assigned, scheme: OpScheme) -> Approach:
    if scheme in _STATIC:
        return "static"
    if scheme == _DYNAMIC:
        if one.op.type.startswith("conv"):
            raise Inexpressible(one, "it has no convolution with dynamic activations")
        return "dynamic"
    _weight_only(one, scheme, _FLOATS)
    return "weight_only"


def _weight_only(one: Assigned, scheme: OpScheme, floats: dict[str, str]) -> WeightScheme:
    """Weight of a weight-only scheme that round-to-nearest has.

    Raises:
        Inexpressible: If it is another one.

    """
    weight = scheme.weight
    if weight is None or scheme.activation is not None or scheme.output:
        known = ", ".join(known.name for known in (*_STATIC, _DYNAMIC))
        raise Inexpressible(one, f"with activations or outputs it has {known}")
    if one.op.type != "linear":
        raise Inexpressible(one, "weight-only schemes are for linear layers")
    if weight.dtype not in (*_INTEGERS, *floats):
        raise Inexpressible(one, f"weights are {weight.dtype}; it has integers up to 8 bits, {', '.join(floats)}")
    if weight.granularity not in ("channel", "group"):
        raise Inexpressible(one, f"weights have a scale per {weight.granularity}, not per channel or group")
    if weight.granularity == "group" and weight.size[0] not in _GROUPS:
        raise Inexpressible(one, f"weights have groups of {weight.size[0]}, not of {', '.join(map(str, _GROUPS))}")
    if weight.dtype in floats and not weight.symmetric:
        raise Inexpressible(one, f"weights of {weight.dtype} have no zero points")
    return weight
