"""From scores to a plan that was measured, and the gate of its config."""

from __future__ import annotations

import re

import pytest

from pytest_qsens.cli import main
from pytest_qsens.configs.decisions import decide
from pytest_qsens.configs.read import read_config
from pytest_qsens.ops import Op
from pytest_qsens.result_files import load
from tests.plugin.harness import MODEL, OPS, write_model


@pytest.fixture
def results(pytester: pytest.Pytester) -> list[str]:
    """Measure a real model under two schemes."""
    write_model(pytester)
    for scheme in ("w8a8", "w4a16"):
        run = ("--qsens-model", MODEL, "--qsens-scheme", scheme, "--qsens-json", f"{scheme}.json")
        pytester.runpytest_inprocess(*run, "--qsens-interactions", "--snapshot-update", "-q")
    return ["w8a8.json", "w4a16.json"]


def test_from_scores_to_a_gate(
    pytester: pytest.Pytester, results: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Measure, plan and verify, write for another tool, and gate: what was verified is what the gate measures."""
    common = ["plan", *results, "--budget-bits", "7", "--verify", "--model", MODEL]
    assert main([*common, "--out", "mine.yaml"]) == 0
    printed = capsys.readouterr().out
    measured = float(re.findall(r"^measured nmse: (\S+) \(prediction", printed, re.MULTILINE)[0])
    predicted = float(re.findall(r"^predicted nmse: ([\d.e-]+) ", printed, re.MULTILINE)[0])
    assert predicted == pytest.approx(measured, rel=0.3)

    run = ("--qsens-model", MODEL, "--qsens-config", "mine.yaml", "--snapshot-update", "--qsens-json", "out.json")
    assert pytester.runpytest_inprocess(*run, "-q").ret == 0
    gated = load(pytester.path / "out.json")
    assert gated.total is not None
    assert gated.total.isolated is not None
    assert gated.total.isolated["nmse"] == pytest.approx(measured, rel=1e-3)

    assert main([*common, "--out", "theirs.json", "--to", "torchao"]) == 4  # it requantizes no outputs
    assert "torchao cannot say 'w8a8'" in capsys.readouterr().err
    assert not (pytester.path / "theirs.json").exists()


WRONG = [
    (("--model", MODEL), "--model is of what --verify measures. Add --verify"),
    (("--verify",), "which is no preset: give with --model"),
    (("--verify", "--model", "other:spec"), "is a result of model 'net.spec', not 'other.spec'"),
    (("--to", "torchao"), "torchao is written to a file whose name ends in .json"),
]


def test_other_formats(pytester: pytest.Pytester, results: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A plan in another tool's format says what ours says; what cannot be is told, and nothing is written."""
    found = []
    for target, name in (("qsens", "a.yaml"), ("llm-compressor", "b.yaml"), ("qsens", "c.toml")):
        assert main(["plan", results[1], "--keep", "50%", "--out", name, "--to", target]) == 0
        decisions, _ = decide(read_config(pytester.path / name), [Op(op, "linear") for op in OPS if op != "embed"])
        found.append({decision.op.name: decision.scheme for decision in decisions})
    assert found[0] == found[1] == found[2]
    assert set(found[0].values()) > {None}

    pytester.makepyfile(other="from net import spec")
    for arguments, message in WRONG:
        assert main(["plan", *results, "--keep", "0%", "--out", "plan.yaml", *arguments]) == 4
        assert message in capsys.readouterr().err
        assert not (pytester.path / "plan.yaml").exists()


def test_a_factory_that_makes_another_model(
    pytester: pytest.Pytester, results: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its unquantized outputs are not those of the results, which is all that tells: refused, nothing written."""
    (pytester.path / "worse").write_text("30")
    plan = ["plan", *results, "--budget-bits", "7", "--verify", "--model", MODEL, "--out", "plan.yaml"]
    assert main(plan) == 4
    assert "the unquantized outputs of net.spec are not those of the result (reference " in capsys.readouterr().err
    assert not (pytester.path / "plan.yaml").exists()
    (pytester.path / "worse").unlink()
    assert main(plan) == 0
