"""Estimates are corrected by what was measured, and their intervals hold as many exact values as they say."""

from __future__ import annotations

import math
import random

import pytest

from pytest_qsens.estimate import LEVEL, MEASURED, Estimator, Evidence, shifted, spread_over


def test_measured_ops_are_spread_over_the_range() -> None:
    """They come from all parts of it, and are the same whatever the order; all ops if there are few."""
    values = {f"op{n}": 2.0**n for n in range(20)}
    chosen = spread_over(values, 5)
    assert chosen == ["op2", "op6", "op10", "op14", "op18"]
    assert spread_over(dict(reversed(values.items())), 5) == chosen
    assert spread_over({"b": 2.0, "a": 1.0}, 5) == ["a", "b"]


def test_many_samples_decide() -> None:
    """The estimate without assumption counts little if it rests on four squares, and nearly alone if on thousands."""
    few = Estimator({"op": Evidence([[1.0, 1.0]], [8.0] * 4)}).values["op"]
    many = Estimator({"op": Evidence([[1.0, 1.0]], [8.0 / 2000] * 4000)}).values["op"]
    assert few == pytest.approx(1, rel=0.1)
    assert many == pytest.approx(8, rel=0.3)


def test_a_common_error_is_corrected_in_part() -> None:
    """If all measured ops say that estimates are too high, the others are lowered; a few do not say it for sure."""
    estimator = Estimator({f"op{n}": Evidence([[1.1, 1.1]], [0.1]) for n in range(10)})
    raw = estimator.values["op9"]
    found = estimator.corrected({f"op{n}": raw / 1.2 for n in range(5)})["op9"].value
    assert raw / 1.2 < found < raw / 1.05


def test_intervals_hold_what_they_say() -> None:
    """Where errors are those that the constants stand for, nine in ten exact values are inside."""
    generator = random.Random(0)
    inside = count = 0
    for _ in range(200):
        spread = 0.08
        exact = {f"op{n}": math.exp(generator.gauss(0, 3)) for n in range(30)}
        evidence = {
            op: Evidence([[value * math.exp(generator.gauss(0, spread))] * 2], [value]) for op, value in exact.items()
        }
        estimator = Estimator(evidence)
        measured = spread_over(estimator.values, MEASURED)
        found = estimator.corrected({op: exact[op] for op in measured})
        inside += sum(found[op].low <= exact[op] <= found[op].high for op in exact if op not in measured)
        count += len(exact) - len(measured)
    assert inside / count == pytest.approx(LEVEL, abs=0.05)


def test_nothing_below_zero() -> None:
    """An error with everything else quantized is a square, whatever the terms of its estimate say."""
    found = shifted({"op": -1.0, "other": 5.0}, {"op": 1.0, "other": 1.0}, {"other": 4.0})
    assert found["op"].low == found["op"].value == 0 < found["op"].high
    assert found["other"].low < 5 < found["other"].high
