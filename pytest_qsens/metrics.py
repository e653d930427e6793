"""Distances between reference and quantized outputs, summed in float64."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_qsens.results import Scores


_CHUNK = 2**16
"""Values taken to float64 at a time: more would not fit into a core's cache, and take several times as long."""


def same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are equal to the last bit; NaN equals NaN."""
    if left is right or torch.equal(left, right):
        return True
    if left.shape != right.shape or not torch.equal(left.isnan(), right.isnan()):
        return False
    return torch.equal(left.masked_fill(left.isnan(), 0), right.masked_fill(right.isnan(), 0))


def squared_distance(one: Tensor, other: Tensor) -> float:
    """Sum of squared differences, in float64."""
    chunks = (torch.split(values.reshape(-1), _CHUNK) for values in (one, other))
    return sum(float((a.double() - b.double()).square().sum()) for a, b in zip(*chunks, strict=True))


def related(sse: float, energy: float, count: int) -> Scores:
    """Relate an error to the reference.

    Args:
        sse: Sum of squared differences.
        energy: Sum of the reference's squares, not zero.
        count: Number of values.

    """
    nmse = sse / energy
    return {"sse": sse, "mse": sse / count, "nmse": nmse, "sqnr_db": -10 * math.log10(nmse) if nmse else None}


def scores(pairs: Iterable[tuple[Tensor, Tensor]], *, logits: bool) -> Scores | None:
    """Score quantized outputs against the reference over all evaluation batches.

    Args:
        pairs: ``(reference, quantized)`` per batch, of the same shape.
        logits: Whether the last dimension holds logits of classes.

    Returns:
        ``sse``, ``mse``, ``nmse`` = SSE / sum(reference²), ``sqnr_db`` = -10 log10(NMSE) (``None`` if nothing differs)
        and, for logits, ``kl`` = mean KL(reference ‖ quantized) per position in nats and ``top1`` = share of positions
        with the same most likely class. ``None`` if a quantized output is not finite.

    Raises:
        ValueError: If the shapes differ.

    """
    sse = energy = kl = agreeing = 0.0
    count = positions = 0
    for reference, quantized in pairs:
        if quantized.shape != reference.shape:
            raise ValueError(f"the output has shape {tuple(quantized.shape)}, not {tuple(reference.shape)}")
        if not bool(torch.isfinite(quantized).all()):
            return None
        classes = reference.shape[-1] if logits else 1
        count += reference.numel()
        positions += reference.numel() // classes
        rows = max(1, _CHUNK // classes)
        chunks = (torch.split(values.reshape(-1, classes), rows) for values in (reference, quantized))
        for ref, out in zip(*chunks, strict=True):
            ref, out = ref.double(), out.double()  # noqa: PLW2901 - the same values
            sse += float((out - ref).square().sum())
            energy += float(ref.square().sum())
            if logits:
                log_p, log_q = ref.log_softmax(-1), out.log_softmax(-1)
                kl += float((log_p.exp() * (log_p - log_q)).sum())
                agreeing += float((ref.argmax(-1) == out.argmax(-1)).sum())
    result = related(sse, energy, count)
    if logits:
        # the sum of non-negative terms can come out below zero by rounding
        result |= {"kl": max(kl / positions, 0.0), "top1": agreeing / positions}
    return result
