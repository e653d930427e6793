"""The options of this run, read once, and those of single tests, whose markers go before them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pytest_qsens.errors import QsensError
from pytest_qsens.options import Options
from pytest_qsens.workers import SNAPSHOTS

_OPTIONS = pytest.StashKey[Options]()


def base_options(config: pytest.Config) -> Options:
    """Options of the command line and the ini file.

    Raises:
        QsensError: If one cannot be.

    """
    if _OPTIONS not in config.stash:
        options = Options.from_config(config)
        if SNAPSHOTS in (given := getattr(config, "workerinput", {})):
            from pytest_qsens.snapshot import take_texts

            directory, texts = given[SNAPSHOTS]
            take_texts(texts)
            options = replace(options, snapshot_dir=Path(directory))
        config.stash[_OPTIONS] = options
    return config.stash[_OPTIONS]


def options_for(node: pytest.Item) -> Options:
    """Options of one test: its ``qsens`` markers over those of the run, the closest marker first.

    Raises:
        QsensError: If one cannot be.

    """
    keywords: dict[str, object] = {}
    of_parameters = [id(mark) for mark in node.callspec.marks] if hasattr(node, "callspec") else []
    # pytest puts those of `pytest.param` after those of the function, which they are closer than.
    for marker in sorted(node.iter_markers("qsens"), key=lambda mark: id(mark) not in of_parameters):
        if marker.args:
            raise QsensError(f"@pytest.mark.qsens takes keywords only, such as model=, not {marker.args[0]!r}")
        keywords = {**marker.kwargs, **keywords}
    return base_options(node.config).override(keywords)


def updating(config: pytest.Config) -> bool:
    """Whether syrupy was asked to accept what is measured."""
    names = ("update_snapshots", "update_new_snapshots_only")
    return any(config.getoption(name, False) for name in names) and not config.option.collectonly


def accepts_all(config: pytest.Config) -> bool:
    """Whether the snapshot takes what got worse, and not only what is new."""
    return updating(config) and bool(config.getoption("update_snapshots"))
