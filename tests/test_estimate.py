"""Estimates are corrected by what was measured, and their intervals hold as many exact values as they say."""

from __future__ import annotations

import math
import random

import pytest

from pytest_qsens.estimate import LEVEL, MEASURED, MEASURED_FALLBACK, Estimator, Evidence, restored, spread_over


def test_measured_ops_are_spread_over_the_range() -> None:
    """They come from all parts of it, and are the same whatever the order; all ops if there are few."""
    values = {f"op{n}": 2.0**n for n in range(20)}
    chosen = spread_over(values, 5)
    assert chosen == ["op2", "op6", "op10", "op14", "op18"]
    assert spread_over(dict(reversed(values.items())), 5) == chosen
    assert spread_over({"b": 2.0, "a": 1.0}, 5) == ["a", "b"]


def test_many_samples_decide() -> None:
    """The estimate without assumption counts little if it rests on four squares, and nearly alone if on thousands."""
    few = Estimator({"op": Evidence([[1.0, 1.0]], [8.0] * 4)}, 10**6).values["op"]
    many = Estimator({"op": Evidence([[1.0, 1.0]], [8.0 / 2000] * 4000)}, 10**6).values["op"]
    assert 1 < few < 1.1
    assert 6.5 < many < 8


def test_a_common_error_is_corrected_in_part() -> None:
    """If all measured ops say that estimates are too high, the others are lowered; a few do not say it for sure."""
    estimator = Estimator({f"op{n}": Evidence([[1.1, 1.1]], [0.1]) for n in range(10)}, 10**6)
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
        estimator = Estimator(evidence, 10**6)
        measured = spread_over(estimator.values, MEASURED)
        found = estimator.corrected({op: exact[op] for op in measured})
        inside += sum(found[op].low <= exact[op] <= found[op].high for op in exact if op not in measured)
        count += len(exact) - len(measured)
    assert inside / count == pytest.approx(LEVEL, abs=0.05)


@pytest.mark.parametrize("terms", [4, 16, 100])
def test_one_draw_scatters_as_passes_do(terms: int) -> None:
    """Where the error is a single draw of few terms, intervals from the scatter of passes hold it all the same."""
    generator = random.Random(terms)

    def draw(scale: float) -> float:
        return scale * sum(generator.gauss(0, 1) ** 2 for _ in range(terms)) / terms

    inside = dict.fromkeys((False, True), 0)
    count = 0
    for _ in range(150):
        sizes = {f"op{n}": math.exp(generator.gauss(0, 3)) for n in range(12)}
        exact = {op: draw(size) for op, size in sizes.items()}
        passes = {op: [draw(size) for _ in range(3)] for op, size in sizes.items()}
        squares = {op: [value / 2 * generator.gauss(0, 1) ** 2 for _ in range(6)] for op, value in exact.items()}
        for drawn in inside:
            evidence = {op: Evidence([passes[op]], squares[op], drawn) for op in exact}
            estimator = Estimator(evidence, 10**6)
            measured = spread_over(estimator.values, MEASURED)
            found = estimator.corrected({op: exact[op] for op in measured})
            inside[drawn] += sum(found[op].low <= exact[op] <= found[op].high for op in exact if op not in measured)
        count += len(exact) - MEASURED
    assert inside[True] / count == pytest.approx(LEVEL, abs=0.06)
    assert inside[False] < inside[True]


def test_few_outputs_say_little() -> None:
    """An exact value that is the sum of a few squares lies anywhere around what is expected of it."""
    evidence = {f"op{n}": Evidence([[1.0, 1.0]], [1.0]) for n in range(10)}
    many, few = (Estimator(evidence, outputs).corrected({"op0": 1.0, "op1": 1.0})["op5"] for outputs in (10**6, 4))
    assert few.high / few.low > 2 * many.high / many.low


def test_intervals_with_everything_quantized() -> None:
    """They hold nine in ten, of large and small parts of the error, in models that differ from what is expected."""
    generator = random.Random(0)
    for factor in (1.0, 5.0, 20.0):
        inside = count = 0
        for _ in range(200):
            base, squares = 10.0, {f"op{n}": 10 ** generator.uniform(-5, 1) for n in range(30)}
            products = {op: -square / 2 for op, square in squares.items()}
            exact = {
                op: base
                + factor * generator.gauss(0, math.hypot(0.02 * base, 0.1 * math.sqrt(square * (square + base))))
                for op, square in squares.items()
            }
            measured = spread_over(squares, MEASURED_FALLBACK)
            found = restored(base, products, squares, {op: exact[op] for op in measured})
            inside += sum(found[op].low <= exact[op] <= found[op].high for op in exact if op not in measured)
            count += len(exact) - len(measured)
        assert inside / count == pytest.approx(LEVEL, abs=0.1)


def test_nothing_below_zero() -> None:
    """An error with everything else quantized is a square, whatever the terms of its estimate say."""
    found = restored(2.0, {"op": -5.0, "other": 1.0}, {"op": 1.0, "other": 1.0}, {"other": 4.9})
    assert found["op"].low == found["op"].value == 0 <= found["op"].high
    assert found["other"].low < 5 < found["other"].high
