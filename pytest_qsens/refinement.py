"""Which ops to measure when all are estimated, in which order, and when to stop. Knows nothing of torch or pytest.

Estimates are taken for independent of each other, and their logarithms for normal, with the interval that they come
with (`pytest_qsens.results.LEVEL`); those with everything else quantized, ordered from the other end, for normal.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

from pytest_qsens.ops import Op
from pytest_qsens.results import LEVEL

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from pytest_qsens.results import Interval, Mode

CERTAIN = 0.95
"""Probability that no op which was not measured belongs to the most sensitive ones, from which on they are told."""

_REACH = NormalDist().inv_cdf((1 + LEVEL) / 2)
_MARGIN = 1.25
"""How much longer than predicted measuring may take: the clock must not run out in the middle."""


class Belief(NamedTuple):
    """What is known of how sensitive an op is: higher is more.

    Attributes:
        middle: The most likely value, or the exact one.
        interval: Where it is expected; ``None`` if ``middle`` is exact.

    """

    middle: float
    interval: Interval | None = None

    @property
    def least(self) -> Belief:
        """The least sensitive that the op is expected to be."""
        return Belief(self.middle if self.interval is None else self.interval[0])

    def above(self, value: float) -> float:
        """Probability that the op is more sensitive than that."""
        if self.interval is None:
            return float(self.middle > value)
        low, high = self.interval
        if high <= low:
            return float(high > value)
        if low > 0:
            if value <= 0:
                return 1.0
            low, high, value = math.log(low), math.log(high), math.log(value)
        return 1 - NormalDist((low + high) / 2, (high - low) / 2 / _REACH).cdf(value)


def measured(mode: Mode, nmse: float) -> Belief:
    """Take an nmse for a sensitivity: what hurts much alone is sensitive, and what hurts little when spared."""
    return Belief(nmse if mode == "isolated" else -nmse)


def estimated(mode: Mode, interval: Interval) -> Belief:
    """Take the interval of an nmse for a sensitivity."""
    low, high = interval
    if mode == "isolated" and low > 0:
        return Belief(math.sqrt(low * high), interval)
    return Belief(measured(mode, (low + high) / 2).middle, interval if mode == "isolated" else (-high, -low))


def certainty(beliefs: Mapping[str, Belief], count: int) -> float:
    """Probability that the most sensitive ``count`` ops are the most sensitive ones of those measured.

    Zero if fewer were measured.
    """
    exact = sorted((found.middle for found in beliefs.values() if found.interval is None), reverse=True)
    if len(exact) < count:
        return 0.0
    return math.prod(1 - found.above(exact[count - 1]) for found in beliefs.values() if found.interval is not None)


class Step(NamedTuple):
    """Ops to measure together, all of one block, and what that costs in forwards of the model."""

    ops: tuple[str, ...]
    cost: float


def steps(ops: Iterable[str], open_ops: Collection[str], costs: Mapping[str, float]) -> list[Step]:
    """Put the ops that are still to be measured together by blocks, in model order."""
    blocks: dict[str, list[str]] = {}
    for op in ops:
        if op in open_ops:
            blocks.setdefault(Op(op, "").block, []).append(op)
    return [Step(tuple(block), sum(costs[op] for op in block)) for block in blocks.values()]


def worth(step: Step, beliefs: Mapping[str, Belief]) -> float:
    """How much an answer gains by a step: by how much its ops may be off, for what it costs.

    An interval is as wide as the op is large and its estimate uncertain. An op of which nothing is known comes first.
    """
    return sum(_width(beliefs.get(op)) for op in step.ops) / max(step.cost, 1e-12)


def _width(found: Belief | None) -> float:
    if found is None:
        return math.inf
    return 0.0 if found.interval is None else found.interval[1] - found.interval[0]


def undecided(beliefs: Mapping[str, Belief], count: int) -> set[str]:
    """Ops that have to be measured to tell the most sensitive ``count``: those that are likely to belong to them.

    Those that are left out belong to them with a probability of a tenth of what is allowed, all taken together.
    """
    middles = sorted((found.middle for found in beliefs.values()), reverse=True)
    threshold = middles[min(count, len(middles)) - 1]
    chances = {op: found.above(threshold) for op, found in beliefs.items() if found.interval is not None}
    negligible = (1 - CERTAIN) / 10 / max(1, len(chances))
    return {op for op, chance in chances.items() if chance > negligible}


class Pace:
    """Predicts how long a step takes, by those before it.

    Args:
        reference: Seconds of one forward: what a step costs until one was measured.

    """

    def __init__(self, reference: float) -> None:
        self._seconds, self._forwards = reference, 1.0
        self._measured = False

    def seconds(self, cost: float) -> float:
        """Seconds that so many forwards are going to take, with a margin."""
        return _MARGIN * cost * self._seconds / self._forwards

    def took(self, cost: float, seconds: float) -> None:
        """Learn from a step."""
        if not self._measured:
            self._seconds = self._forwards = 0.0
            self._measured = True
        self._seconds += seconds
        self._forwards += cost


def choose(candidates: Sequence[Step], beliefs: Mapping[str, Belief], seconds: float, pace: Pace) -> Step | None:
    """Choose the step that is worth most of those there is time for."""
    fitting = [step for step in candidates if pace.seconds(step.cost) <= seconds]
    return max(fitting, key=lambda step: worth(step, beliefs), default=None)


def owners(ops: Iterable[str], count: int) -> dict[str, int]:
    """Tell which of so many processes measures each op, the first one being 0: blocks are dealt out in turn.

    Args:
        ops: Names of all that are measured, ops and whole model, in the order of their tests.
        count: How many processes there are.

    """
    turns: dict[str, int] = {}
    return {op: turns.setdefault(Op(op, "").block, len(turns)) % count for op in ops}
