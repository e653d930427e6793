"""Limits in real runs: without a snapshot, with one, where an update must not accept, and of interactions."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING

import pytest

from pytest_qsens.cli import main
from pytest_qsens.time_budget import NOT_MEASURED
from tests.plugin.harness import LABEL, MODEL, OPS, TOTAL_ID, listing, snapshot_file, snapshot_ops, write_model

if TYPE_CHECKING:
    from pathlib import Path

FAIL = "--qsens-fail"


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    """Run the built-in suite in this process."""
    return pytester.runpytest_inprocess("--qsens-model", MODEL, *arguments)


@pytest.fixture
def scores(pytester: pytest.Pytester, request: pytest.FixtureRequest) -> dict[str, float]:
    """Measure the model under limits that nothing is past: no snapshot is asked for, and none is made."""
    write_model(pytester)
    path: Path = pytester.path / "r.json"
    ran = run(pytester, FAIL, "nmse<=1,total.sqnr_db>=1", "--qsens-json", str(path))
    assert ran.ret == 0, request.node
    ran.assert_outcomes(passed=len(OPS) + 1)
    assert "accept with" not in ran.stdout.str()
    assert not snapshot_file(pytester).exists()
    result = json.loads(path.read_text())
    return {op["op"]: op["isolated"]["nmse"] for op in (*result["ops"], result["total"])}


def test_without_a_snapshot(pytester: pytest.Pytester, scores: dict[str, float]) -> None:
    """What is past a limit fails, by itself, with both numbers; workers say the same."""
    limit = scores["total"] / 2
    for workers in ("0", "2"):
        ran = run(pytester, FAIL, f"total.nmse<={limit!r},blocks.*.nmse<=0.01", "-n", workers)
        assert ran.ret == pytest.ExitCode.TESTS_FAILED
        ran.assert_outcomes(passed=len(OPS), failed=1)
        told = f"*isolated nmse {scores['total']:.6g} is past the limit of {limit:.6g} (total.nmse<=*)"
        ran.stdout.fnmatch_lines(["*total is past its limits", told, "*no update of the snapshot accepts that*"])
        ran.stdout.fnmatch_lines(["8 ops: 8 measured; 1 past a limit", "repeat with: pytest *"])
        repeat = next(line for line in ran.outlines if line.startswith("repeat with: "))
        assert shlex.split(repeat)[-3:] == ["-n", workers, TOTAL_ID]
        assert "accept with" not in ran.stdout.str()


def test_no_update_accepts_it(pytester: pytest.Pytester, scores: dict[str, float]) -> None:
    """An update records what is within its limits, and leaves the rest to fail."""
    worst = max(OPS, key=scores.__getitem__)
    rules = f"nmse:5%,{worst}.nmse<={scores[worst] / 2!r}"
    ran = run(pytester, FAIL, rules, "--snapshot-update")
    ran.assert_outcomes(passed=len(OPS), failed=1)
    assert set(snapshot_ops(pytester)) == {*OPS} - {worst}
    before = listing(pytester)
    assert run(pytester, FAIL, rules, "--snapshot-update").ret == pytest.ExitCode.TESTS_FAILED
    assert listing(pytester) == before
    assert run(pytester, FAIL, f"nmse:5%,{worst}.nmse<=1", "--snapshot-update").ret == 0
    assert set(snapshot_ops(pytester)) == {*OPS}
    ran = run(pytester, FAIL, rules)  # not worse than the snapshot, and past its limit all the same
    ran.assert_outcomes(passed=len(OPS), failed=1)


def test_overrides_and_markers(pytester: pytest.Pytester, scores: dict[str, float]) -> None:
    """Limits stand in the ini file and in a test's own marker as well."""
    strict = min(scores.values()) / 2
    pytester.makeini(f"[pytest]\nqsens_fail = nmse<=1\nqsens_fail_overrides =\n    head = nmse<={strict!r}\n")
    ran = run(pytester, "-rf")
    ran.assert_outcomes(passed=len(OPS), failed=1)
    ran.stdout.fnmatch_lines(["FAILED *head]*"])
    pytester.makeini("[pytest]\n")
    pytester.makepyfile(
        test_own=f"""
        import pytest

        @pytest.mark.qsens(model="{MODEL}", fail="embed.nmse<={strict!r},nmse<=1")
        def test_own(qsens_op, qsens_score, snapshot):
            assert qsens_score == snapshot
        """
    )
    ran = pytester.runpytest_inprocess("test_own.py", "-rf")
    ran.assert_outcomes(passed=len(OPS) - 1, failed=1)
    ran.stdout.fnmatch_lines(["FAILED *embed]*"])
    own = pytester.path / "test_own.py"
    own.write_text(own.read_text().replace("embed.nmse", "embde.nmse"))
    ran = pytester.runpytest_inprocess("test_own.py")
    assert ran.ret == pytest.ExitCode.USAGE_ERROR
    ran.stdout.fnmatch_lines(["*fail= of @pytest.mark.qsens: embde.nmse<=* limits nothing *(near: embed). Correct it"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((FAIL, "heda.nmse<=1"), "*heda.nmse<=1.0: 'heda' matches neither an op *(near: head)*would gate nothing*"),
        ((FAIL, "total.nmse<=1", "--qsens-max-ops", "1"), "*limits nothing that is measured, as --qsens-max-ops *"),
        ((FAIL, "additive_gap<=10%"), "*total.additive_gap<=10% is of how errors of ops meet, which only *"),
        (
            (FAIL, "additive_gap<=10%", "--qsens-interactions", "--qsens-ops", "head"),
            "*is of all ops together, as --qsens-ops leaves it out*",
        ),
        (
            (FAIL, "additive_gap<=10%", "--qsens-interactions", "--qsens-shard", "1/2"),
            "*qsens merge --fail 'total.additive_gap<=10%'",
        ),
        ((FAIL, "nmse<=x"), "*'x' is no limit of nmse*"),
    ],
)
def test_limits_of_nothing(arguments: tuple[str, ...], told: str, pytester: pytest.Pytester) -> None:
    """Refused before anything is measured or written."""
    write_model(pytester)
    before = listing(pytester)
    ran = run(pytester, *arguments)
    assert ran.ret == pytest.ExitCode.USAGE_ERROR
    ran.stderr.fnmatch_lines([told])
    assert listing(pytester) == before


