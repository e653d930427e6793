"""The action and the workflows: valid, pinned, with least permissions, and no input is part of a script."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.workflows import (
    ACTION,
    ROOT,
    WORKFLOWS,
    environments,
    is_name,
    names,
    parsed,
    schema_errors,
    shellcheck,
    steps,
    zizmor,
)

if TYPE_CHECKING:
    from pathlib import Path

FILES = [ACTION, *WORKFLOWS]
GITHUB = ROOT / ".github"
WRITES = {
    "qsens-accept.yml": {"commit": {"contents"}},
    "docs.yml": {"publish": {"pages", "id-token"}},
}
"""What may be written by which jobs."""


def ids(path: Path) -> str:
    """Name a file."""
    return path.name


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("github-workflows", WORKFLOWS),
        ("github-actions", [ACTION]),
        ("dependabot", [GITHUB / "dependabot.yml"]),
        ("github-issue-forms", [GITHUB / "ISSUE_TEMPLATE" / name for name in ("bug.yml", "feature.yml")]),
        ("github-issue-config", [GITHUB / "ISSUE_TEMPLATE" / "config.yml"]),
    ],
)
def test_schemas(schema: str, files: list[Path]) -> None:
    """They are what GitHub's own schemas say."""
    assert files
    assert schema_errors(schema, *files) == ""


def test_the_schemas_would_find_something(tmp_path: Path) -> None:
    """A key that is mistyped is none."""
    (tmp_path / "w.yml").write_text(WORKFLOWS[0].read_text().replace("timeout-minutes", "timeout-minute"))
    assert "timeout-minute" in schema_errors("github-workflows", tmp_path / "w.yml")


def test_audit() -> None:
    """An auditor of GitHub Actions finds nothing: no injection, no loose permission, no credentials left behind."""
    found = zizmor(ROOT, ".github", "action.yml", ".pre-commit-config.yaml")
    assert found.returncode == 0, found.stdout + found.stderr
    audited = re.findall(r"completed (?:\./)?(\S+)", found.stderr)
    assert {path.relative_to(ROOT).as_posix() for path in FILES} < set(audited)


def test_the_audit_would_find_something(tmp_path: Path) -> None:
    """The auditor does complain about an input in a script and an action by its tag."""
    (tmp_path / "action.yml").write_text(
        "name: n\ndescription: d\ninputs: {a: {description: d}}\nruns:\n  using: composite\n  steps:\n"
        "    - uses: actions/checkout@v4\n    - run: echo ${{ inputs.a }}\n      shell: bash\n"
    )
    found = zizmor(tmp_path, "action.yml")
    assert found.returncode != 0
    assert {"template-injection", "unpinned-uses"} <= set(re.findall(r"error\[([\w-]+)\]", found.stdout))


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_scripts(path: Path) -> None:
    """Scripts have no mistakes that a linter knows, and use no variable that nothing sets."""
    found = environments(path)
    assert found
    for step, known in found:
        assert shellcheck(step["run"], known) == ""


def test_the_script_of_ci() -> None:
    """What CI runs is a script, too."""
    assert shellcheck((ROOT / ".ci" / "run").read_text()) == ""


@pytest.mark.parametrize(
    ("mistake", "code"),
    [
        ('echo "$QSENS_MODLE"', "SC2154"),
        ("rm -r $QSENS_MODEL", "SC2086"),
        ('echo "$(cat "$QSENS_MODEL")"', "SC2312"),
    ],
)
def test_the_linter_would_find_something(mistake: str, code: str) -> None:
    """A name that is mistyped, words that are split, an exit code that is lost."""
    assert shellcheck('echo "$QSENS_MODEL"', ["QSENS_MODEL"]) == ""
    assert f"{code} (" in shellcheck(mistake, ["QSENS_MODEL"])


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
    """Nothing is allowed but what a job names; two jobs may write: that which pushes, and that which publishes."""
    workflow = parsed(path)
    assert workflow["permissions"] == {}
    writing = {
        name: {what for what, how in job.get("permissions", {}).items() if how == "write"}
        for name, job in workflow["jobs"].items()
    }
    assert {name: what for name, what in writing.items() if what} == WRITES.get(path.name, {})
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())


def test_the_site_is_published_from_main_alone() -> None:
    """By a job of its own, which runs nothing; what it publishes is what CONTRIBUTING.md says how to build."""
    jobs = parsed(ROOT / ".github" / "workflows" / "docs.yml")["jobs"]
    uploads = [step for step in jobs["build"]["steps"] if "upload-pages-artifact" in step.get("uses", "")]
    conditions = {jobs["publish"]["if"], *(step["if"] for step in uploads)}
    assert conditions == {"${{ github.event_name == 'push' && github.ref == 'refs/heads/main' }}"}
    assert not any("run" in step for step in jobs["publish"]["steps"])
    (command,) = re.findall(r"^    (sphinx-build .*)$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert command in [step.get("run") for step in jobs["build"]["steps"]]
    assert [step["with"]["path"] for step in uploads] == [command.split()[-1]]
