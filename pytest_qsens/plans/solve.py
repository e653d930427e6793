"""Choose schemes: binary programs for SciPy's HiGHS, and exchanges where the error is quadratic.

Additive errors make a linear program with a proof that nothing is better. With interactions the error is a quadratic
form in as many binary variables; its programs start from linear ones and are refined by all exchanges of one or two
units, until none is better.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from pytest_qsens.errors import QsensError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from pytest_qsens.plans.problem import Chosen, Floats, Problem

    Places = NDArray[np.intp]
    """Of candidates."""

_SLACK = 1e-9
"""Relative: sums of gains in another order differ by less."""

_ABOVE_GAP = 1e3
"""Factor of objectives of size 1: HiGHS ends within 1e-6 of the best, whatever relative gap it is given."""

_SMALL = 1e-3
"""HiGHS stops at differences of 1e-6: an optimum below this is found again in units of its own size."""

_BETTER = 1e-6
"""Relative: by how much a plan has to be better to go on from it."""

_ROWS = 256
"""Moves that are paired with all others at a time."""

_NARROW = 1e-3
"""Relative: how narrow the interval gets in which the smallest size lies."""


def least_error(problem: Problem, gains: Floats, need: float) -> Chosen:
    """Find the plan with the lowest predicted error whose gains, added up, are ``need`` at least.

    Args:
        problem: What there is to choose from.
        gains: Of each candidate, none negative.
        need: At most `Problem.most` of the gains.

    Raises:
        QsensError: If the gains cannot be that large.

    """
    most = problem.most(gains)
    if need > most * (1 + _SLACK):
        raise QsensError(f"{need:.6g} is needed and {most:.6g} is all that there is to gain")
    need = min(need, most)
    if problem.cross is None:
        return _linear(problem, problem.nmse, gains, need)
    costs = problem.own + 2 * problem.cross @ _fractions(problem, gains, need)
    starts = [_linear(problem, start, gains, need) for start in (problem.nmse, costs)]
    best = min((_exchanged(problem, start, gains, need) for start in starts), key=problem.predicted)
    while True:
        around = _linear(problem, problem.own + 2 * (problem.cross @ best), gains, need)
        found = _exchanged(problem, around, gains, need)
        if not problem.predicted(found) < problem.predicted(best) * (1 - _BETTER):
            return best
        best = found


def smallest(problem: Problem, limit: float) -> Chosen:
    """Find the plan that saves the most bits with a predicted error of at most ``limit``."""
    if problem.cross is None:
        return _most_saved(problem, limit)
    best = np.zeros(len(problem.candidates), dtype=bool)
    most = problem.most(problem.saved)
    low, high = 0.0, most
    need = most
    while high - low > _NARROW * most:
        found = least_error(problem, problem.saved, need)
        if problem.predicted(found) <= limit:
            best, low = found, max(need, float(problem.saved[found].sum()))
        else:
            high = need
        need = (low + high) / 2
    return best


def _most_saved(problem: Problem, limit: float) -> Chosen:
    able = (problem.nmse <= limit) & (problem.saved > 0)
    if not able.any():
        return able
    scale = limit or 1.0
    saved = np.where(able, problem.saved, 0.0)
    rows = sparse.vstack([_one_each(problem), sparse.csr_array([np.where(able, problem.nmse / scale, 0.0)])])
    tops = np.concatenate([np.ones(len(problem.units)), [1.0]])
    for tighter in (0.0, 1e-6, 1e-5):  # HiGHS takes what is past a limit by 1e-6 for within it
        tops[-1] = (1.0 if limit else 0.0) - tighter * bool(limit)
        chosen = _solved(-saved / (saved.max() or 1.0), LinearConstraint(rows, ub=tops), able)
        if problem.additive(chosen) <= limit:
            return chosen
    raise AssertionError("a plan within the limit, found by the solver, is past it")


def _linear(problem: Problem, costs: Floats, gains: Floats, need: float) -> Chosen:
    """Solve with an error that is a sum."""
    if need <= 0 and (costs >= 0).all():
        return np.zeros(len(costs), dtype=bool)
    scale, size = float(np.abs(costs).max()) or 1.0, float(gains.max()) or 1.0
    able = np.ones(len(costs), dtype=bool)
    rows = sparse.vstack([_one_each(problem), sparse.csr_array([-gains / size])])
    for tighter in (0.0, 1e-7, 1e-6, 1e-5):
        tops = np.concatenate([np.ones(len(problem.units)), [-min(need / size + tighter, problem.most(gains) / size)]])
        chosen = _solved(costs / scale, LinearConstraint(rows, ub=tops), able)
        while (costs >= 0).all() and 0 < (found := float(costs[chosen].sum())) < _SMALL * scale:
            scale = found
            able = costs <= found * (1 + _SLACK)  # a dearer candidate alone would cost more
            chosen = _solved(np.where(able, costs / scale, 0.0), LinearConstraint(rows, ub=tops), able)
        if _enough(gains, chosen, need):
            return chosen
    raise AssertionError("a plan with enough gains, found by the solver, has too few")


def _enough(gains: Floats, chosen: Chosen, need: float) -> bool:
    return float(gains[chosen].sum()) >= need * (1 - _SLACK)


def _one_each(problem: Problem) -> sparse.csr_array:
    size = len(problem.owners)
    return sparse.csr_array((np.ones(size), (problem.owners, np.arange(size))), shape=(len(problem.units), size))


def _solved(costs: Floats, constraint: LinearConstraint, able: Chosen) -> Chosen:
    with _silence():
        result = milp(
            costs * _ABOVE_GAP,
            constraints=constraint,
            integrality=np.ones(len(costs)),
            bounds=Bounds(0, able.astype(float)),
            options={"mip_rel_gap": 0.0},
        )
    if result.x is None:
        raise QsensError(f"HiGHS finds no plan: {result.message}")
    chosen: Chosen = result.x > 0.5
    return chosen


@contextmanager
def _silence() -> Iterator[None]:
    """Send to nowhere what HiGHS 1.12 prints although it is told to print nothing (`tmpSolver.run();`)."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _fractions(problem: Problem, gains: Floats, need: float) -> Floats:
    """Guess how likely each candidate is taken: the same for all units."""
    share = need / (problem.most(gains) or 1.0)
    return share / np.bincount(problem.owners, minlength=len(problem.units))[problem.owners]


