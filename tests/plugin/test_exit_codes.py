"""Every exit code of docs/options.md comes of a run of its own, and the three that a pipeline has to tell apart are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.plugin.harness import MODEL, op_id, snapshot_file, write_model
from tests.plugin.test_gate import NAN_WHEN_QUANTIZED

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = Path(__file__).parent.parent.parent / "docs" / "options.md"


def documented() -> dict[int, str]:
    """Codes of the table, with what it says of them."""
    section = PAGE.read_text().partition("## Exit codes\n")[2].partition("\n## ")[0]
    return {int(code): text for code, text in re.findall(r"^\| (\d+) \| (.*) \|$", section, re.MULTILINE)}


def _run(pytester: pytest.Pytester, *args: str) -> int:
    return int(pytester.inline_run("--qsens-model", MODEL, *args, no_reraise_ctrlc=True).ret)


def _same(pytester: pytest.Pytester) -> int:
    _run(pytester, "--snapshot-update")
    return _run(pytester)


def _worse(pytester: pytest.Pytester) -> int:
    _run(pytester, "--snapshot-update")
    (pytester.path / "worse").write_text("30")
    return _run(pytester)


def _interrupted(pytester: pytest.Pytester) -> int:
    pytester.makeconftest("def pytest_runtest_teardown(): raise KeyboardInterrupt")
    return _run(pytester)


def _broken_plugin(pytester: pytest.Pytester) -> int:
    pytester.makeconftest("def pytest_runtest_logstart(): raise RuntimeError('broken')")
    return _run(pytester)


def _bad_input(pytester: pytest.Pytester) -> int:
    return _run(pytester, "--qsens-scheme", "w8a9")


def _nothing_selected(pytester: pytest.Pytester) -> int:
    return _run(pytester, "-k", "nothing")


def _out_of_time(pytester: pytest.Pytester) -> int:
    return _run(pytester, "--qsens-time-budget", "0.01s")


SCENARIOS: dict[int, Callable[[pytest.Pytester], int]] = {
    0: _same,
    1: _worse,
    2: _interrupted,
    3: _broken_plugin,
    4: _bad_input,
    5: _nothing_selected,
    10: _out_of_time,
}


def test_all_are_documented() -> None:
    """The table has what is tested here, and nothing else."""
    assert list(documented()) == list(SCENARIOS)
    assert all(documented().values())


@pytest.mark.parametrize("code", SCENARIOS)
def test_codes(pytester: pytest.Pytester, code: int) -> None:
    """A run that ends so has this code; only an update writes a snapshot."""
    write_model(pytester)
    assert SCENARIOS[code](pytester) == code
    assert snapshot_file(pytester).exists() is (code in (0, 1))


def _new(pytester: pytest.Pytester) -> int:
    return _run(pytester)


def _lost(pytester: pytest.Pytester) -> int:
    write_model(pytester, spare="used")
    _run(pytester, "--snapshot-update")
    write_model(pytester, spare="unused")
    return _run(pytester)


def _failed(pytester: pytest.Pytester) -> int:
    pytester.makepyfile(bad=NAN_WHEN_QUANTIZED)
    _run(pytester, "--qsens-model", "bad:spec", "--snapshot-update")
    return _run(pytester, "--qsens-model", "bad:spec")


@pytest.mark.parametrize("scenario", [_new, _lost, _failed])
def test_what_fails(pytester: pytest.Pytester, scenario: Callable[[pytest.Pytester], int]) -> None:
    """New ops, ops that lost their scores and ops that fail end as ops that got worse do, not as bad input."""
    write_model(pytester)
    assert scenario(pytester) == 1


@pytest.mark.parametrize(
    "args",
    [
        ["--qsens-ops", "nothing*"],
        ["--qsens-fail", "nmse"],
        [op_id("nothing")],
        ["--qsens-json", "missing/out.json"],
        ["--qsens-gitlab", "missing/out.json"],
        ["--qsens-gitlab", "net.py"],
        ["--no-such-option"],
    ],
)
def test_what_is_refused(pytester: pytest.Pytester, args: list[str]) -> None:
    """Bad input is never taken for a regression, and an older file stays as it is."""
    write_model(pytester)
    before = (pytester.path / "net.py").read_bytes()
    assert _run(pytester, *args) == 4
    assert (pytester.path / "net.py").read_bytes() == before
