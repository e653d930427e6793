"""In GitHub Actions: a step summary in Markdown, and annotations that point into the snapshot file."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from pytest_qsens.ci import LIMIT, append
from pytest_qsens.ops import Op
from pytest_qsens.report import summary_markdown
from pytest_qsens.report.findings import counts, findings
from pytest_qsens.report.github import command, workflow_commands
from pytest_qsens.results import OpResult
from pytest_qsens.session.run import Run
from pytest_qsens.snapshot import Entry, Snapshot, dumps
from pytest_qsens.thresholds import Comparison, Verdict
from pytest_qsens.time_budget import NOT_MEASURED
from tests.plugin.harness import LABEL, MODEL, OPS, op_id, snapshot_file, snapshot_ops, write_model
from tests.plugin.test_config import write_config

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

ACCEPT = f"pytest --qsens-model {MODEL}"
_COMMAND = re.compile(r"::(?P<level>\w+)(?: (?P<properties>.*?))?::(?P<data>.*)")


def parsed(line: str) -> tuple[str, dict[str, str], str]:
    """Read a workflow command as GitHub's runner does (``ActionCommand.TryParseV2``): level, properties, message."""
    match = _COMMAND.fullmatch(line)
    assert match is not None, line
    pairs = [pair.split("=", 1) for pair in (match["properties"] or "").split(",") if pair]
    return match["level"], {name: _unescaped(value, ":,") for name, value in pairs}, _unescaped(match["data"], "")


def _unescaped(text: str, marks: str) -> str:
    for mark in (*marks, "\r", "\n", "%"):
        text = text.replace(f"%{ord(mark):02X}", mark)
    return text


def commands(result: pytest.RunResult) -> list[tuple[str, dict[str, str], str]]:
    """Workflow commands at the start of lines of standard output."""
    return [parsed(line) for line in result.outlines if line.startswith("::")]


