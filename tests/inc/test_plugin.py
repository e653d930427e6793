"""Engine inc behind pytest's options."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tests.plugin.harness import MODEL, OPS, snapshot_file, write_model

if TYPE_CHECKING:
    import pytest

COUNT = len(OPS) + 1


def run(pytester: pytest.Pytester, *options: str) -> pytest.RunResult:
    """Run the built-in suite with engine inc in a process of its own."""
    return pytester.runpytest_subprocess(
        "-p", "no:cacheprovider", "--qsens-model", MODEL, "--qsens-engine", "inc", *options
    )


def report(pytester: pytest.Pytester) -> dict[str, Any]:
    """Content of the JSON report."""
    content: dict[str, Any] = json.loads((pytester.path / "report.json").read_text())
    return content


def test_gate_and_report(pytester: pytest.Pytester) -> None:
    """Everything is new and fails, then is accepted and passes; the report has Intel Neural Compressor's numbers."""
    write_model(pytester)
    both = ("--qsens-mode", "both", "--qsens-json", "report.json")
    result = run(pytester, *both)
    result.assert_outcomes(failed=COUNT)
    run(pytester, *both, "--snapshot-update").assert_outcomes(passed=COUNT)
    assert snapshot_file(pytester).exists()
    result = run(pytester, *both)
    result.assert_outcomes(passed=COUNT)
    result.stdout.fnmatch_lines(["*engine inc*"])
    content = report(pytester)
    assert content["run"]["engine"] == "inc"
    ops = {op["op"]: op for op in content["ops"]}
    for name in OPS:
        for mode in ("isolated", "fallback"):
            scores = ops[name][mode]
            assert abs(scores["inc_sse"] - scores["sse"]) <= 1e-4 * scores["sse"]
            assert "noise" not in scores
    assert not (pytester.path / "nc_workspace").exists()


def test_only_what_is_asked_for_is_computed(pytester: pytest.Pytester) -> None:
    """A selection or a limit of ops is one of the loop's iterations, not of what is shown of them."""
    write_model(pytester)
    pytester.makeconftest(
        """
        from pathlib import Path
        from pytest_qsens.engines import inc

        drive = inc.IncEngine._drive

        def counting(self, function, loop, candidates, *more):
            with (Path(__file__).parent / "drives").open("a") as log:
                log.writelines(f"{candidate[0]}\\n" for candidate in candidates)
            return drive(self, function, loop, candidates, *more)

        inc.IncEngine._drive = counting
        """
    )
    for options, expected in (
        (("--qsens-ops", "blocks.1.up"), ["blocks.1.up"]),
        (("--qsens-max-ops", "2"), list(OPS[:2])),
    ):
        run(pytester, "--qsens-mode", "isolated", *options)
        drives = (pytester.path / "drives").read_text().split()
        (pytester.path / "drives").unlink()
        assert [op for op in drives if op != "qsens_everything"] == expected


def test_workers(pytester: pytest.Pytester) -> None:
    """Two workers measure what one process does."""
    write_model(pytester)
    run(pytester, "--snapshot-update").assert_outcomes(passed=COUNT)
    one = snapshot_file(pytester).read_text()
    snapshot_file(pytester).unlink()
    run(pytester, "--snapshot-update", "-n", "2").assert_outcomes(passed=COUNT)
    assert snapshot_file(pytester).read_text() == one
