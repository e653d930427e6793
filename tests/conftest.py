"""Keep tests away from the user's caches, the network and the settings of the machine they run on."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from pathlib import Path

collect_ignore = [] if find_spec("neural_compressor") else ["inc"]
"""Tests that need Intel Neural Compressor, which asks for an environment of its own, are run by name: tests/inc."""

# read when torch is imported: processes whose threads fight for the cores are several times slower
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("tests", deadline=None)  # how long an example takes says how busy the machine is
settings.load_profile("tests")

OUTSIDE = {"CI", "NO_COLOR", "FORCE_COLOR", "GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "CI_PROJECT_DIR"}


@pytest.fixture(autouse=True)
def _hermetic(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Give every test an empty cache of its own, and none of the variables that change what the plugin does."""
    cache: Path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as above, for every process that a test starts
    # of pytest started by a test: hypothesis, which it has no use for, takes a second to say that it found nothing
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:hypothesispytest")
    for name in os.environ:
        # PYTEST_XDIST_*: a run started by a test that runs in a worker is no worker's run.
        if name in OUTSIDE or name.startswith("PYTEST_XDIST_"):
            monkeypatch.delenv(name)
