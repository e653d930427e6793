"""``qsens accept``: a result file's scores become the snapshot, by the rules of ``--snapshot-update``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_qsens.cli import main
from pytest_qsens.result_files import write
from pytest_qsens.results import Cost, OpResult, RunInfo, RunResult
from pytest_qsens.snapshot import Entry, Snapshot, load
from pytest_qsens.snapshot import write as write_snapshot

if TYPE_CHECKING:
    from pathlib import Path

ENVIRONMENT = {"cpu": "AMD", "torch": "2.13.0"}


def op(name: str, nmse: float) -> OpResult:
    """Make a measured op with what results hold beside metrics."""
    scores = {"nmse": nmse, "noise": 0.1, "distinguishable": True}
    return OpResult(name, "linear", "", "measured", None, {"nmse": nmse}, scores)


def result(directory: Path, *ops: OpResult) -> str:
    """Write a result file."""
    info = RunInfo("m", "w8a8", "delta", "both", ENVIRONMENT, Cost(1.0))
    total = OpResult("total", "total", "", "measured", None, {"nmse": 0.5})
    write(directory / "result.json", RunResult(info, ops, total))
    return str(directory / "result.json")


def accept(directory: Path, *args: str) -> int:
    """Run the command on the result."""
    return main(["accept", str(directory / "result.json"), "--snapshot-dir", str(directory / "snapshots"), *args])


def recorded(directory: Path) -> Snapshot:
    """Read the snapshot."""
    return load(directory / "snapshots" / "m" / "w8a8.json")


def test_a_first_snapshot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Measured ops and the whole model get their lines, metrics only; others get none."""
    result(tmp_path, op("a", 0.1), OpResult("b", "linear", "", "failed", "NaN"), OpResult("c", "linear", "", "unrun"))
    assert accept(tmp_path) == 0
    assert capsys.readouterr().out.strip().endswith("w8a8.json: 2 lines new or changed")
    found = recorded(tmp_path)
    assert found.environment == ENVIRONMENT
    assert found.ops == {
        "a": Entry("linear", {"nmse": 0.1}, {"nmse": 0.1}),
        "total": Entry("total", {"nmse": 0.5}),
    }
    assert accept(tmp_path) == 0
    assert "0 lines new or changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("nmse", "rules", "kept"),
    [(0.102, (), True), (0.2, (), False), (0.102, ("--fail", "nmse:1%"), False), (0.05, (), False)],
)
def test_what_moved_within_its_threshold_stays(tmp_path: Path, nmse: float, rules: tuple[str, ...], kept: bool) -> None:
    """Small moves make no diff; better and worse scores are recorded."""
    result(tmp_path, op("a", 0.1))
    accept(tmp_path)
    result(tmp_path, op("a", nmse))
    assert accept(tmp_path, *rules) == 0
    assert recorded(tmp_path).ops["a"].isolated == {"nmse": 0.1 if kept else nmse}


def test_other_lines_and_the_environment_stay(tmp_path: Path) -> None:
    """Lines of other ops are kept, and as long as there are such, the environment they were measured in."""
    path = tmp_path / "snapshots" / "m" / "w8a8.json"
    old = Snapshot("m", "w8a8", {"cpu": "Intel"}, {"z": Entry("linear", {"nmse": 1.0})})
    write_snapshot(path, lambda _: old, model="m", scheme="w8a8")
    result(tmp_path, op("a", 0.1))
    accept(tmp_path)
    assert recorded(tmp_path).environment == {"cpu": "Intel"}
    assert set(recorded(tmp_path).ops) == {"a", "total", "z"}
    result(tmp_path, op("a", 0.1), op("z", 1.0))
    accept(tmp_path)
    assert recorded(tmp_path).environment == ENVIRONMENT


@pytest.mark.parametrize("allow", [False, True])
def test_ci_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, allow: bool
) -> None:
    """In CI nothing is accepted, unless that is said."""
    monkeypatch.setenv("CI", "true")
    result(tmp_path, op("a", 0.1))
    assert accept(tmp_path, *["--allow-ci-update"] * allow) == (0 if allow else 4)
    assert (tmp_path / "snapshots").exists() == allow
    assert allow or "CI is set to 'true'" in capsys.readouterr().err


def test_what_cannot_be_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A result without scores, a damaged snapshot and unknown rules: refused, nothing written."""
    write(tmp_path / "result.json", RunResult(RunInfo("m", "w8a8", "delta", "both", {}, Cost(1.0)), ()))
    assert accept(tmp_path) == 4
    assert "nothing to accept" in capsys.readouterr().err
    result(tmp_path, op("a", 0.1))
    assert accept(tmp_path, "--fail", "nmsd:5%") == 4
    assert "--fail 'nmsd:5%': no metric 'nmsd'" in capsys.readouterr().err
    assert not (tmp_path / "snapshots").exists()
    path = tmp_path / "snapshots" / "m" / "w8a8.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    assert accept(tmp_path) == 4
    assert path.read_text() == "{"
