"""Limits of scores, and gates of what single ops say of the whole model: read, printed, judged."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_qsens.errors import QsensError
from pytest_qsens.gates import Gates, Overrides, parse_gates, parse_op_gates
from pytest_qsens.joint_gates import JointGate
from pytest_qsens.limits import Limit, judge_limits, sign_of
from pytest_qsens.ops import TOTAL
from pytest_qsens.results import OpResult, Scores
from pytest_qsens.thresholds import METRICS, parse_fail

if TYPE_CHECKING:
    from pytest_qsens.results import Mode

LIMITS = st.builds(
    Limit,
    st.sampled_from(sorted(METRICS)),
    st.floats(0, 1e300, allow_nan=False),
    st.sampled_from([None, TOTAL, "*.lm_head", "model.layers.0.self_attn:qk"]),
)
JOINT = st.one_of(
    st.builds(JointGate, st.sampled_from(["additive_gap", "quadratic_gap"]), st.floats(0, 1e6, allow_nan=False)),
    st.builds(JointGate, st.sampled_from(["additive", "quadratic"]), st.floats(0, 1e6, allow_nan=False)),
)


def scored(op: str = "a.fc", **modes: Scores) -> OpResult:
    """Make a measured op."""
    return OpResult(op, "linear", "a", "measured", **modes)


@given(st.lists(LIMITS, max_size=4, unique_by=lambda limit: (limit.metric, limit.glob)), st.lists(JOINT, max_size=1))
def test_what_is_printed_is_read(limits: list[Limit], joint: list[JointGate]) -> None:
    """Rules are read as they are printed, beside thresholds and gates of ranks."""
    text = ",".join(["nmse:5%", *map(str, limits), "top3:2", *map(str, joint)])
    found = parse_gates(text)
    assert found.thresholds == parse_fail("nmse:5%")
    assert found.limits == tuple(limits)
    assert found.joint == tuple(joint)
    assert len(found.ranks) == 1


@given(LIMITS, st.floats(0, 1e300), st.floats(0, 1e300))
def test_a_better_score_never_fails_alone(limit: Limit, one: float, other: float) -> None:
    """What holds for a score holds for every better one."""
    better, worse = sorted((one, other), reverse=sign_of(limit.metric) == ">=")
    assert limit.holds(better) or not limit.holds(worse)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nmse>=1e-3", "of nmse, higher is worse. Write nmse<=1e-3"),
        ("total.sqnr_db<=30", "of sqnr_db, lower is worse. Write sqnr_db>=30"),
        ("nmse<1e-3", "Write nmse<=1e-3"),
        ("nmse<=5%", "'5%' is no limit of nmse.*nmse:5% is a threshold relative to the snapshot"),
        ("nmse<=", "'' is no limit of nmse"),
        ("nmse<=-1", "'-1' is no limit of nmse"),
        ("nmse<=1e999", "'1e999' is no limit of nmse"),
        ("<=1e-3", "'<=1e-3' is no limit"),
        (".nmse<=1e-3", "names no op"),
        ("total.nmsee<=1e-3", r"no metric 'nmsee' \(did you mean nmse\?\) to limit"),
        ("nmse<=1,nmse<=2", "nmse< is there twice"),
        ("fc.additive_gap<=10%", "additive_gap is of the whole model, and not of 'fc'"),
        ("additive_gap>=10%", "is no limit of additive_gap"),
        ("additive<=10%", "is no limit of additive"),
        ("quadratic_gap<=x", "is no limit of quadratic_gap"),
    ],
)
def test_what_is_no_limit(text: str, told: str) -> None:
    """The message quotes it, and says what to write."""
    with pytest.raises(QsensError, match=told):
        parse_gates(text)


def test_where_gates_belong() -> None:
    """Single ops have limits, and no gates of a whole run; a change has no limit."""
    assert parse_op_gates("total.nmse<=0.1", "here").limits == (Limit("nmse", 0.1, TOTAL),)
    with pytest.raises(QsensError, match="additive_gap is known when a whole run is through"):
        parse_op_gates("additive_gap<=0.1", "here")
    with pytest.raises(QsensError, match=r"'nmse<=0.1' limits a score, and says nothing about a change"):
        parse_fail("nmse:5%,nmse<=0.1")
    with pytest.raises(QsensError, match=r"total.nmse<=0.1 names ops again. Write nmse<=0.1"):
        Overrides.parse(["*.fc = total.nmse<=0.1"])
    with pytest.raises(QsensError, match="is not 'GLOB = THRESHOLDS'"):
        Overrides.parse(["fc.nmse<=0.1"])


def test_which_limits_hold_for_an_op() -> None:
    """An override takes the place of what names no op; limits that name ops hold beside it."""
    default = parse_gates("nmse:5%,nmse<=1,*.fc.nmse<=2,total.nmse<=3")
    overrides = Overrides.parse(["a.* = nmse<=4"])
    assert overrides.gates_for("a.fc", default).limits == (Limit("nmse", 2, "*.fc"), Limit("nmse", 4))
    assert overrides.gates_for("a.fc", default).thresholds == ()
    assert overrides.gates_for("b.fc", default).limits == (Limit("nmse", 1), Limit("nmse", 2, "*.fc"))
    assert overrides.gates_for(TOTAL, default).limits == (Limit("nmse", 1), Limit("nmse", 3, TOTAL))
    assert overrides.gates_for("b.q+k", default, ("b.q.fc", "b.k.fc")).limits[1:] == (Limit("nmse", 2, "*.fc"),)


@pytest.mark.parametrize(
    ("text", "needed"),
    [("nmse<=1", False), ("additive<=1", False), ("nmse<=1,kl:5%", True), ("nmse<=1,top3:2", True), ("top3:2", True)],
)
def test_what_needs_a_snapshot(text: str, needed: bool) -> None:
    """Limits alone hold without one."""
    assert parse_gates(text).needs_snapshot is needed
    assert Overrides().gates_for("a", parse_gates(text)).needs_snapshot is needed


@pytest.mark.parametrize(
    ("limit", "result", "lines"),
    [
        ("nmse<=0.001", scored(isolated={"nmse": 0.0010000001}), ()),  # 6 digits, as everywhere
        (
            "nmse<=0.001",
            scored(isolated={"nmse": 0.00101}, fallback={"nmse": 0.5}),
            ("isolated nmse 0.00101 is past the limit of 0.001", "fallback nmse 0.5 is past the limit of 0.001"),
        ),
        ("sqnr_db>=30", scored(isolated={"nmse": 0.0, "sqnr_db": None}), ()),
        ("sqnr_db>=30", scored(isolated={"sqnr_db": 29.9}), ("isolated sqnr_db 29.9 is past the limit of 30",)),
        ("kl<=1", scored(isolated={"nmse": 0.0}), ("kl was not measured, and has a limit (kl<=1.0)",)),
        ("gain<=0.1", scored(fallback={"gain": 0.2}), ("fallback gain 0.2 is past the limit of 0.1",)),
        ("gain<=0.1", scored(added={"loss": 0.2}), ("added loss 0.2 is past the limit of 0.1",)),
        ("gain<=0.1", scored(isolated={"nmse": 0.2}), ("gain was not measured, and has a limit (gain<=0.1)",)),
        ("gain<=0.1", scored(TOTAL, isolated={"nmse": 0.2}), ()),
    ],
)
def test_the_judgement(limit: str, result: OpResult, lines: tuple[str, ...]) -> None:
    """Each mode by itself; what was not measured is past a limit, and does not pass."""
    verdict = judge_limits(result, parse_gates(limit).limits)
    assert verdict.kind == ("exceeded" if lines else "ok")
    assert len(verdict.lines) == len(lines)
    assert all(line.startswith(told) for line, told in zip(verdict.lines, lines, strict=True))
    assert len(verdict.compared) == len(lines)
    for seen in verdict.compared:
        assert seen.mode in result.modes
        assert (seen.metric in result.modes[cast("Mode", seen.mode)]) is (seen.new is not None)
        assert (seen.old, seen.kind) == (None, "exceeded")
        assert seen.limit == (None if seen.new is None else parse_gates(limit).limits[0].bound)


@pytest.mark.parametrize(
    ("gate", "scores", "state"),
    [
        ("additive_gap<=10%", {"nmse": 1.0, "additive": 1.1, "quadratic": 5.0}, "held"),
        ("additive_gap<=0.1", {"nmse": 1.0, "additive": 0.89, "quadratic": 1.0}, "failed"),
        ("quadratic_gap<=5%", {"nmse": 2.0, "additive": 0.0, "quadratic": 2.1}, "held"),
        ("additive<=1", {"nmse": 5.0, "additive": 1.0, "quadratic": 2.0}, "held"),
        ("quadratic<=1", {"nmse": 0.5, "additive": 1.0, "quadratic": 2.0}, "failed"),
        ("additive_gap<=10%", {"nmse": 0.0, "additive": 0.0, "quadratic": 0.0}, "held"),
        ("additive_gap<=10%", {"nmse": 0.0, "additive": 1e-9, "quadratic": 0.0}, "failed"),
        ("additive_gap<=10%", {"nmse": 1.0}, "not judged"),
    ],
)
def test_what_is_predicted_of_the_whole_model(gate: str, scores: Scores, state: str) -> None:
    """A gap is relative to what was measured; without a prediction there is nothing to judge."""
    (found,) = parse_gates(gate).joint
    assert found.judge(scored(TOTAL, isolated=scores)).state == state
    assert found.judge(None).state == "not judged"
    assert math.isclose(found.bound, parse_gates(str(found)).joint[0].bound)
    assert not parse_gates(gate).needs_snapshot
    assert parse_gates(gate) == Gates((), joint=(found,))
