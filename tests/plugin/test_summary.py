"""The terminal summary: legible on any terminal, and it says which direction is worse."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from pytest_qsens.controller import Run
from pytest_qsens.ops import TOTAL, Op
from pytest_qsens.report.terminal import attention, worst_ops
from pytest_qsens.results import OpResult
from tests.plugin.harness import MODEL, write_model


def table(values: dict[str, float], width: int = 80, bar: str = "#") -> list[str]:
    """Lines of the table for these isolated NMSE values."""
    run = Run("m", "w8a8", Path("m.json"), tuple(Op(name, "linear") for name in values))
    for name, nmse in values.items():
        scores = {"nmse": nmse, "sqnr_db": None if nmse == 0 else 10.0}
        run.results[name] = OpResult(name, "linear", "", "measured", None, isolated=scores)
    return list(worst_ops(run, width, bar))


def test_the_worst_ten_come_first() -> None:
    """Sorted by error, ten at most, with a longer bar for a worse op, on a logarithmic scale."""
    lines = table({f"op{n:02}": 10.0**-n for n in range(1, 15)})
    assert "higher nmse is worse" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == [f"op{n:02}" for n in range(1, 11)]
    bars = [line.count("#") for line in lines[1:]]
    assert bars == sorted(bars, reverse=True)
    assert bars[0] > bars[4] > bars[9] >= 1
    steps = [a - b for a, b in pairwise(bars)]
    assert max(steps) - min(steps) <= 1  # equal factors, equal steps


def test_an_error_of_zero_has_no_bar() -> None:
    """An op whose output equals the reference is called identical."""
    lines = table({"same": 0.0, "other": 1e-3})
    assert lines[2].split() == ["same", "0", "identical"]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_lines_fit_the_terminal(width: int) -> None:
    """Long names are cut in the middle, so that the layer and the end stay; bars give way first."""
    name = "model.language_model.layers.17.self_attn.a_rather_long_name_of_a_projection.q_proj"
    lines = table({name: 1e-3, name + "2": 1e-4}, width)
    assert all(len(line) <= max(width, 36) for line in lines[1:])
    shown = lines[1].split()[0]
    assert (shown == name) if width == 200 else ("q_proj" in shown and ".." in shown)


@pytest.mark.parametrize(("encoding", "bar"), [("utf-8", "█"), ("ascii", "#"), ("latin-1", "#")])
def test_terminals_without_unicode(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, encoding: str, bar: str
) -> None:
    """Bars are drawn with what the terminal's encoding has."""
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    monkeypatch.setenv("PYTHONUTF8", "0")
    write_model(pytester)
    result = pytester.runpytest_subprocess("--qsens-model", MODEL)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines([f"  head *dB  {bar}{bar}*"])


def test_the_whole_model_alone(pytester: pytest.Pytester) -> None:
    """A run of the whole model alone does not count ops that nobody asked for."""
    write_model(pytester)
    result = pytester.runpytest_inprocess("--qsens-model", MODEL, "qsens::test_total")
    result.stdout.fnmatch_lines(["the whole model, and none of its 8 ops; against the snapshot: 1 new"])


def test_many_lines_of_no_op() -> None:
    """Of many ops that are gone, the first are named."""
    run = Run("m", "w8a8", Path("m.json"), gone=[f"op{n}" for n in range(9)])
    (line,) = attention(run)
    assert line.startswith("9 lines in m.json of no op of this model: op0, op1, op2, op3, op4, ...; remove with")


def test_a_whole_model_without_a_score() -> None:
    """A failed whole model is said once, among the lines that ``-q`` keeps."""
    run = Run("m", "w8a8", Path("m.json"))
    run.results[TOTAL] = OpResult(TOTAL, TOTAL, "", "failed", "the output holds NaN")
    assert list(attention(run)) == ["FAILED: total: the output holds NaN"]
    assert not list(worst_ops(run, 80, "#"))


def test_quiet(pytester: pytest.Pytester) -> None:
    """With ``-q`` the table goes, and what needs attention stays."""
    write_model(pytester, spare="unused")
    text = pytester.runpytest_inprocess("--qsens-model", MODEL, "-q").stdout.str()
    assert "worst ops" not in text
    assert "cost:" not in text
    assert "NOT EXERCISED: 1 of 9 ops" in text
    assert f"accept with: pytest --qsens-model {MODEL} -q --snapshot-update" in text


def test_colours_are_the_terminals_choice(pytester: pytest.Pytester) -> None:
    """Escape sequences appear when colour is forced, and not otherwise."""
    write_model(pytester, spare="unused")
    run = ("--qsens-model", MODEL, "--qsens-ops", "spare", "--qsens-ops", "head")
    assert "\x1b[" not in pytester.runpytest_inprocess(*run).stdout.str()
    coloured = pytester.runpytest_inprocess(*run, "--color=yes").stdout.str()
    assert any("\x1b[" in line for line in coloured.splitlines() if "NOT EXERCISED" in line)


def test_the_accepting_command_is_the_same_run(pytester: pytest.Pytester) -> None:
    """Arguments are kept, quoted for the shell, and other kinds of updating are left out."""
    write_model(pytester)
    args = ("--qsens-model", MODEL, "--qsens-ops", "blocks.*", "--qsens-ops", "head")
    result = pytester.runpytest_inprocess(*args)
    accept = f"pytest --qsens-model {MODEL} --qsens-ops 'blocks.*' --qsens-ops head --snapshot-update"
    assert f"accept with: {accept}" in result.outlines
    result = pytester.runpytest_inprocess(*args, "--snapshot-update-new-only")
    assert "accept with" not in result.stdout.str()