def _exchanged(problem: Problem, chosen: Chosen, gains: Floats, need: float) -> Chosen:
    exchange = _Exchange(problem, chosen, gains, need)
    exchange.run()
    return exchange.chosen


class _Exchange:
    """A plan that is bettered by exchanging the candidates of one or two units.

    A move is a change of one unit: the candidate that it has, and the one that it gets. The last place, one past the
    candidates, stands for none.
    """

    def __init__(self, problem: Problem, chosen: Chosen, gains: Floats, need: float) -> None:
        assert problem.cross is not None  # noqa: S101 - for mypy: else nothing is to be refined
        self._problem = problem
        self._cross = np.pad(problem.cross, (0, 1))
        self._gains = np.append(gains, 0.0)
        self._spare = float(gains[chosen].sum()) - need * (1 - _SLACK)
        self._slope = np.append(problem.own, 0.0) + 2 * self._cross[:, :-1] @ chosen
        self.chosen = chosen.copy()

    def run(self) -> None:
        """Exchange until no exchange is better, some of the moves with all others at a time."""
        start = without = 0
        while without < len(self.chosen):
            better = self._pass(slice(start, start + _ROWS))
            if better:
                without = 0
            else:
                without += _ROWS
                start = start + _ROWS if start + _ROWS < len(self.chosen) else 0

    def _pass(self, rows: slice) -> bool:
        """Make the best exchanges that some of the moves are part of; tells whether there were any."""
        old, new, units = self._moves()
        errors, gained = self._slope[new] - self._slope[old], self._gains[new] - self._gains[old]
        differences = self._cross[new[rows]] - self._cross[old[rows]]
        both = errors[rows, None] + errors + 2 * (differences[:, new] - differences[:, old])
        both[(self._spare + gained[rows, None] + gained < 0) | (units[rows, None] == units)] = np.inf
        partners = both.argmin(1)
        paired = both[np.arange(len(both)), partners]
        alone = np.where(self._spare + gained[rows] >= 0, errors[rows], np.inf)
        least = -_BETTER * self._problem.predicted(self.chosen)
        touched: set[int] = set()
        for row in np.argsort(np.minimum(paired, alone)):
            if not min(paired[row], alone[row]) < least:
                break
            moves = [rows.start + int(row), *([int(partners[row])] if paired[row] < alone[row] else [])]
            if touched.isdisjoint(units[moves].tolist()) and self._made(old[moves], new[moves], least):
                touched.update(units[moves].tolist())
        return bool(touched)

    def _made(self, old: Places, new: Places, least: float) -> bool:
        """Make moves, unless those that were made before have left no room for them, or made them worse."""
        gained = float((self._gains[new] - self._gains[old]).sum())
        change = float((self._slope[new] - self._slope[old]).sum())
        if len(old) == 2:
            difference = self._cross[new[0]] - self._cross[old[0]]
            change += 2 * float(difference[new[1]] - difference[old[1]])
        if self._spare + gained < 0 or not change < least:
            return False
        self._spare += gained
        self._slope += 2 * (self._cross[:, new] - self._cross[:, old]).sum(1)
        for places, value in ((old, False), (new, True)):
            self.chosen[places[places < len(self.chosen)]] = value
        return True

    def _moves(self) -> tuple[Places, Places, Places]:
        """List the old and the new place of every move, and whose it is."""
        owners, none = self._problem.owners, len(self.chosen)
        current = np.full(len(self._problem.units), none)
        current[owners[self.chosen]] = np.flatnonzero(self.chosen)
        others, given_up = np.flatnonzero(~self.chosen), np.flatnonzero(self.chosen)
        old = np.concatenate([current[owners[others]], given_up])
        new = np.concatenate([others, np.full(len(given_up), none)])
        return old, new, owners[np.concatenate([others, given_up])]
