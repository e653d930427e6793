"""Sums over a batch that also tell what each of its samples adds, and the standard error that follows from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from pytest_qsens.errors import QsensError
from pytest_qsens.graph.probes import common_samples

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from pytest_qsens.models.spec import Batch

Rows = Sequence[int]
"""How many rows of an output, entries of its first dimension, each sample of the batch has, in order."""


class Sums(NamedTuple):
    """What values of a batch add up to.

    Attributes:
        whole: Over all of them.
        samples: Over those of each sample. Their sum is ``whole`` but for the order of additions.
        sketch: Of differences of which these are the squares (`pytest_qsens.sketches`), if that is asked for.

    """

    whole: float
    samples: tuple[float, ...]
    sketch: Tensor | None = None


def rows_of(batch: Batch, output: Tensor, told: Callable[[Batch], Iterable[int] | None] | None) -> Rows:
    """Tell how many rows of a batch's scored output each sample has; the whole batch is one where that is not known.

    Args:
        batch: The batch.
        output: The scored output of the unquantized model.
        told: `pytest_qsens.models.spec.ModelSpec.rows`. Without it, or if it gives ``None``, every row is a sample if
            the output has as many as all tensors of the batch.

    Raises:
        QsensError: If what is told are no counts, or not those of this output.

    """
    length = output.shape[0] if output.dim() else 1
    counts = None if told is None else told(batch)
    if counts is not None:
        rows = [int(count) for count in counts]
        if sum(rows) != length or min(rows) < 0:
            raise QsensError(
                f"`rows` gives {rows} for a batch whose scored output has {length} rows (its first dimension): it is "
                "to give how many of them each sample has. Correct it, or leave it out"
            )
        return [count for count in rows if count]
    tensors = [leaf for leaf in tree_leaves(dict(batch)) if isinstance(leaf, torch.Tensor)]
    return [1] * length if output.dim() and common_samples(tensors) == length else [length]


def summed(chunks: Iterable[Tensor], rows: Rows, size: int) -> Sums:
    """Add up values that come in chunks.

    The whole is the sum of the chunks' sums, whatever the samples are: it has the same bits with any.

    Args:
        chunks: Float64, flat, in the order of the output.
        rows: As in `Rows`.
        size: Number of all values.

    """
    ends = [end * size // sum(rows) for end in accumulate(rows)] if sum(rows) else [size]
    found = [0.0] * len(ends)
    whole, start, sample = 0.0, 0, 0
    for chunk in chunks:
        total = float(chunk.sum())
        whole += total
        stop = start + chunk.numel()
        if stop <= ends[sample]:
            found[sample] += total
        else:
            last = next(i for i, end in enumerate(ends[sample:], sample) if end >= stop)
            cuts = [start, *ends[sample:last], stop]
            parts = torch.split(chunk, [right - left for left, right in pairwise(cuts)])
            for i, value in enumerate(torch.stack([part.sum() for part in parts]).tolist(), sample):
                found[i] += value
            sample = last
        start = stop
    return Sums(whole, tuple(found))


def standard_error(errors: Sequence[float], energies: Sequence[float]) -> float | None:
    """Estimate the standard error of sum(errors) / sum(energies) over samples; ``None`` for fewer than two.

    The ratio estimator R = Σe / Σx, linearised: Var(R) ≈ n / (n - 1) · Σ(e - R·x)² / (Σx)² (Cochran, Sampling
    Techniques, 3rd edition, 1977, chapter 6, without the finite-population correction).

    Args:
        errors: Squared error e of each sample.
        energies: Squares x of the reference, of each sample.

    """
    count, size = len(errors), sum(energies)
    if count < 2:
        return None
    ratio = sum(errors) / size
    spread = sum((error - ratio * energy) ** 2 for error, energy in zip(errors, energies, strict=True))
    return math.sqrt(count / (count - 1) * spread) / size
