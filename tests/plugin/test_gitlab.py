"""The Code Quality report: what GitLab shows in a merge request."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from tests.plugin.harness import LABEL, MODEL, snapshot_file, write_model

if TYPE_CHECKING:
    import pytest


def report(pytester: pytest.Pytester, *args: str) -> list[dict[str, Any]]:
    """Run, and read the report."""
    pytester.runpytest_inprocess("--qsens-model", MODEL, "--qsens-gitlab", "quality.json", *args)
    found: list[dict[str, Any]] = json.loads((pytester.path / "quality.json").read_text())
    return found


def test_the_report(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every issue has what GitLab asks for, points to the op's line, and is the same one in the next run."""
    monkeypatch.setenv("CI_PROJECT_DIR", str(pytester.path.parent))
    write_model(pytester, spare="unused")
    assert {issue["check_name"] for issue in report(pytester)} == {"qsens-new", "qsens-unexercised"}
    accepted = report(pytester, "--snapshot-update")
    assert [(issue["check_name"], issue["severity"]) for issue in accepted] == [("qsens-unexercised", "info")]
    (pytester.path / "worse").write_text("30")
    found = report(pytester)
    lines = snapshot_file(pytester).read_text().split("\n")
    for issue in found:
        assert issue.keys() == {"check_name", "description", "fingerprint", "location", "severity"}
        assert issue["severity"] in ("info", "minor", "major", "critical", "blocker")
        assert issue["location"]["path"] == f"{pytester.path.name}/qsens_snapshots/{LABEL}/w8a8.json"
        if issue["check_name"] == "qsens-regressed":
            op = re.match(rf"{LABEL} w8a8, (\S+): regressed; isolated nmse \S+ → ", issue["description"])
            assert op is not None
            assert lines[issue["location"]["lines"]["begin"] - 1].strip().startswith(f'"{op[1]}": {{')
    fingerprints = {issue["fingerprint"] for issue in found}
    assert len(fingerprints) == len(found) >= 3
    (pytester.path / "worse").write_text("40")
    assert {issue["fingerprint"] for issue in report(pytester)} == fingerprints


def test_nothing_found(pytester: pytest.Pytester) -> None:
    """A report without issues is written, too: GitLab compares with it."""
    write_model(pytester)
    assert report(pytester, "--snapshot-update") == []
