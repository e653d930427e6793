"""``--qsens-profile`` in real runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qsens.result_files import load
from tests.plugin.harness import LABEL, MODEL, OPS, write_model

if TYPE_CHECKING:
    from collections.abc import Sequence

TITLE = "where the time went from the first measurement to the last, in seconds"


def profiled(pytester: pytest.Pytester, *args: str) -> dict[str, Any]:
    """Run with a result file; returns ``run`` of it."""
    result = pytester.runpytest_inprocess("--qsens-model", MODEL, "--qsens-json", "out.json", *args)
    assert result.ret in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    assert load(pytester.path / "out.json").ops
    run: dict[str, Any] = json.loads((pytester.path / "out.json").read_text())["run"]
    return run | {"lines": result.outlines}


@pytest.mark.parametrize(("args", "processes"), [([], 1), (["-n", "2"], 2)])
def test_phases_add_up(pytester: pytest.Pytester, args: Sequence[str], processes: int) -> None:
    """All processes are in it, nothing is negative, and it is no more than the processes had."""
    write_model(pytester)
    run = profiled(pytester, "--qsens-profile", *args)
    profile = run["profile"]
    assert profile["processes"] == processes
    expected = {"load", "calibration", "reference", "capture", "local quantization", "replay", "scoring", "waiting"}
    assert profile["seconds"].keys() == expected
    assert all(spent > 0 for spent in profile["seconds"].values())
    assert sum(profile["seconds"].values()) <= processes * run["cost"]["wall_seconds"]
    assert {"linear", "relu", "add"} <= profile["replay"].keys()
    assert 0 < sum(profile["replay"].values()) <= profile["seconds"]["replay"]
    assert 0 < profile["gemm_seconds"] <= sum(profile["seconds"].values())
    at = run["lines"].index(TITLE + (" of 2 processes together" if processes == 2 else ""))
    names = [line.rsplit(maxsplit=2)[0].strip() for line in run["lines"][at + 1 :]]
    assert names[0] == "load"
    assert {"replay", "linear", "between the calls", "waiting", "all", "in matrix products"} <= set(names)


def test_off_by_default(pytester: pytest.Pytester) -> None:
    """Without the option there is nothing in the summary and nothing in the file."""
    write_model(pytester)
    run = profiled(pytester)
    assert "profile" not in run
    assert not any("where the time went" in line for line in run["lines"])


def test_the_ini_file_and_a_quiet_run(pytester: pytest.Pytester) -> None:
    """Who asks for it gets it, with ``-q`` and from the ini file, too; no result file is needed."""
    write_model(pytester)
    pytester.makeini("[pytest]\nqsens_profile = true")
    result = pytester.runpytest_inprocess("--qsens-model", MODEL, "-q", "--qsens-ops", "head")
    result.stdout.fnmatch_lines([TITLE])
    assert "cost:" not in result.stdout.str()


def test_an_engine_that_runs_the_model_itself(pytester: pytest.Pytester) -> None:
    """Its forwards are one phase, and what they hold is unknown rather than nothing."""
    write_model(pytester)
    run = profiled(pytester, "--qsens-profile", "--qsens-engine", "eager")
    assert "replay" not in run["profile"]["seconds"]
    assert run["profile"]["seconds"]["forward"] > 0
    assert (run["profile"]["replay"], run["profile"]["gemm_seconds"]) == ({}, None)
    assert "  in matrix products: unknown, as the engine runs the model itself" in run["lines"]


def test_what_a_dead_worker_did_is_kept(pytester: pytest.Pytester) -> None:
    """The time up to its last report, as the scores; the worker in its place has a profile of its own."""
    write_model(pytester)
    pytester.makeconftest(
        """
        import os, signal
        def pytest_runtest_call(item):
            if "-blocks.1.down]" in item.nodeid and "PYTEST_XDIST_WORKER" in os.environ:
                os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    run = profiled(pytester, "--qsens-profile", "-n", "1", "-p", "no:randomly")
    assert run["profile"]["processes"] == 2


def test_the_first_failure_ends_the_run(pytester: pytest.Pytester) -> None:
    """With ``-x`` on the first op, what was measured for it has a profile."""
    write_model(pytester)
    assert profiled(pytester, "--qsens-profile", "-x")["profile"]["seconds"]["replay"] > 0


def test_models_have_profiles_of_their_own(pytester: pytest.Pytester) -> None:
    """One for each model and scheme; scores that a test asks for itself count, although no report carries them."""
    write_model(pytester)
    pytester.makepyfile(
        test_user=f"""
        import pytest
        @pytest.mark.qsens(model="{MODEL}")
        class Test:
            @pytest.mark.qsens(scheme="w8a8_dynamic", ops="head")
            def test_a(self, qsens_score, snapshot): assert qsens_score == snapshot
            @pytest.mark.qsens(scheme="w8a8_static", ops="head")
            def test_b(self, qsens_model, qsens_op, qsens_score, snapshot):
                assert qsens_score == snapshot
                assert qsens_model.total().isolated
        """
    )
    result = pytester.runpytest_inprocess("--qsens-profile")
    text = result.stdout.str()
    assert text.count(TITLE) == 2
    for scheme in ("w8a8_dynamic", "w8a8_static"):
        section = text[text.index(f"qsens: model {LABEL}, scheme {scheme}") :]
        assert section.index(TITLE) < section.index("accept with")
    assert len(OPS) > 1  # and no built-in suite beside those tests
