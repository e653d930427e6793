"""The step of the action that installs: real pip, in an environment of its own, offline."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from tests.packaging.conftest import copy_sources
from tests.workflows import ACTION, inputs, run, step


class Installation:
    """A copy of the action, and an environment for what it installs.

    What this process's environment has counts as installed there, so that pip finds all dependencies, at those
    versions and no others, without an index.
    """

    def __init__(self, directory: Path) -> None:
        self.action, self.work, self.environment = (
            directory / "the action",
            directory / "work",
            directory / "environment",
        )
        self.wheels, self.report = directory / "wheels", directory / "report.json"
        copy_sources(self.action)
        shutil.copy(ACTION.with_name("constraints.txt"), self.action)
        self.work.mkdir()
        self.wheels.mkdir()
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.environment], check=True)
        (self.site / "outside.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")

    @property
    def site(self) -> Path:
        """Where packages are put."""
        return self.environment / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"

    def run(self, *, dry: bool = True, **given: str) -> subprocess.CompletedProcess[str]:
        """Run the step; a dry run resolves, and leaves out to build and to install."""
        context = inputs(model="m", **given) | {"github.action_path": str(self.action)}
        env = {
            "PIP_DRY_RUN": str(int(dry)),
            "PIP_FIND_LINKS": str(self.wheels),
            "PIP_NO_BUILD_ISOLATION": "0",  # of options that switch off, pip takes the variable for the opposite
            "PIP_NO_INDEX": "1",
            "PIP_REPORT": str(self.report),
            "PYTHONPATH": "",
        }
        return run(step(ACTION, "Install"), context, self.work, env=env, programs=self.environment / "bin")

    def reported(self) -> dict[str, dict[str, Any]]:
        """Tell what pip says that it installs, by name."""
        return {part["metadata"]["name"]: part for part in json.loads(self.report.read_text())["install"]}

    def python(self, code: str) -> str:
        """Run code there, away from any checkout; returns what it prints."""
        command = [self.environment / "bin" / "python", "-c", code]
        done = subprocess.run(command, cwd=self.work, env={}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """Make one for all tests."""
    return Installation(tmp_path_factory.mktemp("installation"))


def test_it_installs_itself(installation: Installation) -> None:
    """The plugin of the action's checkout, with charts and under its constraints, and its program."""
    found = installation.run(dry=False)
    assert found.returncode == 0, found.stdout + found.stderr
    own = installation.reported()["pytest-qsens"]
    assert own["requested_extras"] == ["report", "xdist"]
    assert own["download_info"] == {"dir_info": {}, "url": installation.action.as_uri()}
    where = installation.python("import pytest_qsens; print(pytest_qsens.__file__)")
    assert Path(where).is_relative_to(installation.site)
    done = subprocess.run(
        [installation.environment / "bin" / "qsens", "--help"], capture_output=True, text=True, check=True
    )
    assert "merge" in done.stdout


def test_its_versions_or_those_of_the_project(installation: Installation) -> None:
    """Without requirements the action's constraints hold, with them not; nothing for charts if none are wanted."""
    limits = installation.action / "constraints.txt"
    before = limits.read_text()
    limits.write_text(f"{before}\nfilelock==4.0.0.dev1\n")
    try:
        refused = installation.run()
        assert refused.returncode != 0
        assert "filelock==4.0.0.dev1" in refused.stdout + refused.stderr

        a_wheel(installation, "our-model", "1.2")
        (installation.work / "our model.txt").write_text("our-model>=1\n")
        found = installation.run(requirements="our model.txt", report="false")
        assert found.returncode == 0, found.stdout + found.stderr
        installed = installation.reported()
        assert installed["our-model"]["metadata"]["version"] == "1.2"
        assert installed["pytest-qsens"]["requested_extras"] == ["xdist"]
    finally:
        limits.write_text(before)


def test_requirements_that_exclude_it(installation: Installation) -> None:
    """Versions of a project that this plugin does not work with end the step, with pip's reasons."""
    (installation.work / "old.txt").write_text("syrupy<7\n")
    found = installation.run(requirements="old.txt")
    assert found.returncode != 0
    assert "syrupy<7" in found.stdout + found.stderr


def a_wheel(installation: Installation, name: str, version: str) -> None:
    """Build a wheel of an empty module."""
    source = installation.work / name
    source.mkdir()
    (source / "our_module.py").touch()
    (source / "pyproject.toml").write_text(
        f'[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        f'[project]\nname = "{name}"\nversion = "{version}"\n[tool.setuptools]\npy-modules = ["our_module"]\n'
    )
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", installation.wheels, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
