"""constraints.txt: one version of everything that is asked for, and the one that is tested."""

from __future__ import annotations

import os
import tomllib
from importlib.metadata import distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.packaging.conftest import ROOT

UNPINNED = {"numpy", "setuptools", "six", "neural-compressor"}
"""Of the extra ``inc``, which needs old ones."""
UNDECLARED = {"llmcompressor"}
"""Installed without its dependencies, and so in no extra."""
_LINES = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
PINS = {canonicalize_name(found.name): found.specifier for found in map(Requirement, filter(None, _LINES))}


def wanted() -> list[Requirement]:
    """List what pyproject.toml asks for, extras included, but for its own name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    return [found for found in map(Requirement, texts) if found.name != project["name"]]


def test_every_requirement_has_one_version() -> None:
    """README and workflows install today what they install next year; no pin is of what nothing asks for."""
    names = {canonicalize_name(found.name) for found in wanted()}
    assert names - UNPINNED == PINS.keys() - UNDECLARED
    assert all([part.operator for part in pin] == ["=="] for pin in PINS.values())


def test_versions_are_allowed() -> None:
    """A pinned version is one that pyproject.toml allows, in each extra that names it."""
    for found in wanted():
        for pin in PINS.get(canonicalize_name(found.name), ()):
            assert pin.version in found.specifier, found


def test_they_are_what_is_tested() -> None:
    """In CI the tests run with these versions; at a desk there may be others."""
    present = {name: found.version for name in PINS for found in distributions(name=name)}
    if not os.environ.get("QSENS_CI") and any(not PINS[name].contains(present.get(name, "0")) for name in PINS):
        pytest.skip("this environment has other versions, or lacks some")
    assert present.keys() == PINS.keys()
    assert {name: found for name, found in present.items() if not PINS[name].contains(found, prereleases=True)} == {}
