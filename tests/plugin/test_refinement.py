"""Runs that estimate all ops, and then measure as long as there is time, or until the most sensitive ones are known."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pytest_qsens.ops import Op
from pytest_qsens.refinement import estimated, steps, worth
from pytest_qsens.refining import forwards
from pytest_qsens.time_budget import NOT_MEASURED
from tests.plugin.harness import MODEL, OPS, listing, snapshot_file, write_model

RUN = ("--qsens-model", MODEL, "--qsens-no-cache", "--qsens-json", "r.json")

CLOCK = """
from pathlib import Path

import pytest_qsens.time_budget as budget


class Clock:
    now = 0.0

    def monotonic(self):
        return self.now


clock = budget.time = Clock()
"""
"""A clock that goes by only when it is told to."""

STEPS = (
    CLOCK
    + """
import os
import signal

from pytest_qsens.calibrated import CalibratedModel

own = CalibratedModel.measure_exactly


def measure_exactly(self, ops):
    if os.environ.get("KILLED", "nobody") == os.environ.get("PYTEST_XDIST_WORKER"):
        os.kill(os.getpid(), signal.SIGKILL)
    own(self, ops)
    with Path("steps.log").open("a") as log:
        log.write(" ".join(ops) + "\\n")
    clock.now += 50


CalibratedModel.measure_exactly = measure_exactly
"""
)
"""A clock that goes by 50 seconds with every step, whatever the machine does."""


def result(pytester: pytest.Pytester) -> dict[str, Any]:
    """Content of the result file."""
    found: dict[str, Any] = json.loads((pytester.path / "r.json").read_text())
    return found


def by_status(pytester: pytest.Pytester) -> dict[str, list[str]]:
    """Names of ops by their status, in the result file."""
    found: dict[str, list[str]] = {}
    for op in result(pytester)["ops"]:
        found.setdefault(op["status"], []).append(op["op"])
    return found


def exact_nmse(pytester: pytest.Pytester, mode: str = "isolated") -> dict[str, float]:
    """Measure all ops, record them, and return the scores of the first mode."""
    assert pytester.runpytest_inprocess(*RUN, "--snapshot-update", "--qsens-mode", mode).ret == 0
    first = "isolated" if mode == "both" else mode
    return {op["op"]: op[first]["nmse"] for op in result(pytester)["ops"]}


def test_the_budget_ends_it(pytester: pytest.Pytester) -> None:
    """Two steps have time. They are those where estimates were the least certain; the rest is named as left out."""
    write_model(pytester)
    exact = exact_nmse(pytester)
    before = snapshot_file(pytester).read_bytes()
    pytester.runpytest_inprocess(*RUN, "--qsens-engine", "probe")
    estimates = {op["op"]: op["isolated"].get("interval") for op in result(pytester)["ops"]}
    corrected_by = {op for op, interval in estimates.items() if interval is None}
    pytester.makeconftest(STEPS)
    run = pytester.runpytest_subprocess(*RUN, "--qsens-time-budget", "100s", "-rs")
    assert run.ret == 0
    chosen = [line.split() for line in (pytester.path / "steps.log").read_text().splitlines()]
    assert len(chosen) == 2
    found = by_status(pytester)
    assert set(found) == {"measured", "estimated"}
    assert set(found["measured"]) == corrected_by.union(*chosen)
    beliefs = {op: estimated("isolated", bounds) for op, bounds in estimates.items() if bounds}
    candidates = steps(OPS, beliefs, forwards([Op(name, "linear") for name in OPS], "probe", ["isolated"]))
    ranked = sorted(candidates, key=lambda step: -worth(step, beliefs))
    assert [set(step) for step in chosen] == [set(step.ops) for step in ranked[:2]]
    for op in result(pytester)["ops"]:
        if op["status"] == "measured":
            assert op["isolated"]["nmse"] == pytest.approx(exact[op["op"]], rel=1e-3)
        else:
            assert op["reason"] == "not measured: the time budget of 100s ended"
    assert result(pytester)["total"]["status"] == "measured"
    run.stdout.fnmatch_lines(["not measured: the time budget of 100s ended: *"])
    assert snapshot_file(pytester).read_bytes() == before


def test_what_was_measured_gates(pytester: pytest.Pytester) -> None:
    """With all the time there is all is measured, by several workers, and compared."""
    write_model(pytester)
    exact = exact_nmse(pytester)
    run = pytester.runpytest_subprocess(*RUN, "--qsens-time-budget", "1h", "-n", "2")
    assert run.ret == 0
    run.assert_outcomes(passed=9)
    assert {op["op"]: op["isolated"]["nmse"] for op in result(pytester)["ops"]} == pytest.approx(exact, rel=1e-3)
    (pytester.path / "worse").write_text("30")
    assert pytester.runpytest_inprocess(*RUN, "--qsens-time-budget", "1h").ret == pytest.ExitCode.TESTS_FAILED


def test_workers_share_the_steps(pytester: pytest.Pytester) -> None:
    """Each worker has time for one step, and takes it from blocks of its own; no op is measured twice."""
    write_model(pytester)
    exact_nmse(pytester)
    pytester.makeconftest(STEPS)
    run = pytester.runpytest_subprocess(*RUN, "--qsens-time-budget", "50s", "-n", "2")
    assert run.ret == 0
    taken = [set(line.split()) for line in (pytester.path / "steps.log").read_text().splitlines()]
    assert len(taken) == 2
    assert not taken[0] & taken[1]
    found = by_status(pytester)
    assert set(found) == {"measured", "estimated"}
    assert set().union(*taken) <= set(found["measured"])


def test_a_killed_worker_costs_its_op(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was its own is not measured any more, as it may kill the next one; the run ends, and tells what was lost."""
    write_model(pytester)
    pytester.makeconftest(STEPS)
    monkeypatch.setenv("KILLED", "gw0")
    run = pytester.runpytest_subprocess(*RUN, "--qsens-time-budget", "1h", "-n", "2")
    assert run.ret == pytest.ExitCode.TESTS_FAILED
    found = by_status(pytester)
    assert len(found.pop("failed")) == 1
    assert set(found) <= {"measured", "estimated"}
    assert sum(map(len, found.values())) == len(OPS) - 1
    run.stdout.fnmatch_lines(["not measured: its worker died: *"])


