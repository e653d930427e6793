"""Which ops are measured after all were estimated, and how sure the most sensitive ones are."""

from __future__ import annotations

import math
import random
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_qsens.errors import QsensError
from pytest_qsens.ops import TOTAL, Op
from pytest_qsens.refinement import (
    CERTAIN,
    Belief,
    Pace,
    Step,
    certainty,
    choose,
    estimated,
    measured,
    owners,
    steps,
    undecided,
    worth,
)
from pytest_qsens.time_budget import parse_duration

REACH = 1.6448536269514722
"""Standard deviations that 90 % of a normal distribution lie within."""

OPS = ("embed", *(f"layers.{i}.{name}" for i in range(5) for name in ("up", "down")), "head")


def logarithmic(middle: float, deviation: float) -> Belief:
    """Belief in a value whose logarithm has that standard deviation."""
    return estimated("isolated", (middle * math.exp(-REACH * deviation), middle * math.exp(REACH * deviation)))


@given(
    st.lists(st.tuples(st.floats(1e-6, 10), st.floats(0.01, 1)), min_size=2, max_size=8),
    st.lists(st.floats(1e-6, 10), min_size=2, max_size=4),
    st.integers(1, 2),
)
def test_certainty_is_the_share_of_draws(open_ops: list[tuple[float, float]], exact: list[float], count: int) -> None:
    """In so many of the worlds that estimates allow for, the most sensitive of the measured ops are those of all."""
    beliefs = {f"exact.{i}": measured("isolated", value) for i, value in enumerate(exact)}
    beliefs |= {f"open.{i}": logarithmic(*it) for i, it in enumerate(open_ops)}
    threshold = sorted(exact, reverse=True)[count - 1]
    draw = random.Random(0)
    held = [
        all(math.exp(draw.gauss(math.log(middle), deviation)) <= threshold for middle, deviation in open_ops)
        for _ in range(2000)
    ]
    assert certainty(beliefs, count) == pytest.approx(fmean(held), abs=0.05)


def test_without_measurements_nothing_is_certain() -> None:
    """As long as fewer are measured than asked for, there is no answer; with all measured, there is no doubt."""
    beliefs = {"a": measured("isolated", 1.0), "b": logarithmic(1e-9, 0.1)}
    assert certainty(beliefs, 2) == 0
    assert certainty({**beliefs, "b": measured("isolated", 0.5)}, 2) == 1


@given(st.lists(st.floats(1e-6, 1), min_size=5, max_size=30, unique=True), st.integers(1, 5), st.integers(0, 9))
def test_measuring_what_is_undecided_finds_the_top(values: list[float], count: int, seed: int) -> None:
    """It ends, with certainty, and with the right ops where intervals hold the truth."""
    draw = random.Random(seed)
    truth = {f"layers.{i}.op": value for i, value in enumerate(values)}
    beliefs = {op: logarithmic(value * math.exp(draw.uniform(-0.15, 0.15)), 0.1) for op, value in truth.items()}
    while certainty(beliefs, count) < CERTAIN:
        rest = undecided(beliefs, count)
        assert rest, "nothing left to measure, but no certainty"
        op = max(rest, key=lambda op: beliefs[op].middle)
        beliefs[op] = measured("isolated", truth[op])
    exact = [op for op, found in beliefs.items() if found.interval is None]
    top = sorted(truth, key=lambda op: -truth[op])[:count]
    missed = set(top) - set(exact)
    least = min(sorted((truth[op] for op in exact), reverse=True)[:count])
    assert not missed or max(truth[op] for op in missed) < 1.1 * least


def test_sparing_an_op_counts_the_other_way_round() -> None:
    """Everything else quantized, the smallest nmse is that of the most sensitive op, intervals included."""
    low, high = estimated("fallback", (0.1, 0.2)), measured("fallback", 0.3)
    assert low.interval == (-0.2, -0.1)
    assert low.middle > high.middle
    assert low.above(-0.15) == pytest.approx(0.5)
    assert estimated("fallback", (0.0, 0.0)).above(-1.0) == 1


def test_steps_are_blocks() -> None:
    """Of what is left, in model order, with the costs of their ops."""
    costs = {op: 1.0 + i for i, op in enumerate(OPS)}
    found = steps(OPS, {"layers.3.down", "layers.1.up", "layers.1.down"}, costs)
    assert found == [Step(("layers.1.up", "layers.1.down"), 9.0), Step(("layers.3.down",), 9.0)]


def test_the_step_worth_most_for_its_cost_comes_first() -> None:
    """What is large and uncertain, what is unknown before all; what does not fit into the time never."""
    beliefs = {"a.0.x": logarithmic(1.0, 0.1), "a.1.x": logarithmic(1.0, 0.3), "a.2.x": logarithmic(1e-3, 0.3)}
    candidates = [Step((op,), 1.0) for op in beliefs]
    pace = Pace(1.0)
    assert choose(candidates, beliefs, 10.0, pace) == candidates[1]
    assert choose([*candidates[:1], Step(("a.1.x",), 5.0)], beliefs, 10.0, pace) == candidates[0]
    assert choose(candidates, beliefs, 1.0, pace) is None
    unknown = Step(("a.3.x",), 1.0)
    assert choose([*candidates, unknown], beliefs, 10.0, pace) == unknown
    assert worth(Step(("a.0.x", "a.1.x"), 1.0), beliefs) > worth(candidates[1], beliefs)
    assert worth(Step(("a.4.x",), 1.0), {"a.4.x": measured("isolated", 1.0)}) == 0


def test_the_pace_is_learned() -> None:
    """A forward is a forward until something was measured."""
    pace = Pace(2.0)
    assert pace.seconds(3.0) == pytest.approx(7.5)
    pace.took(4.0, 2.0)
    pace.took(4.0, 6.0)
    assert pace.seconds(3.0) == pytest.approx(3.75)


@given(st.integers(1, 9))
def test_every_block_has_one_owner(count: int) -> None:
    """Ops of a block go together, and blocks are dealt out evenly."""
    names = (*OPS, TOTAL)
    blocks = {Op(op, "").block: set() for op in names}
    for op, index in owners(names, count).items():
        assert 0 <= index < count
        blocks[Op(op, "").block].add(index)
    assert all(len(found) == 1 for found in blocks.values())
    loads = [sum(found == {index} for found in blocks.values()) for index in range(count)]
    assert max(loads) - min(loads) <= 1


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("120s", 120), ("5m", 300), ("1h30m", 5400), ("90", 90), ("1.5s", 1.5), (" 2H1m5S ", 7265), ("0h5s", 5)],
)
def test_durations(text: str, seconds: float) -> None:
    """As people write them."""
    assert parse_duration(text, "here") == seconds


@pytest.mark.parametrize("text", ["0", "0s", "-5s", "5x", "s", "m5", "1d", "1e3", "inf", "nan", "5 m 3", "\u0665s"])
def test_what_is_no_duration(text: str) -> None:
    """Named with the place and an example."""
    with pytest.raises(QsensError, match=r"here takes a time above 0, such as 120s, 5m or 1h30m, not "):
        parse_duration(text, "here")
