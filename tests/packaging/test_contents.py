"""The wheel and the sdist have what they are to have, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from typing import TYPE_CHECKING
from zipfile import ZipFile

from tests.packaging.conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path


def test_contents_of_the_wheel(wheel: Path) -> None:
    """Every module and data file of the package, the licence, and no tests, docs or benchmarks."""
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = {name for name in names if ".dist-info/" not in name}
    files = {path for path in (ROOT / "pytest_qsens").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert package == {path.relative_to(ROOT).as_posix() for path in files}
    assert {"pytest_qsens/py.typed", "pytest_qsens/configs/schema.json", "pytest_qsens/data/evaluation.txt"} <= package
    assert {name.split("/", 1)[1] for name in names - package} >= {"METADATA", "licenses/LICENSE", "entry_points.txt"}


def test_contents_of_the_sdist(built: Path) -> None:
    """What the wheel is built from, and no tests without what they need."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        tops = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert tops >= {"pytest_qsens", "LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "PKG-INFO"}
    assert not tops & {"tests", "docs", "benchmarks", "fixtures"}


def test_metadata(built: Path) -> None:
    """An index takes them, and can show the description."""
    files = [str(path) for path in built.iterdir()]
    command = [sys.executable, "-m", "twine", "--no-color", "check", "--strict", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2