def test_a_worker_that_comes_too_late(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is up when one takes the place of another that died: what the others measured is told."""
    write_model(pytester)
    late = "budget.start = lambda config: config.stash.__setitem__(budget._STARTED, -7200.0)"
    pytester.makeconftest(f"{STEPS}\nif os.environ.get('PYTEST_XDIST_WORKER') == 'gw2':\n    {late}\n")
    monkeypatch.setenv("KILLED", "gw0")
    run = pytester.runpytest_subprocess(*RUN, "--qsens-time-budget", "1h", "-n", "2")
    assert run.ret == pytest.ExitCode.TESTS_FAILED
    found = by_status(pytester)
    assert len(found["failed"]) == 1
    assert set(found) <= {"failed", "measured", "estimated", "unrun"}


def test_the_next_run_goes_further(pytester: pytest.Pytester) -> None:
    """What was measured is known, so the same time is spent on the rest, and a run without a budget takes it, too."""
    pytester.makeconftest(STEPS)
    run = ("--qsens-model", "tiny_qwen2_5_vl", "--qsens-cache", "cache", "--qsens-json", "r.json")
    counts = []
    for _ in range(2):
        assert pytester.runpytest_subprocess(*run, "--qsens-time-budget", "100s", "--snapshot-update").ret == 0
        counts.append(len(by_status(pytester)["measured"]))
    assert counts[0] < counts[1]
    assert pytester.runpytest_subprocess(*run, "--qsens-time-budget", "10h", "--snapshot-update").ret == 0
    assert "estimated" not in by_status(pytester)
    whole = pytester.runpytest_inprocess(*run)
    assert whole.ret == 0
    whole.stdout.fnmatch_lines(["scores: * from the cache, 0 measured in this run"])


def test_too_short(pytester: pytest.Pytester) -> None:
    """There is nothing to tell, so nothing is written; the exit code says that it was not measured."""
    write_model(pytester)
    before = listing(pytester)
    for more in ((), ("-n", "1")):
        run = pytester.runpytest_subprocess(*RUN, "--qsens-time-budget", "0.01s", *more)
        assert run.ret == NOT_MEASURED == 10
        run.stderr.fnmatch_lines(["*the time budget of 0.01s ended after the model was loaded*give more time*"])
        assert listing(pytester) == before


SLOW = (
    CLOCK
    + """
from pytest_qsens.engines.probe import ProbeEngine

own = ProbeEngine._rounding


def rounding(self, op, gradient):
    with Path("steps.log").open("a") as log:
        log.write(op + "\\n")
    clock.now += 50
    return own(self, op, gradient)


ProbeEngine._rounding = rounding
"""
)
"""A clock that goes by 50 seconds with every op that a gradient reaches."""


def test_too_short_for_estimates(pytester: pytest.Pytester) -> None:
    """The clock is looked at after every op: what takes longer than the budget is not waited for."""
    write_model(pytester)
    pytester.makeconftest(SLOW)
    run = pytester.runpytest_subprocess(*RUN, "--qsens-time-budget", "120s")
    assert run.ret == NOT_MEASURED
    run.stderr.fnmatch_lines(["*the time budget of 120s ended while all ops were estimated*give more time*"])
    assert len((pytester.path / "steps.log").read_text().split()) == 3 < len(OPS)
    assert not (pytester.path / "r.json").exists()


@pytest.mark.parametrize("mode", ["isolated", "fallback"])
def test_the_top_is_that_of_all(mode: str, pytester: pytest.Pytester) -> None:
    """The most sensitive ops are measured, and the summary says how likely another one belongs to them."""
    write_model(pytester)
    exact = exact_nmse(pytester, mode)
    ranked = sorted(exact, key=lambda op: exact[op], reverse=mode == "isolated")
    run = pytester.runpytest_inprocess(*RUN, "--qsens-mode", mode, "--qsens-top", "2")
    assert run.ret == 0
    run.stdout.fnmatch_lines([f"top 2, {mode} (*): no other op belongs to them with probability *"])
    lines = run.outlines[[line.startswith("top 2") for line in run.outlines].index(True) + 1 :][:2]
    assert [line.split()[1] for line in lines] == ranked[:2]
    assert set(ranked[:2]) <= set(by_status(pytester)["measured"])


def test_the_top_of_several_workers(pytester: pytest.Pytester) -> None:
    """Each makes sure of its own part."""
    write_model(pytester)
    exact = exact_nmse(pytester)
    run = pytester.runpytest_subprocess(*RUN, "--qsens-top", "3", "-n", "2")
    assert run.ret == 0
    top = sorted(exact, key=lambda op: -exact[op])[:3]
    assert set(top) <= set(by_status(pytester)["measured"])
    assert set(by_status(pytester)) <= {"measured", "estimated"}
    lines = run.outlines[[line.startswith("top 3") for line in run.outlines].index(True) + 1 :][:3]
    assert [line.split()[1] for line in lines] == top


def test_both_modes(pytester: pytest.Pytester) -> None:
    """Ops that correct the estimates of one mode are exact in that one, and gate there; the other is an estimate."""
    write_model(pytester)
    exact = exact_nmse(pytester, "both")
    run = pytester.runpytest_subprocess(*RUN, "--qsens-mode", "both", "--qsens-top", "1")
    assert run.ret == 0
    most = max(exact, key=lambda op: exact[op])
    lines = run.outlines[[line.startswith("top 1, isolated") for line in run.outlines].index(True) + 1 :]
    assert lines[0].split()[1] == most
    assert "estimated" in by_status(pytester)


def test_two_schemes_in_one_budget(pytester: pytest.Pytester) -> None:
    """The first takes the time there is; what is not even estimated of the second is told, and nothing is lost."""
    write_model(pytester)
    pytester.makeconftest(STEPS)
    pytester.makepyfile(
        test_schemes=f"""
        import pytest

        @pytest.mark.qsens(model={MODEL!r}, scheme="w8a8")
        def test_one(qsens_op, qsens_score):
            pass

        @pytest.mark.qsens(model={MODEL!r}, scheme="w8a8_static")
        def test_other(qsens_op, qsens_score):
            pass
        """
    )
    run = pytester.runpytest_subprocess("--qsens-time-budget", "50s", "--qsens-no-cache", "test_schemes.py")
    assert run.ret == 0
    run.stdout.fnmatch_lines(["*scheme w8a8,*", "8 ops: *measured*", "*scheme w8a8_static*", "8 ops: *unrun*"])


def test_representatives(pytester: pytest.Pytester) -> None:
    """One op of every layer type is measured, and two in two halves of the depth."""
    write_model(pytester)
    for strata, expected in ((1, {"embed", "blocks.1.up", "blocks.1.down", "head"}), (3, set(OPS))):
        assert pytester.runpytest_inprocess(*RUN, "--qsens-representatives", str(strata)).ret == 0
        assert set(by_status(pytester)["measured"]) == expected


def test_estimates_gate_if_they_are_told_to(pytester: pytest.Pytester) -> None:
    """They fail where all of the interval is past the threshold, and are recorded nowhere."""
    write_model(pytester)
    exact_nmse(pytester)
    before = snapshot_file(pytester).read_bytes()
    run = (*RUN, "--qsens-engine", "probe", "--qsens-gate-estimates", "--qsens-fail", "nmse:50%")
    pytester.runpytest_inprocess(*run).assert_outcomes(passed=9)
    (pytester.path / "worse").write_text("30")
    worse = pytester.runpytest_inprocess(*run)
    assert worse.ret == pytest.ExitCode.TESTS_FAILED
    regressed = [line for line in worse.outlines if "estimated to be at least: nmse" in line]
    assert regressed
    worse.stdout.fnmatch_lines(["ESTIMATES: *They fail only where all of their interval is past the threshold*"])
    without = pytester.runpytest_inprocess(*RUN, "--qsens-engine", "probe", "--qsens-fail", "nmse:50%")
    assert not [line for line in without.outlines if "estimated to be at least: nmse" in line]
    assert snapshot_file(pytester).read_bytes() == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--qsens-time-budget", "soon"), "--qsens-time-budget takes a time above 0, such as 120s*not 'soon'"),
        (("--qsens-time-budget", "0s"), "--qsens-time-budget takes a time above 0*"),
        (("--qsens-top", "0"), "--qsens-top takes a whole number from 1, not '0'"),
        (("--qsens-top", "9"), "--qsens-top 9: 8 ops of net.spec are asked for. Give 8 at most"),
        (("--qsens-top", "1", "--qsens-shard", "1/2"), "--qsens-top 1 compares all ops, and --qsens-shard 1/2*"),
        (("--qsens-representatives", "x"), "--qsens-representatives takes a whole number from 1, not 'x'"),
        (("--qsens-top", "1", "--qsens-engine", "replay"), "--qsens-top goes by estimates, and --qsens-engine replay*"),
        (("--qsens-time-budget", "1h", "--qsens-engine", "eager"), "*goes by estimates*eager makes none*"),
        (("--qsens-gate-estimates",), "--qsens-gate-estimates: engine auto measures all, and there are no estimates*"),
        (("--qsens-representatives", "1", "--snapshot-update"), "*snapshots hold what was measured*"),
        (
            ("--qsens-top", "1", "--qsens-gate-estimates", "--qsens-fail", "sqnr_db:1"),
            "--qsens-gate-estimates: only nmse is estimated with an interval*",
        ),
        (("--qsens-top", "1", "--qsens-granularity", "block"), "*is a group of*"),
    ],
)
def test_what_cannot_be(given: tuple[str, ...], message: str, pytester: pytest.Pytester) -> None:
    """A usage error before anything runs, and nothing is written."""
    write_model(pytester)
    before = listing(pytester)
    run = pytester.runpytest_inprocess(*RUN, *given)
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    run.stderr.fnmatch_lines([f"*{message}"])
    assert listing(pytester) == before
