"""The terminal summary: legible on any terminal, and it says which direction is worse."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
from _pytest.terminal import TerminalReporter

from pytest_qsens.ops import TOTAL, Op
from pytest_qsens.report.attention import attention
from pytest_qsens.report.lines import Lines
from pytest_qsens.report.ranking import worst_ops
from pytest_qsens.results import OpResult
from pytest_qsens.session.run import Run
from tests.plugin.harness import MODEL, write_model

if TYPE_CHECKING:
    from typing import TextIO


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


class Narrow(io.StringIO):
    """A terminal."""

    encoding = "ascii"  # type: ignore[assignment]  # a stream's own one cannot be set

    def isatty(self) -> bool:
        """Say that it is one."""
        return True


def narrow(width: int, *, terminal: bool = True) -> tuple[Lines, io.StringIO]:
    """Make a terminal of some width, or a log."""
    file = Narrow() if terminal else io.StringIO()
    # without warnings: we may be imported already, and asserts of ours not be rewritten again
    config = pytest.Config.fromdictargs({}, ["-p", "no:cacheprovider", "-p", "no:warnings"])
    reporter = TerminalReporter(config, cast("TextIO", file))
    reporter._tw.fullwidth = width
    return Lines(reporter), file


def test_lines_on_a_narrow_terminal() -> None:
    """They are broken between words; commands stay whole, and so does everything in a log."""
    lines, file = narrow(40)
    lines.title("qsens: model some_model, scheme w8a8, engine delta")
    lines.write("  blocks.1.down: isolated nmse 5.2665e-06 → 0.000264392 (+4920.3 %)")
    lines.write(f"accept with: pytest {'--option ' * 9}", whole=True)
    shown = file.getvalue().splitlines()
    assert shown[0].strip("= ") == "qsens"
    assert shown[1:3] == ["model some_model, scheme w8a8, engine", "  delta"]
    assert shown[3:5] == ["  blocks.1.down: isolated nmse", "    5.2665e-06 -> 0.000264392 (+4920.3"]
    assert all(len(line) <= 40 for line in shown[:-1])
    assert shown[-1].count("--option") == 9
    lines, file = narrow(40, terminal=False)
    lines.write("word " * 20)
    assert file.getvalue() == f"{'word ' * 20}\n"


def test_worse_ops_are_named_with_their_numbers(pytester: pytest.Pytester) -> None:
    """The summary says by how much, the worst first; with ``-q``, too, and not of what was accepted."""
    write_model(pytester)
    pytester.runpytest_inprocess("--qsens-model", MODEL, "--snapshot-update")
    (pytester.path / "worse").write_text("30")
    result = pytester.runpytest_inprocess("--qsens-model", MODEL, "-q")
    result.stdout.re_match_lines(
        [
            r"WORSE: \d of 9 scores are past their thresholds or limits",
            r"  blocks\.1\.\w+: isolated nmse \S+ → \S+ \(\+.*",
        ],
        consecutive=True,
    )
    accepted = pytester.runpytest_inprocess("--qsens-model", MODEL, "--snapshot-update")
    assert "WORSE" not in accepted.stdout.str()


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


def test_accepting_what_was_estimated(pytester: pytest.Pytester) -> None:
    """A run that estimates records nothing: the command is that of one that measures, and it works."""
    write_model(pytester)
    pytester.runpytest_inprocess("--qsens-model", MODEL, "--snapshot-update")
    (pytester.path / "worse").write_text("30")
    for args in (["--qsens-engine", "probe"], ["--qsens-engine=probe", "--qsens-gate-estimates"]):
        result = pytester.runpytest_inprocess(*args, "--qsens-model", MODEL, "--qsens-mode", "both")
        command = f"pytest --qsens-model {MODEL} --qsens-mode both --qsens-engine=auto --snapshot-update"
        assert f"accept with: {command}" in result.outlines
    assert pytester.runpytest_inprocess(*command.split()[1:]).ret == pytest.ExitCode.OK


def test_blocks_are_drawn_in_every_mode(pytester: pytest.Pytester) -> None:
    """Where nothing was measured alone, by what ops gain or add."""
    write_model(pytester)
    drawn = ["blocks from left to right, by {}: ▁ * to █ *", "  blocks.*.up   ???", "  blocks.*.down ???"]
    for arguments, metric in (((), "nmse"), (("--qsens-mode", "fallback"), "gain")):
        result = pytester.runpytest_inprocess("--qsens-model", MODEL, *arguments)
        result.stdout.fnmatch_lines([line.format(metric) for line in drawn])
    schemes = {"embed": "w8a8", "head": "w8a8", "blocks.*": "unquantized"}
    rules = [{"ops": ops, "scheme": scheme} for ops, scheme in schemes.items()]
    (pytester.path / "quant.json").write_text(json.dumps({"schema": 1, "rules": rules}))
    config = ("--qsens-config", "quant.json", "--qsens-mode", "fallback", "--qsens-config-down", "w8a8")
    result = pytester.runpytest_inprocess("--qsens-model", MODEL, *config)
    result.stdout.fnmatch_lines([line.format("loss") for line in drawn])
