"""The action and the workflows: valid, pinned, with least permissions, and no input is part of a script."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.workflows import ACTION, ROOT, WORKFLOWS, is_name, names, parsed, steps

FILES = [ACTION, *WORKFLOWS]
BIN = Path(sys.executable).parent


def ids(path: Path) -> str:
    """Name a file."""
    return path.name


def test_schemas() -> None:
    """They are what GitHub's own schemas say."""
    for schema, files in (("github-workflows", WORKFLOWS), ("github-actions", [ACTION])):
        command = [BIN / "check-jsonschema", "--builtin-schema", f"vendor.{schema}", *files]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout


def test_audit() -> None:
    """An auditor of GitHub Actions finds nothing: no injection, no loose permission, no credentials left behind."""
    found = subprocess.run(
        [BIN / "zizmor", "--offline", "--no-progress", *FILES], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert found.returncode == 0, found.stdout


def test_the_audit_would_find_something(tmp_path: Path) -> None:
    """The auditor does complain about an input in a script and an action by its tag."""
    (tmp_path / "action.yml").write_text(
        "name: n\ndescription: d\ninputs: {a: {description: d}}\nruns:\n  using: composite\n  steps:\n"
        "    - uses: actions/checkout@v4\n    - run: echo ${{ inputs.a }}\n      shell: bash\n"
    )
    command = [BIN / "zizmor", "--offline", "--no-progress", tmp_path / "action.yml"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert {"template-injection", "unpinned-uses"} <= set(re.findall(r"error\[([\w-]+)\]", found.stdout))


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_nothing_is_pasted_into_scripts(path: Path) -> None:
    """Values reach a script by its environment alone, each as one name."""
    for step in steps(path):
        assert not names(step.get("run", ""))
        assert all(is_name(name) or "||" in name for value in step.get("env", {}).values() for name in names(value))


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_pins(path: Path) -> None:
    """Actions of others are pinned to commits, with the version beside them; one action has one version everywhere."""
    used = re.findall(r"uses: (\S+)(?: # (\S+).*)?$", path.read_text(), re.MULTILINE)
    assert len(used) == path.read_text().count("uses:")
    everywhere = dict(re.findall(r"uses: ([\w./-]+)@(\w+)", "\n".join(file.read_text() for file in FILES)))
    for name, version in used:
        if name != "./":
            action, _, commit = name.partition("@")
            assert re.fullmatch(r"[0-9a-f]{40}", commit), name
            assert re.fullmatch(r"v\d+\.\d+\.\d+", version), name
            assert everywhere[action] == commit


@pytest.mark.parametrize("path", WORKFLOWS, ids=ids)
def test_permissions(path: Path) -> None:
    """Nothing is allowed but what a job names, and only one job may write, to contents: that which pushes."""
    workflow = parsed(path)
    assert workflow["permissions"] == {}
    writing = {
        name: [what for what, how in job["permissions"].items() if how == "write"]
        for name, job in workflow["jobs"].items()
    }
    assert {name: what for name, what in writing.items() if what} in ({}, {"commit": ["contents"]})
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())
