"""Tests that take our fixtures: one item for each op of their model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import pytest

from pytest_qsens.collection.catalogue import catalogue
from pytest_qsens.collection.checks import check_interactions, check_own_limits, check_refinement
from pytest_qsens.collection.choice import select
from pytest_qsens.collection.subjects import Subject
from pytest_qsens.collection.suite import Suite
from pytest_qsens.errors import QsensError
from pytest_qsens.given_options import base_options, options_for
from pytest_qsens.ops import TOTAL, Op
from pytest_qsens.options import Options
from pytest_qsens.workers import place

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_qsens.collection.model import Model

FIXTURES = frozenset({"qsens_model", "qsens_op", "qsens_score", "qsens_total"})

SPEC = "_qsens_spec"
"""Fixture behind those that need a model: its parameter is the `RunSpec`. It loads nothing."""

_PLANNED = pytest.StashKey[dict[str, Options]]()

_MADE = pytest.StashKey[dict["Subject", "Made"]]()


class UnusableTest(pytest.Collector.CollectError):
    """A test asks for something that cannot be; reported without a traceback and as a usage error."""


@dataclass
class Made:
    """What tests were made for of one model under one scheme: names of ops or groups, and `TOTAL`."""

    model: Model
    units: tuple[Op, ...]
    engine: str
    names: set[str]


def parametrize(metafunc: pytest.Metafunc) -> None:
    """Give a test that takes our fixtures one item for each op of its model.

    Raises:
        UnusableTest: If its options cannot be.

    """
    if not FIXTURES.intersection(metafunc.fixturenames):
        return
    try:
        options = options_for(metafunc.definition)
        model = catalogue(metafunc.config).model(options)
        check_refinement(model, options)
        check_interactions(options)
        check_own_limits(model, options, base_options(metafunc.config))
    except QsensError as error:
        raise UnusableTest(f"qsens: {error}{place(metafunc.config)}") from error
    metafunc.config.stash.setdefault(_PLANNED, {})[metafunc.definition.nodeid] = options
    prefix = f"{model.label}-{options.label}"
    if SPEC in metafunc.fixturenames:
        metafunc.parametrize(SPEC, [options.run_spec], indirect=True, ids=[prefix], scope="session")
        prefix = ""
    ops = select(model, options) if "qsens_op" in metafunc.fixturenames else ()
    suite = metafunc.definition.parent
    if not isinstance(suite, Suite) or suite.wants(metafunc.function.__name__, options):
        made = metafunc.config.stash.setdefault(_MADE, {})
        key = Subject(model.label, options.label, options.granularity)
        names = made.setdefault(key, Made(model, model.units(options), options.engine, set())).names
        names.update(op.name for op in ops)
        names.update([TOTAL] * ("qsens_total" in metafunc.fixturenames))
    if "qsens_op" in metafunc.fixturenames:
        ids = [f"{prefix}-{op}" if prefix else str(op) for op in ops]
        metafunc.parametrize("qsens_op", ops, indirect=True, ids=ids)


def planned(item: pytest.Function) -> Options:
    """Options of one test that takes our fixtures.

    Raises:
        QsensError: If a marker has changed since the test was given its model and ops.

    """
    options = options_for(item)
    made = made_with(item)
    if any(getattr(options, name) != getattr(made, name) for name in ("run_spec", "ops", "max_ops", "granularity")):
        raise QsensError(
            f"{item.nodeid}: a qsens marker chooses another model or other ops than this test was made for. It came "
            "too late, with a single parameter (pytest.param) or by add_marker: put it on the function, class or module"
        )
    return options


def made_with(item: pytest.Function) -> Options:
    """Options that a test that takes our fixtures was given its model and ops by."""
    return item.config.stash[_PLANNED][_definition(item)]


def made_for(config: pytest.Config) -> Mapping[Subject, Made]:
    """Tell what tests were made for, of every model and scheme, whether they are going to run or not."""
    return config.stash.get(_MADE, {})


def _definition(item: pytest.Function) -> str:
    """Node id of the function that a test was made of."""
    return f"{cast('pytest.Collector', item.parent).nodeid}::{item.originalname}"
