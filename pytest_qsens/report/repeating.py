"""By which command what failed is run again, after a change of the model, the data or a limit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.rerun import same_command

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_qsens.report.findings import Finding, Kind
    from pytest_qsens.session.controller import Controller
    from pytest_qsens.session.run import Run

REPEATED: tuple[Kind, ...] = ("exceeded", "failed", "lost")
"""What no update of the snapshot accepts."""

_TESTS = 5
"""Tests that a command names."""


def repeating(controller: Controller, run: Run, found: Iterable[Finding]) -> str | None:
    """Give the command that repeats what no update accepts; ``None`` if there is nothing of that.

    It names the tests of a few ops. A limit of what ops come to together needs all of them again.

    Args:
        controller: What has seen the run.
        run: One model and scheme of it.
        found: What is wrong with it.

    """
    wanted = {finding.op for finding in found if finding.kind in REPEATED}
    together = any(verdict.state == "failed" for verdict in run.joint)
    if not wanted and not together:
        return None
    subject = run.model, run.scheme, run.granularity
    tests = [nodeid for nodeid, case in controller.cases.items() if case.subject == subject and case.op in wanted]
    config = controller.config
    whole = together or config.args_source is config.ArgsSource.ARGS or len(tests) > _TESTS
    return same_command(config.invocation_params.args, () if whole else tests)
