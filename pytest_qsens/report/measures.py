"""The number by which ops are ranked, mode by mode."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pytest_qsens.rank_gates import RANKED_BY

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_qsens.results import Mode, OpResult


@dataclass(frozen=True)
class Measure:
    """A number by which ops are ranked: higher is more sensitive.

    Attributes:
        mode: In which it is measured.
        meaning: What it says, a sentence.
        also: The one of ops that lack this one, in the same unit: what an op of a config gains by being kept ranks
            beside what one outside of it loses by being added.

    """

    mode: Mode
    meaning: str
    also: Measure | None = None

    @property
    def metric(self) -> str:
        """Name of the number."""
        return RANKED_BY[self.mode]

    @property
    def name(self) -> str:
        """Name of mode and number, for a heading."""
        own = f"{self.mode} {name_of(self.metric)}"
        return own if self.also is None else f"{own} or {self.also.name}"

    @property
    def modes(self) -> str:
        """The mode, or both."""
        return self.mode if self.also is None else f"{self.mode} and {self.also.modes}"

    def of(self, op: OpResult) -> Measure:
        """Tell which of both an op is ranked by."""
        return self if self.also is None or self.mode in op.modes else self.also


ISOLATED = Measure("isolated", "Error of the output with only this op quantized.")
FALLBACK = Measure("fallback", "How much of the whole model's error goes when only this op is kept in full precision.")
ADDED = Measure("added", "How much error it adds to the whole model's when this op is quantized as well.")
BOTH = replace(
    FALLBACK,
    meaning="Of an op of the config, how much of the whole model's error goes when only this op is kept; of another "
    "one, how much error it adds when it is quantized as well.",
    also=ADDED,
)


def measure_of(ops: Iterable[OpResult]) -> Measure | None:
    """Choose what ops are ranked by; ``None`` if none has scores."""
    modes = {mode for op in ops for mode in op.modes}
    if "isolated" in modes:
        return ISOLATED
    if {"fallback", "added"} <= modes:
        return BOTH
    return next((measure for measure in (FALLBACK, ADDED) if measure.mode in modes), None)


def score(op: OpResult, measure: Measure | None) -> float | None:
    """Value by which an op is ranked; ``None`` if it has none."""
    if measure is None:
        return None
    own = measure.of(op)
    return op.modes.get(own.mode, {}).get(own.metric)


def by_score(ops: Iterable[OpResult], measure: Measure | None) -> list[OpResult]:
    """Ops with a score, the most sensitive first."""
    scored = [(value, op) for op in ops if (value := score(op, measure)) is not None]
    return [op for _, op in sorted(scored, key=lambda pair: (-pair[0], pair[1].op))]


def name_of(metric: str) -> str:
    """Write a metric as people write it."""
    return metric.upper() if metric in ("nmse", "mse", "sse") else metric
