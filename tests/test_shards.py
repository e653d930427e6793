"""Dividing ops among machines: laws of the division, and what ``i/N`` may be."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_qsens.errors import QsensError
from pytest_qsens.ops import TOTAL, Op
from pytest_qsens.option_declarations import ENGINES
from pytest_qsens.shards import WHOLE_RUNS, Shard, predicted_costs, split


def tower(*widths: int) -> tuple[Op, ...]:
    """Make a model of blocks with so many ops each."""
    return tuple(Op(f"layers.{n}.op{i}", "linear") for n, width in enumerate(widths) for i in range(width))


NAMES = st.from_regex(r"(a|b)(\.[0-3])?\.(q|k|v)|embed|head", fullmatch=True)
MODELS = st.lists(NAMES, min_size=1, max_size=40, unique=True).map(lambda names: [Op(name, "linear") for name in names])


@st.composite
def divisions(draw: st.DrawFn) -> tuple[list[Op], list[Op], str, int, bool]:
    """Draw a model, what of it is measured, the engine, the number of shards, and whether the whole model counts."""
    model = draw(MODELS)
    chosen = draw(st.sets(st.sampled_from(model), min_size=1))
    ops = [op for op in model if op in chosen]
    return model, ops, draw(st.sampled_from(ENGINES)), draw(st.integers(1, 12)), draw(st.booleans())


@given(divisions())
def test_every_op_is_in_exactly_one_shard(division: tuple[list[Op], list[Op], str, int, bool]) -> None:
    """No op is measured twice or by nobody, the whole model included, and no machine idles while there is work."""
    model, ops, engine, count, total = division
    parts = split(ops, predicted_costs(model, engine), count, total=total)
    assert len(parts) == count
    assert sorted(name for part in parts for name in part) == sorted([op.name for op in ops] + [TOTAL] * total)
    assert sum(not part for part in parts) == max(0, count - len(ops) - total)


@given(divisions())
def test_loads_are_balanced_and_blocks_whole(division: tuple[list[Op], list[Op], str, int, bool]) -> None:
    """What is measured together stays together, and no shard has more than the mean and one block."""
    model, ops, engine, count, total = division
    costs = predicted_costs(model, engine)
    assert min(costs.values()) > 0
    parts = split(ops, costs, count, total=total)
    blocks = [[op.name for op in block] for _, block in groupby(ops, key=lambda op: op.block)]
    if len(blocks) + total < count:
        blocks = [[op.name] for op in ops]
    assert all(any(part.issuperset(block) for part in parts) for block in blocks)
    blocks += [[TOTAL]] * total
    largest, loads = (
        max(sum(costs[name] for name in block) for block in blocks),
        [sum(map(costs.get, p)) for p in parts],
    )
    assert max(loads) <= sum(loads) / count + largest


@given(divisions())
def test_every_machine_comes_to_the_same_division(division: tuple[list[Op], list[Op], str, int, bool]) -> None:
    """Machines agree without talking to each other: nothing but the arguments decides."""
    model, ops, engine, count, total = division
    first, again = (split(list(ops), predicted_costs(list(model), engine), count, total=total) for _ in range(2))
    assert first == again


def test_a_division_that_machines_rely_on() -> None:
    """Machines may run different builds of Python: this is the division of this version, on all of them."""
    ops = tower(2, 2, 2)
    found = split(ops, predicted_costs(ops, "delta"), 3, total=True)
    assert [sorted(part) for part in found] == [
        ["total"],
        ["layers.0.op0", "layers.0.op1"],
        ["layers.1.op0", "layers.1.op1", "layers.2.op0", "layers.2.op1"],
    ]


def test_what_an_op_is_expected_to_cost() -> None:
    """Replays get cheaper towards the output, and never free; engines that run the whole model cost the same each."""
    ops = tower(*[7] * 24)
    for engine in ENGINES:
        costs = [cost for name, cost in predicted_costs(ops, engine).items() if name != TOTAL]
        if engine in WHOLE_RUNS:
            assert set(costs) == {1}
        else:
            assert costs == sorted(costs, reverse=True)
            assert costs[0] / costs[-1] == pytest.approx(11, rel=0.1)


@pytest.mark.parametrize(("text", "shard"), [("1/1", Shard(1, 1)), (" 2/4 ", Shard(2, 4)), ("10/10", Shard(10, 10))])
def test_parts_that_can_be(text: str, shard: Shard) -> None:
    """The first is 1 and the last N, and a message spells it like the option."""
    assert Shard.parse(text, "--qsens-shard") == shard
    assert str(shard) == text.strip()


@pytest.mark.parametrize(
    "text", ["0/4", "5/4", "0/0", "4", "1/", "-1/4", "1/4/2", "a/b", "1.0/4", "1 / 4", "٣/٤", "1/1000000000"]
)
def test_parts_that_cannot_be(text: str) -> None:
    """The message says where it was given, what is needed and what it was."""
    with pytest.raises(QsensError, match=r"^here takes i/N, part i of N.*not '"):
        Shard.parse(text, "here")
