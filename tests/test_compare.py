"""Comparing the sensitivities of two files."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_qsens.compare import Comparison, Correlation, Missing, compare
from pytest_qsens.errors import QsensError
from pytest_qsens.op_names import Prefix
from pytest_qsens.sensitivity_files import Sensitivities

if TYPE_CHECKING:
    from collections.abc import Mapping


def file(
    values: Mapping[str, float],
    without: Mapping[str, str] | None = None,
    *,
    larger: bool = True,
    trusted: bool = True,
    path: str = "f.json",
) -> Sensitivities:
    """Make what is read from a file."""
    mode = "isolated" if larger else "fallback"
    return Sensitivities(path, "tool", "about", mode, "nmse", larger, values, without or {}, trusted)


VALUE = st.sampled_from([0.0, 1e-9, 0.25, 0.5, 1.0, 3.0, 1e9]) | st.floats(0, 1e12)
TABLE = st.dictionaries(st.sampled_from([f"op.{index}" for index in range(12)]), VALUE, min_size=3)
FILE = st.builds(
    lambda values, without, larger, trusted: file(
        values, {op: "failed" for op in without if op not in values}, larger=larger, trusted=trusted
    ),
    TABLE,
    st.sets(st.sampled_from([f"op.{index}" for index in range(15)])),
    st.booleans(),
    st.booleans(),
)


def compared(a: Sensitivities, b: Sensitivities, top: int = 10) -> Comparison | None:
    """Compare; None if too few ops can be ranked."""
    try:
        return compare(a, b, top)
    except QsensError:
        return None


@settings(deadline=None)
@given(FILE, st.integers(1, 20))
def test_a_file_agrees_with_itself(a: Sensitivities, top: int) -> None:
    """Comparing a file with itself gives 1, the same top and no disagreement, in both directions and with ties."""
    found = compared(a, a, top)
    if found is None:
        return
    constant = len({op.value_a for op in found.ops}) == 1
    assert found.correlation.spearman == found.correlation.kendall_tau_b == (None if constant else 1.0)
    assert found.disagreements == ()
    assert found.top_a == found.top_b == found.top_both


@settings(deadline=None)
@given(FILE, FILE, st.integers(1, 5))
def test_swapping_the_files_swaps_the_sides(a: Sensitivities, b: Sensitivities, top: int) -> None:
    """Nothing depends on which file is named first."""
    forth, back = compared(a, b, top), compared(b, a, top)
    if forth is None or back is None:
        assert forth is back
        return
    assert (back.a, back.b) == (forth.b, forth.a)
    assert back.common == forth.common
    for one, other in ((back.correlation, forth.correlation), (back.with_suspects, forth.with_suspects)):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.ops == other.ops
            assert one.spearman == pytest.approx(other.spearman, abs=1e-5)
            assert one.kendall_tau_b == pytest.approx(other.kendall_tau_b, abs=1e-5)
    swapped = {(op.op, op.rank_b, op.rank_a, op.value_b, op.value_a) for op in back.ops}
    assert swapped == {(op.op, op.rank_a, op.rank_b, op.value_a, op.value_b) for op in forth.ops}
    assert [op.op for op in back.top_a] == [op.op for op in forth.top_b]
    assert [op.op for op in back.disagreements] == [op.op for op in forth.disagreements]


@settings(deadline=None)
@given(FILE, FILE, st.lists(st.floats(0, 1e6), min_size=12, max_size=12, unique=True))
def test_only_the_order_of_values_counts(a: Sensitivities, b: Sensitivities, scale: list[float]) -> None:
    """A growing function of one side's values (another metric, other units) changes no rank and no correlation."""
    new = dict(zip(sorted(set(a.values.values())), sorted(scale), strict=False))
    other = replace(a, values={op: new[value] for op, value in a.values.items()})
    before, after = compared(a, b), compared(other, b)
    if before is None or after is None:
        assert before is after
        return
    assert after.correlation == before.correlation
    assert after.with_suspects == before.with_suspects
    assert [(op.op, op.rank_a, op.rank_b) for op in after.ops] == [(op.op, op.rank_a, op.rank_b) for op in before.ops]


