"""SECURITY.md says what is never run; the code has no way to."""

from __future__ import annotations

import ast
import re
from functools import cache

from tests.documentation.pages import ROOT

PACKAGE = ROOT / "pytest_qsens"

NEVER = {"eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "torch.load", "yaml.load"}
"""Calls that would run what is in a file."""

STARTS = {"subprocess.run", "subprocess.Popen", "subprocess.check_output", "subprocess.call", "os.execv", "os.spawnv"}


@cache
def calls() -> dict[str, set[str]]:
    """Names of what is called, with the modules that do."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                found.setdefault(ast.unparse(node.func), set()).add(path.relative_to(PACKAGE).as_posix())
    return found


def test_nothing_runs_what_is_in_a_file() -> None:
    """No pickle is read but by torch with ``weights_only``, no YAML but by a safe loader, no text is run."""
    assert len(calls()) > 1000
    assert not NEVER & calls().keys()


def test_what_is_imported_by_name() -> None:
    """Names come from the user (factories), from a list (operators in a cached graph) or are our own."""
    assert calls()["importlib.import_module"] == {"models/factory.py", "graph/serialize.py", "collection/suite.py"}


def test_what_is_started() -> None:
    """Only git, by the commands that SECURITY.md names; workers are started by pytest-xdist."""
    assert set().union(*(calls().get(name, set()) for name in STARTS)) == {"diff.py"}
    (said,) = (
        line for line in (ROOT / "SECURITY.md").read_text().splitlines() if line.startswith("- **Other programs**")
    )
    commands = {path.stem for path in (PACKAGE / "commands").glob("*.py") if "REVISION:PATH" in path.read_text()}
    assert commands == set(re.findall(r"`qsens (\w+)", said))


def test_code_of_checkpoints_is_never_asked_for() -> None:
    """``trust_remote_code`` is passed nowhere, and pickled weights go through ``weights_only=True``."""
    keywords = [
        (keyword.arg, ast.unparse(keyword.value))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
    ]
    assert ("weights_only", "True") in keywords
    assert ("weights_only", "False") not in keywords
    assert not [value for name, value in keywords if name == "trust_remote_code"]
