"""constraints.txt: one version of everything that is asked for, and the one that is tested."""

from __future__ import annotations

import os
import tomllib
from importlib.metadata import distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.packaging.conftest import ROOT

UNDECLARED = {"llmcompressor"}
"""Installed without its dependencies, and so in no extra."""
_LINES = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
PINS = {canonicalize_name(found.name): found.specifier for found in map(Requirement, filter(None, _LINES))}


def wanted(*, without: str = "") -> list[Requirement]:
    """List what pyproject.toml asks for, extras included but for one, and but for its own name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [texts for extra, texts in project["optional-dependencies"].items() if extra != without]
    found = [Requirement(text) for texts in (project["dependencies"], *extras) for text in texts]
    return [requirement for requirement in found if requirement.name != project["name"]]


def names(requirements: list[Requirement]) -> set[str]:
    """Names as pip compares them."""
    return {canonicalize_name(found.name) for found in requirements}


def test_every_requirement_has_one_version() -> None:
    """README and workflows install today what they install next year; no pin is of what nothing asks for."""
    assert names(wanted(without="inc")) - PINS.keys() == {"numpy"}  # of which the extra inc needs an old one
    assert PINS.keys() - names(wanted()) == UNDECLARED
    assert all([part.operator for part in pin] == ["=="] for pin in PINS.values())


def test_versions_are_allowed() -> None:
    """A pinned version is one that pyproject.toml allows, in each extra that names it."""
    for found in wanted():
        for pin in PINS.get(canonicalize_name(found.name), ()):
            assert pin.version in found.specifier, found


def test_they_are_what_is_tested() -> None:
    """In CI the tests run with these versions; at a desk there may be others."""
    pins = {name: pin for name, pin in PINS.items() if name in names(wanted(without="inc")) | UNDECLARED}
    # the first of several, as an import finds it: setuptools brings copies of its own
    present = {name: next((found.version for found in distributions(name=name)), None) for name in pins}
    differing = {name: present[name] for name, pin in pins.items() if not pin.contains(present[name] or "0")}
    if differing and not os.environ.get("QSENS_CI"):
        pytest.skip(f"this environment has other versions: {differing}")
    assert differing == {}
