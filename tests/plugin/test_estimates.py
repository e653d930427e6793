"""A run of engine probe: estimates are named as such, gate nothing, and go into no snapshot."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.plugin.harness import MODEL, snapshot_file, write_model

RUN = ("--qsens-model", MODEL, "--qsens-engine", "probe")


def result_file(pytester: pytest.Pytester) -> dict[str, Any]:
    """Content of the result file."""
    found: dict[str, Any] = json.loads((pytester.path / "r.json").read_text())
    return found


def test_estimates_are_named(pytester: pytest.Pytester) -> None:
    """In the summary, with intervals and the cost, in the reasons of skipped tests, and in the result file."""
    write_model(pytester)
    result = pytester.runpytest_inprocess(*RUN, "--qsens-json", "r.json", "-rs")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*is estimated, which gates nothing: isolated nmse *, 90 % interval * to *"])
    result.stdout.fnmatch_lines(
        [
            "worst ops, isolated (*; 5 of 8 are estimates)",
            "ESTIMATES: 5 of 8 ops are estimated, not measured. They gate nothing*",
            "cost: * forwards for all ops",
        ]
    )
    ops = result_file(pytester)["ops"]
    estimated = [op for op in ops if op["status"] == "estimated"]
    assert len(estimated) == 5
    for op in estimated:
        low, high = op["isolated"]["interval"]
        assert low < op["isolated"]["nmse"] < high
    assert all("interval" not in op["isolated"] for op in ops if op["status"] == "measured")


def test_nothing_is_recorded(pytester: pytest.Pytester) -> None:
    """Updating with estimates is refused; a snapshot that is there stays as it is, and gates what is measured."""
    write_model(pytester)
    refused = pytester.runpytest_inprocess(*RUN, "--snapshot-update")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(["*engine probe estimates, and snapshots hold what was measured*"])
    assert not snapshot_file(pytester).exists()
    assert pytester.runpytest_inprocess("--qsens-model", MODEL, "--snapshot-update").ret == 0
    before = snapshot_file(pytester).read_bytes()
    result = pytester.runpytest_inprocess(*RUN)
    result.assert_outcomes(passed=4, skipped=5)
    assert snapshot_file(pytester).read_bytes() == before
    (pytester.path / "worse").write_text("30")
    worse = pytester.runpytest_inprocess(*RUN)
    assert worse.ret == pytest.ExitCode.TESTS_FAILED


def test_the_cache_keeps_them_apart(pytester: pytest.Pytester) -> None:
    """Estimates are made anew, and a run that measures takes none of them; nor the other way round."""
    write_model(pytester)
    cache = ("--qsens-cache", "cache")
    pytester.runpytest_inprocess(*RUN, *cache)
    pytester.runpytest_inprocess("--qsens-model", MODEL, *cache, "--qsens-json", "r.json")
    assert {op["status"] for op in result_file(pytester)["ops"]} == {"measured"}
    pytester.runpytest_inprocess(*RUN, *cache, "--qsens-json", "r.json")
    assert sum(op["status"] == "estimated" for op in result_file(pytester)["ops"]) == 5


def test_workers_agree(pytester: pytest.Pytester) -> None:
    """Each of two workers chooses the same ops as one process, and estimates the others alike but for rounding."""
    write_model(pytester)
    pytester.runpytest_subprocess(*RUN, "--qsens-json", "r.json", "--qsens-no-cache")
    alone = result_file(pytester)["ops"]
    pytester.runpytest_subprocess(*RUN, "--qsens-json", "r.json", "--qsens-no-cache", "-n", "2")
    for one, other in zip(alone, result_file(pytester)["ops"], strict=True):
        assert one["status"] == other["status"]
        assert one["isolated"]["nmse"] == pytest.approx(other["isolated"]["nmse"], rel=1e-3)