@pytest.fixture
def summary(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Path:
    """File of the step summary, which GitHub makes before a step."""
    path = pytester.path / "summary.md"
    path.touch()
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
    return path


@pytest.fixture
def annotated(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Say that this is GitHub Actions."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_WORKSPACE", str(pytester.path))


def taken(path: Path) -> str:
    """Text of a file, which is emptied."""
    text = path.read_text()
    path.write_text("")
    return text


@pytest.mark.parametrize("workers", [(), ("-n", "1")])
def test_the_life_of_a_summary(pytester: pytest.Pytester, summary: Path, workers: Sequence[str]) -> None:
    """The verdict comes first, once for a run; then counts, what got worse with its limit, and the next command."""
    write_model(pytester, spare="unused")
    run = ("--qsens-model", MODEL, *workers)
    accept = " ".join(["pytest", *run, "--snapshot-update"])
    assert pytester.runpytest_inprocess(*run).ret == 1
    text = taken(summary)
    assert text.startswith("## ❌ qsens: 8 ops are new, the whole model is new\n")
    assert text.count("## ❌") == 1
    assert "| 0 | 0 | 8 | 1 | 0 | 0 | 8 |" in text
    assert f"```sh\n{accept}\n```" in text
    assert "- NOT EXERCISED: 1 of 9 ops" in text
    assert re.search(r"^- cost: [\d.]+ s in all; .* forwards per op$", text, re.MULTILINE)

    assert pytester.runpytest_inprocess(*run, "--snapshot-update").ret == 0
    text = taken(summary)
    assert text.startswith("## ✅ qsens: nothing that was measured got worse, 8 ops measured, 1 not exercised\n")
    assert f"9 scores were accepted into qsens\\_snapshots/{LABEL}/w8a8.json." in text
    assert "```" not in text

    (pytester.path / "worse").write_text("30")
    assert pytester.runpytest_inprocess(*run).ret == 1
    text = taken(summary)
    old = snapshot_ops(pytester)["blocks.1.down"]["isolated"]["nmse"]
    assert re.match(r"## ❌ qsens: \d ops? got worse", text)
    row = re.search(r"\| blocks\.1\.down \| regressed \| isolated nmse \| (\S+) \| (\S+) \(\+\d+ %\) \| (\S+) \|", text)
    assert row is not None
    assert float(row[1]) == pytest.approx(old, rel=1e-3)
    assert float(row[3]) == pytest.approx(1.05 * old, rel=1e-3)
    assert float(row[2]) > float(row[3])
    assert accept in text
    worst = text.partition("Most sensitive, isolated (higher nmse is worse):")[2]
    assert worst.count("\n| ") == len(OPS) + 1


def test_no_summary_of_what_is_none_of_ours(pytester: pytest.Pytester, summary: Path, annotated: None) -> None:
    """Without a model, while tests are listed, and for help, nothing is written."""
    del annotated
    write_model(pytester)
    pytester.makepyfile(test_it="def test_it(): assert 0")
    for args in (["test_it.py"], ["--qsens-model", MODEL, "--collect-only", "-q"], ["--help"]):
        result = pytester.runpytest_inprocess(*args)
        assert not commands(result)
    assert summary.read_text() == ""


def test_nothing_outside_of_github(pytester: pytest.Pytester) -> None:
    """Without its variables there are no commands."""
    write_model(pytester)
    assert not commands(pytester.runpytest_inprocess("--qsens-model", MODEL))


def test_failed_and_lost_ops(pytester: pytest.Pytester, summary: Path, annotated: None) -> None:
    """What has no score any more is told with its reason, and how to repeat it."""
    del annotated
    write_model(pytester, spare="used")
    pytester.runpytest_inprocess("--qsens-model", MODEL, "--snapshot-update")
    line = (
        snapshot_file(pytester)
        .read_text()
        .split("\n")
        .index(next(line for line in snapshot_file(pytester).read_text().split("\n") if '"spare"' in line))
    )
    write_model(pytester, spare="unused")
    taken(summary)
    result = pytester.runpytest_inprocess("--qsens-model", MODEL)
    assert result.ret == 1
    text = summary.read_text()
    assert "1 op lost its score" in text.split("\n")[0]
    assert "| spare | lost | the evaluation data never reached it |" in text
    assert f"```sh\npytest --qsens-model {MODEL} '{op_id('spare')}'\n```" in text
    level, properties, message = next(found for found in commands(result) if "no score any more" in found[1]["title"])
    assert (level, properties["line"]) == ("error", str(line + 1))
    assert message.split("\n") == ["spare", "the evaluation data never reached it"]


def test_annotations(pytester: pytest.Pytester, annotated: None) -> None:
    """They are at the starts of lines, whatever pytest prints beside them, and point to the op's line."""
    del annotated
    write_model(pytester)
    pytester.runpytest_inprocess("--qsens-model", MODEL, "--snapshot-update")
    (pytester.path / "worse").write_text("30")
    pytester.makeconftest(  # what is captured of a test has no end of line
        "import pytest\n@pytest.fixture(autouse=True)\ndef noise():\n    print('noise', end='')\n"
    )
    lines = snapshot_file(pytester).read_text().split("\n")
    for args in (["-q"], ["-qq"], ["-v"], ["-s"], ["-n", "1", "-q"], ["-p", "no:terminal"], ["--color=yes"]):
        result = pytester.runpytest_inprocess("--qsens-model", MODEL, *args)
        assert result.ret == 1
        found = commands(result)
        assert len(found) >= 2
        for level, properties, message in found:
            assert level == "error"
            assert properties["file"] == f"qsens_snapshots/{LABEL}/w8a8.json"
            assert properties["title"] == f"{LABEL} w8a8: worse than the snapshot"
            op, change, accept = message.split("\n")
            assert lines[int(properties["line"]) - 1].strip().startswith(f'"{op}": {{')
            assert re.fullmatch(r"isolated nmse \S+ → \S+ \(\+[\d.]+ %, limit \S+ = \+5 %\)", change)
            assert accept == f"accept with: pytest --qsens-model {MODEL} {' '.join(args)} --snapshot-update"
        growth = [float(re.search(r"\(\+([\d.]+) %", message)[1]) for _, _, message in found]  # type: ignore[index]
        assert growth == sorted(growth, reverse=True)


def test_new_ops_are_annotated_where_they_will_be(pytester: pytest.Pytester, annotated: None) -> None:
    """A new op points to the line after which its own one comes."""
    del annotated
    write_model(pytester)
    pytester.runpytest_inprocess("--qsens-model", MODEL, "--snapshot-update", "--qsens-ops", "blocks.*")
    result = pytester.runpytest_inprocess("--qsens-model", MODEL)
    lines = [line.strip().split(":")[0] for line in snapshot_file(pytester).read_text().split("\n")]
    places = {message.split("\n")[0]: lines[int(found["line"]) - 1] for _, found, message in commands(result)}
    assert places == {"embed": '"blocks.2.up"', "head": '"blocks.2.up"', "total": '"blocks.2.up"'}


def test_as_many_annotations_as_are_shown(pytester: pytest.Pytester, annotated: None) -> None:
    """GitHub shows ten errors of a step: the last one says how many more there are."""
    del annotated
    write_model(pytester, spare="used")
    pytester.makepyfile(more="from net import *\ndef spec2(): return spec()\n")
    pytester.makepyfile(
        test_both="""
        import pytest
        @pytest.mark.parametrize("again", [1])
        @pytest.mark.qsens(model="more:spec2")
        def test_op(qsens_score, snapshot, again): assert qsens_score == snapshot
        """
    )
    result = pytester.runpytest_inprocess("--qsens-model", MODEL, ".")
    found = commands(result)
    assert len(found) == 10
    assert found[9][2].startswith("10 more: ")
    assert found[9][2].endswith(", ...") is False
    assert all(f"{LABEL} w8a8" in title or "more.spec2" in title for _, p, _ in found[:9] for title in [p["title"]])


_INTERRUPTING = """
    import pytest
    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(item):
        if "blocks.1.up" in item.nodeid: raise {error}
    """


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ("KeyboardInterrupt", 2, r"## ⚠️ qsens: interrupted after 3 ops, exit code 2: 3 ops are new"),
        ("SystemExit('no')", 3, r"## ⚠️ qsens: ended by an internal error after 3 ops, exit code 3: 3 ops are new"),
    ],
)
def test_interrupted(
    pytester: pytest.Pytester, summary: Path, annotated: None, error: str, code: int, said: str
) -> None:
    """A run that does not come to its end tells what it has."""
    del annotated
    write_model(pytester)
    internal = "pytest_runtest_logstart(nodeid)", "nodeid"
    hook = _INTERRUPTING.format(error=error)
    if code == 3:  # an error in a hook is pytest's, one in a test the test's
        hook = hook.replace("pytest_runtest_call(item)", internal[0]).replace("item.nodeid", internal[1])
        hook = hook.replace("SystemExit('no')", "RuntimeError('no')")
    pytester.makeconftest(hook)
    run = pytester.runpytest_subprocess if code == 2 else pytester.runpytest_inprocess
    result = run("--qsens-model", MODEL)
    assert result.ret == code
    assert summary.read_text().split("\n")[0] == said
    assert len(commands(result)) == 3


