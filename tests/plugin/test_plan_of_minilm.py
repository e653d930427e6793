"""Plans of a real model that are measured: corrected where a prediction was too good, and a whole spectrum."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pytest_qsens.cli import main
from pytest_qsens.configs.decisions import decide
from pytest_qsens.configs.read import read_config
from pytest_qsens.models.resolve import resolve
from pytest_qsens.models.source import ModelRequest
from pytest_qsens.ops import Op
from pytest_qsens.result_files import load
from tests.plans.test_pareto import texts

BLOCK = "encoder.layer.0.*"
"""What is measured, and what plans quantize: all else stays as it is."""


def numbers(printed: str, start: str) -> list[float]:
    """Find the numbers that follow this at the start of a line."""
    return [float(found) for found in re.findall(rf"^{start} ([\d.e-]+)", printed, re.MULTILINE)]


def test_plans_are_measured(pytester: pytest.Pytester, capsys: pytest.CaptureFixture[str]) -> None:
    """Errors of the block are more than their sum: a budget between prediction and measurement is kept all the same."""
    resolve(ModelRequest("minilm", root=str(Path.cwd()))).load()  # first: what a run imports is forgotten
    run = ("--qsens-model", "minilm", "--snapshot-update", "-q")
    assert (
        pytester.runpytest_inprocess(
            *run, "--qsens-ops", BLOCK, "--qsens-scheme", "w8a8_dynamic", "--qsens-json", "scores.json"
        ).ret
        == 0
    )
    ops = [Op(op.op, op.type) for op in load(Path("scores.json")).ops if op.isolated]
    capsys.readouterr()

    assert main(["plan", "scores.json", "--keep", "85%", "--verify", "--out", "all.yaml"]) == 0
    printed = capsys.readouterr().out
    (predicted,), (measured,) = numbers(printed, "predicted nmse:"), numbers(printed, "measured nmse:")
    assert predicted < measured
    assert "unquantized, unrun: not selected by --qsens-ops" in printed
    assert "is unrun" not in printed  # members of a group that is not quantized for one reason are not told one by one

    budget = (predicted + measured) / 2
    assert main(["plan", "scores.json", "--budget-nmse", str(budget), "--verify", "--out", "corrected.yaml"]) == 0
    printed = capsys.readouterr().out
    assert (
        f"a larger plan, predicted {predicted:.4g}, was measured at {measured:.4g}, which is past the budget" in printed
    )
    (corrected,) = numbers(printed, "measured nmse:")
    assert corrected <= budget
    decisions, _ = decide(read_config(Path("corrected.yaml")), ops)
    kept = [decision.op.name for decision in decisions if decision.scheme is None]
    assert 0 < len(kept) < len(ops)
    gate = ("--qsens-config", "corrected.yaml", "--qsens-fail", f"total.nmse<={budget!r}", "--qsens-ops", "total")
    assert pytester.runpytest_inprocess(*run[:2], *gate, "-q").ret == 0
    assert pytester.runpytest_inprocess(*run[:2], "--qsens-config", "all.yaml", *gate[2:], "-q").ret == 1
    capsys.readouterr()

    spectrum = ["plan", "scores.json", "--spectrum", "0,50,100", "--verify", "--out", "s.yaml", "--plot", "s.svg"]
    assert main(spectrum) == 0
    printed = capsys.readouterr().out
    table = [line.split() for line in printed.splitlines() if re.match(r"saved|\d+ %", line)]
    assert table[0][-2:] == ["measured", "nmse"]
    found = [float(row[-1]) for row in table[1:]]
    assert found[0] == 0 < found[1] < found[2]
    assert found[2] == pytest.approx(measured, rel=1e-3)
    assert all(read_config(Path(f"s-{share}.yaml")).rules for share in (0, 50, 100))
    assert {"nmse of the output", "plan, predicted", "plan, measured"} <= set(texts(Path("s.svg")))
