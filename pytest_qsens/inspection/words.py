"""Schemes in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_qsens.quant.op_scheme import ActivationScheme, OpScheme, SmoothQuant, WeightScheme


def told(parts: OpScheme, op_type: str) -> str:
    """Say what a scheme is.

    >>> from pytest_qsens.quant.op_scheme import parse
    >>> told(parse("w8a8_dynamic"), "linear")
    'weight int8 per channel; input int8 per token, dynamic'
    >>> told(parse("w8a8_static_minmax_smoothquant"), "linear")
    'weight int8 per channel; input int8 per tensor, static, by minmax; SmoothQuant, alpha 0.5'
    >>> told(parse("w8a8"), "embedding")
    'weight int8 per row'
    """
    if parts.cache is not None:
        what = "queries, keys and values" if parts.queries else "keys and values"
        return f"{what} {_activation(parts.cache)}"
    if op_type == "embedding":
        return f"weight {'int8 per row' if parts.weight is None else _weight(parts.weight, 'row')}"
    found = [] if parts.weight is None else [f"weight {_weight(parts.weight)}"]
    found += [] if parts.activation is None else [f"input {_activation(parts.activation)}"]
    found += ["output requantized"] if parts.output else []
    found += [] if parts.smoothing is None else [_smoothing(parts.smoothing)]
    return "; ".join(found)


def _weight(weight: WeightScheme, channel: str = "channel") -> str:
    extent = f"per {channel}" if weight.granularity == "channel" else _per(weight)
    return f"{weight.dtype} {extent}" + ", with zero points" * (not weight.symmetric)


def _activation(activation: ActivationScheme) -> str:
    found = f"{activation.dtype} {_per(activation)}, {activation.kind}"
    return f"{found}, by {activation.observer}" if activation.observer else found


def _smoothing(smoothing: SmoothQuant) -> str:
    return f"SmoothQuant, alpha {smoothing.alpha:g}" + ", of its own" * (not smoothing.shared)


def _per(part: WeightScheme | ActivationScheme) -> str:
    if part.granularity == "group":
        return f"per group of {part.size[0]}"
    return f"per block of {part.size[0]} x {part.size[1]}" if part.granularity == "block" else f"per {part.granularity}"
