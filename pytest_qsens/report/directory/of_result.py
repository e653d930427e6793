"""The report of a finished result file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.diff import read
from pytest_qsens.errors import QsensError
from pytest_qsens.report.directory.contents import Report, compared, judged_by

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_qsens.results import RunResult
    from pytest_qsens.thresholds import Threshold


def report_of(result: RunResult, against: str | None, thresholds: Sequence[Threshold]) -> Report:
    """Put a report together.

    Args:
        result: What was measured.
        against: A result, a snapshot, or ``REVISION:PATH`` of one in git, to compare it with.
        thresholds: What counts as worse.

    Raises:
        QsensError: If what to compare with cannot be read, or not be compared.

    """
    changes, uncompared = None, None
    if against is None:
        uncompared = "Give what it is to be compared with: qsens report RESULT.json DIR --against OLD"
    else:
        changes, uncompared = compared(result, read(against), thresholds)
        if uncompared is not None:
            raise QsensError(uncompared)
    return Report(result, judged_by(result, changes, uncompared), changes, uncompared, tuple(thresholds))