def test_interactions(pytester: pytest.Pytester, capsys: pytest.CaptureFixture[str]) -> None:
    """The sum, the prediction and how far they are from what was measured: judged once, by merged shards as well."""
    write_model(pytester)
    arguments, problem = ("--qsens-interactions", FAIL), f"qsens: interactions of {LABEL} w8a8: "
    ran = run(pytester, *arguments, "additive_gap<=90%,quadratic<=1")
    assert ran.ret == 0
    ran.stdout.fnmatch_lines(
        ["interactions: total.additive_gap<=90% held: sum of the isolated nmse *, measured *", "interactions: *held*"]
    )
    ran = run(pytester, *arguments, "additive_gap<=0%,quadratic_gap<=0%", "-q")
    ran.assert_outcomes(passed=len(OPS) + 1)
    assert ran.ret == pytest.ExitCode.TESTS_FAILED
    ran.stdout.fnmatch_lines(
        [
            f"repeat with: pytest --qsens-model {MODEL} {' '.join(arguments)} 'additive_gap<=0%,quadratic_gap<=0%' -q",
            f"{problem}total.additive_gap<=0% failed: sum of the isolated nmse *, measured * (*%)",
            f"{problem}total.quadratic_gap<=0% failed: nmse predicted with interactions *",
        ]
    )
    assert ran.stdout.str().count("additive_gap<=0% failed") == 1  # told once
    assert "accept with" not in ran.stdout.str()
    ran = run(pytester, *arguments, "quadratic_gap<=90%", "-k", "not head")
    assert ran.ret == NOT_MEASURED
    ran.stdout.fnmatch_lines([f"{problem}total.quadratic_gap<=90% not judged: not all ops *"])
    for index in ("1/2", "2/2"):
        parts = ("--qsens-shard", index, "--qsens-json", f"{index[0]}.json")
        assert run(pytester, *arguments, "nmse<=1", *parts).ret == 0
    merge = ["merge", *(str(pytester.path / f"{index}.json") for index in (1, 2)), "-o", str(pytester.path / "m.json")]
    assert main([*merge, "--fail", "total.additive_gap<=90%"]) == 0
    assert main([*merge, "--fail", "total.quadratic_gap<=0%"]) == 1
    assert "interactions: total.quadratic_gap<=0% failed: " in capsys.readouterr().out


def test_estimates(pytester: pytest.Pytester) -> None:
    """An estimate is past a limit if all of its interval is, and if estimates count; else it gates nothing."""
    write_model(pytester)
    estimated = ("--qsens-engine", "probe", FAIL, "nmse<=1e-12", "-rf")
    ran = run(pytester, *estimated, "--qsens-gate-estimates")
    assert ran.ret == pytest.ExitCode.TESTS_FAILED
    ran.stdout.fnmatch_lines(["*isolated, estimated to be at least: nmse * is past the limit of 1e-12 (nmse<=1e-12)"])
    ran.assert_outcomes(failed=len(OPS) + 1)
    outcomes = run(pytester, *estimated).parseoutcomes()
    assert outcomes["skipped"] > 0  # some are measured, as the engine needs them
    assert outcomes["skipped"] + outcomes["failed"] == len(OPS) + 1
