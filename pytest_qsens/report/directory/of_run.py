"""The report of a run that has just ended, from the process that sees all of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_qsens.collection.catalogue import catalogue
from pytest_qsens.details import Details
from pytest_qsens.diff import of_snapshot
from pytest_qsens.given_options import base_options, updating
from pytest_qsens.measure import bench
from pytest_qsens.ops import TOTAL
from pytest_qsens.report.accepting import accepting
from pytest_qsens.report.directory.channel_charts import wanted, without_ranges
from pytest_qsens.report.directory.contents import Judgement, Report, compared, suggestions, unit_of
from pytest_qsens.report.findings import FAILING, SAID, findings, said
from pytest_qsens.session.result import result_of
from pytest_qsens.wording import count

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

    from pytest_qsens.report.findings import Finding
    from pytest_qsens.results import RunResult
    from pytest_qsens.session.controller import Controller
    from pytest_qsens.session.run import Run


def report_of(controller: Controller, run: Run, *, interrupted: bool) -> Report:
    """Put the report of a run together; the model is loaded once more for ranges of channels, and samples of its data.

    Args:
        controller: What has seen the run.
        run: One model and scheme of it.
        interrupted: Whether the user has ended it: then nothing is loaded.

    """
    config = controller.config
    gates = base_options(config).gates
    result = result_of(run, config, controller.wall_seconds)
    if interrupted:
        details = Details(notes=("The run was interrupted, so ranges and samples of the data were not collected.",))
    else:
        details = _details(config, run, result)
    result = replace(result, details=details)
    place = _place(config, run)
    changes, uncompared = None, f"There was no snapshot {place} before this run, so there is nothing to compare with."
    if run.recorded is not None and run.recorded.ops:
        changes, why = compared(result, of_snapshot(run.recorded, place), gates.thresholds, run.verdicts)
        uncompared = why or ""
    found = tuple(findings(run))
    judgement = _judgement(controller, run, result, found, interrupted=interrupted)
    return Report(result, judgement, changes, uncompared or None, gates.thresholds, gates.limits, found)


def _details(config: pytest.Config, run: Run, result: RunResult) -> Details:
    """Look at what matters most in the model; without it the report is written all the same."""
    model = next((model for model in catalogue(config).models if model.label == run.model), None)
    if model is None:
        return Details(notes=("Ranges and samples are collected of a model that --qsens-model names, and not here.",))
    from pytest_qsens.ranges import details

    bench(config).release()  # two models may not fit
    found = details(model.source, wanted(result), base_options(config).device)
    note = without_ranges(result)
    return found if note is None else replace(found, notes=(*found.notes, note))


def _place(config: pytest.Config, run: Run) -> str:
    """Tell where the snapshot is, from the root directory."""
    root = config.rootpath
    return str(run.path.relative_to(root) if run.path.is_relative_to(root) else run.path)


def _judgement(
    controller: Controller, run: Run, result: RunResult, found: Sequence[Finding], *, interrupted: bool
) -> Judgement:
    """Say what became of the tests."""
    place, unit = _place(controller.config, run), unit_of(result)
    kinds = {finding.op: finding.kind for finding in found if finding.kind in FAILING and finding.op in run.failing}
    counted = Counter(kind for op, kind in kinds.items() if op != TOTAL)
    parts = [said(kind, counted[kind], unit) for kind in FAILING if counted[kind]]
    if others := len(run.failing - {TOTAL} - kinds.keys()):
        parts.append(f"{count(others, unit)} failed for another reason")
    reasons = [f"{len(run.failing)} of {count(len(run.results), 'test')} failed."] if run.failing else []
    if TOTAL in run.failing:
        what = SAID[kinds[TOTAL]].one if TOTAL in kinds else "failed for another reason"
        reasons.append(f"The whole model {what}.")
    reasons += [f"{problem[0].upper()}{problem[1:]}." for problem in controller.problems.messages]
    commands = suggestions(result, base_options(controller.config).report)
    if accept := accepting(controller, run):
        commands = (("Accept these scores, if they are as they should be", accept), *commands)
    if interrupted:
        left = sum(op.status == "unrun" for op in result.ops)
        return Judgement("failed", "Interrupted", (f"{count(left, unit)} not run.", *reasons), commands)
    if run.failing or controller.problems.messages:
        headline = "Failed" + (f": {', '.join(parts)}" if parts else "")
        return Judgement("failed", headline, tuple(reasons), commands)
    if updating(controller.config) and run.path in controller.written:
        return Judgement("passed", "Accepted", (f"Written to {place}{controller.written[run.path]}.",), commands)
    improved = sum(verdict.kind == "improved" for verdict in run.verdicts.values())
    better = f"; {count(improved, unit)} better" if improved else ""
    compared_ops = sum(op != TOTAL for op in run.verdicts)
    if not run.verdicts:
        return Judgement("open", "Nothing was compared", (f"No test compared a score with {place}.",), commands)
    told = f"{count(compared_ops, unit)} compared with {place}{better}."
    return Judgement("passed", f"Passed: no {unit} got worse", (told,), commands)
