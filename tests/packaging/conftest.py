"""One wheel and one sdist for all tests, built from the working tree."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "MANIFEST.in", "pytest_qsens")


def copy_sources(directory: Path) -> None:
    """Copy what a wheel is built from, so that building leaves nothing in the checkout."""
    directory.mkdir(exist_ok=True)
    for name in SOURCES:
        found = ROOT / name
        if found.is_dir():
            shutil.copytree(found, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif found.exists():
            shutil.copy(found, directory / name)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build both in a copy; the wheel comes from the sdist, as on an index."""
    source = tmp_path_factory.mktemp("source")
    copy_sources(source)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="session")
def wheel(built: Path) -> Path:
    """Find the wheel."""
    (found,) = built.glob("*.whl")
    return found
