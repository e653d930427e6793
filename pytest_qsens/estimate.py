"""From what probes say to estimates with an interval, corrected by ops that were measured. Knows nothing of torch.

The constants were chosen by trying on MiniLM, a tiny Qwen2.5-VL, a small CNN and a causal LM.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import TYPE_CHECKING

from pytest_qsens.results import LEVEL

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

MEASURED = 3
"""Ops that are measured to correct the estimates of the others."""

_BIAS = 0.05
"""Standard deviation, over models, of the mean logarithm of estimate over exact value."""

_SPREAD = 0.08
"""Standard deviation, over ops, of that logarithm where rounding errors are taken for independent, with many passes."""

_SCATTER = 2.0
"""How much more passes of one op differ from the exact value than their scatter says: it is that of few."""

_PRIOR = 6
"""How many measured ops the expectations above count as much as."""

MEASURED_FALLBACK = 5
"""As `MEASURED`, with everything else quantized."""

_REROUNDING = 0.02
"""Standard deviation of an error with everything else quantized that no gradient tells, relative to the error of all.

When an op is restored, values after it are rounded anew, and fall on the other side now and then.
"""

_CURVATURE = 0.1
"""The part that goes with the size of what is restored: standard deviation relative to the terms of its estimate."""

_FALLBACK_PRIOR = 2
"""As `_PRIOR`, for the two: models differ more in them."""


_INDEX = re.compile(r"\.\d+(?=\.|$)")


@dataclass(frozen=True)
class Estimate:
    """An estimate, and the bounds of the interval that holds the exact value for `LEVEL` of ops."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Evidence:
    """What probes tell of an op.

    Attributes:
        passes: By batch: an estimate of its part by each of at least two backward passes, all by the same assumption.
        squares: Squares of random numbers whose mean over passes, added up, is an estimate without it.
        drawn: Whether all of the error is one draw of rounding errors, each of which counts for itself, as it is of
            keys and values: not many draws, as when rows are multiplied by a weight.

    """

    passes: Sequence[Sequence[float]]
    squares: Sequence[float]
    drawn: bool = False

    @cached_property
    def total(self) -> float:
        """Sum over batches of the mean over passes."""
        return math.fsum(map(fmean, self.passes))

    @cached_property
    def scatter(self) -> float:
        """Variance of `total`, relative to its square."""
        return math.fsum(map(_variance_of_mean, self.passes)) / self.total**2

    @property
    def free(self) -> float:
        """Estimate without assumption."""
        return math.fsum(self.squares) / len(self.passes[0])

    @property
    def free_scatter(self) -> float:
        """Variance of `free`, relative to its square.

        The square of a normal number has a variance of two thirds of its mean square.
        """
        total = math.fsum(self.squares)
        return max(2 / 3 * math.fsum(square**2 for square in self.squares) / total**2, 2 / len(self.squares))


def _variance_of_mean(values: Sequence[float]) -> float:
    mean = fmean(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)


def spread_over(values: Mapping[str, float], count: int) -> list[str]:
    """Choose ops in the middle of so many parts of the range, each with as many ops; all if there are no more.

    Args:
        values: Op → its estimate.
        count: How many to choose, at least 1.

    """
    ranked = sorted(values, key=lambda op: (values[op], op))
    if len(ranked) <= count:
        return ranked
    return [ranked[int((part + 0.5) * len(ranked) / count)] for part in range(count)]


def depths(ops: Iterable[str]) -> list[list[str]]:
    """Ops of one layer type, in the order of the model: those whose names differ by indices alone.

    Args:
        ops: Names, in the order of the model.

    """
    found: dict[str, list[str]] = {}
    for op in ops:
        found.setdefault(_INDEX.sub(".*", op), []).append(op)
    return list(found.values())


def representatives(types: Iterable[Sequence[str]], strata: int) -> list[str]:
    """Choose the op in the middle of each of so many parts of the depth, of every layer type.

    Args:
        types: From `depths`.
        strata: How many parts; a type with fewer ops is measured whole.

    """
    chosen = []
    for ops in types:
        parts = min(strata, len(ops))
        chosen += [ops[int((part + 0.5) * len(ops) / parts)] for part in range(parts)]
    return chosen


