"""Pytest hooks: thin, and free for those who do not measure anything. No torch, transformers or NumPy from here."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qsens import option_declarations, time_budget, workers
from pytest_qsens.automatic_workers import automatic_workers
from pytest_qsens.ci import CiOutput
from pytest_qsens.collection.items import add_suite
from pytest_qsens.collection.parametrized import UnusableTest, parametrize
from pytest_qsens.collection.plan import files, plan
from pytest_qsens.collection.suite import take_selection
from pytest_qsens.fixtures import annotate, qsens_model, qsens_op, qsens_score, qsens_spec, qsens_total
from pytest_qsens.given_options import base_options
from pytest_qsens.session.controller import Controller
from pytest_qsens.session.distribution import CHANNEL, Distribution

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

__all__ = ["qsens_model", "qsens_op", "qsens_score", "qsens_spec", "qsens_total"]

# An editable install does not tell pytest which modules belong to a plugin, so assertions there stay plain.
pytest.register_assert_rewrite("pytest_qsens.builtin_suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare options and ini settings."""
    option_declarations.declare(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Take our node ids out of the arguments, in workers too: these read the command line again."""
    time_budget.start(config)
    config.addinivalue_line("markers", option_declarations.MARKER_HELP)
    take_selection(config)
    if not hasattr(config, "workerinput"):
        controller = Controller(config)
        config.pluginmanager.register(controller, "qsens-controller")
        config.pluginmanager.register(Distribution(controller), "qsens-distribution")
        config.pluginmanager.register(CiOutput(controller), "qsens-ci")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test that takes our fixtures one item for each op."""
    parametrize(metafunc)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Mark a usage error found at collection, so that the controller knows it from a broken test file."""
    report = yield
    call: pytest.CallInfo[object] | None = getattr(report, "call", None)
    if call is not None and call.excinfo is not None and isinstance(call.excinfo.value, UnusableTest):
        report.qsens = {"abort": str(call.excinfo.value)}  # type: ignore[attr-defined]  # reports carry extras
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Add the built-in suite before anything selects, deselects or orders tests."""
    add_suite(session, items)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """In a worker: tell the controller what will be measured, before xdist tells it which tests there are."""
    channel = getattr(session.config, "workerinput", {}).get(CHANNEL)
    if channel is not None and (planned := plan(session)) is not None:
        channel.send(planned | {"files": files(session.config)})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put what a test measured on its report."""
    report = yield
    annotate(item, call, report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_assertrepr_compare(
    op: str, left: object, right: object
) -> Generator[None, list[list[str] | None], list[list[str] | None]]:
    """Explain a failed comparison of a score, before syrupy does: pytest shows the first explanation."""
    explained = yield
    if "Score" in (type(left).__name__, type(right).__name__):  # keeps syrupy unimported in other people's runs
        from pytest_qsens.syrupy_extension import explain

        explained.insert(0, explain(op, left, right))
    return explained


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Choose the number of workers for ``-n auto`` by cores and memory."""
    return automatic_workers(config)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: Sequence[Any]) -> None:
    """Share the cores among the workers about to be started, and spell options so that other machines get them."""
    if any(map(workers.apart, specs)):
        arguments = option_declarations.joined(config.invocation_params.args)
        config.invocation_params = replace(config.invocation_params, args=tuple(arguments))
    if base_options(config).model is not None:
        config.add_cleanup(workers.set_threads(specs))
