"""Workflow commands of GitHub Actions: annotations that point to the line of an op in the snapshot file.

https://docs.github.com/en/actions/reference/workflows-and-actions/workflow-commands
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pytest_qsens.given_options import base_options
from pytest_qsens.report.accepting import ACCEPTABLE, accepting
from pytest_qsens.report.attention import notes
from pytest_qsens.report.findings import FAILING, SAID, findings
from pytest_qsens.report.places import relative

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_qsens.report.findings import Finding
    from pytest_qsens.session.controller import Controller
    from pytest_qsens.session.run import Run

SHOWN = 10
"""Annotations of one level that GitHub shows of a step."""


def workflow_commands(controller: Controller) -> Iterator[str]:
    """Lines for standard output: errors, the worst first, then warnings, of each as many as are shown."""
    if controller.stopped:
        yield command("error", controller.stopped, title="qsens: not measured")
        return
    runs = [run for run in controller.runs.values() if run.results]
    errors = [command("error", problem, title="qsens") for problem in controller.problems.messages]
    failing = [(run, finding) for run in runs for finding in findings(run) if finding.kind in FAILING]
    failing.sort(key=lambda pair: FAILING.index(pair[1].kind))  # stable: each run has its worst first
    errors += [_error(controller, run, finding) for run, finding in failing]
    if len(errors) > SHOWN:
        hidden = failing[max(0, SHOWN - 1 - len(controller.problems.messages)) :]
        names = ", ".join(finding.op for _, finding in hidden[:SHOWN])
        named = f": {names}{', ...' * (len(hidden) > SHOWN)}" if names else ""
        more = f"{len(errors) - SHOWN + 1} more{named}"
        errors[SHOWN - 1 :] = [command("error", more, title="qsens")]
    yield from errors
    yield from [warning for run in runs for warning in _warnings(controller, run)][:SHOWN]


def command(
    level: Literal["error", "warning"], message: str, *, title: str, file: str | None = None, line: int | None = None
) -> str:
    """Write one workflow command, escaped by GitHub's rules."""
    given = {"file": file, "line": None if file is None else line, "title": title}
    properties = ",".join(f"{name}={_property(str(value))}" for name, value in given.items() if value is not None)
    return f"::{level} {properties}::{_data(message)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def _error(controller: Controller, run: Run, finding: Finding) -> str:
    lines = [finding.op, *finding.lines]
    if finding.kind in ACCEPTABLE and (accept := accepting(controller, run)):
        lines.append(f"accept with: {accept}")
    return command(
        "error",
        "\n".join(lines),
        title=f"{run.model} {run.scheme}: {SAID[finding.kind].title}",
        file=relative(run.path, _workspace(controller)),
        line=finding.line,
    )


def _warnings(controller: Controller, run: Run) -> Iterator[str]:
    """One for each note about a run, with the lines below it."""
    told: list[list[str]] = []
    for line in notes(run, gated=base_options(controller.config).gate_estimates):
        if line.startswith("  ") and told:
            told[-1].append(line)
        else:
            told.append([line])
    for lines in told:
        yield command("warning", "\n".join(lines), title=f"qsens: {run.model} {run.scheme}")


def _workspace(controller: Controller) -> Path:
    return Path(os.environ.get("GITHUB_WORKSPACE") or controller.config.rootpath)
