"""The report of a run that has just ended, from the process that sees all of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_qsens.collect import base_options, catalogue, updating
from pytest_qsens.compare import count
from pytest_qsens.details import Details
from pytest_qsens.diff import of_snapshot
from pytest_qsens.measure import accept_command, bench
from pytest_qsens.ops import TOTAL
from pytest_qsens.report.directory.charts import wanted
from pytest_qsens.report.directory.contents import Judgement, Report, compared, ranked, suggestions

if TYPE_CHECKING:
    import pytest

    from pytest_qsens.controller import Controller, Run
    from pytest_qsens.results import RunResult

_SAID = {"regressed": "got worse", "new": "new: the snapshot has no line"}


def report_of(controller: Controller, run: Run, *, interrupted: bool) -> Report:
    """Put the report of a run together; the model is loaded once more for ranges of channels, and samples of its data.

    Args:
        controller: What has seen the run.
        run: One model and scheme of it.
        interrupted: Whether the user has ended it: then nothing is loaded.

    """
    config = controller.config
    thresholds = base_options(config).gates.thresholds
    result = controller.result(run)
    if interrupted:
        details = Details(notes=("The run was interrupted, so ranges and samples of the data were not collected.",))
    else:
        details = _details(config, run, result)
    result = replace(result, details=details)
    changes, uncompared = None, f"There was no snapshot {run.path} before this run, so there is nothing to compare with."
    if run.recorded is not None and run.recorded.ops:
        old = replace(of_snapshot(run.recorded, str(run.path)), name=str(run.path))
        changes, why = compared(result, old, thresholds, run.verdicts)
        uncompared = why or ""
    judgement = _judgement(controller, run, result, interrupted=interrupted)
    return Report(result, judgement, changes, uncompared or None, thresholds)


def _details(config: pytest.Config, run: Run, result: RunResult) -> Details:
    """Look at what matters most in the model; without it the report is written all the same."""
    model = next((model for model in catalogue(config).models if model.label == run.model), None)
    if model is None:
        return Details(notes=("Ranges and samples are collected of a model that --qsens-model names, and not here.",))
    from pytest_qsens.ranges import details

    bench(config).release()  # two models may not fit
    return details(model.source, wanted(ranked(result)), base_options(config).device)


def _judgement(controller: Controller, run: Run, result: RunResult, *, interrupted: bool) -> Judgement:
    """Say what became of the tests."""
    ops = run.failing - {TOTAL}
    kinds = Counter(run.verdicts[op].kind for op in ops if op in run.verdicts)
    parts = [f"{kinds[kind]} {said}" for kind, said in _SAID.items() if kinds[kind]]
    parts += [f"{rest} without a score"] * bool(rest := len(ops) - sum(kinds[kind] for kind in _SAID))
    reasons = [f"Of {count(len(run.results), 'test')}, {len(run.failing)} failed: {', '.join(parts)}."] if parts else []
    if TOTAL in run.failing:
        verdict = run.verdicts.get(TOTAL)
        reasons.append(f"The whole model {_SAID.get(verdict.kind if verdict else '', 'has no score')}.")
    reasons += [f"{problem[0].upper()}{problem[1:]}." for problem in controller.problems]
    commands = suggestions(result)
    accepts = [verdict.kind for op, verdict in run.verdicts.items() if op in run.failing]
    if accepts:
        accept = accept_command(controller.config.invocation_params.args)
        commands = (("Accept these scores, if they are as they should be", accept), *commands)
    if interrupted:
        left = sum(op.status == "unrun" for op in result.ops)
        return Judgement("failed", "Interrupted", (f"{count(left, 'op')} not run.", *reasons), commands)
    if run.failing or controller.problems:
        headline = "Failed" + (f": {', '.join(parts)}" if parts else "")
        return Judgement("failed", headline, tuple(reasons), commands)
    if updating(controller.config) and run.path in controller.written:
        return Judgement("passed", "Accepted", (f"Written to {run.path}{controller.written[run.path]}.",), commands)
    improved = sum(verdict.kind == "improved" for verdict in run.verdicts.values())
    better = f"; {count(improved, 'op')} better" if improved else ""
    compared_ops = sum(op != TOTAL for op in run.verdicts)
    if not run.verdicts:
        return Judgement("open", "Nothing was compared", (f"No test compared a score with {run.path}.",), commands)
    told = f"{count(compared_ops, 'op')} compared with {run.path}{better}."
    return Judgement("passed", "Passed: no op got worse", (told,), commands)
