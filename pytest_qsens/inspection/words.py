"""Schemes in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_qsens.quant.op_scheme import ActivationScheme, OpScheme, WeightScheme


def told(parts: OpScheme, op_type: str) -> str:
    """Say what a scheme is.

    >>> from pytest_qsens.quant.op_scheme import parse
    >>> told(parse("w8a8_dynamic"), "linear")
    'weight int8 per channel; input int8 per token, dynamic'
    >>> told(parse("w8a8"), "embedding")
    'weight int8 per row'
    """
    if op_type == "embedding":
        return "weight int8 per row"
    found = [] if parts.weight is None else [f"weight {_weight(parts.weight)}"]
    found += [] if parts.activation is None else [f"input {_activation(parts.activation)}"]
    found += ["output requantized"] if parts.output else []
    return "; ".join(found)


def _weight(weight: WeightScheme) -> str:
    return f"{weight.dtype} {_per(weight)}" + ", with zero points" * (not weight.symmetric)


def _activation(activation: ActivationScheme) -> str:
    return f"{activation.dtype} {_per(activation)}, {activation.kind}"


def _per(part: WeightScheme | ActivationScheme) -> str:
    if part.granularity == "group":
        return f"per group of {part.size[0]}"
    return f"per block of {part.size[0]} x {part.size[1]}" if part.granularity == "block" else f"per {part.granularity}"
