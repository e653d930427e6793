"""Tools that take what is written for them, where they are installed."""

from __future__ import annotations

import os
import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from types import ModuleType


def required(name: str) -> ModuleType:
    """Import a module of a tool; skip where it is not installed, which fails in CI."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if os.environ.get("QSENS_CI"):
            return import_module(name)
        module: ModuleType = pytest.importorskip(name)
    return module


def needed(name: str) -> None:
    """Skip where a package that another process imports is not installed; in CI that process fails."""
    if not os.environ.get("QSENS_CI") and find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
