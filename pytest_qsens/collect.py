"""From options to test items: models looked up once, tests parametrized by op, the built-in suite."""

from __future__ import annotations

import difflib
import importlib
import os
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import pytest

from pytest_qsens.engines.availability import check_added, check_engine, check_group
from pytest_qsens.errors import QsensError
from pytest_qsens.groups import grouped
from pytest_qsens.memory import free_memory
from pytest_qsens.ops import TOTAL, Op, matches
from pytest_qsens.options import Options
from pytest_qsens.quant.assignment import Assigned, Assignment
from pytest_qsens.quant.schemes import scheme_named
from pytest_qsens.shards import predicted_costs, split
from pytest_qsens.workers import SNAPSHOTS, cores, fitting, place

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import ModuleType

    import pluggy

    from pytest_qsens.configs.gate import ConfigRequest
    from pytest_qsens.groups import Fused
    from pytest_qsens.models.source import ModelRequest, ModelSource
    from pytest_qsens.options import RunSpec
    from pytest_qsens.result_cache import Part
    from pytest_qsens.results import Mode, Payload
    from pytest_qsens.snapshot import Snapshot

SUITE = "qsens"
"""Node id of the built-in suite; no file has to have that name."""

FIXTURES = frozenset({"qsens_model", "qsens_op", "qsens_score", "qsens_total"})

SPEC = "_qsens_spec"
"""Fixture behind those that need a model: its parameter is the `RunSpec`. It loads nothing."""

_OPTIONS = pytest.StashKey[Options]()
_CATALOGUE = pytest.StashKey["Catalogue"]()
_SELECTION = pytest.StashKey[tuple[str, ...]]()
_PLANNED = pytest.StashKey[dict[str, Options]]()
_WANTED = pytest.StashKey[dict[tuple[str, str], "Wanted"]]()
_MADE = pytest.StashKey[dict["Subject", "_Made"]]()
_ELSEWHERE = pytest.StashKey[dict["Subject", set[str]]]()


class Subject(NamedTuple):
    """What has a snapshot, a section of the summary and a result file of its own."""

    model: str
    scheme: str
    """Or the name of a config."""
    granularity: str = "op"


@dataclass(frozen=True)
class Case:
    """What one test measures: an op of a model under a scheme, a group of ops, or the whole model (`TOTAL`)."""

    model: str
    scheme: str
    op: str
    granularity: str = "op"
    members: tuple[str, ...] = ()
    """Of a group."""

    @property
    def subject(self) -> Subject:
        """Where its result belongs."""
        return Subject(self.model, self.scheme, self.granularity)

    @property
    def unit(self) -> Op:
        """The op or group, without types."""
        return Op(self.op, "", tuple(Op(member, "") for member in self.members))


@dataclass
class _Made:
    """What tests were made for of one model under one scheme: names of ops or groups, and `TOTAL`."""

    model: Model
    units: tuple[Op, ...]
    engine: str
    names: set[str]


@dataclass
class Wanted:
    """What the collected tests need of a model under a scheme."""

    parts: dict[Op, set[Part]] = field(default_factory=dict)
    """Op or group → its scores; the whole model's under the op `TOTAL`."""
    model: bool = False
    """Whether a test takes the calibrated model itself."""


class UnusableTest(pytest.Collector.CollectError):
    """A test asks for something that cannot be; reported without a traceback and as a usage error."""


