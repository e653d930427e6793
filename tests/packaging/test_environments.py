"""The wheel alone works with the lowest and with the newest versions of what it depends on."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.packaging import environment

if TYPE_CHECKING:
    from pathlib import Path

IMPORT_ALL = """
import importlib, pkgutil, pytest_qsens
names = [module.name for module in pkgutil.walk_packages(pytest_qsens.__path__, "pytest_qsens.")]
for name in names:
    importlib.import_module(name)
print(len(names), pytest_qsens.__file__)
"""
SUITE = ("-q", "--qsens-model", "tiny_qwen2_5_vl")


@pytest.mark.parametrize("versions", ["lowest", "newest"])
def test_the_wheel_works(tmp_path: Path, wheel: Path, versions: str) -> None:
    """Alone, in an environment of its own: one test, as an environment takes a while to make."""
    constraints = environment.lowest(wheel) if versions == "lowest" else []
    try:
        installed = environment.create(wheel, tmp_path, constraints)
    except subprocess.CalledProcessError as error:
        if "QSENS_CI" in os.environ or "ResolutionImpossible" in error.stdout:
            pytest.fail(f"pip: {error.stdout}")
        pytest.skip(f"pip cannot install: {error.stdout[-300:]}")
    entry_points_work(installed)
    every_module_is_importable(installed)
    it_measures_and_gates(installed)
    it_plans(installed)
    it_reports(installed)


def it_measures_and_gates(installed: environment.Environment) -> None:
    """Scores are recorded, compared by two workers, and a worse one fails; all with what the wheel brought along."""
    assert "30 passed" in installed.run("pytest", *SUITE, "--snapshot-update")
    passed = installed.run("pytest", *SUITE, "--qsens-no-cache", "-n", "2")
    assert "30 passed" in passed
    assert "warning" not in passed
    snapshot = installed.work / "qsens_snapshots" / "tiny_qwen2_5_vl" / "w8a8.json"
    content = json.loads(snapshot.read_text())
    nmse = content["ops"]["lm_head"]["isolated"]["nmse"]
    snapshot.write_text(snapshot.read_text().replace(f'"nmse": {nmse}', f'"nmse": {nmse / 2:.6g}'))
    assert "worse than the snapshot of lm_head" in installed.run("pytest", *SUITE, code=1)


def it_plans(installed: environment.Environment) -> None:
    """See that the solver and the plot take what we give them."""
    installed.run("pytest", *SUITE, "--snapshot-update", "--qsens-interactions", "--qsens-json", "qsens.json")
    for aim in (("--keep", "20%"), ("--budget-bits", "12")):
        installed.run("qsens", "plan", "qsens.json", *aim, "--out", "plan.yaml", "--plot", "plan.svg")
    assert "measured" in installed.run("qsens", "show", "qsens.json")


def it_reports(installed: environment.Environment) -> None:
    """See that templates and charts are made by what the extra ``report`` brings along, and nothing warns."""
    said = installed.run("pytest", *SUITE, "--qsens-report", "out")
    assert "warning" not in said
    page = (installed.work / "out" / "report.html").read_text()
    assert "lm_head" in page
    assert len(page) > 500_000  # with the plotting library, which vl-convert-python holds
    assert {path.name for path in (installed.work / "out").iterdir()} == {
        *(f"report.{suffix}" for suffix in ("csv", "html", "json", "md"))
    }


def every_module_is_importable(installed: environment.Environment) -> None:
    """No module needs what is not declared, and none warns."""
    count, place = installed.run("python", "-W", "error", "-c", IMPORT_ALL).split()
    assert int(count) > 100
    assert str(installed.directory) in place


def entry_points_work(installed: environment.Environment) -> None:
    """Entry points are those of the wheel, and what is installed fits together."""
    assert "merge" in installed.run("qsens", "--help")
    assert "No broken requirements" in installed.run("python", "-m", "pip", "check")
