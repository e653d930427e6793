"""A Code Quality report of GitLab: what a merge request shows of the ops that got worse.

https://docs.gitlab.com/ci/testing/code_quality/#code-quality-report-format
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from pytest_qsens.errors import QsensError
from pytest_qsens.files import check_replaceable, parse_json, read_text
from pytest_qsens.report.findings import findings
from pytest_qsens.report.places import relative

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from pytest_qsens.report.findings import Finding, Kind
    from pytest_qsens.session.run import Run

_SEVERITY: dict[Kind, str] = {
    "exceeded": "critical",
    "regressed": "major",
    "failed": "critical",
    "lost": "major",
    "new": "minor",
    "unexercised": "info",
}


def code_quality(runs: Iterable[Run], base: Path) -> str:
    """Text of the report: a list of what was found, empty if that is nothing.

    Args:
        runs: What was measured.
        base: The repository, from which paths start.

    """
    listed = [_issue(run, finding, base) for run in runs if run.results for finding in findings(run)]
    return json.dumps(listed, ensure_ascii=False, indent=2) + "\n"


def _issue(run: Run, finding: Finding, base: Path) -> dict[str, object]:
    # The same thing found again has the same fingerprint, whatever its numbers: GitLab tells by it what is new.
    identity = json.dumps([run.model, run.scheme, run.granularity, finding.op, finding.kind])
    return {
        "check_name": f"qsens-{finding.kind}",
        "description": f"{run.model} {run.scheme}, {finding.op}: {'; '.join((finding.kind, *finding.lines))}",
        "fingerprint": hashlib.sha256(identity.encode()).hexdigest(),
        "location": {
            "lines": {"begin": finding.line or 1},
            "path": relative(run.path, base) or run.path.name,
        },
        "severity": _SEVERITY[finding.kind],
    }


def check_report(path: Path) -> None:
    """Make sure before a run that a report can go to ``path`` and destroys nothing but an older one.

    Raises:
        QsensError: If something else is there, or the directory is missing or read-only.

    """
    check_replaceable(path, _check_older)


def _check_older(path: Path) -> None:
    text = read_text(path)
    found = parse_json(text, path) if text else []
    if not isinstance(found, list) or not all(isinstance(issue, dict) and "fingerprint" in issue for issue in found):
        raise QsensError(f"{path} exists and is no Code Quality report. Choose another name or remove it.")
