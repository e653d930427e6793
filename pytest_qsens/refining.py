"""Measure ops after all were estimated, as long as there is time and something to find out. Knows nothing of pytest."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from pytest_qsens import time_budget
from pytest_qsens.ops import TOTAL, Op
from pytest_qsens.refinement import (
    CERTAIN,
    Belief,
    Pace,
    certainty,
    choose,
    estimated,
    measured,
    steps,
    undecided,
)
from pytest_qsens.results import LEFT_OUT, MODES
from pytest_qsens.shards import predicted_costs

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from pytest_qsens.calibrated import CalibratedModel
    from pytest_qsens.known_scores import Measured
    from pytest_qsens.options import Options
    from pytest_qsens.result_cache import Part
    from pytest_qsens.results import Mode, OpResult

_DRAWS = 4
"""How often a fallback score is measured, to tell what is noise (`pytest_qsens.noise`)."""

_ESTIMATE = 6
"""Forwards that estimating takes at least: less time than that is not worth a try (docs/estimates.md)."""


class TooShort(Exception):  # noqa: N818 - told to the user by who catches it
    """There is no time for an estimate of all ops."""


class Work(NamedTuple):
    """What is to be found out.

    Attributes:
        parts: All that tests ask for, of all processes, the whole model among them → the scores that they ask for.
        own: Names of those that this process measures.
        known: Gives what is known of an op already.
        costs: Name → forwards of the model that measuring it takes, as predicted.
        left: Seconds that are left.
        processes: How many share the work.

    """

    parts: Mapping[Op, Collection[Part]]
    own: Collection[str]
    known: Callable[[Op, Part], Measured | None]
    costs: Mapping[str, float]
    left: Callable[[], float]
    processes: int

    @property
    def modes(self) -> list[Mode]:
        """Those that scores are asked for in, the one that decides about the order first."""
        return [mode for mode in MODES if any(mode in parts for parts in self.parts.values())]


@dataclass
class Refined:
    """What came of it.

    Attributes:
        why: Why no more was measured, for each op that was not.
        seconds: What it took, until it is charged.
        own: Names of those that this process was to measure.
        fresh: What was measured, until it is asked for.
        estimates: Whether there was time to estimate what was not measured.

    """

    why: str
    seconds: float
    own: Collection[str]
    fresh: dict[tuple[Op, Part], Measured] = field(default_factory=dict)
    estimates: bool = True

    def charge(self, found: Measured) -> Measured:
        """Take what was asked for first as what took all the time: the sum is what counts."""
        if found.spent is None or not self.seconds:
            return found if found.spent is None else replace(found, spent=0.0)
        spent, self.seconds = self.seconds, 0.0
        return replace(found, spent=spent)


def forwards(ops: Sequence[Op], engine: str, modes: Collection[Mode]) -> dict[str, float]:
    """Predict what measuring each op of a model in these modes, and the whole model, takes: forwards of the model."""
    costs = predicted_costs(ops, engine)
    whole = max(costs[op.name] for op in ops)
    runs = sum(_DRAWS if mode == "fallback" else 1 for mode in modes)
    return {name: cost / whole * (1 if name == TOTAL else runs) for name, cost in costs.items()}


def refine(
    calibrated: CalibratedModel, work: Work, measure: Callable[[Op, Part], OpResult], options: Options
) -> tuple[str, float]:
    """Estimate all ops, and measure those that matter most.

    Args:
        calibrated: The model.
        work: What is to be found out.
        measure: Measures an op, or the whole model, and keeps what comes of it.
        options: Time budget, or how many of the most sensitive ops are to be told.

    Returns:
        Why no more was measured, and the seconds that all this took.

    Raises:
        TooShort: If the time is up before all ops are estimated.

    """
    start = time.perf_counter()
    budget = options.time_budget
    if work.left() < _ESTIMATE * calibrated.reference_seconds:
        raise TooShort(_too_short(budget, "after the model was loaded and calibrated", calibrated.reference_seconds))

    def check() -> None:
        if work.left() <= 0:
            raise TooShort(_too_short(budget, "while all ops were estimated", calibrated.reference_seconds))

    calibrated.watch(check)
    sought = _Sought(calibrated, work)
    check()
    pace = Pace(calibrated.reference_seconds)
    if TOTAL in sought.open and pace.seconds(work.costs[TOTAL]) <= work.left():
        sought.measure([TOTAL], measure)
    sought.open.discard(TOTAL)
    names, ended = [op.name for op in work.parts], options.top is None
    while candidates := steps(names, sought.rest(options.top), work.costs):
        step = choose(candidates, sought.beliefs, work.left(), pace)
        if step is None:
            ended = True
            break
        began = time.perf_counter()
        calibrated.measure_exactly(step.ops)
        sought.measure(step.ops, measure)
        pace.took(step.cost, time.perf_counter() - began)
    why = f"the time budget of {budget} ended" if ended else f"hardly one of the {options.top} most sensitive"
    return f"{LEFT_OUT}{why}", time.perf_counter() - start


class _Sought:
    """What is known while it is being found out.

    Attributes:
        open: Names of what this process can still measure.
        beliefs: Name → what is known of an op.

    """

    def __init__(self, calibrated: CalibratedModel, work: Work) -> None:
        self._work = work
        self._mode = work.modes[0] if work.modes else None
        self._ops = {op.name: op for op in work.parts}
        self.open: set[str] = set()
        self.beliefs: dict[str, Belief] = {}
        for op, parts in work.parts.items():
            if op.name != TOTAL and calibrated.reach.refused(op) is not None:
                continue  # there is nothing to measure
            known = {part: found.result for part in parts if (found := work.known(op, part))}
            if len(known) < len(parts) and op.name in work.own:
                self.open.add(op.name)
            if op.name != TOTAL:
                self._estimate(calibrated, op, known)

    def _estimate(self, calibrated: CalibratedModel, op: Op, known: Mapping[Part, OpResult]) -> None:
        told = {mode: calibrated.estimated(op, mode) for mode in self._work.modes if mode not in known}
        exact = {mode for mode, result in told.items() if result is not None and result.status != "estimated"}
        if exact.issuperset(set(self._work.parts[op]) - known.keys()):  # it corrects the estimates
            self.open.discard(op.name)
        mode = self._mode
        result = known.get(mode) or told.get(mode) if mode is not None else None
        if mode is None or result is None:
            return
        if mode in result.intervals:
            self.beliefs[op.name] = estimated(mode, result.intervals[mode])
        else:
            self._learn(op.name, result)

    def measure(self, ops: Collection[str], measure: Callable[[Op, Part], OpResult]) -> None:
        """Measure these."""
        for op in map(self._ops.__getitem__, ops):
            for part in sorted(self._work.parts[op]):
                if self._work.known(op, part) is None:
                    self._learn(op.name, measure(op, part), part)
            self.open.discard(op.name)

    def rest(self, count: int | None) -> set[str]:
        """Names of ops to be measured; where the most sensitive ones are to be told, none if they are certain.

        What other processes measure is taken for as little sensitive as it may be.
        """
        if count is None:
            return self.open
        beliefs = {op: found if op in self._work.own else found.least for op, found in self.beliefs.items()}
        unknown = self.open - self.beliefs.keys()
        certain = bool(beliefs) and certainty(beliefs, count) >= CERTAIN ** (1 / self._work.processes)
        return unknown if certain or not beliefs else self.open & undecided(beliefs, count) | unknown

    def _learn(self, op: str, result: OpResult, part: Part | None = None) -> None:
        if self._mode is not None and part in (None, self._mode) and op != TOTAL:
            self.beliefs.pop(op, None)
            scores = result.modes.get(self._mode)
            if scores is not None and (nmse := scores["nmse"]) is not None:
                self.beliefs[op] = measured(self._mode, nmse)


def _too_short(budget: str | None, when: str, reference: float) -> str:
    return (
        f"the time budget of {budget} ended {when}, so there is nothing to tell and nothing is written. One forward "
        f"takes {time_budget.told(reference)}, and estimating all ops {_ESTIMATE} to 20 of them: give more time"
    )
