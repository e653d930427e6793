"""Factors of products of two activations in low precision, with scales that do not change along what is summed over."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch

from pytest_qsens.quant.formats import round_between

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qsens.quant.op_scheme import ActivationScheme

Side = Literal["left", "right"]


def side_of(kind: str) -> Side:
    """Which factor a call of this kind gives, see `pytest_qsens.graph.marks.FACTORS`."""
    return "left" if kind == "left" else "right"


def inner_dim(kind: str, factor: Tensor) -> int:
    """Return the dimension of a factor that is summed over."""
    return -2 if kind == "right" and factor.dim() > 1 else -1


def finite_only(factor: Tensor, dim: int) -> tuple[Tensor, Tensor | None]:
    """Put zero where anything along this dimension is not finite; which parts are, as ``None`` if all are."""
    if not factor.numel() or all(map(math.isfinite, torch.stack(torch.aminmax(factor)).tolist())):
        return factor, None
    finite = torch.isfinite(factor).all(dim, keepdim=True)
    return factor.masked_fill(~finite, 0), finite


def round_factor(
    factor: Tensor, kind: str, scheme: ActivationScheme, extremes: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Round a factor, fp32, and return what it becomes, of its shape and layout.

    Where values that are summed up together hold NaN or infinite ones, all of them become NaN.

    Args:
        factor: ``(*, rows, inner)``, or ``(*, inner, columns)`` of the kind ``right``; ``(inner,)``.
        kind: One of `pytest_qsens.graph.marks.FACTORS`.
        scheme: How.
        extremes: The least and largest value that calibration has seen, where scales are static.

    """
    if not factor.numel():
        return factor
    dim = inner_dim(kind, factor)
    known, finite = finite_only(factor, dim)
    if extremes is not None:
        low, high = extremes
    elif scheme.granularity == "tensor":
        low, high = torch.aminmax(known)
    else:
        low, high = known.amin(dim, keepdim=True), known.amax(dim, keepdim=True)
    found = round_between(known, scheme, low.clamp(max=0), high.clamp(min=0))
    return found if finite is None else found.masked_fill(~finite, torch.nan)
