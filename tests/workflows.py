"""As much of GitHub's runner as the run steps of our action and workflows need: expressions, environments, bash."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
ACTION = ROOT / "action.yml"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ACCEPT = ROOT / ".github" / "workflows" / "qsens-accept.yml"

_CHECKS = (
    "add-default-case",
    "check-extra-masked-returns",
    "check-set-e-suppressed",
    "check-unassigned-uppercase",
    "deprecate-which",
    "quote-safe-variables",
)
_SET = ("GITHUB_OUTPUT",)
_EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")
_PATH = re.compile(r"[\w-]+(\.[\w-]+)*")
_ERRORS = ["bash", "--noprofile", "--norc", "-eo", "pipefail"]
"""How GitHub runs a step whose shell is bash, and how it runs steps of jobs on Linux, but for ``pipefail``."""


def parsed(path: Path) -> dict[str, Any]:
    """Parse a YAML file; its key ``on`` is one that YAML 1.1 takes for true."""
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def steps(path: Path) -> list[dict[str, Any]]:
    """List all steps of an action or a workflow."""
    document = parsed(path)
    jobs = [document["runs"]] if "runs" in document else document["jobs"].values()
    return [step for job in jobs for step in job["steps"]]


def step(path: Path, name: str) -> dict[str, Any]:
    """Find the step of this name that has a script; of two the last one."""
    return [step for step in steps(path) if step.get("name") == name and "run" in step][-1]


def environments(path: Path) -> list[tuple[dict[str, Any], set[str]]]:
    """List all steps that have a script, with the names that GitHub or the file puts into its environment."""
    document = parsed(path)
    jobs = [document["runs"]] if "runs" in document else list(document["jobs"].values())
    return [
        (step, {*_SET, *document.get("env", {}), *job.get("env", {}), *step.get("env", {})})
        for job in jobs
        for step in job["steps"]
        if "run" in step
    ]


def shellcheck(script: str, known: Iterable[str] = ()) -> str:
    """Check a script as one that GitHub runs, and more strictly than by default; returns what is wrong with it.

    Variables in capitals that are neither assigned nor known are mistakes, too.
    """
    declared = "".join(f"read -r {name}; export {name}\n" for name in sorted(known))
    command = [BIN / "shellcheck", "--shell=bash", "--norc", f"--enable={','.join(_CHECKS)}", "-"]
    text = f"set -eo pipefail\n{declared}{script}"
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False).stdout


def zizmor(directory: Path, *paths: str) -> subprocess.CompletedProcess[str]:
    """Audit files of a directory; a file that cannot be read is an error, too."""
    command = [BIN / "zizmor", "--offline", "--no-progress", "--strict-collection", *paths]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory)


def schema_errors(schema: str, *files: Path) -> str:
    """Check files by a schema that check-jsonschema brings along; returns what is wrong with them."""
    command = [BIN / "check-jsonschema", "--builtin-schema", f"vendor.{schema}", *files]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if found.returncode == 0 else found.stdout + found.stderr


def filled_in(text: str, context: Mapping[str, str]) -> str:
    """Evaluate expressions, which are names in the context alone; `KeyError` for one that is not there.

    What is filled in is not looked at again.
    """
    return _EXPRESSION.sub(lambda match: context[match[1]], text)


def names(text: str) -> list[str]:
    """Expressions in a text."""
    return _EXPRESSION.findall(text)


def is_name(expression: str) -> bool:
    """Whether an expression is one name, such as ``inputs.model``."""
    return _PATH.fullmatch(expression) is not None


def inputs(**given: str) -> dict[str, str]:
    """Give the inputs of the action: given ones, and the defaults of the others."""
    declared = parsed(ACTION)["inputs"]
    assert given.keys() <= declared.keys()
    return {f"inputs.{name}": given.get(name, about.get("default", "")) for name, about in declared.items()}


def run(
    found: Mapping[str, Any],
    context: Mapping[str, str],
    directory: Path,
    *,
    env: Mapping[str, str] | None = None,
    programs: Path = BIN,
) -> subprocess.CompletedProcess[str]:
    """Run the script of a step in bash, with nothing of the context but what its ``env`` names.

    ``python``, ``pytest`` and ``qsens`` are those of this process, or of another environment's directory of programs.
    """
    own = {name: filled_in(str(value), context) for name, value in found.get("env", {}).items()}
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [*_ERRORS, "-c", found["run"]],
        cwd=directory,
        env={**os.environ, "PATH": path, "CI": "true", **(env or {}), **own},
        capture_output=True,
        text=True,
        check=False,
    )