def test_refused(pytester: pytest.Pytester, summary: Path, annotated: None) -> None:
    """Of a usage error the message is the verdict, before and after workers have started."""
    del annotated
    write_model(pytester)
    for args in (["--qsens-scheme", "w8a9"], ["--qsens-ops", "nothing*", "-n", "1"], ["--qsens-fail", "gain:5%"]):
        result = pytester.runpytest_inprocess("--qsens-model", MODEL, *args)
        assert result.ret == 4, result.stdout.str()
        text = taken(summary)
        assert text.startswith("## ❌ qsens: not measured, exit code 4: ")
        ((level, properties, message),) = commands(result)
        assert (level, properties["title"]) == ("error", "qsens: not measured")
        assert message in result.stderr.str().replace("ERROR: qsens: ", "")


def test_out_of_time(pytester: pytest.Pytester, summary: Path) -> None:
    """A time budget that was too short is no failure of the model, and is told apart."""
    write_model(pytester)
    result = pytester.runpytest_inprocess("--qsens-model", MODEL, "--qsens-time-budget", "0.01s")
    assert result.ret == NOT_MEASURED
    assert summary.read_text().startswith("## ⌛ qsens: not measured, exit code 10: ")


def test_nothing_selected(pytester: pytest.Pytester, summary: Path) -> None:
    """A run without tests does not look like one that found nothing."""
    write_model(pytester)
    assert pytester.runpytest_inprocess("--qsens-model", MODEL, "-k", "nothing").ret == 5
    assert summary.read_text() == "## ⚠️ qsens: nothing was measured, exit code 5\n"


