"""The composite action: its scripts run as GitHub would run them."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest

from tests.plugin.harness import MODEL, snapshot_ops, write_model
from tests.workflows import ACTION, inputs, run, step

if TYPE_CHECKING:
    import subprocess


def context(pytester: pytest.Pytester, **given: str) -> dict[str, str]:
    """Give what expressions of the action can name."""
    temporary = pytester.path / "runner temp"
    temporary.mkdir(exist_ok=True)
    return inputs(**given) | {"runner.temp": str(temporary), "github.action_path": str(ACTION.parent)}


def measure(pytester: pytest.Pytester, **given: str) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
    """Run the step that measures; tell how it ended, and its outputs."""
    output = pytester.path / "output"
    output.write_text("")
    env = {"GITHUB_OUTPUT": str(output), "GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(pytester.path / "s.md")}
    found = run(step(ACTION, "Measure"), context(pytester, **given), pytester.path, env=env)
    return found, dict(line.split("=", 1) for line in output.read_text().splitlines())


def test_measure(pytester: pytest.Pytester) -> None:
    """It passes on what it was given, keeps the results, and ends as pytest does; the summary has its command."""
    write_model(pytester)
    given = {"model": MODEL, "workers": "0", "snapshot-dir": "my snapshots", "args": "-k 'head or embed'\n--tb=no"}
    found, outputs = measure(pytester, **given)
    assert found.returncode == 1, found.stderr
    assert outputs == {"exit-code": "1", "result": str(pytester.path / "runner temp" / "qsens-results" / "qsens.json")}
    statuses = {op["op"]: op["status"] for op in json.loads(Path(outputs["result"]).read_text())["ops"]}
    assert [op for op, status in statuses.items() if status == "measured"] == ["embed", "head"]
    cases = ET.parse(Path(outputs["result"]).with_name("junit.xml")).iter("testcase")
    assert len(list(cases)) == 2
    command = (
        f"pytest --qsens-model={MODEL} -n 0 '--qsens-snapshot-dir=my snapshots' -k 'head or embed' --tb=no "
        "--snapshot-update"
    )
    assert command in (pytester.path / "s.md").read_text()
    assert found.stdout.count("\n::error ") == 2
    assert not list(pytester.path.glob("runner temp/qsens-results/args"))


@pytest.mark.parametrize(
    "given",
    [
        {"model": "net:spec; touch pwned; echo $(touch pwned) `touch pwned`"},
        {"model": MODEL, "args": "$(touch pwned) ; touch pwned `touch pwned`"},
        {"model": MODEL, "args": "'never closed"},
        {"model": MODEL, "config": '"; touch pwned; "'},
    ],
)
def test_inputs_are_no_code(pytester: pytest.Pytester, given: dict[str, str]) -> None:
    """Whatever is in an input, it is an argument of pytest or an error, and never run."""
    write_model(pytester)
    found, outputs = measure(pytester, workers="0", **given)
    assert found.returncode != 0
    assert outputs.get("exit-code") in (None, "4")
    assert not list(pytester.path.rglob("pwned"))


def test_install(pytester: pytest.Pytester) -> None:
    """The action installs itself, with the versions it is tested with or those of the project."""
    shim = pytester.path / "bin" / "python"
    shim.parent.mkdir()
    shim.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {pytester.path / 'called'}\n")
    shim.chmod(shim.stat().st_mode | stat.S_IXUSR)
    found = step(ACTION, "Install")
    script = {**found, "run": f'PATH="{shim.parent}:$PATH"\n{found["run"]}'}
    for requirements, versions in (("", ["-c", f"{ACTION.parent}/constraints.txt"]), ("a b.txt", ["-r", "a b.txt"])):
        ended = run(script, context(pytester, model=MODEL, requirements=requirements), pytester.path)
        assert ended.returncode == 0, ended.stderr
        called = (pytester.path / "called").read_text().splitlines()
        assert called[:3] == ["-m", "pip", "install"]
        assert called[-3:] == [*versions, f"{ACTION.parent}[xdist]"]
    assert (ACTION.parent / "constraints.txt").is_file()


def test_update_is_refused(pytester: pytest.Pytester) -> None:
    """In CI a snapshot is compared, not written, whatever the arguments of the action."""
    write_model(pytester)
    found, outputs = measure(pytester, model=MODEL, workers="0", args="--snapshot-update")
    assert (found.returncode, outputs["exit-code"]) == (4, "4")
    assert "CI is set to 'true'" in found.stderr
    with pytest.raises(FileNotFoundError):
        snapshot_ops(pytester)
