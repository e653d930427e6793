"""Names of ops that start at different modules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_qsens.op_names import Matching, Prefix, match

PART = st.sampled_from(["model", "visual", "layers", "0", "1", "q_proj", "fc"])
NAME = st.lists(PART, min_size=1, max_size=4).map(".".join)
NAMES = st.lists(NAME, unique=True, max_size=12)


@given(NAMES, NAMES)
def test_swapping_the_files_swaps_the_names(a: list[str], b: list[str]) -> None:
    """Whether two ops are the same does not depend on which file is named first."""
    forth, back = match(a, b), match(b, a)
    assert {(left, right) for right, left in back.pairs} == set(forth.pairs)
    assert back.by_prefix == forth.by_prefix
    if forth.prefix is not None:
        assert back.prefix == Prefix("b" if forth.prefix.side == "a" else "a", forth.prefix.text)


@given(NAMES, NAMES)
def test_no_name_is_used_twice_and_equal_names_meet(a: list[str], b: list[str]) -> None:
    """A prefix never takes an op from the one with the same name, nor gives one op two partners."""
    pairs = match(a, b).pairs
    assert len({left for left, _ in pairs}) == len({right for _, right in pairs}) == len(pairs)
    assert {(name, name) for name in set(a) & set(b)} <= set(pairs)


@given(st.lists(NAME, unique=True, min_size=1, max_size=12))
def test_a_prefix_of_a_whole_file_is_found(names: list[str]) -> None:
    """A file that starts at a submodule meets the file of the whole model, which may hold more."""
    found = match(names, [*(f"whole.{name}" for name in names), "whole.head"])
    assert found.prefix == Prefix("a", "whole.")
    assert found.pairs == tuple((name, f"whole.{name}") for name in names)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        # the head is outside of the submodule in both
        (
            ["lm_head", "x.0", "x.1"],
            ["m.x.0", "m.x.1", "lm_head"],
            Matching((("lm_head", "lm_head"), ("x.0", "m.x.0"), ("x.1", "m.x.1")), Prefix("a", "m."), 2),
        ),
        # encoder or decoder? nothing tells
        (["0.q"], ["dec.0.q", "enc.0.q"], Matching((), rivals=(Prefix("a", "dec."), Prefix("a", "enc.")))),
        # the decoder has what the encoder has not
        (
            ["0.q", "0.cross"],
            ["dec.0.q", "dec.0.cross", "enc.0.q"],
            Matching((("0.q", "dec.0.q"), ("0.cross", "dec.0.cross")), Prefix("a", "dec."), 2),
        ),
        # one odd pair is no reason for a prefix where most names meet as they are
        (["a", "b", "fc"], ["a", "b", "new.fc"], Matching((("a", "a"), ("b", "b")))),
        # part of a word is no module
        (["proj"], ["q_proj"], Matching(())),
        ([], [], Matching(())),
    ],
)
def test_a_prefix_is_assumed_only_where_nothing_else_explains_more(
    a: list[str], b: list[str], expected: Matching
) -> None:
    """One prefix for a whole file, the one that pairs most names; none if two are as good or it is a minority."""
    assert match(a, b) == expected
