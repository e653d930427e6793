"""The process that sees every report: checks what was asked for, collects results, and alone writes files."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_qsens.cache import trim
from pytest_qsens.collect import (
    Case,
    Subject,
    base_options,
    catalogue,
    check_interactions,
    check_limits,
    check_ranks,
    check_refinement,
    check_selection,
    check_shard,
    plan,
    select,
    selection,
    updating,
    wants_total,
)
from pytest_qsens.errors import QsensError, told
from pytest_qsens.files import write_atomically
from pytest_qsens.memory import parse_memory
from pytest_qsens.ops import TOTAL, Op
from pytest_qsens.options import MODES
from pytest_qsens.quant.assignment import ADDED_AS
from pytest_qsens.shards import ELSEWHERE
from pytest_qsens.time_budget import LATE, LEFT, NOT_MEASURED, left
from pytest_qsens.workers import SHARE, SNAPSHOTS, apart, check_distribution, machine, named, position, workers_beside

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

    from xdist.remote import Producer  # type: ignore[import-untyped]  # it ships no types
    from xdist.workermanage import WorkerController  # type: ignore[import-untyped]  # it ships no types

    from pytest_qsens.collect import Model
    from pytest_qsens.joint_gates import JointVerdict
    from pytest_qsens.options import Options
    from pytest_qsens.profile import Profile
    from pytest_qsens.rank_gates import RankVerdict
    from pytest_qsens.results import OpResult, Payload, RunResult
    from pytest_qsens.snapshot import Entry, Snapshot
    from pytest_qsens.thresholds import Verdict

CHANNEL = "qsens_channel"
"""Key of ``workerinput``: where a worker sends what it is going to measure."""

_STOPPED = "nothing can be measured, see the error below"


@dataclass
class Run:
    """What the reports of one (model, scheme, granularity) have told so far."""

    model: str
    scheme: str
    path: Path
    ops: tuple[Op, ...] = ()
    """Of the model; groups of them, where these are measured as one."""
    elsewhere: frozenset[str] = frozenset()
    """Ops that other shards measure, and `TOTAL` if one of them does."""
    facts: list[Payload] = field(default_factory=list)
    profiles: dict[str, Payload] = field(default_factory=dict)
    """Process → where its time went so far."""
    results: dict[str, OpResult] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    compared: dict[str, Entry] = field(default_factory=dict)
    """All scores of ops that the snapshot may have as they are: accepted, better, or within their thresholds."""
    mismatch: list[str] = field(default_factory=list)
    """How the environment of the snapshot differs from that of this run."""
    gone: list[str] = field(default_factory=list)
    """Lines of the snapshot that are of no op of the model."""
    lost: set[str] = field(default_factory=set)
    """Ops whose worker died."""
    failing: set[str] = field(default_factory=set)
    """Ops with a failed test."""
    recorded: Snapshot | None = None
    """The snapshot before it was updated, if there is going to be a report."""
    ranks: list[RankVerdict] = field(default_factory=list)
    """What gates of the order of ops found, once all ops are through."""
    joint: list[JointVerdict] = field(default_factory=list)
    """What gates of interactions found, likewise."""
    spent: dict[str, float] = field(default_factory=dict)
    """Op → seconds that this run took for it; those that came from the cache are not there."""
    granularity: str = "op"
    config: Payload | None = None
    """What a config says: see `pytest_qsens.collect.plan`."""
    moved: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Op → its scheme in the snapshot and now, where they differ."""
    pruned: bool = False
    """Whether lines are removed of ops that have no score any more."""

    @property
    def engines(self) -> list[str]:
        """Engines in use: one, unless workers or modes differ."""
        return sorted({name for facts in self.facts for name in facts["engine"].split("+")})

    @property
    def engine_reason(self) -> str | None:
        """Why another engine than the usual one was used."""
        return next((facts["engine_reason"] for facts in self.facts if facts["engine_reason"]), None)

    @property
    def environments(self) -> list[dict[str, str]]:
        """Where scores were measured: one place, unless workers differ."""
        return [dict(items) for items in sorted({tuple(sorted(facts["environment"].items())) for facts in self.facts})]

    @property
    def environment(self) -> dict[str, str]:
        """Where scores were measured; of several different places the same one whatever the order of reports."""
        return next(iter(self.environments), {})

    @property
    def contradictory(self) -> bool:
        """Whether the unquantized outputs differ between processes of one machine."""
        found = {(facts["machine"], facts["reference"]) for facts in self.facts}
        return len({place for place, _ in found}) < len(found)

    @property
    def data(self) -> str | None:
        """Short hash of the batches."""
        return next((facts["data"] for facts in self.facts), None)

    @property
    def reference(self) -> str | None:
        """Hash of the unquantized outputs' bits; of machines that round differently, all of them."""
        return "+".join(sorted({facts["reference"] for facts in self.facts})) or None

    @property
    def checkpoint(self) -> str | None:
        """Short hash of the weights' files, if there are any."""
        return next((facts["weights"] for facts in self.facts), None)

    @property
    def mode(self) -> str:
        """``isolated``, ``fallback`` or ``both``."""
        modes = {facts["mode"] for facts in self.facts}
        return modes.pop() if len(modes) == 1 else "both"

    @property
    def profile(self) -> Profile | None:
        """Where the time of all processes went, if that was asked for."""
        from pytest_qsens.profile import total
        from pytest_qsens.results import read_profile

        found = [read_profile(payload, f"profile of {process}") for process, payload in self.profiles.items()]
        return total(found) if found else None

    @property
    def functional(self) -> list[OpResult]:
        """Functional ops, which have no tests."""
        from pytest_qsens.results import from_payload

        return [from_payload(payload) for facts in self.facts[:1] for payload in facts["functional"]]

    @property
    def total(self) -> OpResult | None:
        """Result of the whole model."""
        return self.results.get(TOTAL)

    @property
    def measured(self) -> list[OpResult]:
        """Measured ops, in the order in which they came in."""
        return [result for op, result in self.results.items() if op != TOTAL and result.status == "measured"]

    @property
    def estimated(self) -> list[OpResult]:
        """Ops of which there are estimates, in the order in which they came in."""
        return [result for op, result in self.results.items() if op != TOTAL and result.status == "estimated"]

    @property
    def reference_seconds(self) -> float | None:
        """Seconds of one unquantized forward, the fastest of all workers; of an earlier run, if this one made none."""
        fresh = [facts for facts in self.facts if facts["loaded"]]
        return min((facts["reference_seconds"] for facts in fresh or self.facts), default=None)

    @property
    def forwards_per_op(self) -> float | None:
        """Mean time of an op that this run has measured or estimated, in units of a reference forward."""
        spent = [self.spent[result.op] for result in (*self.measured, *self.estimated) if result.op in self.spent]
        if not spent or not self.reference_seconds:
            return None
        return sum(spent) / len(spent) / self.reference_seconds

    @property
    def forwards(self) -> float | None:
        """Time of all ops that this run has measured or estimated, in units of a reference forward."""
        spent = [seconds for op, seconds in self.spent.items() if op != TOTAL]
        return sum(spent) / self.reference_seconds if spent and self.reference_seconds else None

    @property
    def cached(self) -> list[OpResult]:
        """Ops whose scores came from the cache alone."""
        return [
            result
            for op, result in self.results.items()
            if op != TOTAL and op not in self.spent and op not in self.lost
        ]

    def add(self, payload: Payload, *, passed: bool) -> None:
        """Take one result; the same op may be reported by several tests."""
        from pytest_qsens.results import from_payload
        from pytest_qsens.snapshot import Entry, union
        from pytest_qsens.thresholds import Comparison, Verdict, combine

        result = from_payload(payload["result"])
        if result.op in self.lost:
            return
        self.results[result.op] = _joined(self.results.get(result.op), result)
        if payload["spent"] is not None:
            self.spent[result.op] = self.spent.get(result.op, 0.0) + payload["spent"]
        if payload["verdict"]:
            compared = tuple(Comparison(*comparison) for comparison in payload["compared"])
            verdict = Verdict(payload["verdict"], tuple(payload["lines"]), tuple(payload["within_noise"]), compared)
            known = self.verdicts.get(result.op)
            self.verdicts[result.op] = combine([known, verdict]) if known else verdict
        if payload["entry"] and passed:
            self.entries = union(self.entries, {result.op: Entry.from_payload(payload["entry"])})
        if passed and result.status == "measured" and (payload["entry"] or payload["verdict"] in ("ok", "improved")):
            self.compared = union(self.compared, {result.op: Entry.of(result)})

    def crashed(self, name: str, reason: str) -> None:
        """Note an op whose worker died during its test. Nothing counts that was, or will be, reported of it.

        xdist fails the test even if the worker died in its teardown, when the score had come in as passed.
        """
        op = next((op for op in self.ops if op.name == name), Op(TOTAL, TOTAL) if name == TOTAL else None)
        if op is not None:
            self.lost.add(name)
            self.failing.add(name)
            self.results[name] = _without_score(op, "failed", reason)
            self.verdicts.pop(name, None)
            self.entries.pop(name, None)
            self.compared.pop(name, None)

    def listed(self, reason: Callable[[Op], str]) -> tuple[OpResult, ...]:
        """One result for every op of the model, in model order, then the functional ones."""
        named = ((op, self.results.get(op.name) or self._not_run(op, reason)) for op in self.ops)
        return (*(replace(result, weights=op.weights) for op, result in named), *self.functional)

    def _not_run(self, op: Op, reason: Callable[[Op], str]) -> OpResult:
        if op.name in self.unquantized:
            from pytest_qsens.configs.gate import UNQUANTIZED

            found = _without_score(op, "unquantized", UNQUANTIZED)
        else:
            found = _without_score(op, "unrun", reason(op))
        return replace(found, scheme=self.schemes.get(op.name))

    @property
    def schemes(self) -> dict[str, str]:
        """Op, group or `TOTAL` → name of its scheme, where a config is measured."""
        return self.config["schemes"] if self.config else {}

    @property
    def unquantized(self) -> frozenset[str]:
        """Ops or groups that the config leaves as they are: they have no tests."""
        return frozenset(self.config["unquantized"] if self.config else ())