@settings(deadline=None)
@given(FILE, FILE)
def test_every_op_of_either_file_is_ranked_or_missing(a: Sensitivities, b: Sensitivities) -> None:
    """No op vanishes: on each side it is ranked, or listed with a reason, once."""
    found = compared(a, b)
    if found is None:
        return
    for side, other, usable in ((found.a, b, a), (found.b, a, b)):
        missing = {op.op for op in side.missing}
        assert len(missing) == len(side.missing)
        suspects = {op for group in side.shared if group.suspect for op in group.ops}
        assert missing == ({*a.ops, *b.ops} - set(usable.values)) | suspects
        assert all(op.other is None or op.other == other.values[op.op] for op in side.missing)


def test_directions_are_brought_together() -> None:
    """A large isolated error and a small fallback error both mean sensitive: such files agree, and rank 1 is first."""
    a = file({"x": 3.0, "y": 2.0, "z": 1.0})
    b = file({"x": 0.1, "y": 0.2, "z": 0.3}, larger=False)
    found = compare(a, b, 2)
    assert found.correlation == Correlation(3, 1.0, 1.0)
    assert [(op.op, op.rank_a, op.rank_b) for op in found.ops] == [("x", 1, 1), ("y", 2, 2), ("z", 3, 3)]
    assert [op.op for op in found.top_both] == ["x", "y"]
    assert found.expected_by_chance == pytest.approx(4 / 3)
    assert compare(a, replace(b, larger_is_sensitive=True)).correlation == Correlation(3, -1.0, -1.0)


def test_correlations_are_tie_aware() -> None:
    """Spearman with mean ranks and Kendall's tau-b, on an example worked by hand: ranks 1.5 1.5 3 4 and 2 1 3 4.

    Spearman: covariance 4.5 over sqrt(4.5 · 5); tau-b: 5 concordant pairs over sqrt((6 - 1) · 6).
    """
    a, b = file({"p": 9.0, "q": 9.0, "r": 5.0, "s": 1.0}), file({"p": 6.0, "q": 7.0, "r": 5.0, "s": 4.0})
    found = compare(a, b)
    assert found.correlation == Correlation(4, 0.948683, 0.912871)
    assert [(op.op, op.difference) for op in found.disagreements] == [("q", 0.5), ("p", 0.5)]
    assert compare(file(dict.fromkeys("pqrs", 1.0)), b).correlation == Correlation(4, None, None)


def test_values_that_many_ops_share_are_not_ranked() -> None:
    """Ops that never ran have one and the same value in other tools: they are told, and have a correlation apart."""
    a = file({"x": 4.0, "y": 3.0, "z": 2.0, "p": 0.0, "q": 0.0, "r": 0.0}, trusted=False)
    b = file({"x": 3.0, "y": 2.0, "z": 1.0, "p": 9.0, "q": 8.0, "r": 7.0})
    found = compare(a, b)
    assert [(group.value, group.ops, group.suspect) for group in found.a.shared] == [(0.0, ("p", "q", "r"), True)]
    assert found.correlation == Correlation(3, 1.0, 1.0)
    assert found.with_suspects is not None
    assert found.with_suspects.ops == 6
    assert found.with_suspects.spearman is not None
    assert found.with_suspects.spearman < 0
    why = "value 0 shared by 3 ops: probably never measured"
    assert found.a.missing == (Missing("p", why, 9.0), Missing("q", why, 8.0), Missing("r", why, 7.0))
    assert found.b.missing == ()


