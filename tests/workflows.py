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
    from collections.abc import Mapping

ROOT = Path(__file__).parent.parent
ACTION = ROOT / "action.yml"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ACCEPT = ROOT / ".github" / "workflows" / "qsens-accept.yml"

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
    found: Mapping[str, Any], context: Mapping[str, str], directory: Path, *, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the script of a step in bash, with nothing of the context but what its ``env`` names.

    ``python``, ``pytest`` and ``qsens`` are those of this process.
    """
    own = {name: filled_in(str(value), context) for name, value in found.get("env", {}).items()}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [*_ERRORS, "-c", found["run"]],
        cwd=directory,
        env={**os.environ, "PATH": path, "CI": "true", **(env or {}), **own},
        capture_output=True,
        text=True,
        check=False,
    )
