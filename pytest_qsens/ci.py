"""What a run tells the CI service that it runs in: a step summary and annotations, or a Code Quality report."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_qsens.errors import QsensError, told
from pytest_qsens.given_options import base_options

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_qsens.session.controller import Controller

SUMMARY = "GITHUB_STEP_SUMMARY"
"""Variable with the path of the file that Markdown is added to."""

ACTIONS = "GITHUB_ACTIONS"
"""Variable that is ``true`` in GitHub Actions."""

LIMIT = 1024 * 1024
"""Bytes that GitHub takes of all summaries of a step; more, and it takes none."""

_CUT = "\n\nThe rest was left out: a step has room for 1 MiB."


class CiOutput:
    """Registered beside the controller. Writes once, when the run is over, however it ended.

    Args:
        controller: What was measured.

    """

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self, config: pytest.Config) -> None:
        """Add the summary, and print annotations: now the exit code is settled, and nothing is captured any more."""
        summary, annotated = os.environ.get(SUMMARY), os.environ.get(ACTIONS) == "true"
        if not (summary or annotated) or config.option.collectonly or not self._concerned(config):
            return
        lines: list[str] = []
        if summary:
            lines += _guarded("summary", lambda: self._summary(Path(summary)))
        if annotated:
            lines += _guarded("annotations", self._annotations)
        _write(config, lines)

    def _summary(self, path: Path) -> list[str]:
        from pytest_qsens.report.summary_markdown import document

        return append(path, document(self._controller))

    def _annotations(self) -> list[str]:
        from pytest_qsens.report.github import workflow_commands

        return list(workflow_commands(self._controller))

    def _concerned(self, config: pytest.Config) -> bool:
        """Whether this is a run of ours: one that measured, or was to."""
        controller = self._controller
        if controller.stopped or any(run.results for run in controller.runs.values()):
            return True
        try:
            return controller.started and base_options(config).model is not None
        except QsensError:
            return False


def _guarded(what: str, write: Callable[[], list[str]]) -> list[str]:
    """Take the lines of an output; an error in it is told in their place, and costs neither exit code nor scores."""
    try:
        return write()
    except Exception as error:  # noqa: BLE001 - pytest is about to end, and has written what matters
        return [f"qsens: no {what} of this run for GitHub, as it could not be put together: {told(error)}"]


def append(path: Path, lines: Sequence[str]) -> list[str]:
    """Add a document to a file, as much of it as there is room for.

    Returns:
        Lines for the terminal: what went wrong, if anything did. A summary is not worth a failed run.

    """
    text = "\n".join(lines).encode("utf-8", "backslashreplace")
    try:
        with path.open("ab") as file:
            before = b"\n" if file.tell() else b""
            room = LIMIT - file.tell() - len(before) - 1
            if len(text) > room:
                kept = text[: max(0, room - len(_CUT))]
                text = kept[: kept.rfind(b"\n") + 1].rstrip(b"\n") + _CUT.encode()
            if len(text) > room:
                return [f"qsens: no room for a summary in {path}, which ${SUMMARY} names: a step has 1 MiB"]
            file.write(before + text + b"\n")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        return [f"qsens: no summary was written, {path}, which ${SUMMARY} names, cannot be written: {reason}"]
    return []


def _write(config: pytest.Config, lines: Sequence[str]) -> None:
    """Write whole lines to standard output, where GitHub looks for commands, whatever pytest has printed."""
    terminal: pytest.TerminalReporter | None = config.pluginmanager.getplugin("terminalreporter")
    if terminal is not None:
        terminal.ensure_newline()
        for line in lines:
            terminal.write_line(line)
        terminal.flush()
        return
    text = "".join(f"{line}\n" for line in lines)
    encoding = sys.stdout.encoding or "ascii"
    print(text.encode(encoding, "backslashreplace").decode(encoding), end="", flush=True)  # noqa: T201  # the purpose