@dataclass(frozen=True, eq=False)
class Model:
    """A model as collection knows it, to be quantized in one way.

    Attributes:
        source: Where it comes from.
        ops: Its layers; its keys and values, where something is said of these; where only of these, they alone.
        assigned: How each op is quantized.

    """

    source: ModelSource
    ops: tuple[Op, ...]
    assigned: Assigned
    _units: dict[tuple[str, tuple[Fused, ...]], tuple[Op, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, source: ModelSource, ops: Sequence[Op], spec: RunSpec) -> Model:
        """Tell how the ops of a model are quantized; a config is read once.

        Args:
            source: The model.
            ops: Of its manifest.
            spec: With the scheme or the config.

        Raises:
            QsensError: If the config cannot be used, or the scheme is of keys and values and the model has none.

        """
        if spec.config is not None:
            from pytest_qsens.configs.gate import assign
            from pytest_qsens.manifest import load_tree

            assigned = assign(spec.config, ops, partial(load_tree, source))
            return cls(source, tuple(op for op in ops if op.name in assigned.assignment.names), assigned)
        scheme = scheme_named(spec.scheme, "scheme")
        meant = tuple(op for op in ops if scheme.means(op.type))
        if not meant:
            raise QsensError(
                f"scheme {spec.scheme!r} quantizes keys and values of attention, and {source.label} has no module that "
                "takes a cache and calls transformers' attention interface or torch's scaled_dot_product_attention"
            )
        return cls(source, meant, Assigned(Assignment.uniform(scheme, meant)))

    def units(self, options: Options) -> tuple[Op, ...]:
        """List what is measured as one: the ops, or groups of them.

        Raises:
            QsensError: If two would have one name.

        """
        key = options.granularity, options.fused
        if key not in self._units:
            self._units[key] = grouped(self.ops, *key)
        return self._units[key]

    def measurable(self, options: Options) -> tuple[Op, ...]:
        """List what is measured as one, but for what a config leaves unquantized."""
        assignment = self.assigned.assignment
        return tuple(unit for unit in self.units(options) if assignment.measures(unit))

    @property
    def label(self) -> str:
        """Name in node ids and snapshot paths."""
        return self.source.label

    @property
    def config_hashes(self) -> dict[str, str]:
        """Name of the config that was read, if one was → hash of the file."""
        about = self.assigned.about
        return {} if about is None else {Path(about["path"]).name: about["sha256"]}

    @cached_property
    def evaluation(self) -> str | None:
        """Hash of the evaluation data, as it was when first asked for."""
        return self.source.evaluation_fingerprint()


class Catalogue:
    """The models and snapshots of this process, each looked up once.

    Args:
        thorough: Whether checkpoints and data files are checked as far as that goes without loading weights. One
            process of a run does it.
        updating: Whether snapshots are going to be written.
        apart: Whether that is done on another machine, or in another directory.

    """

    def __init__(self, *, thorough: bool, updating: bool, apart: bool) -> None:
        self._thorough = thorough
        self._updating = updating
        self._apart = apart
        self._listed: dict[ModelRequest, tuple[ModelSource, tuple[Op, ...]]] = {}
        self._models: dict[tuple[ModelRequest, str | ConfigRequest], Model] = {}
        self._snapshots: dict[tuple[Path, str, str], Snapshot] = {}
        self._measured: dict[Path, RunSpec] = {}
        self._configs: dict[tuple[str, str], ConfigRequest | None] = {}

    def model(self, options: Options) -> Model:
        """Model of these options; its snapshot is readable and, where that is asked for, may be written.

        Raises:
            QsensError: For everything wrong with the model, its data, the choice of ops or the snapshot.

        """
        check_engine(options.engine, options.label, options.device)
        model = self._look_up(options)
        check_added(options.run_spec.engine, model.assigned.assignment.added)
        for unit in select(model, options):
            check_group(options.run_spec.engine, unit)
        self.snapshot(options, model)
        path = options.snapshot_path(model.label)
        other = self._measured.setdefault(path, options.run_spec)
        if other != options.run_spec:
            raise QsensError(
                f"two tests would be compared with one snapshot, {path}, but measure different things: "
                f"{_differences(other, options.run_spec)}. Measure them in two runs, each with its own "
                "--qsens-snapshot-dir"
            )
        config = self._configs.setdefault((model.label, options.label), options.config_request)
        if config != options.config_request:
            raise QsensError(
                f"two tests measure {model.label} under the name {options.label!r}, but not the same: {config} and "
                f"{options.config_request}. Rename one of the config files"
            )
        return model

    @property
    def models(self) -> Iterable[Model]:
        """Every model that was looked up, for each way in which it is quantized."""
        return self._models.values()

    def known(self, spec: RunSpec) -> Model:
        """Model that was looked up for a test before."""
        return self._models[spec.request, spec.config or spec.scheme]

    def snapshot(self, options: Options, model: Model) -> Snapshot:
        """Snapshot that the tests of these options are compared with, as it was when first asked for."""
        from pytest_qsens.snapshot import check_writable, load

        key = options.snapshot_path(model.label), model.label, options.label
        if key not in self._snapshots:
            if self._updating and not options.recording:
                raise QsensError(
                    f"engine {options.engine} estimates, and snapshots hold what was measured: {key[0]} is left as it "
                    "is. Update it with another engine, such as delta, or leave --snapshot-update out"
                )
            if self._updating and os.environ.get("CI") and not options.allow_ci_update:
                raise QsensError(
                    f"CI is set to {os.environ['CI']!r}, and there snapshots are compared, not written: {key[0]} "
                    "would accept whatever was measured. Update it on your own machine and commit it, or add "
                    "--qsens-allow-ci-update"
                )
            self._snapshots[key] = load(
                key[0], model=model.label, scheme=options.label, granularity=options.granularity
            )
            if self._updating and not self._apart:
                check_writable(key[0].resolve().parent)  # where its lock goes, too
        return self._snapshots[key]

    def _look_up(self, options: Options) -> Model:
        from pytest_qsens.manifest import load_manifest
        from pytest_qsens.models.resolve import resolve

        request, spec = options.request, options.run_spec
        key = request, spec.config or spec.scheme
        if key not in self._models:
            if request not in self._listed:
                source = resolve(request)
                if self._thorough:
                    source.check()
                self._listed[request] = source, load_manifest(source, options.cache_dir())
            self._models[key] = Model.of(*self._listed[request], spec)
        return self._models[key]


def _differences(one: RunSpec, other: RunSpec) -> str:
    def flat(spec: RunSpec) -> dict[str, object]:
        config = {} if spec.config is None else {f"config {name}": value for name, value in asdict(spec.config).items()}
        return {**asdict(spec.request), "engine": spec.engine, "device": spec.device, **config}

    old, new = flat(one), flat(other)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} {old.get(name)!r} and {new.get(name)!r}" for name in names)


