"""How well a proxy ranks the ops that were measured: rank correlations, and the most sensitive ops in common."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

TOP = 10
"""Most sensitive ops that are compared as a set."""


@dataclass(frozen=True)
class Agreement:
    """A proxy beside exact scores.

    Attributes:
        name: Of the proxy.
        values: Op → value, of ops that have one.
        spearman: Rank correlation with the exact scores; ``None`` if all values are equal.
        kendall_tau_b: Likewise.
        top: How many of the most sensitive ops are the same.
        places: How many were compared, `TOP` at most.
        forwards: Time that the values of all ops take, in forwards of the evaluation data.

    """

    name: str
    values: Mapping[str, float]
    spearman: float | None
    kendall_tau_b: float | None
    top: int
    places: int
    forwards: float

    @property
    def expected_by_chance(self) -> float:
        """Mean of ``top`` if the proxy were shuffled: k² / n."""
        return self.places**2 / len(self.values)


def agreement(name: str, values: Mapping[str, float], exact: Mapping[str, float], forwards: float) -> Agreement | None:
    """Compare a proxy with exact scores on the ops that have both.

    Args:
        name: Of the proxy.
        values: Op → value, larger for a more sensitive op; what is not finite counts as no value.
        exact: Op → score, likewise, all of them finite.
        forwards: What the proxy costs.

    Returns:
        ``None`` if fewer than 3 ops have a value.

    """
    usable = {op: value for op, value in values.items() if op in exact and math.isfinite(value)}
    if len(usable) < 3:
        return None
    places = min(TOP, len(usable))
    scores = {op: exact[op] for op in usable}
    spearman, kendall = _correlations(list(usable.values()), list(scores.values()))
    both = set(_most(usable, places)) & set(_most(scores, places))
    return Agreement(name, usable, spearman, kendall, len(both), places, forwards)


def _correlations(one: list[float], other: list[float]) -> tuple[float | None, float | None]:
    from scipy.stats import kendalltau, spearmanr

    if len(set(one)) == 1 or len(set(other)) == 1:
        return None, None
    return float(spearmanr(one, other).statistic), float(kendalltau(one, other).statistic)


def _most(values: Mapping[str, float], places: int) -> list[str]:
    """Name the ops of the largest values; of equal ones the first in the alphabet."""
    return sorted(values, key=lambda op: (-values[op], op))[:places]


def best_first(found: list[Agreement]) -> list[Agreement]:
    """Sort by Spearman's correlation, undefined ones last."""
    return sorted(found, key=lambda it: (it.spearman is None, -(it.spearman or 0.0), it.name))
