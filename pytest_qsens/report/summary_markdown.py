"""A run in Markdown: the verdict, what got worse, the most sensitive ops, and what to do next."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_qsens.given_options import base_options
from pytest_qsens.ops import TOTAL
from pytest_qsens.report.accepting import accepting
from pytest_qsens.report.attention import notes
from pytest_qsens.report.counts import config_line, cost
from pytest_qsens.report.findings import FAILING, SAID, counts, findings, said
from pytest_qsens.report.markdown import code, escaped, table
from pytest_qsens.report.measures import by_score, measure_of, score
from pytest_qsens.report.places import relative
from pytest_qsens.report.ranking import WORST
from pytest_qsens.report.repeating import repeating
from pytest_qsens.time_budget import NOT_MEASURED
from pytest_qsens.wording import count, score_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_qsens.report.findings import Finding
    from pytest_qsens.report.measures import Measure
    from pytest_qsens.results import OpResult
    from pytest_qsens.session.controller import Controller
    from pytest_qsens.session.run import Run
    from pytest_qsens.thresholds import Comparison

ROWS = 100
"""Ops that fail in one table."""

_REASON = 300
"""Characters of an explanation."""

_OTHERS = {"estimated": "estimated", "unexercised": "not exercised"}


def document(controller: Controller) -> list[str]:
    """Lines of the document, the most important ones first, so that it can be cut at the end."""
    runs = [run for run in controller.runs.values() if run.results]
    found = {id(run): findings(run) for run in runs}
    lines = [f"## {headline(controller, [finding for run in runs for finding in found[id(run)]])}"]
    for run in [] if controller.stopped else runs:
        lines += ["", *_section(controller, run, found[id(run)])]
    tail = [*controller.problems.messages, *(f"{warning}" for warning in controller.warnings)]
    if tail:
        lines += ["", *(f"- {escaped(line)}" for line in tail)]
    return lines


def headline(controller: Controller, found: list[Finding]) -> str:
    """Say in one line how the run ended."""
    status = controller.exit_status
    if controller.stopped:
        mark = "⌛" if status == NOT_MEASURED else "❌"
        return f"{mark} qsens: not measured, exit code {status}: {escaped(_short(controller.stopped))}"
    kinds = [finding.kind for finding in found if finding.op != TOTAL]
    parts = [said(kind, kinds.count(kind)) for kind in FAILING if kind in kinds]
    parts += [f"the whole model {SAID[f.kind].one}" for f in found if f.op == TOTAL]
    parts += [escaped(_short(controller.problems.messages[0]))] if controller.problems.messages and not parts else []
    verdict = ", ".join(parts)
    results = [result for run in controller.runs.values() for op, result in run.results.items() if op != TOTAL]
    ops = _with(results, "measured")
    if status in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR):
        how = "interrupted" if status == pytest.ExitCode.INTERRUPTED else "ended by an internal error"
        return f"⚠️ qsens: {how} after {count(ops, 'op')}, exit code {status}{f': {verdict}' * bool(verdict)}"
    if verdict:
        return f"❌ qsens: {verdict}"
    if not results and not any(run.total for run in controller.runs.values()):
        return f"⚠️ qsens: nothing was measured, exit code {status}"
    others = [f"{number} {said}" for status_, said in _OTHERS.items() if (number := _with(results, status_))]
    also = "" if status == 0 else f"; pytest ended with exit code {status} for other reasons"
    what = "nothing that was measured" if others else "nothing"
    measured = ", ".join([f"{count(ops, 'op')} measured", *others])
    return f"✅ qsens: {what} got worse, {measured}{also}"


def _with(results: list[OpResult], status: str) -> int:
    return sum(result.status == status for result in results)


def _section(controller: Controller, run: Run, found: list[Finding]) -> Iterator[str]:
    groups = "" if run.granularity == "op" else f", granularity {run.granularity}"
    what = "scheme" if run.config is None else "config"
    yield f"### {escaped(run.model)}, {what} {escaped(run.scheme)}{groups}, engine {'+'.join(run.engines) or 'none'}"
    if run.config is not None:
        yield ""
        yield escaped(config_line(run, run.config))
    yield ""
    counted = counts(run, found)
    yield from table(list(counted), [list(map(str, counted.values()))], numbers=len(counted))
    failing = [finding for finding in found if finding.kind in FAILING]
    accepted = [op for op, verdict in run.verdicts.items() if verdict.kind != "ok" and op in run.entries]
    if accepted:
        yield ""
        path = relative(run.path, controller.config.rootpath) or str(run.path)
        yield f"{len(accepted)} scores were accepted into {escaped(path)}."
    if failing:
        yield ""
        yield from _failing(run, failing)
    worst = list(_worst(run))
    if worst:
        yield ""
        yield from worst
    yield ""
    yield from _notes(controller, run)
    yield from _next(controller, run, failing)


def _failing(run: Run, failing: list[Finding]) -> Iterator[str]:
    head = ["op", "what", *(["scheme"] if run.config is not None else []), "metric", "snapshot", "now", "limit"]
    rows = []
    for finding in failing[:ROWS]:
        first = [finding.op, finding.kind, *([finding.scheme or ""] if run.config is not None else [])]
        rows += [first + rest for rest in _compared(finding)]
    yield from table(head, rows, numbers=3)
    if len(failing) > ROWS:
        yield ""
        yield f"and {len(failing) - ROWS} more"


def _compared(finding: Finding) -> Iterator[list[str]]:
    """Cells of an op: one row for every metric that decided, or one with the reason why there is no score."""
    told = (finding.kind, "regressed") if finding.kind == "exceeded" else (finding.kind,)
    decided = [found for found in finding.compared if found.kind in told]
    if finding.kind in ("failed", "lost") or not decided:
        yield [_short("; ".join(finding.lines)), "", "", ""]
    for found in decided:
        yield [f"{found.mode} {found.metric}", *_values(found)]


def _values(found: Comparison) -> list[str]:
    if found.kind == "new":
        return ["none", score_text(found.new), ""]
    if found.kind == "exceeded":
        measured = ["not measured", ""] if found.limit is None else [score_text(found.new), score_text(found.limit)]
        return ["", *measured]
    if found.limit is None:
        return [score_text(found.old), "not measured", ""]
    change = ""
    if found.new is not None and found.old:
        percent = (found.new - found.old) / abs(found.old) * 100
        digits = 1 if abs(percent) < 100 else 0
        change = f" ({found.new - found.old:+.3g} dB)" if found.metric == "sqnr_db" else f" ({percent:+.{digits}f} %)"
    return [score_text(found.old), f"{score_text(found.new)}{change}", score_text(found.limit)]


def _worst(run: Run) -> Iterator[str]:
    """Table of the ops that hurt most, and what the whole model comes to."""
    known = [result for result in (*run.measured, *run.estimated) if result.modes]
    measure = measure_of(known)
    if measure is not None:
        ranked = by_score(known, measure)[:WORST]
        schemes = ["scheme"] if run.config is not None else []
        metrics = measure.metric if measure.also is None else f"{measure.metric} or {measure.also.metric}"
        yield f"Most sensitive, {measure.modes} (higher {metrics} is worse):"
        yield ""
        rows = [[result.op, *([result.scheme or ""] * bool(schemes)), *_scores(result, measure)] for result in ranked]
        yield from table(["op", *schemes, metrics, "SQNR in dB"], rows, numbers=2)
    total = run.total
    if total is not None and total.isolated is not None:
        yield ""
        yield f"Everything quantized: nmse {score_text(total.isolated['nmse'])}, SQNR {_decibels(total.isolated)} dB."


def _scores(result: OpResult, measure: Measure) -> list[str]:
    mode = measure.of(result).mode
    value = score_text(score(result, measure)) + f" ({mode})" * (measure.also is not None)
    if mode in result.intervals:
        low, high = result.intervals[mode]
        value += f" (estimated, {low:.3g} to {high:.3g})"
    return [value, _decibels(result.modes[mode])]


def _decibels(scores: dict[str, float | None]) -> str:
    value = scores.get("sqnr_db")
    return "infinite" if value is None else f"{value:.1f}"


def _notes(controller: Controller, run: Run) -> Iterator[str]:
    for line in notes(run, gated=base_options(controller.config).gate_estimates):
        yield f"{'  ' * line.startswith('  ')}- {escaped(_short(line.strip()))}"
    if run.reference_seconds is not None:
        yield f"- {escaped(cost(run, controller.wall_seconds))}"


def _next(controller: Controller, run: Run, failing: list[Finding]) -> Iterator[str]:
    """Give the commands that repeat what failed, and that accept what is worse or new."""
    if command := repeating(controller, run, failing):
        yield ""
        yield "Repeat what failed:"
        yield ""
        yield from code(command, "sh")
    if command := accepting(controller, run):
        yield ""
        yield "If that is meant, accept it and commit the snapshot:"
        yield ""
        yield from code(command, "sh")


def _short(text: str) -> str:
    return text if len(text) <= _REASON else f"{text[:_REASON]} ..."
