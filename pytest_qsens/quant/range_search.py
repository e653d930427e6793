"""From a distribution of values to the range that quantization covers; what is outside is clipped.

``percentile``, ``mse`` and ``entropy`` are what TensorRT's calibrators, NVIDIA's pytorch-quantization and ModelOpt
(``calib/histogram.py``) and ONNX Runtime (``quantization/calibrate.py``) call so.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from pytest_qsens.quant.distribution import Distribution, Histogram

    Round = Callable[[Tensor, Tensor, Tensor], Tensor]
    """From values ``(bins,)``, and ends ``(candidates, 1)`` of as many ranges, to what they become in each."""

FRACTIONS = tuple(2.0 ** (-step / 8) for step in range(49))
"""Parts of the extremes that `least_error` tries for the ends of the range: from all of them down to 1/64."""

_VALUES = 2**20
"""Values that are rounded at a time."""

_CANDIDATES = 256
"""About how many thresholds `least_divergence` compares."""


class Range(NamedTuple):
    """Ends of a range, ``low <= 0 <= high``."""

    low: float
    high: float


def of_percentile(values: Distribution, percentile: float, *, symmetric: bool) -> Range:
    """Keep so many per cent of the values: of magnitudes if it is symmetric, else half of the rest is cut on each side.

    In a bin values are taken to be spread evenly.
    """
    rest = 1 - percentile / 100
    if symmetric:
        high = min(_quantile(values.folded(), values.zeros, 1 - rest), max(-values.low, values.high))
        return Range(-high, high)
    histogram = values.signed()
    low, high = (_quantile(histogram, values.zeros, share) for share in (rest / 2, 1 - rest / 2))
    return Range(min(max(low, values.low), 0.0), max(min(high, values.high), 0.0))


def _quantile(histogram: Histogram, zeros: int, share: float) -> float:
    """Value below which this share of the values is; ``zeros`` of them lie at zero."""
    counts, edges = histogram
    below = torch.cat((counts.new_zeros(1), counts.cumsum(0))).double()
    below_at_zero = float(below[edges <= 0][-1]) if float(edges[0]) <= 0 else 0.0
    wanted = share * (float(below[-1]) + zeros)
    if wanted > below_at_zero:
        if wanted <= below_at_zero + zeros:
            return 0.0
        wanted -= zeros
    place = int(torch.searchsorted(below, wanted)) if wanted > 0 else 1
    place = min(max(place, 1), len(counts))
    inside = float(below[place] - below[place - 1])
    part = (wanted - float(below[place - 1])) / inside if inside else 0.0
    return float(edges[place - 1] + min(max(part, 0.0), 1.0) * (edges[place] - edges[place - 1]))


def least_error(values: Distribution, rounded: Round, *, symmetric: bool) -> Range:
    """Find the range with the least squared error, over all pairs of `FRACTIONS` of the extremes.

    Of equals it is the widest. The values of a bin count as its middle. ModelOpt's ``_compute_amax_mse`` compares
    magnitudes in the same way.

    Args:
        values: That are rounded.
        rounded: Rounds them.
        symmetric: Whether both ends are of one magnitude.

    """
    low, high = min(values.low, 0.0), max(values.high, 0.0)
    largest = max(-low, high)
    if not largest or not math.isfinite(largest):
        return Range(0.0, 0.0)
    fractions = torch.tensor(FRACTIONS, dtype=torch.float64)
    if symmetric:
        highs = fractions * largest
        lows, histogram = -highs, values.folded()
    else:
        grid = torch.meshgrid(fractions if low else fractions[:1], fractions if high else fractions[:1], indexing="ij")
        lows, highs = (part.flatten() * end for part, end in zip(grid, (low, high), strict=True))
        histogram = values.signed()
    used = histogram.counts > 0
    errors = _errors(histogram.centers[used].float(), histogram.counts[used], lows.float(), highs.float(), rounded)
    best = int(errors.argmin())
    return Range(float(lows[best]), float(highs[best]))


def _errors(centers: Tensor, counts: Tensor, lows: Tensor, highs: Tensor, rounded: Round) -> Tensor:
    """Sum the squared errors of each candidate, float64."""
    weights = counts.double()
    step = max(1, _VALUES // max(1, len(centers)))
    found = []
    for low, high in zip(torch.split(lows, step), torch.split(highs, step), strict=True):
        errors = rounded(centers, low[:, None], high[:, None]).sub_(centers)
        found.append(errors.square_().double() @ weights)
    return torch.cat(found)


def of_entropy(values: Distribution, *, symmetric: bool) -> Range:
    """Clip where the divergence of the rounded values from the values is least: `least_divergence`."""
    histogram = values.folded()
    levels = 128 if symmetric or values.low < 0 else 256
    stride = max(1, len(histogram.counts) // _CANDIDATES)
    threshold = float(histogram.edges[least_divergence(histogram.counts, levels, stride)])
    threshold = min(threshold, max(-values.low, values.high))
    if symmetric:
        return Range(-threshold, threshold)
    return Range(min(max(values.low, -threshold), 0.0), max(min(values.high, threshold), 0.0))


def least_divergence(counts: Tensor, levels: int, stride: int = 1) -> int:
    """Tell how many bins to keep of a histogram of magnitudes, so that the Kullback-Leibler divergence is least.

    Migacz, "8-bit Inference with TensorRT", GTC 2017, as in NVIDIA's pytorch-quantization and ModelOpt,
    ``_compute_amax_entropy``: what is beyond a threshold is added to the last bin before it, the bins that are left are
    put together to so many levels, and each level is spread over those of its bins that are not empty. Of equals the
    last. The first bin, which zeros fill in activations of a ReLU, is given the count of the second.

    Args:
        counts: ``(bins,)``.
        levels: That magnitudes have.
        stride: Between the numbers of bins that are compared, from ``levels`` on; all of them are compared, too.

    """
    bins = counts.double().clone()
    if len(bins) <= levels:
        return len(bins)
    bins[0] = bins[1]
    total = float(bins.sum())
    least, best = math.inf, len(bins)
    for size in [*range(levels, len(bins), stride), len(bins)]:
        kept = bins[:size]
        filled = (kept != 0).double()
        level = torch.searchsorted(
            torch.linspace(0, size, levels + 1, dtype=torch.float64),
            torch.arange(size, dtype=torch.float64),
            right=True,
        ).sub_(1)
        of_level = torch.bincount(level, kept, levels) / torch.bincount(level, filled, levels).clamp_(min=1)
        spread = of_level[level] * filled
        reference = kept.clone()
        reference[-1] += total - float(kept.sum())
        divergence = _divergence(reference, spread)
        if divergence <= least:
            least, best = divergence, size
    return best


def _divergence(reference: Tensor, other: Tensor) -> float:
    """KL(reference ‖ other) of two lists of counts, each taken as shares of its sum."""
    p, q = reference / reference.sum(), other / other.sum()
    inside = p > 0
    return float((p[inside] * (p[inside] / q[inside]).log()).sum())
