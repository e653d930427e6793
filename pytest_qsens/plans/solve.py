"""Choose schemes: binary programs for SciPy's HiGHS, and exchanges where the error is quadratic.

Additive errors make a linear program with a proof that nothing is better. With interactions the error is a quadratic
form in as many binary variables; its programs start from linear ones and are refined by all exchanges of one or two
units, until none is better.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from pytest_qsens.errors import QsensError

if TYPE_CHECKING:
    from pytest_qsens.plans.problem import Chosen, Floats, Problem

_SLACK = 1e-9
"""Relative: sums of gains in another order differ by less."""

_SMALL = 1e-3
"""HiGHS stops at differences of 1e-6: an optimum below this is found again in units of its own size."""

_BETTER = 1e-6
"""Relative: by how much a plan has to be better to go on from it."""

_ROWS = 256
"""Moves that are paired with all others at a time."""

_NARROW = 1e-4
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
    return min((_refined(problem, start, gains, need) for start in starts), key=problem.predicted)


def _refined(problem: Problem, start: Chosen, gains: Floats, need: float) -> Chosen:
    best = _relinearized(problem, start, gains, need)
    while True:
        exchanged = _exchanged(problem, best, gains, need)
        best = _relinearized(problem, exchanged, gains, need)
        if best is exchanged:
            return best


def _relinearized(problem: Problem, best: Chosen, gains: Floats, need: float) -> Chosen:
    """Solve programs that are linear around the best plan so far, until one finds no better plan."""
    assert problem.cross is not None  # noqa: S101 - for mypy: else the first program is the last
    while True:
        found = _linear(problem, problem.own + 2 * (problem.cross @ best), gains, need)
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
    able = problem.nmse <= limit
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
    result = milp(
        costs,
        constraints=constraint,
        integrality=np.ones(len(costs)),
        bounds=Bounds(0, able.astype(float)),
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise QsensError(f"HiGHS finds no plan: {result.message}")
    chosen: Chosen = result.x > 0.5
    return chosen


def _fractions(problem: Problem, gains: Floats, need: float) -> Floats:
    """Guess how likely each candidate is taken: the same for all units."""
    share = need / (problem.most(gains) or 1.0)
    return share / np.bincount(problem.owners, minlength=len(problem.units))[problem.owners]


class _Moves(NamedTuple):
    """Changes of one unit: the candidate it has, and the one it gets; the last place stands for none.

    Attributes:
        old: Places.
        new: Places.
        unit: Whose they are.

    """

    old: np.ndarray[tuple[int], np.dtype[np.intp]]
    new: np.ndarray[tuple[int], np.dtype[np.intp]]
    unit: np.ndarray[tuple[int], np.dtype[np.intp]]


def _exchanged(problem: Problem, chosen: Chosen, gains: Floats, need: float) -> Chosen:
    """Exchange candidates of one or two units, until no exchange is better."""
    assert problem.cross is not None  # noqa: S101 - for mypy: else nothing is to be refined
    cross = np.pad(problem.cross, (0, 1))
    own, gain = np.append(problem.own, 0.0), np.append(gains, 0.0)
    chosen = chosen.copy()
    start = tried = 0
    while tried <= len(own):
        moves = _moves(problem, chosen)
        spare = float(gains[chosen].sum()) - need * (1 - _SLACK)
        slope = own + 2 * cross[:, :-1] @ chosen
        errors = slope[moves.new] - slope[moves.old]
        start = start if start < len(errors) else 0
        change, best = _best_pair(moves, errors, gain[moves.new] - gain[moves.old], cross, spare, start)
        if change < -_BETTER * problem.predicted(chosen):
            tried = 0
            for move in best:
                for place, value in ((moves.old[move], False), (moves.new[move], True)):
                    if place < len(chosen):
                        chosen[place] = value
        else:
            start, tried = start + _ROWS, tried + _ROWS
    return chosen


def _moves(problem: Problem, chosen: Chosen) -> _Moves:
    none = len(chosen)
    current = np.full(len(problem.units), none)
    current[problem.owners[chosen]] = np.flatnonzero(chosen)
    others = np.flatnonzero(~chosen)
    given_up = np.flatnonzero(chosen)
    old = np.concatenate([current[problem.owners[others]], given_up])
    new = np.concatenate([others, np.full(len(given_up), none)])
    return _Moves(old, new, problem.owners[np.concatenate([others, given_up])])


def _best_pair(
    moves: _Moves, errors: Floats, gained: Floats, cross: Floats, spare: float, start: int
) -> tuple[float, tuple[int, ...]]:
    """Find the best of the moves from ``start`` on, alone or paired with any, and what the error changes by."""
    rows = slice(start, start + _ROWS)
    alone = np.where(spare + gained[rows] >= 0, errors[rows], np.inf)
    differences = cross[moves.new[rows]] - cross[moves.old[rows]]
    both = errors[rows, None] + errors + 2 * (differences[:, moves.new] - differences[:, moves.old])
    both[(spare + gained[rows, None] + gained < 0) | (moves.unit[rows, None] == moves.unit)] = np.inf
    one, two = int(alone.argmin()), int(both.argmin())
    if alone[one] <= both.flat[two]:
        return float(alone[one]), (start + one,)
    return float(both.flat[two]), (start + two // len(errors), two % len(errors))
