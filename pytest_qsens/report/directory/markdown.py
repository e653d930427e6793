"""The report in Markdown: what a comment on a pull request, or a terminal, shows of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.report.diff import SAID
from pytest_qsens.report.directory.contents import STATUSES, ranked
from pytest_qsens.report.markdown import escaped
from pytest_qsens.report.measures import score
from pytest_qsens.report.numbers import decibels, short

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_qsens.diff import Diff
    from pytest_qsens.report.directory.contents import Report

MARK = "<!-- pytest-qsens report -->"
"""First line of the file, by which it is known as ours."""

_WORST = 20
_CHANGES = 40
_SIGNS = {"passed": "✅", "failed": "❌", "open": "⚪"}


def as_markdown(report: Report) -> str:
    """Give the text of the file."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    run, judgement = report.result.run, report.judgement
    yield MARK
    yield f"# {escaped(report.title)}"
    yield ""
    yield f"**{_SIGNS[judgement.level]} {escaped(judgement.headline)}**"
    yield ""
    yield from (f"- {escaped(reason)}" for reason in judgement.reasons if reason)
    for what, command in judgement.commands:
        yield f"- {escaped(what)}{f': {_code(command)}' if command else ''}"
    yield ""
    counts = ", ".join(f"{number} {status}" for status, number in report.counts.items())
    groups = "" if run.granularity == "op" else f", granularity {escaped(run.granularity)}"
    units = f"{len(report.result.ops)} {'groups' if groups else 'ops'}"
    yield f"{units}: {counts}. Mode {run.mode}, engine {escaped(run.engine)}{groups}."
    total = report.result.total
    if total is not None and total.isolated is not None:
        scores = total.isolated
        yield f"Everything quantized at once: NMSE {short(scores.get('nmse'))}, SQNR {decibels(scores)}."
    yield ""
    yield from _limits(report)
    yield from _worst(report)
    yield from _changes(report)
    yield from _statuses(report)
    yield from _environment(report)


def _limits(report: Report) -> Iterator[str]:
    if not (report.limits or report.exceeded):
        return
    yield "## Limits"
    yield ""
    yield f"{escaped(report.limits_told)}"
    if report.exceeded:
        yield ""
        yield "| op | past a limit |"
        yield "|---|---|"
    for finding in report.exceeded[:_CHANGES]:
        yield f"| {escaped(finding.op)} | {'<br>'.join(map(escaped, finding.lines))} |"
    if len(report.exceeded) > _CHANGES:
        yield ""
        yield f"and {len(report.exceeded) - _CHANGES} more; all are in `report.csv`"
    yield ""


def _worst(report: Report) -> Iterator[str]:
    measure, ops = report.measure, ranked(report.result)
    if measure is None:
        return
    yield f"## Most sensitive of {len(ops)}"
    yield ""
    yield f"{measure.meaning} Higher is worse; all are in `report.csv`."
    yield ""
    schemes = report.result.run.config is not None  # then each op has one of its own
    yield f"| # | op | type |{' scheme |' * schemes} {measure.name} | SQNR | status |"
    yield f"|--:|---|---|{'---|' * schemes}--:|--:|---|"
    for place, op in enumerate(ops[:_WORST], 1):
        mode = measure.of(op).mode
        scores = op.modes[mode]
        value = short(score(op, measure))
        if measure.also is not None:
            value += f" ({mode})"
        if mode in op.intervals:
            low, high = op.intervals[mode]
            value += f" (nmse {low:.3g} to {high:.3g})"
        what = f"{escaped(op.type)} | {escaped(op.scheme or '')}" if schemes else escaped(op.type)
        yield f"| {place} | {escaped(op.op)} | {what} | {value} | {decibels(scores)} | {op.status} |"
    yield ""


def _changes(report: Report) -> Iterator[str]:
    yield "## What changed"
    yield ""
    if report.changes is None:
        yield f"{escaped(report.uncompared or 'Nothing to compare with')}"
    else:
        yield from _listed_changes(report, report.changes)
    yield ""


def _listed_changes(report: Report, changes: Diff) -> Iterator[str]:
    rules = f", by {escaped(report.rules)}"
    counts = ", ".join(f"{number} {said}" for said, number in report.change_counts)
    yield f"Against {escaped(changes.old.name)}{rules}: {counts or 'no op to compare'}."
    yield from (f"- {escaped(note)}" for note in changes.notes)
    found = report.changed
    if found:
        yield ""
        yield "| change | op | scores |"
        yield "|---|---|---|"
    for change in found[:_CHANGES]:
        yield f"| {SAID[change.kind]} | {escaped(change.op)} | {'<br>'.join(map(escaped, change.lines))} |"
    if len(found) > _CHANGES:
        yield ""
        yield f"and {len(found) - _CHANGES} more; all are in `report.csv`"


def _statuses(report: Report) -> Iterator[str]:
    without = [op for op in report.result.ops if op.status not in ("measured", "estimated")]
    if not without:
        return
    yield "## Without a score"
    yield ""
    for status, number in report.counts.items():
        if status not in ("measured", "estimated"):
            yield f"- {number} {status}: {STATUSES[status]}"
    yield ""
    shown = [op for op in without if op.status not in ("unrun", "unquantized")]
    if not shown:
        return
    yield "| op | status | reason |"
    yield "|---|---|---|"
    yield from (f"| {escaped(op.op)} | {op.status} | {escaped(op.reason or '')} |" for op in shown[:_WORST])
    if len(shown) > _WORST:
        yield ""
        yield f"and {len(shown) - _WORST} more"
    yield ""


def _environment(report: Report) -> Iterator[str]:
    run = report.result.run
    yield "## Where"
    yield ""
    yield "| | |"
    yield "|---|---|"
    facts = {**run.environment, **{f"config {name}": value for name, value in (run.config or {}).items()}}
    yield from (f"| {escaped(name)} | {escaped(value)} |" for name, value in facts.items())
    yield f"| wall time | {run.cost.wall_seconds:.1f} s |"


def _code(command: str) -> str:
    """Code span that no backtick in it ends."""
    fence = "`" * (1 + max((len(run) for run in _runs(command)), default=0))
    inside = command.replace("\n", " ")
    return f"{fence} {inside} {fence}" if "`" in inside else f"{fence}{inside}{fence}"


def _runs(text: str) -> Iterator[str]:
    found = ""
    for character in text:
        if character == "`":
            found += character
        elif found:
            yield found
            found = ""
    if found:
        yield found
