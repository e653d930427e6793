"""Distances between reference and quantized outputs, summed in float64."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pytest_qsens import profile
from pytest_qsens.samples import Sums, standard_error, summed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_qsens.results import Scores
    from pytest_qsens.samples import Rows
    from pytest_qsens.sketches import Sketcher


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
    return sum(float(chunk.sum()) for chunk in _squared_differences(one, other))


@profile.phase("scoring")
def squared_distances(one: Tensor, other: Tensor, rows: Rows, sketcher: Sketcher | None = None) -> Sums:
    """Sum of squared differences, in float64, as a whole and by sample; with a sketch of what the second has more."""
    found = summed(_squared_differences(one, other), rows, one.numel())
    return found if sketcher is None else found._replace(sketch=sketcher(other - one))


def _squared_differences(one: Tensor, other: Tensor) -> Iterator[Tensor]:
    chunks = (torch.split(values.reshape(-1), _CHUNK) for values in (one, other))
    return ((a.double() - b.double()).square() for a, b in zip(*chunks, strict=True))


def energy(values: Tensor) -> float:
    """Sum of squares, in float64."""
    return sum(float(chunk.sum()) for chunk in _squares(values))


def energies(values: Tensor, rows: Rows) -> Sums:
    """Sum of squares, in float64, as a whole and by sample."""
    return summed(_squares(values), rows, values.numel())


def _squares(values: Tensor) -> Iterator[Tensor]:
    return (chunk.double().square() for chunk in torch.split(values.reshape(-1), _CHUNK))


class Score:
    """How far quantized outputs are from the reference's, batch after batch.

    Args:
        logits: Whether the last dimension of the outputs holds logits of classes, to be compared as distributions.

    Attributes:
        sse: Sum of squared differences so far.
        finite: Whether all outputs so far were.
        sketch: Of all differences so far, if there is one of each batch.

    """

    def __init__(self, *, logits: bool) -> None:
        self.sse = 0.0
        self.finite = True
        self.sketch: Tensor | None = None
        self._samples: list[float] = []
        self._logits = logits
        self._kl = self._agreeing = 0.0
        self._positions = 0

    @profile.phase("scoring")
    def add(
        self, reference: Tensor, quantized: Tensor, rows: Rows | None = None, sketcher: Sketcher | None = None
    ) -> None:
        """Compare one batch.

        Args:
            reference: Output of the unquantized model.
            quantized: Of the quantized one.
            rows: Of each sample; ``None`` takes the batch for one.
            sketcher: Of this batch; ``None`` sketches nothing.

        Raises:
            ValueError: If the shapes differ.

        """
        if quantized.shape != reference.shape:
            raise ValueError(f"the output has shape {tuple(quantized.shape)}, not {tuple(reference.shape)}")
        self.add_error(squared_distances(reference, quantized, rows or [1], sketcher))
        if not self._logits or not self.finite:
            return
        classes = reference.shape[-1]
        self._positions += reference.numel() // classes
        positions = max(1, _CHUNK // classes)
        chunks = (torch.split(values.reshape(-1, classes), positions) for values in (reference, quantized))
        for ref, out in zip(*chunks, strict=True):
            ref, out = ref.double(), out.double()  # noqa: PLW2901 - the same values
            log_p, log_q = ref.log_softmax(-1), out.log_softmax(-1)
            self._kl += float((log_p.exp() * (log_p - log_q)).sum())
            self._agreeing += float((ref.argmax(-1) == out.argmax(-1)).sum())

    def add_error(self, sse: Sums) -> None:
        """Add one batch of which only the sums of squared differences are known."""
        self.sse += sse.whole
        self._samples += sse.samples
        if sse.sketch is not None:
            self.sketch = sse.sketch if self.sketch is None else self.sketch + sse.sketch
        self.finite = math.isfinite(self.sse)

    def related(self, energy: float, count: int, energies: Sequence[float] = ()) -> Scores | None:
        """Relate the error to the reference.

        Args:
            energy: Sum of the reference's squares, not zero.
            count: Number of its values.
            energies: Sum of the reference's squares of each sample, for the standard error; without them it has none.

        Returns:
            ``sse``, ``mse``, ``nmse`` = SSE / energy, ``sqnr_db`` = -10 log10(NMSE) (``None`` if nothing differs) and,
            for logits, ``kl`` = mean KL(reference ‖ quantized) per position in nats and ``top1`` = share of positions
            with the same most likely class. For two ``samples`` or more, their number, and as ``stderr`` the standard
            error of the NMSE over them. ``None`` if an output was not finite.

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
        stderr = standard_error(self._samples, energies) if energies else None
        if stderr is not None:
            found |= {"stderr": stderr, "samples": len(energies)}
        return found
