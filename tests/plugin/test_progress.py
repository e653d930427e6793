"""What a long run shows while it goes on: right from the first number on, and nothing of pytest's own is spoilt."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from pytest_qsens.collection.subjects import Case, Subject
from pytest_qsens.ops import TOTAL, Op
from pytest_qsens.report import progress
from pytest_qsens.report.progress import Progress, Tally, duration
from tests.plugin.harness import LABEL, MODEL, OPS, write_model

if TYPE_CHECKING:
    from collections.abc import Sequence

DRAWN = re.compile("\x1bD\x1b\\[A\x1b7\r\n(.*?)\x1b8")
ERASED = "\x1b[J"


def run_test(
    tally: Tally, op: str, seconds: float | None, *, calibrating: float = 0.0, unexercised: bool = False
) -> None:
    """Let one test start, and end unless a test of that name is started already; no seconds: its op is cached."""
    if op not in tally._running:
        tally.start(op)
    spent = 0.0 if unexercised else seconds
    facts = [{"reference_seconds": 1.0}] if calibrating else []
    carried = {"records": [{"spent": spent}], "facts": facts}
    phases = (("setup", calibrating + (seconds or 0.0), {}), ("call", 0.0, {"qsens": carried}), ("teardown", 0.0, {}))
    for when, spent, extra in phases:
        report = pytest.TestReport(op, ("", None, ""), {}, "passed", None, when, duration=spent, **extra)  # type: ignore[arg-type]
        tally.add(Op(op, ""), report)


def tally_of(count: int, prefix: str = "layers.0.op") -> Tally:
    """Nothing done of this many ops."""
    tally = Tally("m")
    tally.ops = {f"{prefix}{n}" for n in range(count)}
    return tally


def test_calibration_is_no_part_of_the_rate() -> None:
    """The first test of a process calibrates the model; its op counts with what measuring it took."""
    tally = tally_of(10)
    assert not str(tally)
    tally.start("layers.0.op0")
    assert str(tally) == "m: 0/10 ops, calibrating"
    run_test(tally, "layers.0.op0", 2.0, calibrating=300.0)
    assert str(tally) == "m: 1/10 ops, 0.5 ops/s, 0:18 left"
    for n in range(1, 9):
        run_test(tally, f"layers.0.op{n}", 2.0)
    assert str(tally) == "m: 9/10 ops, 0.5 ops/s, 0:02 left"
    run_test(tally, "layers.0.op9", 2.0)
    assert not str(tally)


def test_ops_that_take_nothing_promise_nothing() -> None:
    """No rate comes of ops that the data never reached, nor of a block that was measured during calibration."""
    tally = Tally("m")
    tally.ops = {f"{block}.{n}.op" for block in ("free", "dead", "slow") for n in range(10)}
    run_test(tally, "free.0.op", 1e-5, calibrating=60.0)
    tally.ops |= {"free.0.op2"}
    run_test(tally, "free.0.op2", 1e-5)
    for n in range(10):
        run_test(tally, f"dead.{n}.op", 1e-3, unexercised=True)
    assert str(tally) == "m: 12/31 ops"
    run_test(tally, "slow.0.op", 2.0)
    assert str(tally) == "m: 13/31 ops, 0.5 ops/s, 0:36 left"


def test_cached_ops_promise_nothing() -> None:
    """What comes from the cache is done, and says nothing of how long the others take."""
    tally = tally_of(10)
    run_test(tally, "layers.0.op0", None, calibrating=300.0)
    for n in range(1, 5):
        run_test(tally, f"layers.0.op{n}", None)
    assert str(tally) == "m: 5/10 ops"
    run_test(tally, "layers.0.op5", 2.0)
    assert str(tally) == "m: 6/10 ops, 0.5 ops/s, 0:08 left"


def test_tests_side_by_side() -> None:
    """With four workers in step, the first results give four times the rate of one, whoever else is not done yet."""
    tally = tally_of(40)
    for n in range(4):
        tally.start(f"layers.0.op{n}")
    run_test(tally, "layers.0.op0", 2.0)
    assert str(tally) == "m: 1/40 ops, 2 ops/s, 0:20 left"


def test_a_dead_worker_ends_its_op() -> None:
    """Xdist reports a crash in a phase of its own, and nothing more comes of that test."""
    tally = tally_of(2)
    tally.start("layers.0.op0")
    tally.add(
        Op("layers.0.op0", ""),
        pytest.TestReport("layers.0.op0", ("", None, ""), {}, "failed", "crashed", "???"),  # type: ignore[arg-type]
    )
    assert str(tally) == "m: 1/2 ops"


def test_times_are_written_as_clocks_do() -> None:
    """Minutes and seconds, hours when there are some."""
    assert [duration(s) for s in (0.2, 59.6, 116, 7390)] == ["0:00", "1:00", "1:56", "2:03:10"]


@pytest.fixture
def clock() -> list[float]:
    """Seconds that the progress under test reads, in the last place."""
    return [0.0]


@pytest.fixture
def following(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> Progress:
    """Progress of a model of three blocks under two schemes, and of another one, on no terminal."""
    monkeypatch.setenv("CI", "true")
    cases = [Case("m", "w8a8", f"layers.{n // 9}.{n % 9}") for n in range(27)]
    cases += [Case("m", "w8a8", TOTAL), Case("m", "w8a8_static", "head"), Case("é", "w8a8", "head")]
    terminal = pytestconfig.pluginmanager.getplugin("terminalreporter")
    return Progress(terminal, {str(case): case for case in cases}, lambda: clock[-1])


def test_lines_wait_for_the_end_of_a_block(following: Progress, clock: list[float]) -> None:
    """No line between ops that were measured together: a whole block of time, one op done, would be a wrong rate."""
    written = []
    tally = following._tallies[Subject("m", "w8a8")]
    for n in range(27):
        case = Case("m", "w8a8", f"layers.{n // 9}.{n % 9}")
        tally.start(case.op)
        written += [(clock[-1], line)] if (line := following._due(case)) else []
        run_test(tally, case.op, 1e-3 if n % 9 else 45.0)
        clock.append(clock[-1] + (1e-3 if n % 9 else 45.0))
    assert [(round(at), line) for at, line in written] == [
        (45, "m w8a8: 9/27 ops, 0.2 ops/s, 1:30 left"),
        (90, "m w8a8: 18/27 ops, 0.2 ops/s, 0:45 left"),
    ]


def test_lines_come_at_intervals(following: Progress, clock: list[float]) -> None:
    """Where each op takes its own time, lines come inside of blocks as well, never closer than the interval."""
    written = []
    for n in range(18):
        case = Case("m", "w8a8", f"layers.{n // 9}.{n % 9}")
        following._tallies[Subject("m", "w8a8")].start(case.op)
        written += [clock[-1]] if following._due(case) else []
        clock.append(clock[-1] + 15.0)
    assert written == [30.0, 60.0, 90.0, 120.0, 165.0, 195.0, 225.0, 255.0]  # at 150 after one op of its block


def test_several_models(following: Progress) -> None:
    """Models in progress are told apart, by scheme only where that is needed, on any terminal; the total is no op."""
    for key in (("m", "w8a8"), ("m", "w8a8_static"), ("é", "w8a8")):
        following._tallies[Subject(*key)].start("x")
    assert str(following) == (
        "m w8a8: 0/27 ops, calibrating; m w8a8_static: 0/1 ops, calibrating; \\xe9: 0/1 ops, calibrating"
    )


@pytest.mark.parametrize("args", [[], ["-v"], ["-q"], ["-n", "2"]])
def test_lines_in_a_log(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, args: Sequence[str]) -> None:
    """Without a terminal, whole lines stand between the lines of pytest."""
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    write_model(pytester)
    result = pytester.runpytest_inprocess("--qsens-model", MODEL, "--snapshot-update", *args)
    result.assert_outcomes(passed=len(OPS) + 1)
    lines = [line for line in result.outlines if re.fullmatch(rf"{LABEL}: \d/8 ops(, .*)?", line)]
    assert len(lines) >= 3
    assert result.stdout.str().count(f"{LABEL}: ") == len(lines)
    dots = [line.removeprefix("qsens ").partition(" ")[0] for line in result.outlines]
    assert "-v" in args or "".join(line for line in dots if set(line) == {"."}) == "." * (len(OPS) + 1)
    assert result.outlines.count("qsens ") == 0
    assert "\x1b" not in result.stdout.str()


@pytest.mark.parametrize("args", [["-qq"], ["-p", "no:terminal"], ["--collect-only"]])
def test_silence(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, args: Sequence[str]) -> None:
    """Nothing is shown where nothing is wanted, and nothing needs a terminal plugin."""
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    write_model(pytester)
    result = pytester.runpytest_inprocess("--qsens-model", MODEL, "--snapshot-update", "-p", "no:xdist", *args)
    assert result.ret == pytest.ExitCode.OK
    assert f"{LABEL}: " not in result.stdout.str()


def on_a_terminal(*args: str) -> str:
    """Run pytest on a pseudo-terminal; returns all that it wrote."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "pytest", "--qsens-model", MODEL, "--snapshot-update", *args]
    environment = os.environ | {"TERM": "xterm", "NO_COLOR": "1", "PY_COLORS": "0"}
    with subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment) as process:
        os.close(follower)
        written = b""
        try:
            while part := os.read(leader, 65536):
                written += part
        except OSError:  # what Linux raises when the other end is closed
            pass
    os.close(leader)
    assert process.returncode == pytest.ExitCode.OK
    return written.decode()


