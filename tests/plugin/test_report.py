"""``--qsens-report``: what real runs write."""

from __future__ import annotations

import csv
import re
from typing import TYPE_CHECKING

import pytest
import vl_convert  # noqa: F401 - before a run in this process, which forgets what it imports: it cannot be twice

import pytest_qsens.report.directory.page  # noqa: F401 - keeps its library from run to run
from pytest_qsens.cli import main
from pytest_qsens.result_files import load
from tests.plugin.harness import LABEL, MODEL, OPS, listing, snapshot_ops, write_model

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_qsens.results import RunResult

FILES = ["report.csv", "report.html", "report.json", "report.md"]


def report(directory: Path) -> tuple[RunResult, str, dict[str, dict[str, str]]]:
    """Read what was written: the result, the head of the page, and the lines of the sheet by op."""
    assert sorted(path.name for path in directory.iterdir()) == FILES
    html = (directory / "report.html").read_text()
    headline = re.search(r'<p class="headline">.*?</span>(.*?)</p>', html)
    assert headline is not None
    with (directory / "report.csv").open(newline="") as stream:
        lines = {line["op"]: line for line in csv.DictReader(stream)}
    return load(directory / "report.json"), headline[1], lines


def run(pytester: pytest.Pytester, *args: str) -> pytest.RunResult:
    """Run on the small model, with a report."""
    return pytester.runpytest_inprocess("--qsens-model", MODEL, "--qsens-report", "out", *args)


def test_it_says_what_became_of_the_run(pytester: pytest.Pytester) -> None:
    """New scores, accepted ones, the same ones, and a worse one: each report says so, and how to go on."""
    write_model(pytester)
    out = pytester.path / "out"
    assert run(pytester).ret == 1
    result, headline, lines = report(out)
    assert headline == "Failed: 8 ops are new"
    assert "--snapshot-update" in (out / "report.md").read_text()
    assert [op.op for op in result.ops] == list(OPS)
    assert result.details is not None
    assert result.details.notes == ()
    assert {item.op for item in result.details.ranges} == set(OPS)
    assert result.details.data[1].samples[0].text == "ids: int64 2 x 6"

    accepted = run(pytester, "--snapshot-update")
    assert accepted.ret == 0
    accepted.stdout.fnmatch_lines(["qsens: wrote *out/report.html"])
    assert report(out)[1] == "Accepted"

    (pytester.path / "out" / "mine.txt").write_text("kept")
    assert run(pytester, "--qsens-json", "result.json").ret == 0
    (out / "mine.txt").unlink()
    result, headline, lines = report(out)
    assert headline == "Passed: no op got worse"
    assert {line["change"] for line in lines.values()} == {"same"}
    assert load(pytester.path / "result.json").ops == result.ops
    assert load(pytester.path / "result.json").details is None

    (pytester.path / "worse").write_text("30")
    assert run(pytester).ret == 1
    result, headline, lines = report(out)
    assert re.fullmatch(r"Failed: \d ops? got worse", headline)
    assert lines["blocks.1.down"]["change"] == "worse"
    assert "blocks.1.down" in (out / "report.html").read_text().partition("<dl")[0]


