"""Scores that are past a limit, in everything that a run writes for people and other tools."""

from __future__ import annotations

import csv
import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree as ET

import vl_convert  # noqa: F401 - before a run in this process, which forgets what it imports: it cannot be twice

import pytest_qsens.report.directory.page  # noqa: F401 - keeps its library from run to run
from pytest_qsens.result_files import load
from tests.plugin.harness import LABEL, MODEL, write_model
from tests.plugin.test_github import commands

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

Commands = list[tuple[str, dict[str, str], str]]


class Written(NamedTuple):
    """What a run wrote: the summary, annotations, issues, properties of tests, and the directory of the report."""

    summary: str
    annotations: Commands
    issues: list[dict[str, Any]]
    properties: dict[str, dict[str, str]]
    out: Path
    terminal: str

    @property
    def page(self) -> str:
        """Text of the page, before its data."""
        return (self.out / "report.html").read_text().partition('<script type="application/json"')[0]

    @property
    def markdown(self) -> str:
        """Text of ``report.md``."""
        return (self.out / "report.md").read_text()

    @property
    def sheet(self) -> dict[str, dict[str, str]]:
        """Lines of ``report.csv`` by op."""
        with (self.out / "report.csv").open(newline="") as stream:
            return {line["op"]: line for line in csv.DictReader(stream)}


def written(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, *args: str) -> Written:
    """Run with every output there is."""
    summary, quality, junit = (pytester.path / name for name in ("summary.md", "quality.json", "junit.xml"))
    summary.write_text("")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    given = ("--qsens-gitlab", quality.name, f"--junitxml={junit.name}", "--qsens-report", "out")
    ran = pytester.runpytest_inprocess("--qsens-model", MODEL, *given, *args)
    properties = {}
    for case in ET.parse(junit).iter("testcase"):
        name = str(case.get("name")).removesuffix("]").split(f"{LABEL}-w8a8")[1].removeprefix("-")
        listed = [(str(p.get("name")), str(p.get("value"))) for p in case.iter("property")]
        assert len(dict(listed)) == len(listed)
        properties[name or "total"] = dict(listed)
    issues = json.loads(quality.read_text())
    return Written(summary.read_text(), commands(ran), issues, properties, pytester.path / "out", ran.stdout.str())


def test_without_a_snapshot(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output names the ops and the whole model, with score and limit, the furthest past first."""
    write_model(pytester)
    rules = "total.nmse<=1e-6,head.nmse<=1e-5,blocks.0.up.nmse<=1e-7,blocks.0.down.nmse<=1"
    found = written(pytester, monkeypatch, "--qsens-fail", rules)
    nmse = {op.op: (op.isolated or {})["nmse"] for op in load(found.out / "report.json").ops}
    growth = {"head": (nmse["head"] or 0) / 1e-5, "blocks.0.up": (nmse["blocks.0.up"] or 0) / 1e-7}
    assert min(growth.values()) > 1

    titles = [properties["title"] for _, properties, _ in found.annotations]
    assert titles == [f"{LABEL} w8a8: past a limit"] * 3
    order = [message.split("\n")[0] for *_, message in found.annotations]
    assert [op for op in order if op != "total"] == sorted(growth, key=lambda op: -growth[op])
    assert not any("accept" in message for *_, message in found.annotations)

    row = rf"^\| head \| exceeded \| isolated nmse \|  \| {nmse['head']:.4g} \| 1e-05 \|$"
    assert re.search(row, found.summary, re.MULTILINE)
    assert "--snapshot-update" not in found.summary

    assert {(issue["check_name"], issue["severity"]) for issue in found.issues} == {("qsens-exceeded", "critical")}
    assert len(found.issues) == 3

    verdicts = {op: properties.get("verdict") for op, properties in found.properties.items()}
    assert {op for op, verdict in verdicts.items() if verdict == "exceeded"} == {"head", "blocks.0.up", "total"}
    assert found.properties["head"]["nmse_limit"] == "1e-05"
    assert "nmse_old" not in found.properties["head"]

    reported = {"head", "blocks.0.up", "total"}
    for text in (found.page, found.markdown):
        assert "Failed: 2 ops are past a limit" in text
        assert "The whole model is past a limit." in text
        assert "Past them: 2 ops and the whole model." in text
        assert "is past the limit of 1e-05 (head.nmse" in text
        assert "--snapshot-update" not in text
    assert "is past the limit of 1e-" in found.page.partition("<dl")[0]
    assert {op for op, line in found.sheet.items() if line["limits"] == "exceeded"} == reported


def test_against_a_snapshot(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """An op that is as it was and past a limit is past a limit, not worse; what limits alone pass can be worse."""
    write_model(pytester)
    written(pytester, monkeypatch, "--snapshot-update")
    found = written(pytester, monkeypatch, "--qsens-fail", "nmse:5%,head.nmse<=1e-5")
    assert {op: line["change"] for op, line in found.sheet.items() if line["change"] != "same"} == {"head": "exceeded"}
    assert "1 past a limit, 7 as before" in found.markdown
    assert "x1.00" not in found.page
    assert "accept" not in found.terminal.partition("no update of the snapshot accepts that")[2]

    (pytester.path / "worse").write_text("30")
    found = written(pytester, monkeypatch, "--qsens-fail", "nmse<=1e9")
    assert found.sheet["blocks.1.down"]["change"] == "worse"
    assert "by nmse:5%, which fails nothing here: no threshold was given:" in found.markdown
    assert "Passed" in found.page


def test_who_is_told_to_accept(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is offered everywhere if the order changed, and nowhere if a test of the user's own failed."""
    write_model(pytester)
    written(pytester, monkeypatch, "--snapshot-update")
    (pytester.path / "worse").write_text("30")
    found = written(pytester, monkeypatch, "--qsens-fail", "nmse:1e9,kendall:0.99")
    for text in (found.terminal, found.summary, found.page, found.markdown):
        assert "--snapshot-update" in text

    (pytester.path / "worse").unlink()
    own = "def test_own(qsens_op, qsens_score, snapshot):\n    assert qsens_score == snapshot\n"
    pytester.makepyfile(test_own=f"{own}    assert qsens_op.name != 'head'\n")
    found = written(pytester, monkeypatch, "test_own.py")
    for text in (found.terminal, found.summary, found.page, found.markdown):
        assert "--snapshot-update" not in text
    assert "Failed: 1 op failed for another reason" in found.markdown
