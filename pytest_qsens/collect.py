"""From options to test items: models looked up once, tests parametrized by op, the built-in suite."""

from __future__ import annotations

import difflib
import importlib
import os
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import pytest

from pytest_qsens.errors import QsensError
from pytest_qsens.ops import TOTAL, Op
from pytest_qsens.options import Options
from pytest_qsens.quant.schemes import SCHEMES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path
    from types import ModuleType

    import pluggy

    from pytest_qsens.models.source import ModelRequest, ModelSource
    from pytest_qsens.options import RunSpec
    from pytest_qsens.snapshot import Snapshot

SUITE = "qsens"
"""Node id of the built-in suite; no file has to have that name."""

FIXTURES = frozenset({"qsens_model", "qsens_op", "qsens_score", "qsens_total"})

_OPTIONS = pytest.StashKey[Options]()
_CATALOGUE = pytest.StashKey["Catalogue"]()
_SELECTION = pytest.StashKey[tuple[str, ...]]()

_CASE = re.compile(rf"\[(?P<label>[^\[\]]+?)-(?P<scheme>{'|'.join(SCHEMES)})-(?P<op>.*)\]$")


def case_of(nodeid: str) -> tuple[str, str, str] | None:
    """Model label, scheme and op name in the node id of a test of one op.

    >>> case_of("qsens::test_op[minilm-w8a8-encoder.layer.0.output.dense]")
    ('minilm', 'w8a8', 'encoder.layer.0.output.dense')
    """
    match = _CASE.search(nodeid)
    return (match["label"], match["scheme"], match["op"]) if match else None


class UnusableTest(pytest.Collector.CollectError):
    """A test asks for something that cannot be; reported without a traceback and as a usage error."""


@dataclass(frozen=True, eq=False)
class Model:
    """A model as collection knows it."""

    source: ModelSource
    ops: tuple[Op, ...]

    @property
    def label(self) -> str:
        """Name in node ids and snapshot paths."""
        return self.source.label


class Catalogue:
    """The models and snapshots of this process, each looked up once.

    Args:
        thorough: Whether checkpoints and data files are checked as far as that goes without loading weights. One
            process of a run does it.
        updating: Whether snapshots are going to be written.

    """

    def __init__(self, *, thorough: bool, updating: bool) -> None:
        self._thorough = thorough
        self._updating = updating
        self._models: dict[ModelRequest, Model] = {}
        self._snapshots: dict[tuple[Path, str, str], Snapshot] = {}
        self._measured: dict[Path, RunSpec] = {}

    def model(self, options: Options) -> Model:
        """Model of these options; its snapshot is readable and, where that is asked for, may be written.

        Raises:
            QsensError: For everything wrong with the model, its data, the choice of ops or the snapshot.

        """
        model = self._models.get(options.request) or self._look_up(options)
        select(model, options)
        self.snapshot(options, model)
        path = options.snapshot_path(model.label)
        other = self._measured.setdefault(path, options.run_spec)
        if other != options.run_spec:
            raise QsensError(
                f"one run would compare two things with the same snapshot {path}: {other} and {options.run_spec}. "
                "Measure them in two runs, with a --qsens-snapshot-dir for each"
            )
        return model

    def known(self, request: ModelRequest) -> Model:
        """Model that was looked up for a test before."""
        return self._models[request]

    def snapshot(self, options: Options, model: Model) -> Snapshot:
        """Snapshot that the tests of these options are compared with, as it was when first asked for."""
        from pytest_qsens.snapshot import check_writable, load

        key = options.snapshot_path(model.label), model.label, options.scheme
        if key not in self._snapshots:
            if self._updating and os.environ.get("CI") and not options.allow_ci_update:
                raise QsensError(
                    f"CI is set to {os.environ['CI']!r}, and there snapshots are compared, not written: {key[0]} "
                    "would accept whatever was measured. Update it on your own machine and commit it, or add "
                    "--qsens-allow-ci-update"
                )
            self._snapshots[key] = load(key[0], model=model.label, scheme=options.scheme)
            if self._updating:
                check_writable(key[0].resolve().parent)  # where its lock goes, too
        return self._snapshots[key]

    def _look_up(self, options: Options) -> Model:
        from pytest_qsens.manifest import load_manifest
        from pytest_qsens.models.resolve import resolve

        source = resolve(options.request)
        if self._thorough:
            source.check()
        model = self._models[options.request] = Model(source, load_manifest(source, options.cache_dir()))
        return model


def select(model: Model, options: Options) -> tuple[Op, ...]:
    """Ops that the options ask for, in model order.

    Raises:
        QsensError: If a glob matches neither an op nor ``total``.

    """
    names = [op.name for op in model.ops]
    for glob in options.ops:
        if not any(fnmatchcase(name, glob) for name in (*names, TOTAL)):
            near = difflib.get_close_matches(glob.strip("*"), names, n=3, cutoff=0.5)
            hint = f" (near: {', '.join(near)})" if near else ""
            raise QsensError(
                f"{options.origins['ops']} {glob!r} matches none of the {len(names)} ops of {model.label}{hint}. "
                "List them with --collect-only -q"
            )
    chosen = [op for op in model.ops if not options.ops or any(fnmatchcase(op.name, glob) for glob in options.ops)]
    return tuple(chosen[: options.max_ops])


def wants_total(options: Options) -> bool:
    """Whether the whole model is measured as well: unless only some ops are asked for."""
    return not options.restricted or any(fnmatchcase(TOTAL, glob) for glob in options.ops)