def _without_score(op: Op, status: str, reason: str) -> OpResult:
    from pytest_qsens.results import OpResult

    names = op.member_names
    return OpResult(op.name, op.type, op.block, status, reason, ops=names)  # type: ignore[arg-type]  # literals


def _joined(old: OpResult | None, new: OpResult) -> OpResult:
    """Join two reports of one op: a measurement counts more than none, and modes add up."""
    if old is None or old.status != "measured" or new.status == "estimated":
        return new
    modes = {mode: getattr(old, mode) or getattr(new, mode) for mode in ("isolated", "fallback", "added")}
    return replace(old, **modes, sketch=old.sketch or new.sketch)


def _subject(payload: Payload) -> Subject:
    return Subject(payload["model"], payload["scheme"], payload["granularity"])


def _named(subject: Subject) -> str:
    return " ".join(subject[:2] if subject.granularity == "op" else subject)


class Controller:
    """Registered in every process but xdist's workers. Does nothing unless a report carries something of ours."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.runs: dict[Subject, Run] = {}
        self.problems: list[str] = []
        self._unjudged = 0  # of these problems: nothing is known to be worse
        """What went wrong after measuring, for the summary."""
        self.written: dict[Path, str] = {}
        """Files, and how much in them is new."""
        self.warnings: dict[str, None] = {}
        """What was told about the cache and the models, each once."""
        self.wall_seconds = 0.0
        self._abort: str | None = None
        self._refusal: str | None = None
        self._unusable = self._not_measured = False
        self._cases: dict[str, Case] = {}
        self._reported: Run | None = None
        """What goes into the result file."""
        self._plans: dict[WorkerController, Payload] = {}
        self._files: dict[str, tuple[str, Mapping[str, str | None]]] = {}
        """Model or config → first process that told, and hashes of its files."""
        self._session: pytest.Session | None = None
        self._start = time.perf_counter()

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Refuse what cannot work, before xdist starts its workers (`DSession` does that last)."""
        self._session = session
        try:
            self._check()
        except QsensError as error:
            raise self._refused(error) from error

    def _refused(self, error: QsensError) -> pytest.UsageError:
        self._refusal = str(error)
        return pytest.UsageError(f"qsens: {error}")

    @property
    def stopped(self) -> str | None:
        """Why nothing counts that was measured, if that is so."""
        unusable = "a test asks for what cannot be, see the errors of its collection" if self._unusable else None
        return self._refusal or self._abort or unusable

    @property
    def started(self) -> bool:
        """Whether it has come as far as to check what is asked for; not with ``--help``."""
        return self._session is not None

    @property
    def exit_status(self) -> int:
        """Exit code of the run, when it is over."""
        return int(pytest.ExitCode.USAGE_ERROR if self._session is None else self._session.exitstatus)

    @property
    def cases(self) -> Mapping[str, Case]:
        """Node id → what the test measures."""
        return self._cases

    def _check(self) -> None:
        options = base_options(self.config)
        if options.report is not None and not self.config.option.collectonly:
            from pytest_qsens.report.directory.write import check_directory

            check_directory(options.report, options.origins["report"])
        if options.model is None:
            for argument in selection(self.config)[:1]:
                raise QsensError(f"{argument} needs a model: add --qsens-model MODEL")
            return
        if not self.config.pluginmanager.hasplugin("syrupy"):
            raise QsensError("the scores are compared by syrupy, which is disabled: remove -p no:syrupy")
        check_distribution(self.config)
        if options.snapshot_prune and not updating(self.config):
            raise QsensError("--qsens-snapshot-prune removes lines from a snapshot, so it needs --snapshot-update")
        if options.snapshot_prune and options.restricted:
            raise QsensError(
                "--qsens-snapshot-prune removes what was not measured, so it needs a complete run: remove --qsens-ops, "
                "--qsens-max-ops and --qsens-shard"
            )
        if options.json is not None and not self.config.option.collectonly:
            from pytest_qsens.results import check_overwritable

            check_overwritable(options.json)
        if options.gitlab is not None and not self.config.option.collectonly:
            from pytest_qsens.report.gitlab import check_report

            check_report(options.gitlab)
        model = catalogue(self.config).model(options)
        check_selection(self.config, model, options)
        check_shard(model, options)
        check_ranks(self.config, model, options)
        check_limits(self.config, model, options)
        check_refinement(model, options)
        for name, sha256 in model.config_hashes.items():
            self._files[f"{name} of {model.label}"] = "this process", {"config": sha256}
        check_interactions(options)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Learn what is going to be measured, where no workers do it."""
        planned = plan(session)
        if planned is not None:
            try:
                self._prepare(planned)
            except QsensError as error:
                raise self._refused(error) from error

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: WorkerController) -> None:
        """Tell a worker how many there are on its machine, and listen to what it is going to measure.

        What is recorded here is what it compares with, wherever it is: there may be no snapshot, or an older one.
        """
        spec, specs = node.gateway.spec, node.nodemanager.specs
        channel = node.gateway.newchannel()
        # In the thread that receives: the plan is there when xdist handles the list of tests sent after it.
        channel.setcallback(partial(self._plans.__setitem__, node))
        node.workerinput.update(
            {
                "qsens_workers": workers_beside(spec, specs),
                "qsens_machine": machine(spec),
                "qsens_scattered": any(map(apart, specs)),
                SHARE: (position(node), len(specs)),
                CHANNEL: channel,
            }
        )
        options = base_options(self.config)
        if options.time_budget is not None:
            node.workerinput[LEFT] = left(self.config, options)
            node.workerinput[LATE] = any(run.results.keys() - run.lost for run in self.runs.values())
        if apart(spec):
            from pytest_qsens.snapshot import collect_texts

            directory = base_options(self.config).snapshot_dir
            node.workerinput[SNAPSHOTS] = (str(directory), collect_texts(directory))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Producer) -> object | None:
        """Schedule by block."""
        return self._scheduler(log) if base_options(config).model is not None else None

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: WorkerController) -> None:
        """Learn what is going to be measured; the first worker tells, all collect the same."""
        planned = self._plans.pop(node, None)
        if planned is None:
            return
        self._compare_files(node, planned["files"])
        if self._cases:
            return
        try:
            check_distribution(self.config)
            self._prepare(planned)
        except QsensError as error:
            self._stop(str(error))
        else:
            self._schedule_by_block()

    def _compare_files(self, node: WorkerController, files: Mapping[str, Mapping[str, str | None]]) -> None:
        """Stop before anything is measured if config, checkpoint or data of two processes differ, on any machines."""
        here = named(node.gateway.id, machine(node.gateway.spec))
        for label, found in files.items():
            there, known = self._files.setdefault(label, (here, found))
            for what, other in found.items():
                one = known[what]
                if None not in (one, other) and one != other:
                    self._stop(
                        f"{label}: {there} and {here} have not the same {what} (hashes {one} and {other}). Copy the "
                        "files of the one to the other, or give each the path of the right ones"
                    )

    def _schedule_by_block(self) -> None:
        """Take over from xdist's scheduler if the model is chosen in code alone, which shows only now."""
        from xdist.scheduler import LoadScheduling, WorkStealingScheduling  # type: ignore[import-untyped]  # no types

        session = self.config.pluginmanager.getplugin("dsession")
        if type(session.sched) in (LoadScheduling, WorkStealingScheduling) and not session.sched.has_pending:
            nodes, session.sched = session.sched.nodes, self._scheduler(session.log)
            for node in nodes:
                session.sched.add_node(node)

    def _scheduler(self, log: Producer) -> object:
        from pytest_qsens.scheduling import BlockScheduling

        workers = len(self.config.pluginmanager.getplugin("dsession").nodemanager.specs)
        refined = base_options(self.config).refined
        return BlockScheduling(self.config, log, self._cases, dealt=workers if refined else None)

    def _prepare(self, planned: Payload) -> None:
        self._cases.update({nodeid: Case(*case) for nodeid, case in planned["cases"].items()})
        for label, scheme, granularity, units, elsewhere, config in planned["models"]:
            run = self._run(Subject(label, scheme, granularity))
            run.ops = tuple(map(Op.from_plain, units))
            run.elsewhere = frozenset(elsewhere)
            run.config = config
        if planned["refusal"]:
            raise QsensError(planned["refusal"])
        self._show_progress()
        options = base_options(self.config)
        path = options.json or options.report
        if path is None:
            return
        chosen = self._chosen(options)
        if chosen not in self.runs and len(self.runs) > 1:
            names = ", ".join(map(_named, self.runs))
            what = "a result file" if options.json else "a report"
            raise QsensError(
                f"{path} cannot be written: {what} holds one model and scheme, this run has {names}. "
                "Select the tests of one with -k, or name the one to write with --qsens-model, and --qsens-scheme or "
                "--qsens-config"
            )
        self._reported = self.runs[chosen] if chosen in self.runs else next(iter(self.runs.values()))

    def _chosen(self, options: Options) -> Subject | None:
        """Tell what the options of the command line and the ini file are about."""
        if options.model is None:
            return None
        return Subject(self._model(options).label, options.label, options.granularity)

    def _show_progress(self) -> None:
        """Follow the tests of ops, unless nothing is to be printed: with ``-qq``, or without a terminal plugin."""
        terminal = self.config.pluginmanager.getplugin("terminalreporter")
        if terminal is not None and self.config.option.verbose >= -1 and not self.config.option.collectonly:
            from pytest_qsens.report.progress import Progress

            self.config.pluginmanager.register(Progress(terminal, self._cases), "qsens-progress")

    def _run(self, subject: Subject) -> Run:
        if subject not in self.runs:
            from pytest_qsens.snapshot import file_name

            model, scheme, granularity = subject
            path = base_options(self.config).snapshot_dir / model / file_name(scheme, granularity)
            self.runs[subject] = Run(model, scheme, path, granularity=granularity)
        return self.runs[subject]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take what a report carries, whichever process it comes from."""
        payload: Payload | None = getattr(report, "qsens", None)
        if payload is not None:
            if "abort" in payload:
                self._stop(payload["abort"], not_measured=payload.get("not_measured", False))
                return
            for facts in payload["facts"]:
                run = self._run(_subject(facts))
                run.facts.append(facts)
                # what an earlier version has cached tells none
                self.warnings |= {f"{run.model}: {warning}": None for warning in facts.get("warnings", ())}
                if run.contradictory:
                    self._stop(
                        f"{run.model}: it is not the same model, or not the same data, every time it is loaded: the "
                        "unquantized outputs differ. Seed what is random where it is made, such as weights and batches"
                    )
                    return
            for told in payload["profiles"]:  # a process measures ops and groups of one model in turn
                for subject, run in self.runs.items():
                    if subject[:2] == (told["model"], told["scheme"]):
                        run.profiles[told["process"]] = told["profile"]
            self.warnings |= dict.fromkeys(payload["warnings"])
            for record in payload["records"]:
                run = self._run(_subject(record))
                run.add(record, passed=report.passed)
                run.failing.update([record["result"]["op"]] * report.failed)
        elif report.when not in ("setup", "call", "teardown") and report.failed:
            # xdist's report of a worker that died: "worker 'gw0' crashed while running ...". A plugin that repeats
            # the test makes another outcome of it.
            self._crashed(report.nodeid, str(report.longrepr))

    def _crashed(self, nodeid: str, reason: str) -> None:
        case = self._cases.get(nodeid)
        if case is not None:
            self._run(case.subject).crashed(case.op, reason)

    def _stop(self, message: str, *, not_measured: bool = False) -> None:
        if self._abort is None:
            self._abort, self._not_measured = message, not_measured
        distributed = self.config.pluginmanager.getplugin("dsession")
        if distributed is not None:
            distributed.shouldstop = _STOPPED
        elif self._session is not None:
            self._session.shouldstop = _STOPPED

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note that a test asks for something that cannot be; pytest prints it as a collection error."""
        self._unusable = self._unusable or "abort" in getattr(report, "qsens", {})

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport | pytest.CollectReport) -> tuple[str, str, str] | None:
        """Leave a stopped run's tests out of the listing: none of them ran, and the error is printed once."""
        stopped = isinstance(report, pytest.TestReport) and "abort" in getattr(report, "qsens", {})
        return ("", "", "") if stopped else None

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, object, object]:
        """Finish after all others, as syrupy adds to the exit code, and also if one of them raises."""
        try:
            result = yield
        except BaseException:  # such as a warning of another plugin, where warnings are errors
            self._finish(session)
            terminal = self.config.pluginmanager.getplugin("terminalreporter")
            if terminal is not None:  # pytest does not come to its summary
                terminal.write_line("")  # ends the line of progress
                self.pytest_terminal_summary(terminal)
            raise
        self._finish(session)
        return result

    def _finish(self, session: pytest.Session) -> None:
        """Write files and settle the exit code."""
        if self._abort is not None or self._unusable:
            session.exitstatus = NOT_MEASURED if self._not_measured else pytest.ExitCode.USAGE_ERROR
            return
        if self.config.option.collectonly:
            return
        self.wall_seconds = time.perf_counter() - self._start
        active = [run for run in self.runs.values() if run.results]
        self._judge(active)
        if active and self._reported is not None:
            self._guarded(partial(self._write_results, self._reported))
        if active:
            self._guarded(partial(self._write_gitlab, active))
        if active and not any(
            result.status in ("measured", "estimated") for run in active for result in run.results.values()
        ):
            self.problems.append("nothing was measured")
            self._unjudged += 1
        if active and self._reported is not None:
            self._guarded(partial(self._write_report, self._reported, session))
        self._trim_cache()
        if self.problems and session.exitstatus == pytest.ExitCode.OK:
            known = len(self.problems) > self._unjudged
            session.exitstatus = pytest.ExitCode.TESTS_FAILED if known else NOT_MEASURED

    def _judge(self, active: list[Run]) -> None:
        """Ask the gates of whole runs, and write the snapshots."""
        for run in active:
            self._guarded(partial(self._remember, run))
        for run in self.runs.values():  # of one without any result, too: gates that saw nothing do not hold
            self._guarded(partial(self._predict, run))
            self._judge_joint(run)
            self._guarded(partial(self._judge_ranks, run))
        for run in active:
            self._guarded(partial(self._write_snapshot, run))

    def _trim_cache(self) -> None:
        """Keep the cache within its size, by what was not used for the longest time."""
        options = base_options(self.config)
        cache_dir = options.cache_dir()
        used = {Path(path) for run in self.runs.values() for facts in run.facts for path in facts["used"]}
        if cache_dir is not None and used:
            trim(cache_dir, parse_memory(options.cache_size, "cache_size"), used)

    def _guarded(self, write: Callable[[], None]) -> None:
        try:
            write()
        except QsensError as error:
            self.problems.append(str(error))

    def _predict(self, run: Run) -> None:
        """Put what interactions say of the whole model beside what was measured of it."""
        if base_options(self.config).interactions and run.total is not None:
            from pytest_qsens.interactions import with_prediction

            ops = run.listed(lambda _: "not run")
            run.results[TOTAL] = with_prediction(run.total, ops, run.model) or run.total

    def _judge_joint(self, run: Run) -> None:
        """Judge what single ops say of the whole model."""
        run.joint = [gate.judge(run.total) for gate in base_options(self.config).gates.joint]
        for verdict in run.joint:
            if verdict.state != "held":
                self.problems.append(f"interactions of {run.model} {run.scheme}: {verdict}")
                self._unjudged += verdict.state == "not judged"

    def _judge_ranks(self, run: Run) -> None:
        """Compare the order of the ops with the snapshot's, as that is before it is updated."""
        gates = base_options(self.config).gates.ranks
        if not gates:
            return
        from pytest_qsens.rank_gates import judge_ranks
        from pytest_qsens.snapshot import load

        recorded = load(run.path, model=run.model, scheme=run.scheme, granularity=run.granularity).ops
        mode = run.mode if run.facts else base_options(self.config).mode
        # what would be added to a config has no place in the order of what is in it
        ops = [op for op in run.ops if op.name not in run.unquantized and ADDED_AS not in run.schemes.get(op.name, "")]
        found = judge_ranks(gates, ops, recorded, run.measured, MODES[mode])
        if updating(self.config):  # a part can be accepted, too, and what is not recorded has no order yet
            found = [verdict for verdict in found if verdict.state != "not judged"]
        if self._accepts_all:
            found = [replace(verdict, state="accepted") if verdict.state == "failed" else verdict for verdict in found]
        run.ranks = found
        for verdict in found:
            if verdict.state in ("failed", "not judged"):
                next_step = "; measure all ops, or give this run only thresholds, such as --qsens-fail nmse:5%"
                self.problems.append(
                    f"the order of the ops of {run.model} {run.scheme}: {verdict}"
                    f"{next_step * (verdict.state == 'not judged')}"
                )
                self._unjudged += verdict.state == "not judged"

    @property
    def _accepts_all(self) -> bool:
        """Whether the snapshot takes what got worse, and not only what is new."""
        return updating(self.config) and bool(self.config.getoption("update_snapshots"))

    def _write_snapshot(self, run: Run) -> None:
        from pytest_qsens.snapshot import changed, environment_diff, load, merge, prune, with_other_schemes, write

        kept = self._kept(run)
        news = ""

        def update(old: Snapshot) -> Snapshot:
            nonlocal news
            # An order that is accepted is that of all scores, of those within their thresholds, too.
            reordered = any(verdict.state == "accepted" for verdict in run.ranks)
            moved = with_other_schemes(old, run.compared) if self._accepts_all else {}
            new = merge(old, run.compared if reordered else {**moved, **run.entries})
            if kept is not None:
                new = prune(new, kept)
            if environment_diff(old.environment, run.environment):
                new = self._moved(new, run)
            # syrupy's count misses the lines of a worker that died, and those that only move with the environment.
            count = len(changed(old, new))
            removed = len(old.ops.keys() - new.ops.keys())
            news = f" ({count} line{'s' * (count != 1)} new or changed{f', {removed} removed' * bool(removed)})"
            return new

        changing = updating(self.config) and (run.compared or kept is not None)
        kind = {"model": run.model, "scheme": run.scheme, "granularity": run.granularity}
        if changing and write(run.path, update, **kind):
            self.written[run.path] = news
        now = load(run.path, **kind)
        if now.ops and run.facts:
            run.mismatch = environment_diff(now.environment, run.environment)
        run.gone = sorted(set(now.ops) - {TOTAL} - {op.name for op in run.ops}) if run.ops else []
        run.moved = {
            name: (entry.scheme or "not recorded", run.schemes[name])
            for name, entry in now.ops.items()
            if name in run.schemes
            and run.schemes[name] != entry.scheme
            # what it would cost to add it may have been measured by another run
            and not (name in run.unquantized and (entry.scheme or "").startswith("unquantized"))
        }

    def _moved(self, snapshot: Snapshot, run: Run) -> Snapshot:
        """Replace the environment, and all lines with it, if this run may and has measured all of them in one place."""
        from pytest_qsens.snapshot import adopt, changed

        if snapshot.environment and len(run.environments) != 1:
            return snapshot
        moved = adopt(snapshot, run.compared, run.environment)
        return snapshot if not self._accepts_all and changed(snapshot, moved) else moved

    def _kept(self, run: Run) -> set[str] | None:
        """Ops to keep when pruning; ``None`` if nothing may be removed."""
        run.pruned = base_options(self.config).snapshot_prune
        if not run.pruned:
            return None
        wanted = [op.name for op in run.ops if op.name not in run.unquantized]
        missing = [name for name in wanted if name not in run.results or run.results[name].status == "failed"]
        if missing:
            self.problems.append(
                f"{run.path} was not pruned: {len(missing)} ops were not measured in this run, such as {missing[0]}"
            )
            return None
        return {result.op for result in run.measured}

    def _write_results(self, run: Run) -> None:
        from pytest_qsens.results import write

        path = base_options(self.config).json
        if path is not None:
            write(path, self.result(run))
            self.written[path] = ""

    def _remember(self, run: Run) -> None:
        """Keep the snapshot as it is, for a report to compare with."""
        if base_options(self.config).report is not None:
            from pytest_qsens.snapshot import load

            run.recorded = load(run.path, model=run.model, scheme=run.scheme, granularity=run.granularity)

    def _write_report(self, run: Run, session: pytest.Session) -> None:
        options = base_options(self.config)
        if options.report is not None:
            from pytest_qsens.report.directory.of_run import report_of
            from pytest_qsens.report.directory.write import write_report

            interrupted = session.exitstatus == pytest.ExitCode.INTERRUPTED
            try:
                write_report(options.report, report_of(self, run, interrupted=interrupted))
            except QsensError:
                raise
            except Exception as error:  # scores are written, the summary is yet to come: worth more than a picture
                raise QsensError(f"no report could be made: {told(error)}") from error
            self.written[options.report / "report.html"] = ""

    def result(self, run: Run) -> RunResult:
        """Put what is known of a run together as result files have it."""
        from pytest_qsens.results import Cost, RunInfo, RunResult

        options = base_options(self.config)
        chosen: set[str] = set()
        if (run.model, run.scheme, run.granularity) == self._chosen(options):
            chosen = {op.name for op in select(self._model(options), options)}

        def reason(op: Op) -> str:
            if op.name in run.elsewhere:
                return ELSEWHERE
            return "not run" if not chosen or op.name in chosen else "not selected by --qsens-ops or --qsens-max-ops"

        total = run.total
        if total is None:
            why = "not run" if wants_total(options) else "only some ops were asked for"
            total = _without_score(Op(TOTAL, TOTAL), "unrun", ELSEWHERE if TOTAL in run.elsewhere else why)
        info = RunInfo(
            model=run.model,
            scheme=run.scheme,
            engine="+".join(run.engines) or options.engine,
            mode=run.mode if run.facts else options.mode,
            environment=run.environment,
            cost=Cost(self.wall_seconds, run.reference_seconds, run.forwards_per_op),
            engine_reason=run.engine_reason,
            data=run.data,
            profile=run.profile,
            reference=run.reference,
            checkpoint=run.checkpoint,
            shard=options.shard,
            cached=len(run.cached),
            granularity=run.granularity,
            config=run.config["about"] if run.config else None,
        )
        ops, joint = run.listed(reason), None
        if options.interactions:
            from pytest_qsens.interactions import matrix

            joint = matrix(ops, run.model)
        return RunResult(info, ops, total, joint)

    def _write_gitlab(self, active: list[Run]) -> None:
        path = base_options(self.config).gitlab
        if path is None:
            return
        from pytest_qsens.report.gitlab import code_quality

        write_atomically(path, code_quality(active, Path(os.environ.get("CI_PROJECT_DIR") or self.config.rootpath)))
        self.written[path] = ""

    def _model(self, options: Options) -> Model:
        return catalogue(self.config).known(options.run_spec)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Tell what was found."""
        if self._abort is None and not self.config.option.collectonly:
            from pytest_qsens.report.terminal import report

            report(terminalreporter, self)

    def pytest_unconfigure(self) -> None:
        """Print why the run was stopped, as pytest prints usage errors: last, and with or without a terminal plugin."""
        if self._abort is not None:
            print(f"ERROR: qsens: {self._abort}", file=sys.stderr)  # noqa: T201  # what pytest's own main does
