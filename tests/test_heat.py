"""Scores of all ops in a few lines."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pytest_qsens.report.heat import BLOCKS, LETTERS, strip

KINDS = ("attn.q", "mlp.up")


def scores(blocks: int) -> dict[str, float]:
    """Scores that grow with the block, and from kind to kind."""
    found = {f"layers.{i}.{kind}": 10.0 ** (i + j) for i in range(blocks) for j, kind in enumerate(KINDS)}
    return {"embed": 1e9} | found | {"head": 1e-9}


def test_a_row_for_each_kind() -> None:
    """Blocks are columns, the scale is logarithmic, and ops outside of blocks are no part of it."""
    assert list(strip(scores(4), 80, "abcde")) == [
        "blocks from left to right, by nmse: a 1 to e 1e+04",
        "  layers.*.attn.q abcd",
        "  layers.*.mlp.up bcde",
    ]


def test_gaps_and_zeros() -> None:
    """A block without the op leaves its place empty; an op without an error has the smallest mark."""
    found = {"b.0.x": 0.0, "b.3.x": 2.0, "b.1.y": 1.0, "b.2.y": 2.0}
    assert list(strip(found, 80, "ab"))[1:] == ["  b.*.x    a  b", "  b.*.y     ab"]


def test_nothing_to_draw() -> None:
    """One block, no block or no error at all is not drawn."""
    for found in ({}, {"head": 1.0}, {"b.0.x": 1.0, "b.0.y": 2.0}, {"b.0.x": 0.0, "b.1.x": 0.0}):
        assert list(strip(found, 80, BLOCKS)) == []


def test_equal_scores() -> None:
    """They have the mark of the largest."""
    assert list(strip({"b.0.x": 1.0, "b.1.x": 1.0}, 80, "ab"))[1].endswith(" bb")


@given(st.integers(2, 300), st.integers(20, 200), st.sampled_from([BLOCKS, LETTERS]))
def test_it_fits(blocks: int, width: int, marks: str) -> None:
    """Rows are no longer than the terminal is wide, whatever the depth, and the worst block of a column shows."""
    found = {f"model.language_model.layers.{i}.mlp.down_proj": 1.0 + (i == blocks - 1) for i in range(blocks)}
    _, row = strip(found, width, marks)
    assert len(row) <= width
    cells = row.rpartition(" ")[2]
    assert cells[-1] == marks[-1]
    assert set(cells[:-1]) <= {marks[0]}
