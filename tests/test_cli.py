"""The console script ``qsens``."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_qsens.cli import main
from pytest_qsens.result_files import write
from pytest_qsens.results import Cost, OpResult, RunInfo, RunResult, Scores


def op(name: str, nmse: float, fallback: Scores | None = None) -> OpResult:
    """Make a measured op."""
    isolated: Scores = {"nmse": nmse, "sqnr_db": None if nmse == 0 else 20.5}
    return OpResult(name, "linear", name, "measured", None, isolated, fallback)


OPS = (
    op("layer.10", 0.001),
    op("layer.9", 0.03),
    OpResult("embed", "embedding", "", "unexercised", "no batch reaches it"),
    op("layer.2", 0.0),
)


def result_file(directory: Path, *ops: OpResult, total: OpResult | None = None) -> Path:
    """Write a result file."""
    file = directory / "result.json"
    environment = {"torch": "2.13.0"}
    write(file, RunResult(RunInfo("minilm", "w8a8", "replay", "both", environment, Cost(1.0)), ops, total))
    return file


def rows(text: str) -> list[list[str]]:
    """Give the cells of the table's body."""
    lines = text.split("\n\n")[1].splitlines()
    return [line.split(maxsplit=5) for line in lines[1:]]


@pytest.mark.parametrize(
    ("arguments", "order"),
    [
        ([], ["layer.10", "layer.9", "embed", "layer.2", "total"]),
        (["--sort", "nmse"], ["layer.9", "layer.10", "layer.2", "embed", "total"]),
        (["--sort", "op"], ["embed", "layer.10", "layer.2", "layer.9", "total"]),
    ],
)
def test_show_lists_every_op(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], order: list[str]
) -> None:
    """Ops come in model order, or sorted with those without numbers last; the whole model closes the table."""
    file = result_file(tmp_path, *OPS, total=op("total", 0.05))
    assert main(["show", str(file), *arguments]) == 0
    table = rows(capsys.readouterr().out)
    assert [row[0] for row in table] == order
    cells = {row[0]: row[1:] for row in table}
    assert cells["layer.9"] == ["linear", "measured", "0.03", "20.5"]
    assert cells["layer.2"] == ["linear", "measured", "0", "infinite"]
    assert cells["embed"] == ["embedding", "unexercised", "-", "-", "no batch reaches it"]


def test_show_says_which_direction_is_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every column of numbers is explained above the table; fallback columns come only if that was measured."""
    main(["show", str(result_file(tmp_path, *OPS))])
    text = capsys.readouterr().out
    assert "nmse: higher is worse\nsqnr_db: lower is worse\n\n" in text
    assert "gain" not in text
    assert "stderr" not in text
    told = replace(op("a", 0.1), isolated={"nmse": 0.1, "sqnr_db": 10.0, "stderr": 0.02, "samples": 8})
    main(["show", str(result_file(tmp_path, told, OPS[1]))])
    text = capsys.readouterr().out
    assert "stderr: standard error of the nmse over the evaluation samples\n\n" in text
    assert [row[3:] for row in rows(text)] == [["0.1", "10", "0.02"], ["0.03", "20.5", "-"]]
    main(["show", str(result_file(tmp_path, op("a", 0.1, {"nmse": 0.4, "gain": -0.01})))])
    text = capsys.readouterr().out
    assert "fallback nmse (all quantized but this op): lower means a more sensitive op" in text
    assert "gain (total - fallback): higher means a more sensitive op" in text
    assert rows(text)[0][3:5] == ["0.1", "20.5"]
    assert rows(text)[0][5].split() == ["0.4", "-0.01"]


def test_show_sorts_fallback_results_by_sensitivity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In fallback mode a small error means a sensitive op, so that one comes first."""
    ops = [
        OpResult(name, "linear", "", "measured", None, None, {"nmse": nmse}) for name, nmse in (("a", 0.5), ("b", 0.1))
    ]
    main(["show", str(result_file(tmp_path, *ops)), "--sort", "nmse"])
    assert [row[0] for row in rows(capsys.readouterr().out)] == ["b", "a"]


def test_a_result_without_ops_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty result is a table without rows, not a traceback."""
    assert main(["show", str(result_file(tmp_path))]) == 0
    assert rows(capsys.readouterr().out) == []


def test_the_installed_script_reports_bad_input(tmp_path: Path) -> None:
    """A file that cannot be used ends in exit code 4 and one line; a wrong command line in argparse's 2."""
    (tmp_path / "bad.json").write_text("{")
    script = Path(sys.executable).with_name("qsens")
    process = subprocess.run([script, "show", tmp_path / "bad.json"], capture_output=True, text=True, check=False)
    assert process.returncode == 4
    assert process.stdout == ""
    assert process.stderr.startswith(f"qsens: {tmp_path}/bad.json, line 1: malformed JSON")
    assert process.stderr.count("\n") == 1
    for arguments in ([], ["show"], ["show", "x", "--sort", "colour"]):
        process = subprocess.run([script, *arguments], capture_output=True, text=True, check=False)
        assert process.returncode == 2
        assert "usage: qsens" in process.stderr
