"""How far a score can be from its snapshot by chance alone. Knows nothing of torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_qsens.results import Scores

STUDENT_T = 3.182
"""Two-sided 95 % quantile of Student's t distribution with three degrees of freedom: `noise` comes from four draws."""

_OF_NMSE = frozenset({"nmse", "sse", "mse", "sqnr_db"})
"""Metrics that are the NMSE in another unit."""


def allowance(metric: str, old: float | None, new: Scores, *, other_data: bool) -> float:
    """Half-width, in the metric's unit, of the two-sided 95 % interval for the difference of two equal ops' scores.

    Both scores are draws, so their difference has √2 times the standard deviation of one. The recorded one is taken
    to vary as much as the new one. Two things make a score vary:

    - ``noise``, ``gain_noise`` and ``loss_noise``: where values of a quantized model round to other integers;
    - ``stderr``: which samples were drawn. On the samples of the snapshot that is no part of the difference.

    Args:
        metric: Name of a gated metric.
        old: The recorded value; ``None`` is an infinite SQNR.
        new: The new scores, with what is said about them.
        other_data: Whether they were measured on other evaluation data than the recorded ones.

    """
    if metric in ("gain", "loss"):
        return _of_draws(new.get(f"{metric}_noise"))
    if metric not in _OF_NMSE or "nmse" not in new:
        return 0.0
    found = math.hypot(_of_draws(new.get("noise")), _of_samples(new) if other_data else 0.0)
    if metric == "sqnr_db":
        return 10 * math.log10(1 + found / _recorded_nmse(old))
    nmse = new["nmse"] or 0.0
    return found if metric == "nmse" or not nmse else found * (new[metric] or 0.0) / nmse


def _recorded_nmse(decibels: float | None) -> float:
    """NMSE of an SQNR, at least that of 100 dB, from where on differences are rounding."""
    return 1e-10 if decibels is None else max(10 ** (-decibels / 10), 1e-10)


def _of_draws(noise: float | None) -> float:
    return STUDENT_T * math.sqrt(2) * (noise or 0.0)


def _of_samples(scores: Mapping[str, float | None]) -> float:
    samples = scores.get("samples") or 0.0
    if samples < 2:
        return 0.0
    from scipy.special import stdtrit

    return float(stdtrit(samples - 1, 0.975)) * math.sqrt(2) * (scores.get("stderr") or 0.0)
