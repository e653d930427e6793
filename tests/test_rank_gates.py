"""Gates on the order of ops: reading them, ties, and what of a run they can be judged by."""

from __future__ import annotations

from itertools import pairwise, permutations
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from pytest_qsens.errors import QsensError
from pytest_qsens.gates import Gates, Overrides, parse_gates
from pytest_qsens.ops import Op
from pytest_qsens.rank_gates import Kendall, Ranking, Top, judge_ranks
from pytest_qsens.results import OpResult, Status
from pytest_qsens.snapshot import Entry
from pytest_qsens.thresholds import parse_fail

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_qsens.rank_gates import RankGate
    from pytest_qsens.results import Mode
    from pytest_qsens.run_verdicts import RunVerdict


@pytest.mark.parametrize(
    ("text", "ranks"),
    [
        ("top10:9", (Top(10, 9),)),
        ("nmse:5%, top3 : 3 ,kendall:.95,sqnr_db:1", (Top(3, 3), Kendall(0.95))),
        ("kendall:1,top2:1,top20:15", (Kendall(1.0), Top(2, 1), Top(20, 15))),
        ("top1:0.01,top2:2", (Top(2, 2),)),
    ],
)
def test_they_are_read_beside_thresholds(text: str, ranks: tuple[RankGate, ...]) -> None:
    """In any order; thresholds are what they are without them, none if there are none; printing reads back."""
    found = parse_gates(text)
    assert found.ranks == ranks
    values = [part for part in text.split(",") if part.strip().startswith(("nmse", "sqnr_db", "top1:"))]
    assert found.thresholds == (parse_fail(",".join(values)) if values else ())
    assert parse_gates(",".join(map(str, found.ranks))) == Gates((), ranks)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("top10:11", "'top10:11' is no gate. Write top10:9"),
        ("top10:0", "'top10:0' is no gate"),
        ("top0:0", "'top0:0' is no gate"),
        ("top:3", "'top:3' is no gate"),
        ("top10", "'top10:' is no gate"),
        ("top10:90%", "'top10:90%' is no gate"),
        ("kendall:95%", "'95%' is not the least Kendall's tau-b"),
        ("kendall:1.01", "'1.01' is not the least"),
        ("kendall:-0.5", "'-0.5' is not the least"),
        ("kendall:nan", "'nan' is not the least"),
        ("kendall", "'' is not the least"),
        ("kendall:0.9,kendall:0.8", "kendall is there twice"),
        ("top5:5,top5:4", "top5 is there twice"),
        ("topten:9", "no metric 'topten'.*topN and kendall"),
        ("top10:9,", "no metric ''"),
    ],
)
def test_what_cannot_be_is_refused(text: str, message: str) -> None:
    """A gate that every order passes is none; what is wrong is quoted with the right form beside it."""
    with pytest.raises(QsensError, match=message) as caught:
        parse_gates(text, "qsens_fail")
    assert str(caught.value).startswith(f"qsens_fail {text!r}: ")


def test_single_ops_have_no_order() -> None:
    """Overrides and markers take thresholds only."""
    with pytest.raises(QsensError, match="top10 compares the order of all ops of a run, so it gates no single op"):
        Overrides.parse(["*.dense = nmse:5%,top10:9"])


VALUES = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=4, max_size=7)


def ranking(pairs: list[tuple[int, int]]) -> Ranking:
    """Ops named by their place in the list."""
    return Ranking.of({f"op{i}": (float(old), float(new)) for i, (old, new) in enumerate(pairs)})


@given(VALUES, st.integers(1, 3))
def test_ties_never_fail_a_gate(pairs: list[tuple[int, int]], places: int) -> None:
    """As many count as kept as in the most favourable order of equal scores, found here by trying all orders."""

    def tops(side: int) -> set[frozenset[int]]:
        orders = permutations(range(len(pairs)))
        sorted_ones = (o for o in orders if all(pairs[a][side] >= pairs[b][side] for a, b in pairwise(o)))
        return {frozenset(order[:places]) for order in sorted_ones}

    most = max(len(before & now) for before in tops(0) for now in tops(1))
    assert Top(places, most).judge(ranking(pairs))[0]
    if most < places:
        assert not Top(places, most + 1).judge(ranking(pairs))[0]


@given(VALUES, st.integers(0, 100).map(lambda n: n / 100))
def test_kendall_is_scipys(pairs: list[tuple[int, int]], least: float) -> None:
    """tau-b of the scores; where it does not exist, the gate does not hold."""
    old, new = zip(*pairs, strict=True)
    holds, text = Kendall(least).judge(ranking(pairs))
    if len(set(old)) == 1 or len(set(new)) == 1:
        assert not holds
        assert "does not exist" in text
    else:
        assert holds == (round(float(kendalltau(old, new).statistic), 6) >= least)


