"""The collected items: those that take our fixtures are marked, the built-in suite is added where it is wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from pytest_qsens.collection.parametrized import FIXTURES, SPEC, made_with
from pytest_qsens.collection.part import keep_part
from pytest_qsens.collection.suite import SUITE, Suite, selection, suite_wanted
from pytest_qsens.given_options import base_options
from pytest_qsens.ops import Op

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pytest

    from pytest_qsens.options import Options


def add_suite(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Mark the tests that take our fixtures, and add the built-in ones unless these do their work."""
    for item in items:
        if FIXTURES.intersection(getattr(item, "fixturenames", ())) and item.get_closest_marker("qsens") is None:
            item.add_marker("qsens")
    options = base_options(session.config)
    if suite_wanted(session.config, options):
        suite = Suite.from_parent(session, path=session.config.rootpath, name=SUITE, nodeid=SUITE)
        if not selection(session.config):  # what was asked for by name is wanted in any case
            suite.replaced = _replaced(options, items)
        items.extend(session.genitems(suite))
    for item in items:
        op = item.callspec.params.get("qsens_op") if hasattr(item, "callspec") else None
        if isinstance(op, Op):
            item.extra_keyword_matches.add(op.name)  # pytest escapes what is not ASCII in an id
    keep_part(session.config, items)


def _replaced(options: Options, items: Iterable[pytest.Item]) -> frozenset[str]:
    """Names of the built-in tests whose work the user's tests of the same model, scheme and granularity do."""
    scores = {"qsens_score": "test_op", "qsens_total": "test_total"}
    found: set[str] = set()
    for item in items:
        spec = item.callspec.params.get(SPEC) if hasattr(item, "callspec") else None
        if spec is None or (spec.request, spec.scheme) != (options.request, options.label):
            continue
        made = made_with(cast("pytest.Function", item))
        if made.granularity == options.granularity:
            found.update(scores[name] for name in getattr(item, "fixturenames", ()) if name in scores)
    return frozenset(found)