class Estimator:
    """Puts together what probes tell of the ops of a model.

    The two estimates of an op are averaged, as logarithms, by their variances: where the inputs hold many samples, the
    one without assumptions decides, where they hold one, it says nothing.

    Args:
        evidence: Op → what probes tell; positive numbers.
        outputs: How many values the model gives for all batches.

    Attributes:
        values: Op → estimate.
        variances: Op → variance of its logarithm, as far as probes tell.

    """

    def __init__(self, evidence: Mapping[str, Evidence], outputs: int) -> None:
        common = {
            drawn: fmean(scatters)
            for drawn in (False, True)
            if (scatters := [found.scatter for found in evidence.values() if found.drawn == drawn])
        }
        logarithms = {op: _averaged(found, common[found.drawn], outputs) for op, found in evidence.items()}
        self.variances = {op: spread for op, (_, spread) in logarithms.items()}
        self.values = {op: math.exp(mean) for op, (mean, _) in logarithms.items()}

    def _compared(self, exact: Mapping[str, float]) -> tuple[dict[str, float], float, float]:
        """Logarithms of the ratios at the ops that were measured; the weight of their mean, and that mean, shrunk."""
        errors = {op: math.log(self.values[op] / value) for op, value in exact.items() if value > 0}
        weight = sum(1 / self.variances[op] for op in errors) + _BIAS**-2
        return errors, weight, sum(error / self.variances[op] for op, error in errors.items()) / weight

    def corrected(self, exact: Mapping[str, float]) -> dict[str, Estimate]:
        """Correct by the ratio at the ops that were measured, and tell how far the others may be off.

        The logarithm of the ratio is taken for normal with a mean, common to all ops, and a factor to its variance that
        are unknown, but of which a little is known before: few measured ops shrink the mean towards zero, and the
        factor towards one, which gives a t distribution (Gelman et al., Bayesian Data Analysis, section 3.3).

        Args:
            exact: Op → exact value, for some of the ops; those of zero say nothing.

        """
        errors, weight, bias = self._compared(exact)
        freedom = _PRIOR + len(errors)
        squares = sum((error - bias) ** 2 / self.variances[op] for op, error in errors.items()) + (bias / _BIAS) ** 2
        reach = quantile(freedom) * math.sqrt((_PRIOR + squares) / freedom)
        found = {}
        for op, value in self.values.items():
            factor = math.exp(reach * math.sqrt(self.variances[op] + 1 / weight))
            middle = value * math.exp(-bias)
            found[op] = Estimate(middle, middle / factor, middle * factor)
        return found

    def represented(self, exact: Mapping[str, float], types: Iterable[Sequence[str]]) -> dict[str, Estimate]:
        """Correct by the ratio at the ops that were measured, each layer type by that of its own as far as they differ.

        The logarithm of the ratio is taken for the sum of a mean common to all ops, one of the type and a rest, all
        normal: a model with random effects (Gelman et al., Bayesian Data Analysis, section 5.4). How much types differ
        is what their means scatter more than the rest explains; if they do not, all ops are corrected alike.

        Args:
            exact: Op → exact value, for some of the ops; those of zero say nothing.
            types: From `depths`.

        """
        errors, weight, bias = self._compared(exact)
        groups = [[op for op in ops if op in self.values] for ops in types]
        told = [[op for op in ops if op in errors] for ops in groups]
        means = [fmean(errors[op] - bias for op in ops) if ops else 0.0 for ops in told]
        within = [
            (errors[op] - bias - mean) ** 2 / self.variances[op]
            for ops, mean in zip(told, means, strict=True)
            for op in ops
        ]
        freedom = _PRIOR + len(within) - sum(map(bool, told))
        factor = (_PRIOR + sum(within)) / freedom
        rests = [factor * fmean(self.variances[op] for op in ops) / len(ops) if ops else math.inf for ops in told]
        between = [mean**2 - rest for mean, rest in zip(means, rests, strict=True) if rest < math.inf]
        scatter = max(0.0, fmean(between)) if between else 0.0
        found = {}
        for ops, mean, rest in zip(groups, means, rests, strict=True):
            share = scatter / (scatter + rest) if scatter else 0.0
            for op in ops:
                variance = factor * (self.variances[op] + 1 / weight) + scatter * (1 - share)
                reach = math.exp(quantile(freedom) * math.sqrt(variance))
                middle = self.values[op] * math.exp(-bias - share * mean)
                found[op] = Estimate(middle, middle / reach, middle * reach)
        return found


def _averaged(found: Evidence, common: float, outputs: int) -> tuple[float, float]:
    """Average the logarithms of the two estimates of an op; returns the mean and its variance.

    Args:
        found: What probes tell of it.
        common: Mean `Evidence.scatter` of all ops of its kind: the scatter of few passes is known badly.
        outputs: As for `Estimator`.

    """
    # the exact value is that of one draw of the rounding errors: squares of so many normal numbers, added up
    drawn = 2 / outputs
    # With rounding errors d and a probe r, d'J'Jd over draws of d and the sum of (J'r)_i^2 d_i^2 over draws of r have
    # one variance, the sum over pairs of 2 (J_i.J_j)^2 d_i^2 d_j^2: the exact value scatters as much as one pass does,
    # which is more than what many outputs say where few tokens or channels make up the error.
    passes = len(found.passes[0])
    factor = 1 + passes if found.drawn else _SCATTER
    assuming, free = _SPREAD**2 + drawn + factor * (found.scatter + common) / 2, found.free_scatter
    share = free / (assuming + free)
    return share * math.log(found.total) + (1 - share) * math.log(found.free), assuming * share


def restored(
    base: float, products: Mapping[str, float], squares: Mapping[str, float], exact: Mapping[str, float]
) -> dict[str, Estimate]:
    """Estimate the error of the model with all but one op quantized, e + d, and tell how far that may be off.

    What it may be off by is taken for normal, of a known standard deviation times a factor that measured ops tell, as
    in `Estimator.corrected`.

    Args:
        base: |e|², of the model with all ops quantized.
        products: Op → e·d, where d is what restoring it changes.
        squares: Op → |d|², as estimated.
        exact: Op → exact value, for some of the ops.

    Returns:
        Of all ops in ``squares``; no bound is below zero.

    """
    raw = added(base, products, squares)
    scale = {
        op: math.hypot(_REROUNDING * base, _CURVATURE * math.sqrt(square * (square + base)))
        for op, square in squares.items()
    }
    freedom = _FALLBACK_PRIOR + len(exact)
    factor = math.sqrt((_FALLBACK_PRIOR + sum(((raw[op] - v) / scale[op]) ** 2 for op, v in exact.items())) / freedom)
    reach = {op: quantile(freedom) * factor * one for op, one in scale.items()}
    return {
        op: Estimate(max(value, 0.0), max(value - reach[op], 0.0), max(value + reach[op], 0.0))
        for op, value in raw.items()
    }


def added(base: float, products: Mapping[str, float], squares: Mapping[str, float]) -> dict[str, float]:
    """|e + d|² = |e|² + 2·e·d + |d|² of each op; arguments as for `restored`."""
    return {op: base + 2 * products[op] + square for op, square in squares.items()}


def quantile(freedom: int) -> float:
    """Quantile of Student's t distribution that so much of it lies within."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + LEVEL) / 2))