@given(VALUES)
def test_the_same_order_holds(pairs: list[tuple[int, int]]) -> None:
    """Whatever ties there are: with scores as recorded nothing fails."""
    same = ranking([(old, old) for old, _ in pairs])
    assert Top(3, 3).judge(same)[0]
    assert Kendall(1.0).judge(same)[0] == (len({old for old, _ in pairs}) > 1)
    assert same.old == same.new


def result(op: str, status: Status = "measured", mode: Mode = "isolated", **scores: float) -> OpResult:
    """Make what is known of one op."""
    return OpResult(op, "linear", "", status, None, **{mode: dict(scores)} if scores else {})


OLD = {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}
OPS = [Op(name, "linear") for name in OLD]
ENTRIES = {name: Entry("linear", isolated={"nmse": value}) for name, value in OLD.items()}


def judged(results: list[OpResult], entries: Mapping[str, Entry] = ENTRIES, gate: RankGate = Top(2, 2)) -> RunVerdict:  # noqa: B008 - frozen
    """Judge one gate by the ops of `OLD`."""
    (verdict,) = judge_ranks([gate], OPS, entries, results, ["isolated"])
    return verdict


def test_who_left_and_who_entered() -> None:
    """A failed gate names them, with their rank in the snapshot and now."""
    verdict = judged([result("a", nmse=4), result("b", nmse=1.5), result("c", nmse=3), result("d", nmse=9)])
    assert verdict.state == "failed"
    assert str(verdict) == (
        "top2:2 failed, isolated nmse: 1 of the 2 most sensitive ops of the snapshot still are; left: b (2 → 4); "
        "entered: d (4 → 1) (of 4 ops)"
    )
    kendall = judged(
        [result("a", nmse=4), result("b", nmse=2), result("c", nmse=3), result("d", nmse=1)], gate=Kendall(0.9)
    )
    assert str(kendall) == (
        "kendall:0.9 failed, isolated nmse: Kendall's tau-b with the snapshot is 0.6667; moved: b (2 → 3), c (3 → 2) "
        "(of 4 ops)"
    )


@pytest.mark.parametrize(
    "missing",
    [
        [],
        [result("d", "failed")],
        [result("d", "unexercised")],
        [result("d", "estimated", nmse=1.0)],
        [result("d", "measured", "fallback", nmse=1.0, gain=1.0)],
    ],
)
def test_what_was_not_measured_exactly_is_not_judged(missing: list[OpResult]) -> None:
    """One op of the snapshot without an exact score in this mode, and the gate neither holds nor fails."""
    verdict = judged([*(result(op, nmse=OLD[op]) for op in "abc"), *missing])
    assert verdict.state == "not judged"
    assert verdict.text == "1 of the 4 ops in the snapshot were not measured (d)"


def test_too_few_ops_are_not_judged() -> None:
    """Of two ops, two are always the first two; and no order at all is no order that holds."""
    results = [result(op, nmse=value) for op, value in OLD.items()]
    few = {name: ENTRIES[name] for name in "ab"}
    assert judged(results, few).text == "the snapshot has 2 of the model's ops, and 3 are needed at least"
    assert judged(results, {}, Kendall(0.5)).state == "not judged"


def test_lines_of_no_op_of_the_model_do_not_count() -> None:
    """An op that is gone, and one that has become another type, are in no order; a new op is in none yet."""
    entries = {
        **ENTRIES,
        "gone": Entry("linear", isolated={"nmse": 9.0}),
        "d": Entry("conv1d", isolated={"nmse": 9.0}),
    }
    verdict = judged([result(op, nmse=value) for op, value in (OLD | {"d": 9.0}).items()], entries)
    assert str(verdict).startswith("top2:2 held, isolated nmse: 2 of the 2")
    assert str(verdict).endswith("(of 3 ops)")


def test_gain_ranks_in_mode_fallback() -> None:
    """The larger the gain, the more sensitive the op, whatever its remaining error is."""
    entries = {name: Entry("linear", fallback={"nmse": 9 - value, "gain": value}) for name, value in OLD.items()}
    now = [result(name, mode="fallback", nmse=1.0, gain=value - 5) for name, value in OLD.items()]
    (verdict,) = judge_ranks([Kendall(1.0)], OPS, entries, now, ["fallback"])
    assert str(verdict) == "kendall:1.0 held, fallback gain: Kendall's tau-b with the snapshot is 1 (of 4 ops)"
