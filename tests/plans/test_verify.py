"""Plans that are measured are corrected where a prediction was too good."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_qsens.errors import QsensError
from pytest_qsens.plans.command import Plan, _verified
from pytest_qsens.plans.solve import smallest
from tests.plans.problems import random_problem

if TYPE_CHECKING:
    from collections.abc import Mapping


@given(st.integers(0, 10**6), st.floats(0.3, 4), st.floats(0.05, 0.9))
def test_a_plan_past_the_budget_is_corrected(seed: int, wrong: float, share: float) -> None:
    """What is written was measured within the budget, whatever the prediction is wrong by; plans before were not."""
    problem = random_problem(seed, 5, 2)
    budget = share * float(problem.nmse.max())
    measured: list[float] = []

    def nmse(assignment: Mapping[str, str | None]) -> float:
        chosen = np.array([assignment[problem.units[c.unit].ops[0]] == c.scheme for c in problem.candidates])
        measured.append(wrong * problem.predicted(chosen))
        return measured[-1]

    plan = _verified(problem, Plan("p", smallest(problem, budget)), budget, nmse)
    assert plan.name == "p"
    assert plan.measured == measured[-1] <= budget
    assert [found for _, found in plan.missed] == measured[:-1]
    assert all(found > budget for found in measured[:-1])
    assert all(later < earlier for (earlier, _), (later, _) in pairwise(plan.missed))


def test_a_budget_that_no_plan_keeps() -> None:
    """It ends where nothing would be left to quantize, or after some plans, with what was measured."""
    problem = random_problem(1, 4, 2)
    with pytest.raises(QsensError, match=r"--budget-nmse 1e-30: one plan was measured, .*the last one at 1, "):
        _verified(problem, Plan("p", smallest(problem, 1.0)), 1e-30, lambda _: 1.0)
    problem = random_problem(1, 40, 2)
    with pytest.raises(QsensError, match=r"--budget-nmse 0\.99: 10 plans were measured, .*the last one at 1, "):
        _verified(problem, Plan("p", smallest(problem, 1.0)), 0.99, lambda _: 1.0)