@pytest.mark.parametrize(("trusted", "equal"), [(True, 3), (False, 2)])
def test_equal_values_that_were_measured_share_their_rank(trusted: bool, equal: int) -> None:
    """Our files say what was not measured, and two equal values can be chance: those are ranked, and told."""
    values = {"x": 4.0, "y": 3.0, "z": 2.0} | dict.fromkeys("pqr"[:equal], 1.0)
    found = compare(file(values, trusted=trusted), file(values))
    assert [(group.ops, group.suspect) for group in found.a.shared] == [(tuple("pqr"[:equal]), False)]
    assert found.with_suspects is None
    assert {op.rank_a for op in found.ops if op.op in "pqr"} == {4 + (equal - 1) / 2}


def test_what_one_file_lacks_is_said_with_the_value_in_the_other() -> None:
    """Ops without a value keep their reason, ops of the other file alone are absent, the most sensitive come first."""
    values = {"m.x": 3.0, "m.y": 2.0, "m.z": 1.0}
    a = file({**values, "m.only": 7.0, "m.gone": 8.0, "m.dead": 9.0}, {"m.none": "failed: NaN"})
    b = file(
        {op.removeprefix("m."): -value + 10 for op, value in values.items()},
        {"dead": "unexercised", "none": "unrun"},
        larger=False,
    )
    found = compare(a, b)
    assert found.matching.prefix == Prefix("b", "m.")
    assert (found.common, len(found.ops)) == (5, 3)
    assert found.b.missing == (
        Missing("m.dead", "unexercised", 9.0),
        Missing("m.gone", "not in the file", 8.0),
        Missing("m.only", "not in the file", 7.0),
        Missing("m.none", "unrun", None),
    )
    assert found.a.missing == (Missing("m.none", "failed: NaN", None),)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (
            file({"a.x": 1.0, "a.y": 2.0, "a.z": 3.0, "a.w": 4.0}, path="A.json"),
            file({"b.v": 1.0}, path="B.json"),
            r"no op is in both files, whichever prefix .*A\.json has a\.x, a\.y, a\.z, \.\.\.; B\.json has b\.v\.",
        ),
        (
            file({"q": 1.0}, path="A.json"),
            file({"dec.q": 1.0, "enc.q": 2.0}, path="B.json"),
            r"several prefixes fit .* equally well \('dec\.', 'enc\.'\)\. A\.json has q; B\.json has dec\.q, enc\.q",
        ),
        (
            file({"x": 1.0, "y": 2.0}, {"z": "failed"}, path="A.json"),
            file({"x": 1.0, "y": 2.0, "z": 3.0}, path="B.json"),
            r"^2 ops of 3 in both .* 3 are needed\. A\.json: 3 ops, 1 op without a value; B\.json: 3 ops\. Measure",
        ),
        (
            file(dict.fromkeys("xyz", 239756304.0), path="A.json", trusted=False),
            file({"x": 1.0, "y": 2.0, "z": 3.0}, path="B.json"),
            r"^0 ops of 3 .* A\.json: 3 ops, 3 ops share the value 239756304 \(probably never measured\);",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(a: Sensitivities, b: Sensitivities, message: str) -> None:
    """No correlation is made up from two ops, from none, or from values that nobody measured."""
    with pytest.raises(QsensError, match=message):
        compare(a, b)


def test_equal_values_do_not_agree_by_name() -> None:
    """A list of the most sensitive ops ends where no side would have to choose among equal ones."""
    names = [f"op{i:02}" for i in range(20)]
    left = file(dict(zip(names, [*[0.0] * 17, 1.0, 2.0, 3.0], strict=True)))
    right = file(dict(zip(names, [1.0, 2.0, 3.0, *[0.0] * 17], strict=True)))
    found = compare(left, right, 10)
    assert [op.op for op in found.top_a] == ["op19", "op18", "op17"]
    assert [op.op for op in found.top_b] == ["op02", "op01", "op00"]
    assert found.top_both == ()
    equal = file(dict.fromkeys(names, 1.0))
    assert compare(equal, equal, 10).top_a == ()