def test_a_summary_that_cannot_be_written(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs a line, not the run, where warnings are errors, too."""
    write_model(pytester)
    pytester.runpytest_inprocess("--qsens-model", MODEL, "--snapshot-update")
    missing = pytester.path / "missing" / "summary.md"
    for path, terminal in ((pytester.path, ()), (missing, ()), (missing, ("-p", "no:terminal"))):
        monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
        strict = ("-W", "error", "-W", "ignore::pytest.PytestAssertRewriteWarning")  # we may be imported already
        result = pytester.runpytest_inprocess("--qsens-model", MODEL, *strict, *terminal)
        assert result.ret == 0
        (line,) = [line for line in result.outlines if "no summary was written" in line]
        assert str(path) in line


def test_an_error_in_the_summary(
    pytester: pytest.Pytester, summary: Path, annotated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake of ours at the very end costs a line: the exit code and the annotations are what they would be."""
    del summary, annotated
    write_model(pytester)

    def broken(_: object) -> list[str]:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(summary_markdown, "document", broken)
    result = pytester.runpytest_inprocess("--qsens-model", MODEL)
    assert result.ret == 1
    result.stdout.fnmatch_lines(["qsens: no summary of this run for GitHub, *ZeroDivisionError: division by zero*"])
    assert len(commands(result)) == len(OPS) + 1


def test_more_problems_than_annotations(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """However many problems there are, the last annotation counts what is not shown."""
    run = Run("m", "w8a8", tmp_path / "snapshot.json", tuple(Op(f"op{n}", "linear") for n in range(3)))
    for op in run.ops:
        run.results[op.name] = OpResult(op.name, "linear", "", "failed", "no")
    problems = [f"problem {number}" for number in range(12)]
    seen = SimpleNamespace(
        stopped=None, problems=SimpleNamespace(messages=problems), runs={0: run}, config=request.config
    )
    errors = [found for line in workflow_commands(seen) if (found := parsed(line))[0] == "error"]  # type: ignore[arg-type]  # what is read of one
    assert [message for *_, message in errors] == [*problems[:9], "6 more: op0, op1, op2"]


def test_the_limit_of_a_step(tmp_path: Path) -> None:
    """All summaries of a step are within 1 MiB, cut at the end of a line; none of them is lost for the others."""
    path = tmp_path / "summary.md"
    path.write_text("before\n")
    lines = [f"| op {number} | ü |" for number in range(80_000)]
    assert append(path, lines) == []
    text = path.read_text()  # cut between characters
    assert LIMIT - 200 < path.stat().st_size <= LIMIT
    assert text.startswith("before\n\n| op 0 | ü |\n| op 1 | ü |\n")
    assert text.endswith(" | ü |\n\nThe rest was left out: a step has room for 1 MiB.\n")
    (line,) = append(path, ["## one more"])
    assert "no room" in line
    assert path.read_text() == text


HOSTILE = "a|b`c<script>alert(1)</script>*d*[e](f)"


def test_names_stay_text(pytester: pytest.Pytester, summary: Path, annotated: None) -> None:
    """Names of modules can hold anything but a dot: they make neither markup nor commands of their own."""
    del annotated
    write_model(pytester)
    source = (pytester.path / "net.py").read_text()
    hostile = f"{HOSTILE}\n::error::pwned"
    source = source.replace("self.head =", f"self.add_module({hostile!r}, nn.Linear(16, 8)); self.head =")
    source = source.replace("return self.head(x)", f"return self.head(x) + getattr(self, {hostile!r})(x)")
    (pytester.path / "net.py").write_text(source)
    result = pytester.runpytest_inprocess("--qsens-model", MODEL)
    found = commands(result)
    assert not any(message == "pwned" for _, _, message in found)
    assert [message.split("\n")[:2] for _, _, message in found if HOSTILE in message] == [hostile.split("\n")]
    html = MarkdownIt("commonmark").enable("table").enable("strikethrough").render(summary.read_text())
    assert "<script" not in html
    cells = re.findall(r"<td[^>]*>(.*?)</td>", html)
    escaped = HOSTILE.replace("<", "&lt;").replace(">", "&gt;")
    assert cells.count(f"{escaped} ::error::pwned") == 2
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    assert {row.count("<td") + row.count("<th") for row in rows} == {7, 6, 3}


@given(st.text(), st.text(), st.text())
def test_commands_are_read_as_they_were_meant(message: str, title: str, file: str) -> None:
    """Whatever is in them, commands are one line, and the runner's parser gives back what went in."""
    line = command("error", message, title=title, file=file, line=3)
    assert len(line.splitlines()) <= 1 or not re.search(r"[\r\n]", line)
    assert parsed(line) == ("error", {"file": file, "line": "3", "title": title}, message)


def test_an_order_that_changed(pytester: pytest.Pytester, summary: Path, annotated: None) -> None:
    """What fails though every test passes is the verdict, and an annotation of its own."""
    del annotated
    write_model(pytester)
    pytester.runpytest_inprocess("--qsens-model", MODEL, "--snapshot-update")
    (pytester.path / "worse").write_text("30")
    result = pytester.runpytest_inprocess("--qsens-model", MODEL, "--qsens-fail", "nmse:1e9,kendall:0.99")
    result.assert_outcomes(passed=len(OPS) + 1)
    assert result.ret == 1
    assert summary.read_text().split("\n## ")[-1].startswith("❌ qsens: the order of the ops of net.spec w8a8: kendall")
    ((level, properties, message),) = [found for found in commands(result) if found[0] == "error"]
    assert (level, properties) == ("error", {"title": "qsens"})
    assert message.startswith("the order of the ops of net.spec w8a8: kendall")


def test_a_config(pytester: pytest.Pytester, summary: Path) -> None:
    """Which file, how many ops have which scheme, and the scheme of every op in the tables."""
    write_model(pytester)
    write_config(pytester, {"head": "unquantized", "*.up": "w8a8_dynamic", "embed": "w8a16_asym", "*": "w8a8"})
    pytester.runpytest_inprocess("--qsens-model", MODEL, "--qsens-config", "quant.json", "--qsens-mode", "both")
    text = summary.read_text()
    assert f"### {LABEL}, config quant, engine delta" in text
    assert re.search(
        r"^config: .*quant\.json \(qsens\): 3 w8a8\\_dynamic, 3 w8a8, 1 w8a16\\_asym, 1 unquantized$",
        text,
        re.MULTILINE,
    )
    assert re.search(
        r"^\| blocks\.1\.up \| new \| w8a8\\_dynamic \| fallback nmse \| none \| \S+ \|  \|$", text, re.MULTILINE
    )
    assert re.search(r"^\| blocks\.1\.up \| w8a8\\_dynamic \| \S+ \| [\d.]+ \|$", text, re.MULTILINE)


def test_thousands_of_ops(tmp_path: Path) -> None:
    """A table stays readable, and the place of every op is found once, not by going through the file for each."""
    path = tmp_path / "snapshot.json"
    names = [f"model.layers.{number:04}.proj" for number in range(5000)]
    run = Run("m", "w8a8", path, tuple(Op(name, "linear") for name in names))
    entries = {name: Entry("linear", isolated={"nmse": 1.0}) for name in names}
    path.write_text(dumps(Snapshot("m", "w8a8", {}, entries)))
    for place, name in enumerate(names):
        run.results[name] = OpResult(name, "linear", "", "measured", isolated={"nmse": 2.0 + place})
        compared = (Comparison("isolated", "nmse", 1.0, 2.0 + place, 1.05, "regressed"),)
        run.verdicts[name] = Verdict("regressed", ("worse",), compared=compared)
    found = findings(run)
    assert [finding.op for finding in found] == names[::-1]
    lines = path.read_text().split("\n")
    assert all(f'"{finding.op}"' in lines[(finding.line or 0) - 1] for finding in found)
    assert counts(run, found)["regressed"] == 5000
