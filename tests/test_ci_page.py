"""The recipes of docs/ci.md: their YAML is valid, and their commands are understood."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from pytest_qsens.cli import main
from pytest_qsens.options import Options
from tests.workflows import ACTION, WORKFLOWS, environments, parsed, schema_errors, shellcheck, zizmor

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = Path(__file__).parent.parent / "docs" / "ci.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
RECIPES = [yaml.safe_load(block) for kind, block in BLOCKS if kind == "yaml"]
INDENTED = "\n".join(line[4:] for line in PAGE.read_text().splitlines() if line.startswith("    "))
_EXPRESSION = re.compile(r"\$\{\{.*?\}\}")
_OF_SLURM = {"SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"}
_FILLED_IN = re.compile(r"\$\{\{.*?\}\}|\$\(\(.*?\)\)|\$\w+")


def texts(value: object) -> Iterator[str]:
    """Every text in parsed YAML."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts(inner)


def commands() -> list[list[str]]:
    """Every call of pytest and of our script, with 1 for all that is filled in."""
    scripts = [text for kind, text in BLOCKS if kind == "bash"] + [INDENTED]
    scripts += [text for kind, block in BLOCKS if kind == "yaml" for text in texts(yaml.safe_load(block))]
    lines = [line.strip() for script in scripts for line in script.replace("\\\n", " ").splitlines()]
    found = [re.sub(r'.*--wrap "(.*)"', r"\1", line) for line in lines]
    return [
        shlex.split(_FILLED_IN.sub("1", line), comments=True)
        for line in found
        if line.startswith(("pytest ", "qsens "))
    ]


def test_there_are_recipes() -> None:
    """The test finds what it is to check."""
    assert [kind for kind, _ in BLOCKS].count("yaml") >= 2
    assert {command[0] for command in commands()} == {"pytest", "qsens"}
    assert len(commands()) >= 9


@pytest.mark.parametrize("command", [command for command in commands() if command[0] == "pytest"], ids=" ".join)
def test_runs_are_understood(pytester: pytest.Pytester, command: list[str]) -> None:
    """Every option of a recipe is one, with a value that can be."""
    found = Options.from_config(pytester.parseconfig(*command[1:]))
    assert found.model is not None


@pytest.mark.parametrize("command", [command for command in commands() if command[0] == "qsens"], ids=" ".join)
def test_our_script_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    """It gets as far as looking for the files, which are not there; argparse would leave with 2."""
    monkeypatch.chdir(tmp_path)
    assert main(command[1:]) == 4
    assert "there is no result file" in capsys.readouterr().err


def test_indexes_of_jobs() -> None:
    """GitHub's matrix and Kubernetes' Job have as many members as their commands have parts."""
    actions, job = (block for block in RECIPES if "matrix" in str(block) or "completions" in str(block))
    matrix = actions["jobs"]["measure"]["strategy"]["matrix"]["shard"]
    assert matrix == list(range(1, len(matrix) + 1))
    assert any(f"--qsens-shard ${{{{ matrix.shard }}}}/{len(matrix)} " in text for text in texts(actions))
    assert any(f'--qsens-shard "$shard/{job["spec"]["completions"]}" ' in text for text in texts(job))


def kind_of(recipe: dict[str, Any]) -> str:
    """Tell by its keys which tool a recipe is for."""
    return "workflow" if "jobs" in recipe else "kubernetes" if "apiVersion" in recipe else "gitlab"


@pytest.fixture
def workflows(tmp_path: Path) -> list[Path]:
    """Put the recipes for GitHub where a repository has them."""
    return written(tmp_path / ".github" / "workflows", "workflow")


def written(directory: Path, kind: str) -> list[Path]:
    """Write the recipes of a kind, each into a file; there are some."""
    directory.mkdir(parents=True)
    texts = [text for language, text in BLOCKS if language == "yaml" and kind_of(yaml.safe_load(text)) == kind]
    paths = [directory / f"{number}.yml" for number in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    assert paths
    return paths


def test_schemas(tmp_path: Path, workflows: list[Path]) -> None:
    """Recipes are what the schemas of GitHub and GitLab say."""
    assert schema_errors("github-workflows", *workflows) == ""
    assert schema_errors("gitlab-ci", *written(tmp_path / "gitlab", "gitlab")) == ""


def test_audit(tmp_path: Path, workflows: list[Path]) -> None:
    """Whoever copies a recipe for GitHub gets one in which an auditor finds nothing."""
    found = zizmor(tmp_path, ".")
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stderr.count(" completed ") == len(workflows)


def test_pins(workflows: list[Path]) -> None:
    """Recipes use the versions of actions that our own workflows use."""
    used = [dict(re.findall(r"uses: (actions/[\w/-]+)(@\w+ # \S+)", path.read_text())) for path in (ACTION, *WORKFLOWS)]
    own = {name: version for found in used for name, version in found.items()}
    for path in workflows:
        found = re.findall(r"uses: (actions/[\w/-]+)(.*)$", path.read_text(), re.MULTILINE)
        assert found
        assert all(own[name] == version for name, version in found)


def test_scripts(workflows: list[Path]) -> None:
    """The scripts of recipes have no mistakes that a linter knows, and use no variable that nothing sets."""
    scripts = [("bash", text, _OF_SLURM) for kind, text in BLOCKS if kind == "bash"]
    scripts += [(path.name, step["run"], known) for path in workflows for step, known in environments(path)]
    scripts += [("gitlab", line, set()) for recipe in RECIPES if kind_of(recipe) == "gitlab" for line in script(recipe)]
    for recipe in RECIPES:
        if kind_of(recipe) == "kubernetes":
            (container,) = recipe["spec"]["template"]["spec"]["containers"]
            scripts.append(("kubernetes", container["args"][0], {"JOB_COMPLETION_INDEX"}))
    assert {name for name, _, _ in scripts} == {"bash", "gitlab", "kubernetes", *(path.name for path in workflows[1:])}
    for _, text, known in scripts:
        assert shellcheck(_EXPRESSION.sub("1", text), known) == ""


def script(recipe: dict[str, Any]) -> list[str]:
    """Give the lines of a GitLab recipe's one job."""
    (job,) = (value for value in recipe.values() if isinstance(value, dict) and "script" in value)
    lines: list[str] = job["script"]
    return lines


def test_inputs_of_the_action() -> None:
    """The recipe gives the action inputs that it has."""
    used = [step for job in RECIPES[0]["jobs"].values() for step in job["steps"] if "pytest-qsens@" in step["uses"]]
    declared = parsed(ACTION)["inputs"]
    assert used
    for step in used:
        assert step["with"].keys() <= declared.keys()
        assert all(name in step["with"] for name, about in declared.items() if about.get("required"))