def _near(glob: str, names: Iterable[str]) -> str:
    names = tuple(names)
    known = dict.fromkeys((*names, *(name.rpartition(".")[2] for name in names)))  # a glob is often of the last part
    near = difflib.get_close_matches(glob.strip("*."), known, n=3, cutoff=0.5)
    return f" (near: {', '.join(near)})" if near else ""


def check_fused(options: Options, models: Iterable[Model]) -> None:
    """Check that every pattern of ``qsens_fused`` means something in this run.

    Raises:
        QsensError: Naming the first that matches no op of any model.

    """
    names = [op.name for model in models for op in model.ops]
    for pattern in options.fused:
        if not any(pattern.parts(name) for name in names):
            raise QsensError(
                f"qsens_fused: {pattern.text!r} matches no op of this run's models, so it would group nothing. Correct "
                "the line, or give this run others with -o qsens_fused=..."
            )


def check_overrides(options: Options, models: Iterable[Model], units: Iterable[Op]) -> None:
    """Check that every glob of ``qsens_fail_overrides``, and of a limit in ``--qsens-fail``, means something here.

    Raises:
        QsensError: Naming the first that matches neither an op of any model nor a group of ``units`` nor ``total``.

    """
    names = list(dict.fromkeys(op.name for op in (*(op for model in models for op in model.ops), *units)))
    ini = "Correct the line, or give this run others with -o qsens_fail_overrides=..."
    globs = [("qsens_fail_overrides", glob, ini) for glob, _ in options.overrides().rules]
    origin = options.origins["fail"]
    globs += [(f"{origin}, {limit}", limit.glob, "Correct it") for limit in options.gates.limits if limit.glob]
    for where, glob, advice in globs:
        if not any(matches(name, glob) for name in (*names, TOTAL)):
            raise QsensError(
                f"{where}: {glob!r} matches neither an op of this run's models nor {TOTAL}{_near(glob, names)}, so it "
                f"would gate nothing. {advice}"
            )


def select(model: Model, options: Options) -> tuple[Op, ...]:
    """Ops, or groups of them, that the options ask for, in model order.

    A glob asks for a group by its name, or by that of any member.

    Raises:
        QsensError: If a glob matches neither an op nor ``total``, or only ops that a config leaves unquantized.

    """
    units, measurable = model.units(options), model.measurable(options)
    names = list(dict.fromkeys(op.name for op in (*model.ops, *units)))
    for glob in options.ops:
        if not any(matches(name, glob) for name in (*names, TOTAL)):
            hint = _near(glob, names)
            raise QsensError(
                f"{options.origins['ops']} {glob!r} matches none of the {len(names)} ops of {model.label}{hint}. "
                "List them with --collect-only -q"
            )
        if not any(_asks_for(glob, unit) for unit in measurable) and not matches(TOTAL, glob):
            raise QsensError(
                f"{options.origins['ops']} {glob!r} matches only ops that {options.config} leaves unquantized, which "
                "are not measured. Give the config a scheme for them, or measure others"
            )
    chosen = [unit for unit in measurable if not options.ops or any(_asks_for(glob, unit) for glob in options.ops)]
    return tuple(chosen[: options.max_ops])


