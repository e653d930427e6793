"""Ranks of a proxy beside exact scores."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_qsens.proxies.agreement import TOP, Agreement, agreement, best_first

VALUES = st.lists(st.integers(-1000, 1000), min_size=3, max_size=30, unique=True)


def named(values: list[float]) -> dict[str, float]:
    """Give ops names."""
    return {f"op{index}": value for index, value in enumerate(values)}


def compared(values: dict[str, float], exact: dict[str, float]) -> Agreement:
    """Compare where that is possible."""
    found = agreement("proxy", values, exact, 1.0)
    assert found is not None
    return found


@settings(deadline=None)  # SciPy is imported in the first
@given(VALUES)
def test_only_the_order_counts(values: list[int]) -> None:
    """Any growing function of the exact scores agrees fully, any falling one is the reverse."""
    exact = named([float(value) for value in values])
    same = compared({op: math.exp(value / 100) for op, value in exact.items()}, exact)
    assert same.spearman == pytest.approx(1)
    assert same.kendall_tau_b == pytest.approx(1)
    assert same.top == same.places == min(TOP, len(values))
    reverse = compared({op: -value for op, value in exact.items()}, exact)
    assert reverse.spearman == pytest.approx(-1)
    assert reverse.top == max(0, 2 * same.places - len(values))


def test_coefficients_by_hand() -> None:
    """Spearman 1 - 6·Σd² / (n³ - n), Kendall (concordant - discordant) / pairs."""
    found = compared(named([1, 2, 3, 5, 4]), named([10, 30, 20, 40, 50]))
    assert found.spearman == pytest.approx(1 - 6 * 4 / 120)
    assert found.kendall_tau_b == pytest.approx((8 - 2) / 10)
    assert found.expected_by_chance == 5


def test_ops_without_a_value_are_left_out() -> None:
    """Neither NaN nor infinity has a rank, and an op that has no exact score is none to compare."""
    exact = named([1, 2, 3, 4])
    found = compared({"op0": 1, "op1": 2, "op2": 3, "op3": math.nan, "op4": math.inf}, exact)
    assert set(found.values) == {"op0", "op1", "op2"}
    assert agreement("proxy", {"op0": 1, "op1": math.inf, "op2": 3}, exact, 1.0) is None


def test_a_constant_proxy_has_no_correlation() -> None:
    """It is undefined, not zero, and comes last."""
    constant = compared(named([2, 2, 2]), named([1, 2, 3]))
    assert (constant.spearman, constant.kendall_tau_b) == (None, None)
    bad = compared(named([3, 2, 1]), named([1, 2, 3]))
    assert best_first([constant, bad]) == [bad, constant]