@pytest.mark.parametrize("args", [["-p", "no:xdist"], ["-n", "2"]])
def test_a_line_on_a_terminal(pytester: pytest.Pytester, args: Sequence[str]) -> None:
    """A line is drawn below the dots and erased before anything else is written: pytest's output stays whole."""
    write_model(pytester)
    written = on_a_terminal(*args)
    drawn = DRAWN.findall(written)
    assert drawn[0] == f"{LABEL}: 0/8 ops, calibrating"
    assert any(re.fullmatch(rf"{LABEL}: 7/8 ops, \S+ ops/s, 0:\d\d left", line) for line in drawn)
    assert len(drawn) == written.count(f"\x1b8{ERASED}") == written.count(ERASED)
    rest = DRAWN.sub("", written).replace(ERASED, "")
    assert re.search(r"\.{9} +\[100%\]", rest)
    assert f"{LABEL}: " not in rest
    assert "\x1b" not in rest


@pytest.mark.parametrize(("variable", "args"), [("CI", []), ("", ["-s"])])
def test_terminals_that_are_not_ours_alone(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, variable: str, args: Sequence[str]
) -> None:
    """No line is updated in place in the terminal of a CI service, nor where tests print beside pytest."""
    if variable:
        monkeypatch.setenv(variable, "true")
    write_model(pytester)
    assert "\x1b" not in on_a_terminal("-p", "no:xdist", "--qsens-ops", "head", "--qsens-allow-ci-update", *args)