def _asks_for(glob: str, unit: Op) -> bool:
    return any(matches(name, glob) for name in (unit.name, *unit.member_names))


def wants_total(options: Options) -> bool:
    """Whether the whole model is measured as well: unless only some ops are asked for."""
    return not options.selective or any(matches(TOTAL, glob) for glob in options.ops)


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


def catalogue(config: pytest.Config) -> Catalogue:
    """Models of this process."""
    if _CATALOGUE not in config.stash:
        apart = SNAPSHOTS in getattr(config, "workerinput", {})
        config.stash[_CATALOGUE] = Catalogue(
            thorough=not (config.option.collectonly or (hasattr(config, "workerinput") and not apart)),
            updating=updating(config),
            apart=apart,
        )
    return config.stash[_CATALOGUE]


def automatic_workers(config: pytest.Config) -> int | None:
    """How many workers ``-n auto`` means; ``None`` if no model is measured, or the environment says it."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    from pytest_qsens.models.resolve import resolve

    try:
        options = base_options(config)
        if options.model is None:
            return None
        weights = resolve(options.request).weight_bytes()
    except QsensError:  # it is told when the session starts
        return None
    kept = 0
    if options.mode != "isolated":  # of a config nothing is read yet: no scheme keeps more than two bytes
        kept = 2 if options.config is not None else scheme_named(options.scheme, "scheme").bytes_kept
    return fitting(cores(), free_memory(), weights, kept=kept)


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
        check_refinement(model, options)
        check_interactions(options)
        _check_own_limits(model, options, base_options(metafunc.config))
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
        names = made.setdefault(key, _Made(model, model.units(options), options.engine, set())).names
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
    made = item.config.stash[_PLANNED][_definition(item)]
    if any(getattr(options, name) != getattr(made, name) for name in ("run_spec", "ops", "max_ops", "granularity")):
        raise QsensError(
            f"{item.nodeid}: a qsens marker chooses another model or other ops than this test was made for. It came "
            "too late, with a single parameter (pytest.param) or by add_marker: put it on the function, class or module"
        )
    return options


def _definition(item: pytest.Function) -> str:
    """Node id of the function that a test was made of."""
    return f"{cast('pytest.Collector', item.parent).nodeid}::{item.originalname}"


def plan(session: pytest.Session) -> Payload | None:
    """Tell what the collected tests are going to measure, in builtin values; ``None`` if they measure nothing.

    ``cases`` maps node ids to the fields of a `Case`; ``models`` lists label, scheme, granularity, ops or groups,
    names of what other shards measure, and what a config says; ``refusal`` is what is wrong with all of it together,
    if something is.
    """
    config = session.config
    cases: dict[str, tuple[str, str, str, str, tuple[str, ...]]] = {}
    models: dict[Subject, tuple[Op, ...]] = {}
    configs: dict[Subject, Payload | None] = {}
    for item in session.items:
        names = getattr(item, "fixturenames", ())
        if not isinstance(item, pytest.Function) or SPEC not in names:
            continue
        spec = cast("RunSpec", item.callspec.params[SPEC])
        op = cast("Op | None", item.callspec.params.get("qsens_op"))
        model = catalogue(config).known(spec)
        wanted = config.stash.setdefault(_WANTED, {}).setdefault((model.label, spec.scheme), Wanted())
        wanted.model = wanted.model or "qsens_model" in names
        if op is not None and "qsens_score" in names:
            modes = model.assigned.assignment.modes_of(op, _modes(item))
            wanted.parts.setdefault(op, set()).update(modes)
        if "qsens_total" in names:
            wanted.parts.setdefault(Op(TOTAL, TOTAL), set()).add("total")
        if "qsens_score" in names or "qsens_total" in names:
            made = config.stash[_PLANNED][_definition(item)]
            members = op.member_names if op else ()
            cases[item.nodeid] = (model.label, spec.scheme, op.name if op else TOTAL, made.granularity, members)
            subject = Subject(model.label, spec.scheme, made.granularity)
            if subject not in models:
                models[subject] = model.units(made)
                configs[subject] = _config_facts(model, made)
    if not cases:
        return None
    refusal = None
    try:
        units = [unit for found in models.values() for unit in found]
        check_overrides(base_options(config), catalogue(config).models, units)
        if any(subject.granularity == "fused" for subject in models):
            check_fused(base_options(config), catalogue(config).models)
    except QsensError as error:
        refusal = str(error)
    elsewhere = config.stash.get(_ELSEWHERE, {})
    listed = [
        [*key, [unit.plain() for unit in units], sorted(elsewhere.get(key, ())), configs[key]]
        for key, units in models.items()
    ]
    return {"cases": cases, "models": listed, "refusal": refusal}


def _config_facts(model: Model, options: Options) -> Payload | None:
    """Tell what a config says, in builtin values.

    ``about`` itself; ``schemes``, of ops or groups and of `TOTAL`; ``unquantized``, of these; ``unsimulated``, ops that
    are quantized in a way that cannot be simulated; ``problems``, what is wrong.
    """
    found = model.assigned
    if found.about is None:
        return None
    units = model.units(options)
    return {
        "about": found.about,
        "schemes": {unit.name: found.assignment.name_of(unit) for unit in units} | {TOTAL: found.assignment.name},
        "unquantized": [unit.name for unit in units if not found.assignment.measures(unit)],
        "unsimulated": found.assignment.unsimulated,
        "problems": list(found.problems),
    }


def files(config: pytest.Config) -> dict[str, dict[str, str | None]]:
    """Hash what every process must have alike: name → kind of file → hash, ``None`` where that cannot be told.

    Configs, and the checkpoint and data of each model in workers that are on several machines, or in several
    directories; elsewhere there is nothing to compare of these.
    """
    found: dict[str, dict[str, str | None]] = {}
    for model in catalogue(config).models:
        found |= {f"{name} of {model.label}": {"config": sha256} for name, sha256 in model.config_hashes.items()}
        if getattr(config, "workerinput", {}).get("qsens_scattered"):
            source = model.source
            found[source.label] = {"checkpoint": source.weights_digest(), "data": source.data_fingerprint()}
    return found


def _modes(item: pytest.Function) -> Iterable[Mode]:
    try:
        return options_for(item).modes
    except QsensError:  # the test says so itself
        return ()


def expected(config: pytest.Config, label: str, scheme: str) -> Wanted:
    """Tell what the collected tests need of a model under a scheme."""
    return config.stash.get(_WANTED, {}).get((label, scheme)) or Wanted()


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


def add_suite(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Mark the tests that take our fixtures, and add the built-in ones unless these do their work."""
    for item in items:
        if FIXTURES.intersection(getattr(item, "fixturenames", ())) and item.get_closest_marker("qsens") is None:
            item.add_marker("qsens")
    options = base_options(session.config)
    if _suite_wanted(session.config, options):
        suite = Suite.from_parent(session, path=session.config.rootpath, name=SUITE, nodeid=SUITE)
        if not selection(session.config):  # what was asked for by name is wanted in any case
            suite.replaced = _replaced(options, items)
        items.extend(session.genitems(suite))
    for item in items:
        op = item.callspec.params.get("qsens_op") if hasattr(item, "callspec") else None
        if isinstance(op, Op):
            item.extra_keyword_matches.add(op.name)  # pytest escapes what is not ASCII in an id
    _keep_part(session.config, items)