def base_options(config: pytest.Config) -> Options:
    """Options of the command line and the ini file.

    Raises:
        QsensError: If one cannot be.

    """
    if _OPTIONS not in config.stash:
        config.stash[_OPTIONS] = Options.from_config(config)
    return config.stash[_OPTIONS]


def options_for(node: pytest.Item) -> Options:
    """Options of one test: its ``qsens`` markers over those of the run, the closest marker first.

    Raises:
        QsensError: If one cannot be.

    """
    keywords: dict[str, object] = {}
    for marker in node.iter_markers("qsens"):
        if marker.args:
            raise QsensError(f"@pytest.mark.qsens takes keywords only, such as model=, not {marker.args[0]!r}")
        keywords = {**marker.kwargs, **keywords}
    return base_options(node.config).override(keywords)


def catalogue(config: pytest.Config) -> Catalogue:
    """Models of this process."""
    if _CATALOGUE not in config.stash:
        config.stash[_CATALOGUE] = Catalogue(
            thorough=not (config.option.collectonly or hasattr(config, "workerinput")), updating=updating(config)
        )
    return config.stash[_CATALOGUE]


def updating(config: pytest.Config) -> bool:
    """Whether syrupy was asked to accept what is measured."""
    names = ("update_snapshots", "update_new_snapshots_only")
    return any(config.getoption(name, False) for name in names) and not config.option.collectonly


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
    except QsensError as error:
        raise UnusableTest(f"qsens: {error}") from error
    prefix = f"{model.label}-{options.scheme}"
    if "qsens_model" in metafunc.fixturenames:
        metafunc.parametrize("qsens_model", [options.run_spec], indirect=True, ids=[prefix], scope="session")
        prefix = ""
    if "qsens_op" in metafunc.fixturenames:
        ops = select(model, options)
        ids = [f"{prefix}-{op}" if prefix else str(op) for op in ops]
        metafunc.parametrize("qsens_op", ops, indirect=True, ids=ids)


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


class Suite(pytest.Module):
    """The built-in suite. Its path is the root directory, so that ``--lf`` looks into it after any failure."""

    def _getobj(self) -> ModuleType:
        return importlib.import_module("pytest_qsens.builtin_suite")

    def funcnamefilter(self, name: str) -> bool:
        """Find the suite's tests whatever ``python_functions`` says about the user's."""
        return name.startswith("test_")

    def collect(self) -> Iterator[pytest.Item | pytest.Collector]:
        """Yield the tests that the options and the node ids on the command line ask for."""
        import pytest_qsens.builtin_suite as tests

        options = base_options(self.config)
        selection = self.config.stash.get(_SELECTION, ())
        path = self.config.rootpath.__class__(tests.__file__)
        for node in super().collect():
            if not isinstance(node, pytest.Function):
                continue
            if node.originalname == "test_total" and not wants_total(options):
                continue
            if node.originalname == "test_op" and not select(catalogue(self.config).model(options), options):
                continue
            if not selection or any(_selects(argument, node.nodeid) for argument in selection):
                yield SuiteTest.of(node, path)


def _selects(argument: str, nodeid: str) -> bool:
    """Whether a command-line node id means this item, as pytest matches them: all parameters, or none given."""
    return argument in (nodeid, nodeid.partition("[")[0], SUITE)


def suite_ids(model: Model, options: Options) -> list[str]:
    """Node ids of the built-in suite under these options."""
    prefix = f"{model.label}-{options.scheme}"
    ids = [f"{SUITE}::test_op[{prefix}-{op}]" for op in select(model, options)]
    return [*ids, f"{SUITE}::test_total[{prefix}]"] if wants_total(options) else ids


def take_selection(config: pytest.Config) -> None:
    """Take node ids of the built-in suite out of the arguments: pytest would look for a file of that name."""
    place = config.invocation_params.dir / SUITE
    ours = tuple(
        argument
        for argument in config.args
        if (argument == SUITE and not place.exists()) or (argument.startswith(f"{SUITE}::") and not place.is_file())
    )
    if ours:
        config.stash[_SELECTION] = ours
        config.args[:] = [argument for argument in config.args if argument not in ours]


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


def add_suite(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Mark the tests that take our fixtures, and add the built-in ones unless these do their work."""
    for item in items:
        if FIXTURES.intersection(getattr(item, "fixturenames", ())) and item.get_closest_marker("qsens") is None:
            item.add_marker("qsens")
    options = base_options(session.config)
    if _suite_wanted(session.config, options) and not _suite_replaced(options, items):
        suite = Suite.from_parent(session, path=session.config.rootpath, name=SUITE, nodeid=SUITE)
        items.extend(session.genitems(suite))


def _suite_wanted(config: pytest.Config, options: Options) -> bool:
    if options.model is None or config.stash.get(_SELECTION, ()):
        return options.model is not None
    if config.getoption("qsens_model") is not None or config.args_source is not config.ArgsSource.ARGS:
        return True
    # The ini file names a model and the user named files: those files are what is asked for.
    given = (config.invocation_params.dir / argument.partition("::")[0] for argument in config.args)
    return any(config.rootpath.is_relative_to(os.path.normpath(path)) for path in given)


def _suite_replaced(options: Options, items: Iterable[pytest.Item]) -> bool:
    for item in items:
        spec = item.callspec.params.get("qsens_model") if hasattr(item, "callspec") else None
        takes = {"qsens_op", "qsens_score", "qsens_total"}.intersection(getattr(item, "fixturenames", ()))
        if spec is not None and takes and (spec.request, spec.scheme) == (options.request, options.scheme):
            return True
    return False
