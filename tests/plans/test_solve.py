"""Plans against all that there is to choose: the best where errors add up, and near it where they are quadratic."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pytest_qsens import QsensError
from pytest_qsens.plans.problem import Candidate, Problem, Unit, own_error
from pytest_qsens.plans.solve import least_error, smallest
from tests.plans.problems import choices, random_problem

SLACK = 1 + 1e-9


def one_each(problem: Problem, chosen: np.ndarray) -> bool:
    """Whether no unit has two schemes."""
    return bool(np.bincount(problem.owners[chosen], minlength=1).max(initial=0) <= 1)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), schemes=st.integers(1, 3), share=st.floats(0, 1))
@example(seed=214, schemes=2, share=0.5625)  # two plans whose sums differ by less than HiGHS' absolute gap
def test_the_lowest_sum(seed: int, schemes: int, share: float) -> None:
    """Of all plans that save enough none has a lower sum of errors, however small that is beside the others."""
    problem = random_problem(seed, 5, schemes)
    every = choices(problem)
    for gains, gained in ((problem.saved, every.saved), (problem.counts, every.counts)):
        need = share * problem.most(gains)
        found = least_error(problem, gains, need)
        best = every.errors[gained * SLACK >= need].min()
        assert one_each(problem, found)
        assert gains[found].sum() * SLACK >= need
        assert problem.predicted(found) == problem.additive(found) == pytest.approx(best, rel=1e-6)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), schemes=st.integers(1, 3), power=st.floats(-10, 0))
def test_the_smallest_within_a_sum(seed: int, schemes: int, power: float) -> None:
    """Of all plans within the limit none is smaller."""
    problem = random_problem(seed, 5, schemes)
    limit = 10**power
    found = smallest(problem, limit)
    every = choices(problem)
    best = every.saved[every.errors <= limit].max()
    assert one_each(problem, found)
    assert problem.additive(found) <= limit
    assert problem.saved[found].sum() == pytest.approx(best)


def test_with_interactions() -> None:
    """Quadratic plans keep the budget, are never worse than those by sums, and most often the best there are."""
    ratios = []
    for seed in range(60):
        problem = random_problem(seed, 7, 1 + seed % 2, dimensions=4 + seed % 9, common=(seed % 4) / 2)
        need = (0.2 + 0.7 * (seed % 7) / 6) * problem.most(problem.saved)
        found = least_error(problem, problem.saved, need)
        added = replace(problem, candidates=tuple(replace(c, sketch=None) for c in problem.candidates))
        rival = least_error(added, problem.saved, need)
        assert one_each(problem, found)
        assert problem.saved[found].sum() * SLACK >= need
        assert problem.predicted(found) <= problem.predicted(rival) * SLACK
        every = choices(problem)
        best = every.errors[every.saved * SLACK >= need].min()
        ratios.append(problem.predicted(found) / best)
    assert sum(ratio < 1 + 1e-6 for ratio in ratios) >= 57
    assert max(ratios) < 1.5


def test_the_smallest_with_interactions() -> None:
    """The limit is kept, as predicted, and hardly any plan within it is smaller."""
    shortfalls = []
    for seed in range(12):
        problem = random_problem(seed, 6, 1 + seed % 2, dimensions=6, common=(seed % 3) / 2)
        limit = problem.predicted(problem.owners >= 0) * 10 ** -(seed % 5)
        found = smallest(problem, limit)
        every = choices(problem)
        best = every.saved[every.errors <= limit].max()
        assert one_each(problem, found)
        assert problem.predicted(found) <= limit
        shortfalls.append(1 - problem.saved[found].sum() / best if best else 0.0)
    assert sum(shortfall < 1e-3 for shortfall in shortfalls) >= 11
    assert max(shortfalls) < 0.2


def test_errors_that_cancel() -> None:
    """Two ops whose changes undo each other are quantized together, although each alone is the worst."""
    change = np.array([1.0, 0.0])
    sketches = [change, -change, np.array([0.0, 0.5]), np.array([0.0, 0.6])]
    units = tuple(Unit(name, (name,), ("linear",), 100) for name in "abcd")
    candidates = tuple(Candidate(i, "s", 8, float(s @ s), float(s @ s), s) for i, s in enumerate(sketches))
    problem = Problem("m", ("s",), units, candidates, 16)
    found = least_error(problem, problem.counts, 2)
    assert found.tolist() == [True, True, False, False]
    assert problem.predicted(found) == pytest.approx(0, abs=1e-12)
    assert problem.additive(found) == pytest.approx(2)
    added = replace(problem, candidates=tuple(replace(c, sketch=None) for c in candidates))
    assert least_error(added, problem.counts, 2).tolist() == [False, False, True, True]


def test_what_cannot_be_gained() -> None:
    """More than there is to save is refused, and nothing to save is nothing to do."""
    problem = random_problem(0, 4, 2)
    with pytest.raises(QsensError, match="is all that there is to gain"):
        least_error(problem, problem.saved, 1.001 * problem.most(problem.saved))
    assert not least_error(problem, problem.saved, 0).any()
    assert not smallest(problem, 0).any()


def test_the_error_of_a_group() -> None:
    """Ops of one group meet as those of two do."""
    one, other = np.array([1.0, 2.0]), np.array([-1.0, 1.0])
    assert own_error(7.0, [one, other]) == pytest.approx(7.0 + 2 * float(one @ other))