def test_workers_make_no_difference(pytester: pytest.Pytester) -> None:
    """The controller writes it, whoever measures; a selection of groups has the ranges of their members."""
    write_model(pytester)
    model = ("--qsens-model", MODEL, "--qsens-no-cache", "--snapshot-update")
    alone = (*model, "--qsens-report", "alone")
    assert pytester.runpytest_inprocess(*alone).ret == 0
    assert pytester.runpytest_subprocess(*model, "--qsens-report", "workers", "-n", "2").ret == 0
    one, other = report(pytester.path / "alone"), report(pytester.path / "workers")
    assert one[0].details == other[0].details
    assert [(op.op, op.isolated) for op in one[0].ops] == [(op.op, op.isolated) for op in other[0].ops]
    groups = ("--qsens-granularity", "block", "--qsens-ops", "blocks.*", "--qsens-report", "groups")
    assert pytester.runpytest_inprocess("--qsens-model", MODEL, *groups).ret == 1
    result, headline, _ = report(pytester.path / "groups")
    assert headline == "Failed: 3 groups are new"
    assert result.run.granularity == "block"
    assert result.details is not None
    members = {"blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "blocks.2.up", "blocks.2.down"}
    assert {item.op for item in result.details.ranges} == members


def test_shards(pytester: pytest.Pytester, capsys: pytest.CaptureFixture[str]) -> None:
    """Their result files can be merged, with what was collected for each, and a report made of that."""
    write_model(pytester)
    for index in ("1", "2"):
        given = ("--qsens-shard", f"{index}/2", "--qsens-report", f"out{index}", "--snapshot-update")
        assert pytester.runpytest_inprocess("--qsens-model", MODEL, *given).ret == 0
    assert main(["merge", "out1/report.json", "out2/report.json", "-o", "merged.json"]) == 0
    assert main(["report", "merged.json", "out", "--against", "qsens_snapshots/net.spec/w8a8.json"]) == 0
    result, headline, lines = report(pytester.path / "out")
    assert headline == "No op got worse"
    assert set(lines) == {*OPS, "total"}
    assert result.details is not None
    assert {item.op for item in result.details.ranges} == set(OPS)
    assert "wrote out/report.html" in capsys.readouterr().out


def test_configs_and_estimates(pytester: pytest.Pytester) -> None:
    """Schemes of a config are told op by op; estimates have their intervals."""
    write_model(pytester)
    (pytester.path / "quant.yaml").write_text("schema: 1\nrules:\n- {ops: 'blocks.*', scheme: w8a8_dynamic}\n")
    given = ("--qsens-config", "quant.yaml", "--qsens-config-down", "w8a8", "--qsens-mode", "both")
    assert run(pytester, *given).ret == 1
    result, _, lines = report(pytester.path / "out")
    assert lines["blocks.0.up"]["scheme"] == "w8a8_dynamic"
    assert float(lines["head"]["added.loss"]) == next(op.added for op in result.ops if op.op == "head")["loss"]  # type: ignore[index]
    assert "quant.yaml" in (pytester.path / "out" / "report.html").read_text()
    ranked = re.findall(
        r"^\| \d+ \| ([\w.]+) \| \w+ \| (.+?) \| ", (pytester.path / "out" / "report.md").read_text(), re.MULTILINE
    )
    assert ("blocks.0.up", r"w8a8\_dynamic") in ranked
    assert run(pytester, "--qsens-engine", "probe").ret == 0
    result, headline, lines = report(pytester.path / "out")
    estimated = [op for op in result.ops if op.status == "estimated"]
    assert estimated
    assert float(lines[estimated[0].op]["isolated.nmse.high"]) == estimated[0].intervals["isolated"][1]
    assert headline == "Nothing was compared"


def test_an_interrupted_run(pytester: pytest.Pytester) -> None:
    """What was measured until then is in it, and the model is not loaded again."""
    write_model(pytester)
    pytester.makeconftest("""
        def pytest_runtest_logfinish(nodeid):
            if "blocks.0.down" in nodeid:
                raise KeyboardInterrupt
        """)
    arguments = ("--qsens-model", MODEL, "--qsens-report", "out", "--qsens-no-cache")
    assert pytester.runpytest_subprocess(*arguments).ret == pytest.ExitCode.INTERRUPTED
    result, headline, _ = report(pytester.path / "out")
    assert headline == "Interrupted"
    assert [op.status for op in result.ops] == ["measured"] * 3 + ["unrun"] * 5
    assert result.details is not None
    assert "interrupted" in result.details.notes[0]


def test_a_model_that_is_gone(pytester: pytest.Pytester) -> None:
    """Scores are reported without ranges, if the model cannot be loaded once more."""
    write_model(pytester)
    source = (pytester.path / "net.py").read_text()
    refusing = 'def model():\n    if (HERE / "gone").exists():\n        raise OSError("gone")\n'
    (pytester.path / "net.py").write_text(source.replace("def model():\n", refusing))
    pytester.makeconftest("""
        from pathlib import Path
        def pytest_runtest_logfinish(nodeid):
            if "test_total" in nodeid:
                Path("gone").touch()
        """)
    assert run(pytester, "--snapshot-update", "--qsens-no-cache").ret == 0
    result, headline, _ = report(pytester.path / "out")
    assert headline == "Accepted"
    assert result.details is not None
    assert result.details.ranges == ()
    assert "gone" in result.details.notes[0]


def test_a_directory_that_is_gone(pytester: pytest.Pytester) -> None:
    """If the report cannot be written after all, the run says so and fails; nothing else is lost."""
    write_model(pytester)
    pytester.makeconftest("""
        from pathlib import Path
        def pytest_runtest_logfinish(nodeid):
            Path("out").touch()
        """)
    result = run(pytester, "--snapshot-update", "--qsens-json", "result.json")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*total, everything quantized: *", "qsens: *out cannot be made: File exists"])
    assert len(load(pytester.path / "result.json").ops) == len(OPS)
    assert set(snapshot_ops(pytester)) == set(OPS)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("net.py", "--qsens-report *net.py is a file, not a directory*"),
        ("net.py/out", "--qsens-report * cannot be made: *net.py is a file*"),
        ("/proc/out", "/proc/out is not writable*"),
        ("theirs", "--qsens-report *theirs has a report.html that no report of ours has written*"),
        ("", "--qsens-report is empty*"),
    ],
)
def test_places_that_cannot_be(pytester: pytest.Pytester, place: str, message: str) -> None:
    """They are refused before anything is measured or written."""
    write_model(pytester)
    (pytester.mkdir("theirs") / "report.html").write_text("<html>pytest-html</html>")
    before = listing(pytester)
    result = pytester.runpytest_inprocess("--qsens-model", MODEL, "--qsens-report", place, "--snapshot-update")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: qsens: {message}"])
    assert listing(pytester) == before


def test_one_report_is_of_one_model(pytester: pytest.Pytester) -> None:
    """Tests of two schemes need to be told apart; that is known before anything is measured."""
    write_model(pytester)
    pytester.makepyfile(f"""
        import pytest
        @pytest.mark.parametrize("_", [pytest.param(0, marks=())])
        @pytest.mark.qsens(model={MODEL!r}, ops=["head"])
        def test_one(qsens_score, snapshot, _):
            assert qsens_score == snapshot
        @pytest.mark.qsens(model={MODEL!r}, scheme="w8a8_dynamic", ops=["head"])
        def test_other(qsens_score, snapshot):
            assert qsens_score == snapshot
        """)
    result = pytester.runpytest_inprocess("--qsens-report", "out")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*out cannot be written: a report holds one model and scheme, this run has *"])
    assert run(pytester, "--snapshot-update").ret == 0
    assert report(pytester.path / "out")[0].run.model == LABEL
