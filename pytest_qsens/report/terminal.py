"""The section of a run in pytest's terminal summary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.given_options import base_options
from pytest_qsens.report import profile
from pytest_qsens.report.accepting import accepting
from pytest_qsens.report.attention import attention
from pytest_qsens.report.counts import config_line, cost, outcomes, sources
from pytest_qsens.report.findings import findings
from pytest_qsens.report.heat import BLOCKS, LETTERS
from pytest_qsens.report.lines import Lines
from pytest_qsens.report.ranking import heat_of, top, worst_ops
from pytest_qsens.report.repeating import repeating

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

    from pytest_qsens.session.controller import Controller
    from pytest_qsens.session.run import Run


def report(terminal: pytest.TerminalReporter, controller: Controller) -> None:
    """Write a section for each (model, scheme) of the run; with ``-q`` only what needs attention."""
    config = controller.config
    lines = Lines(terminal)
    for run in controller.runs.values():
        if not run.results:
            continue
        engine = f", engine {'+'.join(run.engines)}" if run.engines else ""
        shard = f", shard {chosen}" if (chosen := base_options(config).shard) else ""
        groups = "" if run.granularity == "op" else f", granularity {run.granularity}"
        what = "scheme" if run.config is None else "config"
        lines.title(f"qsens: model {run.model}, {what} {run.scheme}{groups}{engine}{shard}")
        lines.write(outcomes(run))
        if run.config is not None and config.option.verbose >= 0:
            lines.write(config_line(run, run.config))
        if run.cached:
            lines.write(sources(run))
        if config.option.verbose >= 0:
            worst = worst_ops(run, lines.width, "█" if lines.can_write("█") else "#")
            heat = heat_of(run, lines.width, BLOCKS if lines.can_write(BLOCKS) else LETTERS)
            for line in (*worst, *heat, *top(run, config, lines.width), *_order(run)):
                lines.write(line)
        for line in attention(run, gated=base_options(config).gate_estimates):
            lines.write(line, yellow=True)
        _repeat(lines, controller, run)
        for line in _costs(run, controller):
            lines.write(line)
        if command := accepting(controller, run):
            lines.write(f"accept with: {command}", whole=True, bold=True)
    _end(lines, controller)


def _repeat(lines: Lines, controller: Controller, run: Run) -> None:
    if command := repeating(controller, run, findings(run)):
        lines.write(f"repeat with: {command}", whole=True, bold=True)


def _end(lines: Lines, controller: Controller) -> None:
    for warning in controller.warnings:
        lines.write(f"qsens: {warning}", yellow=True)
    for path, news in controller.written.items():
        lines.write(f"qsens: wrote {path}{news}", whole=True)
    for problem in controller.problems.messages:
        lines.write(f"qsens: {problem}", red=True)


def _order(run: Run) -> Iterator[str]:
    """Tell what gates of the whole run found, if nobody has to do anything about it: else it is a problem of all."""
    yield from (f"order of ops: {verdict}" for verdict in run.ranks if verdict.state in ("held", "accepted"))
    yield from (f"interactions: {verdict}" for verdict in run.joint if verdict.state == "held")


def _costs(run: Run, controller: Controller) -> Iterator[str]:
    if controller.config.option.verbose >= 0 and run.reference_seconds is not None:
        yield cost(run, controller.wall_seconds)
    if run.profile is not None:
        yield from profile.table(run.profile)
