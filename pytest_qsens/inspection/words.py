"""Schemes in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.inspection.found import NAMES

if TYPE_CHECKING:
    from pytest_qsens.quant.op_scheme import ActivationScheme, OpScheme, SmoothQuant, WeightScheme


def described(parts: OpScheme, op_type: str) -> str:
    """Say what a scheme is.

    >>> from pytest_qsens.quant.op_scheme import parse
    >>> described(parse("w8a8_dynamic"), "linear")
    'weight int8 per channel; input int8 per token, dynamic'
    >>> described(parse("w8a8_static_minmax_smoothquant"), "linear")
    'weight int8 per channel; input int8 per tensor, with zero points, static, by minmax; SmoothQuant, alpha 0.5'
    >>> described(parse("w8a8_dynamic_act_asym"), "linear")
    'weight int8 per channel; input int8 per token, with zero points, dynamic'
    >>> described(parse("w8a8_dynamic_smoothquant_unshared"), "linear")
    'weight int8 per channel; input int8 per token, dynamic; SmoothQuant, alpha 0.5, scales not shared'
    >>> described(parse("w8a8"), "embedding")
    'weight int8 per row'
    >>> described(parse("kv_int8_dynamic"), "k")
    'keys int8 per token, dynamic'
    """
    if parts.cache is not None:
        what = "queries, keys and values" if parts.queries else "keys and values"
        return f"{NAMES.get(op_type, what)} {_activation(parts.cache)}"
    if op_type == "embedding":
        return f"weight {'int8 per row' if parts.weight is None else _weight(parts.weight, 'row')}"
    found = [] if parts.weight is None else [f"weight {_weight(parts.weight)}"]
    found += [] if parts.activation is None else [f"input {_activation(parts.activation)}"]
    found += ["output requantized"] if parts.output else []
    found += [] if parts.smoothing is None else [_smoothing(parts.smoothing)]
    return "; ".join(found)


def _weight(weight: WeightScheme, channel: str = "channel") -> str:
    extent = f"per {channel}" if weight.granularity == "channel" else _per(weight)
    zero_points = "" if weight.symmetric else ", with zero points"
    return f"{weight.dtype} {extent}{zero_points}{_mode(weight)}"


def _activation(activation: ActivationScheme) -> str:
    zero_points = "" if activation.symmetric else ", with zero points"
    found = f"{activation.dtype} {_per(activation)}{zero_points}{_mode(activation)}, {activation.kind}"
    return f"{found}, by {activation.observer}" if activation.observer else found


def _mode(part: WeightScheme | ActivationScheme) -> str:
    return f", scales {part.scaling_mode}" if part.scaling_mode else ""


def _smoothing(smoothing: SmoothQuant) -> str:
    by_range = ", by ranges" * (smoothing.statistic == "range")
    return f"SmoothQuant, alpha {smoothing.alpha:g}{by_range}" + ", scales not shared" * (not smoothing.shared)


def _per(part: WeightScheme | ActivationScheme) -> str:
    if part.granularity == "group":
        return f"per group of {part.size[0]}"
    return f"per block of {part.size[0]} x {part.size[1]}" if part.granularity == "block" else f"per {part.granularity}"
