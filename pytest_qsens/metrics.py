"""Distances between reference and quantized outputs, summed in float64."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pytest_qsens import profile

if TYPE_CHECKING:
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


@profile.phase("scoring")
def squared_distance(one: Tensor, other: Tensor) -> float:
    """Sum of squared differences, in float64."""
    chunks = (torch.split(values.reshape(-1), _CHUNK) for values in (one, other))
    return sum(float((a.double() - b.double()).square().sum()) for a, b in zip(*chunks, strict=True))


def energy(values: Tensor) -> float:
    """Sum of squares, in float64."""
    return sum(float(chunk.double().square().sum()) for chunk in torch.split(values.reshape(-1), _CHUNK))


class Score:
    """How far quantized outputs are from the reference's, batch after batch.

    Args:
        logits: Whether the last dimension of the outputs holds logits of classes, to be compared as distributions.

    Attributes:
        sse: Sum of squared differences so far.
        finite: Whether all outputs so far were.

    """

    def __init__(self, *, logits: bool) -> None:
        self.sse = 0.0
        self.finite = True
        self._logits = logits
        self._kl = self._agreeing = 0.0
        self._positions = 0

    @profile.phase("scoring")
    def add(self, reference: Tensor, quantized: Tensor) -> None:
        """Compare one batch.

        Raises:
            ValueError: If the shapes differ.

        """
        if quantized.shape != reference.shape:
            raise ValueError(f"the output has shape {tuple(quantized.shape)}, not {tuple(reference.shape)}")
        self.add_error(squared_distance(reference, quantized))
        if not self._logits or not self.finite:
            return
        classes = reference.shape[-1]
        self._positions += reference.numel() // classes
        rows = max(1, _CHUNK // classes)
        chunks = (torch.split(values.reshape(-1, classes), rows) for values in (reference, quantized))
        for ref, out in zip(*chunks, strict=True):
            ref, out = ref.double(), out.double()  # noqa: PLW2901 - the same values
            log_p, log_q = ref.log_softmax(-1), out.log_softmax(-1)
            self._kl += float((log_p.exp() * (log_p - log_q)).sum())
            self._agreeing += float((ref.argmax(-1) == out.argmax(-1)).sum())

    def add_error(self, sse: float) -> None:
        """Add one batch of which only the sum of squared differences is known."""
        self.sse += sse
        self.finite = math.isfinite(self.sse)

    def related(self, energy: float, count: int) -> Scores | None:
        """Relate the error to the reference.

        Args:
            energy: Sum of the reference's squares, not zero.
            count: Number of its values.

        Returns:
            ``sse``, ``mse``, ``nmse`` = SSE / energy, ``sqnr_db`` = -10 log10(NMSE) (``None`` if nothing differs) and,
            for logits, ``kl`` = mean KL(reference ‖ quantized) per position in nats and ``top1`` = share of positions
            with the same most likely class. ``None`` if an output was not finite.

        """
        if not self.finite:
            return None
        nmse = self.sse / energy
        found: Scores = {
            "sse": self.sse,
            "mse": self.sse / count,
            "nmse": nmse,
            "sqnr_db": -10 * math.log10(nmse) if nmse else None,
        }
        if self._logits:
            # the sum of non-negative terms can come out below zero by rounding
            found |= {"kl": max(self._kl / self._positions, 0.0), "top1": self._agreeing / self._positions}
        return found
