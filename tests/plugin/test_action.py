"""The composite action: its scripts run as GitHub would run them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest

from tests.plugin.harness import MODEL, snapshot_ops, write_model
from tests.workflows import ACTION, inputs, names, run, step, steps

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
    kept = sorted(path.name for path in Path(outputs["result"]).parent.rglob("*") if path.is_file())
    assert kept == ["junit.xml", "qsens.json", "report.csv", "report.html", "report.json", "report.md"]


def test_no_report(pytester: pytest.Pytester) -> None:
    """Whoever does not want excerpts of the data in the artifact gets none, and one in a place of one's own is made."""
    write_model(pytester)
    found, outputs = measure(pytester, model=MODEL, workers="0", report="false")
    assert found.returncode == 1, found.stderr
    kept = sorted(path.name for path in Path(outputs["result"]).parent.iterdir())
    assert kept == ["junit.xml", "qsens.json"]
    found, outputs = measure(pytester, model=MODEL, workers="0", args="--qsens-report out")
    assert found.returncode == 1, found.stderr
    assert (pytester.path / "out" / "report.html").exists()
    assert not (Path(outputs["result"]).parent / "report").exists()


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


def key(pytester: pytest.Pytester, action: Path = ACTION.parent, **given: str) -> str:
    """Run the step that tells what the packages in the cache depend on."""
    output = pytester.path / "output"
    output.write_text("")
    known = context(pytester, model=MODEL, **given) | {"github.action_path": str(action)}
    found = run(step(ACTION, "Key"), known, pytester.path, env={"GITHUB_OUTPUT": str(output)})
    assert found.returncode == 0, found.stderr
    (line,) = output.read_text().splitlines()
    assert line.startswith("versions=")
    return line.removeprefix("versions=")


def test_key_of_the_packages(pytester: pytest.Pytester) -> None:
    """It is of what pip reads: requirements below the working directory, or the versions that come with the action."""
    (cached,) = (found["with"]["key"] for found in steps(ACTION) if found.get("with", {}).get("path") == "~/.cache/pip")
    assert {"steps.key.outputs.versions", "inputs.report"} <= set(names(cached))
    action, directory = pytester.path / "the action", pytester.path / "my project"
    action.mkdir()
    directory.mkdir()
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ACTION.parent / name, action)
    requirements = directory / "my requirements.txt"
    keys = []
    for version in (1, 2):
        requirements.write_text(f"einops=={version}\n")
        (pytester.path / "constraints.txt").write_text(f"torch=={version}\n")  # the workspace's, which nothing reads
        keys.append(key(pytester, action, **{"working-directory": directory.name, "requirements": requirements.name}))
        keys.append(key(pytester, action))
    assert len(set(keys)) == 3
    assert keys[1] == keys[3]
    with (action / "constraints.txt").open("a") as file:
        file.write("einops==3\n")
    assert key(pytester, action) not in keys


def test_update_is_refused(pytester: pytest.Pytester) -> None:
    """In CI a snapshot is compared, not written, whatever the arguments of the action."""
    write_model(pytester)
    found, outputs = measure(pytester, model=MODEL, workers="0", args="--snapshot-update")
    assert (found.returncode, outputs["exit-code"]) == (4, "4")
    assert "CI is set to 'true'" in found.stderr
    with pytest.raises(FileNotFoundError):
        snapshot_ops(pytester)
