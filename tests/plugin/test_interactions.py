"""``--qsens-interactions``: sketches in the result file, from the cache and from shards, and what they predict."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pytest_qsens.cli import main
from pytest_qsens.interactions import decode, predict
from pytest_qsens.result_files import load
from tests.checkpoints import bert
from tests.plugin.harness import MODEL, OPS, write_model

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_qsens.results import RunResult

ARGUMENTS = ("--snapshot-update", "--qsens-cache", "cache")


def measure(pytester: pytest.Pytester, *arguments: str, model: str = MODEL) -> tuple[pytest.RunResult, RunResult]:
    """Run in this process, and read the result file."""
    path: Path = pytester.path / "r.json"
    ran = pytester.runpytest_inprocess(*ARGUMENTS, "--qsens-model", model, "--qsens-json", str(path), *arguments)
    return ran, load(path)


def test_side_by_side(pytester: pytest.Pytester, capsys: pytest.CaptureFixture[str]) -> None:
    """What is predicted stands beside what was measured, and shards say the same together."""
    write_model(pytester, spare="unused")
    ran, plain = measure(pytester)
    assert ran.ret == 0
    assert [op.sketch for op in plain.ops] == [None] * 9
    assert [op.weights for op in plain.ops] == [800, *[512] * 6, 256, 128]
    ran, first = measure(pytester, "--qsens-interactions")
    assert ran.ret == 0
    ops = {op.op: op for op in first.ops}
    assert all(ops[name].sketch is not None for name in OPS)
    assert ops["spare"].sketch is None
    for name in OPS:  # 192 values: the changes themselves, and their squares are the errors
        change = decode(ops[name].sketch or "", name)
        assert len(change) == 192
        assert ops[name].isolated is not None
        assert change @ change == pytest.approx(ops[name].isolated["nmse"], rel=1e-4)
    assert first.total is not None
    assert first.total.isolated is not None
    assert plain.total is not None
    assert plain.total.isolated is not None
    predicted = predict(first.ops)
    assert predicted is not None
    assert first.total.isolated == plain.total.isolated | predicted._asdict()
    assert plain.interactions is None
    assert first.interactions is not None
    assert first.interactions.ops == OPS  # in the order of the model, without what was not measured
    matrix = np.array(first.interactions.matrix)
    assert (matrix == matrix.T).all()
    assert matrix.sum() == pytest.approx(predicted.quadratic, rel=1e-4)
    assert matrix.trace() == pytest.approx(predicted.additive, rel=1e-5)
    assert [op.isolated["nmse"] for op in first.ops if op.isolated] == pytest.approx(matrix.diagonal(), rel=1e-5)
    nmse = first.total.isolated["nmse"] or 0.0
    line = f"total nmse: {nmse:.4g} measured; sum of isolated {predicted.additive:.4g} (*%), with interactions *"
    ran.stdout.fnmatch_lines([line])
    capsys.readouterr()
    assert main(["show", str(pytester.path / "r.json")]) == 0
    assert f"total nmse: {nmse:.4g} measured; sum of isolated" in capsys.readouterr().out
    parts = []
    for index in (1, 2):
        parts.append(str(pytester.path / f"{index}.json"))
        ran = pytester.runpytest_inprocess(
            *ARGUMENTS,
            "--qsens-model",
            MODEL,
            "--qsens-interactions",
            "--qsens-shard",
            f"{index}/2",
            "--qsens-json",
            parts[-1],
        )
        assert ran.ret == 0
        assert "with interactions" not in ran.stdout.str()  # one part of the ops says nothing of all
    assert main(["merge", *parts, "-o", str(pytester.path / "merged.json")]) == 0
    merged = load(pytester.path / "merged.json")
    assert merged.total is not None
    assert merged.total.isolated == first.total.isolated
    assert merged.interactions == first.interactions
    assert [replace(op, seconds=0.0) for op in merged.ops] == [replace(op, seconds=0.0) for op in first.ops]


def test_the_cache(pytester: pytest.Pytester) -> None:
    """Cached scores without sketches are no use; those with are, and nothing is measured again for them."""
    model = str(bert(pytester.path / "checkpoint"))
    _, plain = measure(pytester, model=model)
    assert plain.run.cached == 0
    _, first = measure(pytester, "--qsens-interactions", model=model)
    assert first.run.cached == 0
    assert predict(first.ops) is not None
    _, again = measure(pytester, "--qsens-interactions", model=model)
    assert again.run.cached == len(again.ops) - sum(op.status == "unquantizable" for op in again.ops)
    assert again.total == first.total
    assert again.ops == first.ops


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--qsens-mode", "fallback"], "*--qsens-interactions goes by what ops do when they alone are quantized*"),
        (["--qsens-engine", "probe"], "*--qsens-interactions goes by what is measured, and this run estimates*"),
        (["--qsens-top", "2"], "*--qsens-interactions goes by what is measured, and this run estimates*"),
    ],
)
def test_what_has_no_interactions(arguments: list[str], told: str, pytester: pytest.Pytester) -> None:
    """Refused before anything is measured."""
    write_model(pytester)
    ran = pytester.runpytest_inprocess("--qsens-model", MODEL, "--qsens-interactions", *arguments)
    assert ran.ret == pytest.ExitCode.USAGE_ERROR
    ran.stderr.fnmatch_lines([told])
