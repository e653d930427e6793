"""The built-in suite: its tests live in no file of the user, and are named by node ids of their own."""

from __future__ import annotations

import difflib
import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_qsens.collection.catalogue import catalogue
from pytest_qsens.collection.choice import select, wants_total
from pytest_qsens.errors import QsensError
from pytest_qsens.given_options import base_options

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    import pluggy
    from _pytest._code.code import TerminalRepr

    from pytest_qsens.collection.model import Model
    from pytest_qsens.options import Options

SUITE = "qsens"
"""Node id of the built-in suite; no file has to have that name."""

_SELECTION = pytest.StashKey[tuple[str, ...]]()


class SuiteTest(pytest.Function):
    """A test of the built-in suite: it lives nowhere on disk, and the root directory's hooks apply to it."""

    @classmethod
    def of(cls, function: pytest.Function, path: Path) -> SuiteTest:
        """Take the place of ``function``; syrupy looks for other snapshots beside ``path``, where there are none."""
        item: SuiteTest = cls.from_parent(
            function.parent,
            name=function.name,
            callspec=getattr(function, "callspec", None),
            callobj=function.obj,
            fixtureinfo=function._fixtureinfo,  # noqa: SLF001  # as pytest-asyncio does to replace a function's class
            keywords=function.keywords,
            originalname=function.originalname,
        )
        item.path = path
        return item

    @property
    def ihook(self) -> pluggy.HookRelay:
        """Hooks of the root directory, not those around ``path``."""
        return self.session.gethookproxy(self.config.rootpath)

    def reportinfo(self) -> tuple[os.PathLike[str] | str, int | None, str]:
        """Report under the suite's name rather than under a path inside of an installed package."""
        return self.config.rootpath / SUITE, 0, self.name  # a line: pytest wants one to report a skipped test

    def repr_failure(  # type: ignore[override]  # has no style, as that of pytest.Function
        self, excinfo: pytest.ExceptionInfo[BaseException]
    ) -> str | TerminalRepr:
        """Show what a failed comparison says and nothing else, unless ``--tb`` is given.

        Source lines and arguments of the built-in tests are the same for every op, and tell a user nothing.
        """
        shown = super().repr_failure(excinfo)
        compared = isinstance(excinfo.value, AssertionError) and excinfo.traceback[-1].path == self.path
        if compared and self.config.getoption("tbstyle", "auto") == "auto":
            for entry in getattr(getattr(shown, "reprtraceback", None), "reprentries", ()):
                entry.lines = [line for line in entry.lines if line.startswith("E")]  # pytest's mark of what failed
                entry.reprfuncargs = entry.reprlocals = entry.reprfileloc = None
        return shown


class Suite(pytest.Module):
    """The built-in suite. Its path is the root directory, so that ``--lf`` looks into it after any failure."""

    replaced: frozenset[str] = frozenset()
    """Names of tests whose work tests of the user do."""

    def _getobj(self) -> ModuleType:
        return importlib.import_module("pytest_qsens.builtin_suite")

    def funcnamefilter(self, name: str) -> bool:
        """Find the suite's tests whatever ``python_functions`` says about the user's."""
        return name.startswith("test_")

    def wants(self, test: str, options: Options) -> bool:
        """Whether one of the suite's tests is needed."""
        return test not in self.replaced and (test != "test_total" or wants_total(options))

    def collect(self) -> Iterator[pytest.Item | pytest.Collector]:
        """Yield the tests that the options and the node ids on the command line ask for."""
        import pytest_qsens.builtin_suite as tests

        options = base_options(self.config)
        selection = self.config.stash.get(_SELECTION, ())
        path = Path(tests.__file__)
        for node in super().collect():
            if not isinstance(node, pytest.Function) or not self.wants(node.originalname, options):
                continue
            if node.originalname == "test_op" and not select(catalogue(self.config).model(options), options):
                continue
            if not selection or any(_selects(argument, node.nodeid) for argument in selection):
                yield SuiteTest.of(node, path)


def _selects(argument: str, nodeid: str) -> bool:
    """Whether a command-line node id means this item, as pytest matches them: all parameters, or none given."""
    return argument in (nodeid.partition("[")[0], SUITE) or _escaped(argument) == _escaped(nodeid)


def _escaped(nodeid: str) -> str:
    """Spell a node id as pytest does by default: what is not ASCII as in Python's literals."""
    return nodeid.encode("ascii", "backslashreplace").decode("ascii")


def suite_ids(model: Model, options: Options) -> list[str]:
    """Node ids of the built-in suite under these options."""
    prefix = f"{model.label}-{options.label}"
    ids = [f"{SUITE}::test_op[{prefix}-{op}]" for op in select(model, options)]
    return [*ids, f"{SUITE}::test_total[{prefix}]"] if wants_total(options) else ids


def take_selection(config: pytest.Config) -> None:
    """Take node ids of the built-in suite out of the arguments: pytest would look for a file of that name."""
    found = {argument: nodeid for argument in config.args if (nodeid := _of_suite(config, argument)) is not None}
    if found:
        config.stash[_SELECTION] = tuple(found.values())
        config.args[:] = [argument for argument in config.args if argument not in found]


def _of_suite(config: pytest.Config, argument: str) -> str | None:
    """Node id of the built-in suite that an argument means, spelled as it is or relative to where pytest was called."""
    given, separator, rest = argument.partition("::")
    place = Path(os.path.normpath(config.invocation_params.dir / given))
    if given != SUITE and place != config.rootpath / SUITE:
        return None
    taken = place.is_file() if separator else place.exists()
    return None if taken else f"{SUITE}{separator}{rest}"


def check_selection(config: pytest.Config, model: Model, options: Options) -> None:
    """Check that every node id given for the built-in suite exists.

    Raises:
        QsensError: Naming the first that does not.

    """
    ids = suite_ids(model, options)
    for argument in config.stash.get(_SELECTION, ()):
        if not any(_selects(argument, nodeid) for nodeid in ids):
            near = difflib.get_close_matches(argument, ids, n=1)
            hint = f" (near: {near[0]})" if near else ""
            raise QsensError(f"not found: {argument}{hint}. List the tests with --collect-only -q")


def selection(config: pytest.Config) -> tuple[str, ...]:
    """Node ids of the built-in suite on the command line."""
    return config.stash.get(_SELECTION, ())


def suite_wanted(config: pytest.Config, options: Options) -> bool:
    """Whether the built-in tests are asked for: a model is, and not only files of the user."""
    if options.model is None or config.stash.get(_SELECTION, ()):
        return options.model is not None
    if config.getoption("qsens_model") is not None or config.args_source is not config.ArgsSource.ARGS:
        return True
    # The ini file names a model and the user named files: those files are what is asked for.
    given = (config.invocation_params.dir / argument.partition("::")[0] for argument in config.args)
    return any(config.rootpath.is_relative_to(os.path.normpath(path)) for path in given)
