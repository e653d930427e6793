"""Who does not measure pays nothing, and who only lists tests does not pay for torch."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from tests.checkpoints import bert
from tests.plugin.harness import collected, op_id, write_model

if TYPE_CHECKING:
    from collections.abc import Sequence

HEAVY = """
import sys
def heavy(): return sorted({"torch", "transformers", "numpy", "safetensors", "PIL"}.intersection(sys.modules))
def pytest_unconfigure(): print("HEAVY:", heavy())
"""


@pytest.mark.parametrize("args", [[], ["-p", "no:xdist"], ["-n", "2"], ["--qsens-scheme", "w8a8_static"]])
def test_nothing_heavy_is_imported(pytester: pytest.Pytester, args: Sequence[str]) -> None:
    """Without a model, torch and its like stay unimported, in the controller and in workers."""
    pytester.makeconftest(HEAVY)
    pytester.makepyfile(
        """
        from conftest import heavy
        def test_heavy(snapshot):
            assert not heavy()
            assert {"a": 1} == snapshot
        """
    )
    for update in (["--snapshot-update"], []):
        result = pytester.runpytest_subprocess(*args, *update, "-s")
        result.assert_outcomes(passed=1)
        assert result.ret == pytest.ExitCode.OK
        result.stdout.fnmatch_lines(["1 snapshot *", "HEAVY: []"])
        assert "qsens" not in "\n".join(
            line for line in result.outlines if not line.startswith(("plugins:", "rootdir:"))
        )


@pytest.mark.parametrize("args", [["--help"], ["--fixtures"]])
def test_what_only_prints_imports_nothing_heavy(pytester: pytest.Pytester, args: Sequence[str]) -> None:
    """All options are declared, and their help is written, without torch."""
    script = "import sys, pytest; code = pytest.main(sys.argv[1:]); sys.exit(code + 50 * ('torch' in sys.modules))"
    result = pytester.run(sys.executable, "-c", script, *args)
    assert result.ret == pytest.ExitCode.OK


def test_a_run_without_us_is_as_without_the_plugin(pytester: pytest.Pytester) -> None:
    """Exit codes and output of an idle run do not show that the plugin is there."""
    pytester.makepyfile(test_it="def test_bad(): assert 1 == 2\ndef test_good(): pass")

    def visible(*args: str) -> tuple[object, list[str]]:
        result = pytester.runpytest_subprocess("--strict-markers", "-p", "no:cacheprovider", *args)
        return result.ret, [line for line in result.outlines if " in " not in line and not line.startswith("plugins:")]

    assert visible() == visible("-p", "no:qsens")


def test_listing_tests_needs_no_torch_once_the_ops_are_known(pytester: pytest.Pytester) -> None:
    """``--collect-only`` reads the op list from the cache: torch is imported the first time only."""
    bert(pytester.path / "checkpoint")
    pytester.makeconftest(HEAVY)
    run = ("--qsens-model", "./checkpoint", "--collect-only", "-q")
    cold = pytester.runpytest_subprocess(*run)
    cold.stdout.fnmatch_lines(["HEAVY: *'torch'*"])
    warm = pytester.runpytest_subprocess(*run)
    warm.stdout.fnmatch_lines(["HEAVY: []"])
    assert collected(warm) == collected(cold) != []
    uncached = pytester.runpytest_subprocess(*run, "--qsens-no-cache")
    uncached.stdout.fnmatch_lines(["HEAVY: *'torch'*"])
    elsewhere = pytester.runpytest_subprocess(*run, "--qsens-cache", "mine")
    elsewhere.stdout.fnmatch_lines(["HEAVY: *'torch'*"])
    assert list((pytester.path / "mine").rglob("*.json"))
    pytester.runpytest_subprocess(*run, "--qsens-cache", "mine").stdout.fnmatch_lines(["HEAVY: []"])


def test_help_and_markers(pytester: pytest.Pytester) -> None:
    """Every option is in ``--help`` with its ini twin, and the marker in ``--markers``."""
    text = pytester.runpytest_inprocess("--help").stdout.str()
    for name in ("model", "checkpoint", "scheme", "mode", "ops", "max-ops", "calib", "calib-samples", "eval", "engine"):
        assert f"--qsens-{name}" in text
        assert f"qsens_{name.replace('-', '_')} " in text
    pytester.runpytest_inprocess("--markers").stdout.fnmatch_lines(["@pytest.mark.qsens(model=*"])


def test_paths_start_where_they_are_written(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path means the working directory on the command line, and the root directory in the ini file."""
    write_model(pytester)
    pytester.makeini("[pytest]\nqsens_snapshot_dir = from_ini\nqsens_model = net:spec\nqsens_ops = head")
    pytester.mkdir("sub")
    monkeypatch.syspath_prepend(pytester.path)
    monkeypatch.chdir(pytester.path / "sub")
    pytester.runpytest_inprocess("--rootdir", "..", "-c", "../tox.ini", "--snapshot-update", op_id("head"))
    assert (pytester.path / "from_ini" / "net.spec" / "w8a8.json").exists()
    pytester.runpytest_inprocess(
        "--rootdir", "..", "-c", "../tox.ini", "--snapshot-update", "--qsens-snapshot-dir", "cli", op_id("head")
    )
    assert (pytester.path / "sub" / "cli" / "net.spec" / "w8a8.json").exists()
