"""JUnit files (``--junitxml``) say of every op what was measured, and what the gate compared it with."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest

from tests.plugin.harness import LABEL, MODEL, snapshot_ops, write_model

if TYPE_CHECKING:
    from collections.abc import Sequence


def properties(pytester: pytest.Pytester, *args: str) -> dict[str, dict[str, str]]:
    """Run, and read the properties of every test case; the name of a test without its op is ``total``."""
    pytester.runpytest_inprocess("--qsens-model", MODEL, "--junitxml=out.xml", *args)
    found = {}
    for case in ET.parse(pytester.path / "out.xml").iter("testcase"):
        listed = [(str(p.get("name")), str(p.get("value"))) for p in case.iter("property")]
        assert len(dict(listed)) == len(listed)
        name = str(case.get("name")).removesuffix("]").split(f"{LABEL}-w8a8")[1].removeprefix("-")
        found[name or "total"] = dict(listed)
    return found


@pytest.mark.parametrize("workers", [(), ("-n", "1")])
def test_scores_and_limits(pytester: pytest.Pytester, workers: Sequence[str]) -> None:
    """Status, scheme, mode, scores, verdict and limits are there, of ops that pass, fail and have no score."""
    write_model(pytester, spare="unused")
    first = properties(pytester, *workers, "--snapshot-update")
    assert first["head"]["verdict"] == "new"
    assert "nmse_old" not in first["head"]
    recorded = snapshot_ops(pytester)
    (pytester.path / "worse").write_text("30")
    found = properties(pytester, *workers)
    for op, entry in recorded.items():
        old, limit = float(found[op]["nmse_old"]), float(found[op]["nmse_limit"])
        assert old == entry["isolated"]["nmse"]
        assert limit == pytest.approx(1.05 * old, rel=1e-4)
        assert (found[op]["verdict"] == "regressed") is (float(found[op]["nmse"]) > limit)
        assert float(found[op]["sqnr_db"]) == pytest.approx(-10 * math.log10(float(found[op]["nmse"])))
    assert {entry["verdict"] for op, entry in found.items() if op != "spare"} >= {"regressed", "improved"}
    common = {"model": LABEL, "scheme": "w8a8", "mode": "isolated"}
    assert all(entry.items() >= common.items() for entry in found.values())
    assert found["spare"] == common | {
        "status": "unexercised",
        "type": "linear",
        "reason": "the evaluation data never reached it",
    }
    assert found["total"]["status"] == "measured"


def test_modes_and_metrics(pytester: pytest.Pytester) -> None:
    """Of a second mode names have the mode before them; every metric that gates is there with its limit."""
    write_model(pytester)
    run = ("--qsens-mode", "both", "--qsens-fail", "nmse:5%,kl:1e-3,sqnr_db:0.5", "--qsens-ops", "head")
    properties(pytester, *run, "--snapshot-update")
    found = properties(pytester, *run)["head"]
    assert found["mode"] == "both"
    assert found["verdict"] == "ok"
    for name in ("nmse", "kl", "sqnr_db", "fallback_nmse", "fallback_kl", "fallback_sqnr_db"):
        value, old, limit = (float(found[name + end]) for end in ("", "_old", "_limit"))
        assert value == pytest.approx(old, rel=1e-3)
        assert limit < old if "sqnr" in name else limit > old
    assert "fallback_gain" in found
    assert "fallback_gain_limit" not in found


def test_estimates(pytester: pytest.Pytester) -> None:
    """An estimate has its interval, and no verdict."""
    write_model(pytester)
    found = properties(pytester, "--qsens-engine", "probe")
    estimated = [entry for entry in found.values() if entry["status"] == "estimated"]
    assert estimated
    for entry in estimated:
        assert float(entry["nmse_low"]) <= float(entry["nmse"]) <= float(entry["nmse_high"])
        assert "verdict" not in entry
