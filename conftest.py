"""The sensitivity suite of this repository, and pytest's own test harness for the unit tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

pytest_plugins = ["pytester"]


def pytest_configure(config: pytest.Config) -> None:
    """Run the sensitivity suite alone when a model is given without paths: the unit tests are a suite of their own."""
    if config.getoption("qsens_model", None) is not None and config.args_source is not config.ArgsSource.ARGS:
        config.args.clear()