def _keep_part(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what other shards measure; tests of no op run in every shard.

    What is divided is all that the tests were made for, not what ``-k``, ``--lf`` and node ids leave of it: failures
    differ between machines, and each repeats its own.
    """
    shard = base_options(config).shard
    if shard is None:
        return
    mine: dict[Subject, frozenset[str]] = {}
    for key, made in config.stash.get(_MADE, {}).items():
        ops = [unit for unit in made.units if unit.name in made.names]
        costs = predicted_costs(made.model.ops, made.engine, made.units)
        parts = split(ops, costs, shard.count, total=TOTAL in made.names)
        mine[key] = parts[shard.index - 1]
        config.stash.setdefault(_ELSEWHERE, {})[key] = made.names - mine[key]
    dropped = [item for item in items if (case := _case(item)) and case.op not in mine[case.subject]]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        gone = set(map(id, dropped))
        items[:] = [item for item in items if id(item) not in gone]


def _case(item: pytest.Item) -> Case | None:
    """Tell the op that a test is of, whether it takes its score or not; ``None`` if it is of none."""
    if not isinstance(item, pytest.Function) or not FIXTURES.intersection(item.fixturenames):
        return None
    op = item.callspec.params.get("qsens_op")
    if not isinstance(op, Op) and "qsens_total" not in item.fixturenames:
        return None
    options = item.config.stash[_PLANNED][_definition(item)]
    model = catalogue(item.config).known(options.run_spec)
    name, members = (op.name, op.member_names) if isinstance(op, Op) else (TOTAL, ())
    return Case(model.label, options.label, name, options.granularity, members)


def check_shard(model: Model, options: Options) -> None:
    """Check that there is something to measure for every shard.

    Raises:
        QsensError: If there are more shards than ops.

    """
    most = len(select(model, options)) + wants_total(options)
    if options.shard is not None and options.shard.count > most:
        raise QsensError(
            f"{options.origins['shard']} {options.shard}: {most} results of {model.label} (ops, and the whole model) "
            f"cannot be shared by {options.shard.count} machines. Use {most} shards at most"
        )


def check_interactions(options: Options) -> None:
    """Check that ops are measured by themselves, if it is to be known how their errors meet.

    Raises:
        QsensError: If they are not.

    """
    if not options.interactions:
        return
    origin = options.origins["interactions"]
    if options.mode == "fallback":
        raise QsensError(
            f"{origin} goes by what ops do when they alone are quantized, which mode fallback does not "
            "measure. Use --qsens-mode isolated or both"
        )
    if options.estimating:
        raise QsensError(
            f"{origin} goes by what is measured, and this run estimates. Leave out engine probe, --qsens-time-budget, "
            "--qsens-top and --qsens-representatives"
        )


def check_refinement(model: Model, options: Options) -> None:
    """Check that what turns estimates into exact scores can be done.

    Raises:
        QsensError: If the engine makes none, or there are fewer ops than asked for.

    """
    names = ("time_budget", "top", "representatives", "gate_estimates")
    given = [options.origins[name] for name in names if getattr(options, name)]
    if given and options.engine not in ("auto", "probe"):
        raise QsensError(
            f"{given[0]} goes by estimates, and {options.origins['engine']} {options.engine} makes none. "
            "Leave the engine out, or leave out what goes by estimates"
        )
    if options.gate_estimates and not options.estimating:
        raise QsensError(
            f"{options.origins['gate_estimates']}: engine {options.engine} measures all, and there are no estimates "
            "to gate. Add --qsens-engine probe, --qsens-time-budget, --qsens-top or --qsens-representatives"
        )
    if options.gate_estimates and "nmse" not in options.gates.metrics:
        raise QsensError(
            f"{options.origins['gate_estimates']}: only nmse is estimated with an interval, and "
            f"{options.origins['fail']} has no threshold and no limit for it. Add one, such as nmse:5%"
        )
    if options.top is None:
        return
    if options.shard is not None and options.shard.count > 1:
        raise QsensError(
            f"{options.origins['top']} {options.top} compares all ops, and {options.origins['shard']} {options.shard} "
            "measures a part of them. Leave one of the two out"
        )
    selected = len(select(model, options))
    if options.top > selected:
        raise QsensError(
            f"{options.origins['top']} {options.top}: {selected} ops of {model.label} are asked for. "
            f"Give {selected} at most"
        )


def check_limits(config: pytest.Config, model: Model, options: Options) -> None:
    """Check that limits of named ops, and gates of interactions, can be judged with all that the options ask for.

    Raises:
        QsensError: If what they are of is not measured.

    """
    if config.option.collectonly:
        return
    origin, total = options.origins["fail"], wants_total(options)
    chosen = select(model, options)
    for limit in options.gates.limits:
        exists = any(limit.is_of(op.name) for op in (*model.ops, *model.units(options))) or limit.is_of(TOTAL)
        known = any(limit.is_of(unit.name, unit.member_names) for unit in chosen) or (total and limit.is_of(TOTAL))
        if limit.glob is not None and exists and not known:  # what does not exist at all is told with what is near
            raise QsensError(
                f"{origin}: {limit} limits nothing that is measured{_left_out(options)}. Measure it, or leave the "
                "limit out"
            )
    for gate in options.gates.joint:
        if not options.interactions:
            raise QsensError(
                f"{origin}: {gate} is of how errors of ops meet, which only --qsens-interactions tells. Add it"
            )
        if options.selective:
            raise QsensError(
                f"{origin}: {gate} is of all ops together{_left_out(options)}. Measure all, or leave the gate out"
            )
        if options.shard is not None and options.shard.count > 1:
            raise QsensError(
                f"{origin}: {gate} is of all ops together, and {options.origins['shard']} {options.shard} measures a "
                f"part of them. Judge it where all parts are together: qsens merge --fail '{gate}'"
            )


def _check_own_limits(model: Model, options: Options, base: Options) -> None:
    """Check that the limits of a marker are of what its test measures; those of a run may be of several models.

    Raises:
        QsensError: Naming the first that is not.

    """
    if options.fail == base.fail:
        return
    chosen = select(model, options)
    for limit in options.gates.limits:
        if limit.glob and not any(limit.is_of(unit.name, unit.member_names) for unit in (*chosen, Op(TOTAL, TOTAL))):
            near = _near(limit.glob, [unit.name for unit in chosen])
            raise QsensError(f"{options.origins['fail']}: {limit} limits nothing that is measured{near}. Correct it")


def _left_out(options: Options) -> str:
    given = [options.origins[name] for name in ("ops", "max_ops") if getattr(options, name)]
    return f", as {' and '.join(given)} leaves it out" if given else ""


def check_ranks(config: pytest.Config, model: Model, options: Options) -> None:
    """Check that gates of the order of ops can be judged with all that the options ask for.

    Raises:
        QsensError: If they leave out ops, or there are too few.

    """
    gates = options.gates.ranks
    if not gates or config.option.collectonly:
        return
    from pytest_qsens.rank_gates import recorded_scores

    assignment = model.assigned.assignment
    units = [unit for unit in model.measurable(options) if not assignment.adds(unit)]
    origin, names = options.origins["fail"], ", ".join(map(str, gates))
    for gate in gates:
        if len(units) < gate.needed:
            raise QsensError(
                f"{origin}: {gate} needs {gate.needed} ops at least, or it says nothing, and {model.label} has "
                f"{len(units)}. Give a smaller number, or only thresholds such as nmse:5%"
            )
    if updating(config):
        return
    without = "Give this run only thresholds, such as --qsens-fail nmse:5%"
    if options.estimating:
        raise QsensError(f"{origin}: {names} compares exact scores, and engine {options.engine} estimates. {without}")
    if options.shard is not None and options.shard.count > 1:
        raise QsensError(
            f"{origin}: {names} compares the order of all ops, and {options.origins['shard']} {options.shard} measures "
            f"a part of them. {without}, and judge the order where all parts are together: qsens merge --fail {names}"
        )
    for mode in options.modes:
        recorded = recorded_scores(units, catalogue(config).snapshot(options, model).ops, mode)
        left_out = recorded.keys() - {op.name for op in select(model, options)}
        if left_out:
            what = " and ".join(options.origins[name] for name in ("ops", "max_ops") if getattr(options, name))
            raise QsensError(
                f"{origin}: {names} compares the order of the {len(recorded)} ops in the snapshot, and {what} leaves "
                f"out {len(left_out)} of them. {without}"
            )


def _suite_wanted(config: pytest.Config, options: Options) -> bool:
    if options.model is None or config.stash.get(_SELECTION, ()):
        return options.model is not None
    if config.getoption("qsens_model") is not None or config.args_source is not config.ArgsSource.ARGS:
        return True
    # The ini file names a model and the user named files: those files are what is asked for.
    given = (config.invocation_params.dir / argument.partition("::")[0] for argument in config.args)
    return any(config.rootpath.is_relative_to(os.path.normpath(path)) for path in given)


def _replaced(options: Options, items: Iterable[pytest.Item]) -> frozenset[str]:
    """Names of the built-in tests whose work the user's tests of the same model, scheme and granularity do."""
    scores = {"qsens_score": "test_op", "qsens_total": "test_total"}
    found: set[str] = set()
    for item in items:
        spec = item.callspec.params.get(SPEC) if hasattr(item, "callspec") else None
        if spec is None or (spec.request, spec.scheme) != (options.request, options.label):
            continue
        made = item.config.stash[_PLANNED][_definition(cast("pytest.Function", item))]
        if made.granularity == options.granularity:
            found.update(scores[name] for name in getattr(item, "fixturenames", ()) if name in scores)
    return frozenset(found)
