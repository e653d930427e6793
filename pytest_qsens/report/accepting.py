"""Whether a run can be accepted, and by which command: the same one wherever it is offered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.given_options import base_options
from pytest_qsens.rerun import accept_command

if TYPE_CHECKING:
    from pytest_qsens.report.findings import Kind
    from pytest_qsens.session.controller import Controller
    from pytest_qsens.session.run import Run

ACCEPTABLE: tuple[Kind, ...] = ("regressed", "new")
"""What an update of the snapshot accepts of a single op; no update helps what is past a limit or has no score."""


def accepting(controller: Controller, run: Run) -> str | None:
    """Give the command that accepts what is worse, new, or in another order; ``None`` if there is nothing of these.

    Args:
        controller: What has seen the run.
        run: One model and scheme of it.

    """
    worse = any(verdict.kind in ACCEPTABLE for verdict in run.verdicts.values())
    reordered = any(verdict.state == "failed" for verdict in run.ranks)
    if not (worse or reordered) or run.path in controller.written:
        return None
    return accept_command(controller.config.invocation_params.args, base_options(controller.config))
