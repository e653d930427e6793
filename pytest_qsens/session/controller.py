"""The process that sees every report: what becomes of a run, from its start to its exit code."""

from __future__ import annotations

import sys
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest

from pytest_qsens.collection.plan import plan
from pytest_qsens.collection.subjects import Case, Subject
from pytest_qsens.errors import QsensError
from pytest_qsens.given_options import base_options
from pytest_qsens.ops import Op
from pytest_qsens.session.judgement import judge_joint, judge_order, predict
from pytest_qsens.session.outputs import trim_cache, write_directory, write_gitlab, write_results
from pytest_qsens.session.problems import Problems
from pytest_qsens.session.recording import remember, write_snapshot
from pytest_qsens.session.result import chosen
from pytest_qsens.session.run import Run
from pytest_qsens.session.start import check_start
from pytest_qsens.time_budget import NOT_MEASURED

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from pytest_qsens.results import Payload

_STOPPED = "nothing can be measured, see the error below"


class Controller:
    """Registered in every process but xdist's workers. Does nothing unless a report carries something of ours."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.runs: dict[Subject, Run] = {}
        self.problems = Problems()
        self.written: dict[Path, str] = {}
        """Files, and how much in them is new."""
        self.warnings: dict[str, None] = {}
        """What was told about the cache and the models, each once."""
        self.wall_seconds = 0.0
        self._abort: str | None = None
        self._refusal: str | None = None
        self._unusable = self._not_measured = False
        self.cases: dict[str, Case] = {}
        """Node id → what the test measures."""
        self._reported: Run | None = None
        """What goes into the result file."""
        self._session: pytest.Session | None = None
        self._start = time.perf_counter()

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Refuse what cannot work, before xdist starts its workers (`DSession` does that last)."""
        self._session = session
        try:
            check_start(self.config)
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

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Learn what is going to be measured, where no workers do it."""
        planned = plan(session)
        if planned is not None:
            try:
                self.prepare(planned)
            except QsensError as error:
                raise self._refused(error) from error

    def prepare(self, planned: Payload) -> None:
        """Take what is going to be measured, as `pytest_qsens.collection.plan.plan` tells it.

        Raises:
            QsensError: If all of it together cannot be.

        """
        self.cases.update({nodeid: Case(*case) for nodeid, case in planned["cases"].items()})
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
        named = chosen(self.config)
        if named not in self.runs and len(self.runs) > 1:
            names = ", ".join(map(_named, self.runs))
            what = "a result file" if options.json else "a report"
            raise QsensError(
                f"{path} cannot be written: {what} holds one model and scheme, this run has {names}. "
                "Select the tests of one with -k, or name the one to write with --qsens-model, and --qsens-scheme or "
                "--qsens-config"
            )
        self._reported = self.runs[named] if named in self.runs else next(iter(self.runs.values()))

    def _show_progress(self) -> None:
        """Follow the tests of ops, unless nothing is to be printed: with ``-qq``, or without a terminal plugin."""
        terminal = self.config.pluginmanager.getplugin("terminalreporter")
        if terminal is not None and self.config.option.verbose >= -1 and not self.config.option.collectonly:
            from pytest_qsens.report.progress import Progress

            self.config.pluginmanager.register(Progress(terminal, self.cases), "qsens-progress")

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
                self.stop(payload["abort"], not_measured=payload.get("not_measured", False))
                return
            for facts in payload["facts"]:
                run = self._run(_subject(facts))
                run.facts.append(facts)
                # what an earlier version has cached tells none
                self.warnings |= {f"{run.model}: {warning}": None for warning in facts.get("warnings", ())}
                if run.contradictory:
                    self.stop(
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
        case = self.cases.get(nodeid)
        if case is not None:
            self._run(case.subject).crashed(case.op, reason)

    def stop(self, message: str, *, not_measured: bool = False) -> None:
        """End the run: nothing of it counts. ``not_measured`` if nothing given to it is wrong."""
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
            self.problems.guarded(partial(write_results, self, self._reported))
        if active:
            self.problems.guarded(partial(write_gitlab, self, active))
        if active and not any(
            result.status in ("measured", "estimated") for run in active for result in run.results.values()
        ):
            self.problems.add("nothing was measured", unjudged=True)
        if active and self._reported is not None:
            self.problems.guarded(partial(write_directory, self, self._reported, session))
        trim_cache(self.runs.values(), base_options(self.config))
        if session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = self.problems.exit_status

    def _judge(self, active: list[Run]) -> None:
        """Ask the gates of whole runs, and write the snapshots."""
        options = base_options(self.config)
        for run in active:
            self.problems.guarded(partial(remember, run, options))
        for run in self.runs.values():  # of one without any result, too: gates that saw nothing do not hold
            self.problems.guarded(partial(predict, run, options))
            judge_joint(run, options, self.problems)
            self.problems.guarded(partial(judge_order, run, self.config, self.problems))
        for run in active:
            self.problems.guarded(partial(write_snapshot, run, self.config, self.problems, self.written))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Tell what was found."""
        if self._abort is None and not self.config.option.collectonly:
            from pytest_qsens.report.terminal import report

            report(terminalreporter, self)

    def pytest_unconfigure(self) -> None:
        """Print why the run was stopped, as pytest prints usage errors: last, and with or without a terminal plugin."""
        if self._abort is not None:
            print(f"ERROR: qsens: {self._abort}", file=sys.stderr)  # noqa: T201  # what pytest's own main does


def _subject(payload: Payload) -> Subject:
    return Subject(payload["model"], payload["scheme"], payload["granularity"])


def _named(subject: Subject) -> str:
    return " ".join(subject[:2] if subject.granularity == "op" else subject)
