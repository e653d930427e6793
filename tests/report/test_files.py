"""The files of a report beside its page, and where they go."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from pytest_qsens import result_files
from pytest_qsens.cli import main
from pytest_qsens.details import Channels, Details
from pytest_qsens.diff import of_result
from pytest_qsens.errors import QsensError
from pytest_qsens.ops import TOTAL
from pytest_qsens.report.directory.channel_charts import range_cards, wanted, without_ranges
from pytest_qsens.report.directory.charts import agreement, heat_maps
from pytest_qsens.report.directory.contents import Judgement, Report, compared, judged_by, ranked
from pytest_qsens.report.directory.markdown import as_markdown
from pytest_qsens.report.directory.sheet import as_csv
from pytest_qsens.report.directory.write import write_report
from pytest_qsens.results import OpResult
from pytest_qsens.thresholds import parse_fail
from tests.report.hostile import TEXTS, hostile, large, measured, scores

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_qsens.results import RunResult

FAIL = parse_fail("nmse:5%")
FILES = ["report.csv", "report.html", "report.json", "report.md"]


def of(result: RunResult, old: RunResult | None = None) -> Report:
    """Report of a result."""
    changes, why = (None, "nothing to compare with") if old is None else compared(result, of_result(old, "old"), FAIL)
    report = Report(result, Judgement("open", ""), changes, why, FAIL)
    return replace(report, judgement=judged_by(report))


def small() -> RunResult:
    """Make a result with few ops, one of them an estimate."""
    estimate = replace(measured("b.1.up", 0.2), status="estimated", intervals={"isolated": (0.1, 0.4)})
    never = OpResult("b.2.up", "linear", "b.2", "unexercised", "the data never reached it")
    return replace(large(1), ops=(measured("b.0.up", 0.1), estimate, never))


def test_a_spreadsheet_runs_nothing() -> None:
    """No cell begins as a formula does, and every text is there, on lines and in columns of its own."""
    rows = list(csv.reader(io.StringIO(as_csv(of(hostile())))))
    assert {len(row) for row in rows} == {len(rows[0])}
    assert len(rows) == 2 + len(hostile().ops)
    texts = [cell for row in rows[1:] for cell in row[:6]]
    assert not [cell for cell in texts if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))]
    assert {cell.removeprefix("'") for cell in texts}.issuperset(text.removeprefix("'") for text in TEXTS)


def test_a_line_has_all_scores() -> None:
    """Numbers are those of the result at full precision; negative ones stay numbers."""
    result = large(30)
    lines = list(csv.DictReader(io.StringIO(as_csv(of(result, result)))))
    assert [line["op"] for line in lines] == [*(op.op for op in result.ops), TOTAL]
    for op, line in zip(result.ops, lines, strict=False):
        assert op.isolated is not None
        assert op.fallback is not None
        assert float(line["isolated.nmse"]) == op.isolated["nmse"]
        assert float(line["fallback.gain"]) == op.fallback["gain"]
        assert (line["change"], line["weights"], line["status"]) == ("same", str(op.weights), "measured")
    assert any(line["fallback.gain"].startswith("-") for line in lines)
    estimate = list(csv.DictReader(io.StringIO(as_csv(of(small())))))[1]
    assert (estimate["isolated.nmse.low"], estimate["isolated.nmse.high"]) == ("0.1", "0.4")


def test_markdown_takes_texts_for_texts() -> None:
    """No mark-up of a text is left as it is, rows of tables keep their columns, and headings are ours."""
    text = as_markdown(of(hostile(), replace(hostile(), ops=hostile().ops[:3])))
    body = re.sub(r"(?<!\\)`[^`\n]*`", "", text.partition("\n")[2])
    assert not re.search(r"<(?!br>)", body)
    assert "[x](" not in body
    assert "**bold**" not in body
    for table in re.findall(r"(?:^\|.*\n)+", body, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert {line for line in body.splitlines() if line.startswith("## ")} == {
        "## Most sensitive of 42",
        "## What changed",
        "## Without a score",
        "## Where",
    }


def test_json_is_a_result_file(tmp_path: Path) -> None:
    """It reads as what was written, details with it, and a report can be made of it again, byte for byte."""
    result = hostile()
    write_report(tmp_path / "one", of(result))
    assert result_files.load(tmp_path / "one" / "report.json") == result
    assert result_files.from_document(json.loads(result_files.dump(small())), tmp_path) == small()
    write_report(tmp_path / "two", of(result_files.load(tmp_path / "one" / "report.json")))
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranges": 1}, "'ranges': a list is needed, found 1"),
        ({"data": [{"purpose": "both"}]}, "'both' is not one of calibration, evaluation"),
        ({"more": 1}, "unknown key 'more'"),
        ({"notes": [1]}, "'notes': a string is needed, found 1"),
    ],
)
def test_damaged_details(tmp_path: Path, change: dict[str, object], message: str) -> None:
    """What is wrong in a file is told with its place."""
    document = json.loads(result_files.dump(replace(small(), details=Details())))
    document["details"] |= change
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(document))
    with pytest.raises(QsensError, match=re.escape(message)):
        result_files.load(path)


def test_a_picture_is_a_picture(tmp_path: Path) -> None:
    """A file cannot bring in another kind of address."""
    text = result_files.dump(hostile()).replace("data:image/png;base64,", "https://example.com/")
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(QsensError, match="a PNG or JPEG data URL is needed"):
        result_files.load(tmp_path / "a.json")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes four files into a directory that it makes, and leaves others there alone; a change shows up."""
    monkeypatch.chdir(tmp_path)
    old = small()
    new = replace(old, ops=(measured("b.0.up", 0.2), *old.ops[1:]))
    result_files.write(tmp_path / "old.json", old)
    result_files.write(tmp_path / "new.json", new)
    assert main(["report", "new.json", "a/b", "--against", "old.json"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"wrote a/b/report.{kind}" for kind in ("json", "csv", "md", "html")
    ]
    assert "1 op got worse" in (tmp_path / "a/b/report.html").read_text()
    assert "+100.0 %" in (tmp_path / "a/b/report.md").read_text()
    other = tmp_path / "a/b/other.txt"
    other.write_text("mine")
    assert main(["report", "new.json", "a/b"]) == 0
    assert "Not compared" in (tmp_path / "a/b/report.html").read_text()
    assert sorted(path.name for path in (tmp_path / "a/b").iterdir()) == ["other.txt", *FILES]
    assert other.read_text() == "mine"


@pytest.mark.parametrize("name", FILES)
def test_files_of_others_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """A file by one of the names that is no report of ours ends it before anything is written."""
    result_files.write(tmp_path / "result.json", small())
    there = tmp_path / "dir" / name
    there.parent.mkdir()
    there.write_text("<html>another tool's</html>")
    assert main(["report", str(tmp_path / "result.json"), str(there.parent)]) == 4
    assert f"has a {name} that no report of ours has written" in capsys.readouterr().err
    assert [path.name for path in there.parent.iterdir()] == [name]


def test_places_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file, something below one, and a directory in the place of a file are refused."""
    result_files.write(tmp_path / "result.json", small())
    arguments = ["report", str(tmp_path / "result.json")]
    for place, message in (("result.json", "is a file, not a directory"), ("result.json/a", "is a file. Choose")):
        assert main([*arguments, str(tmp_path / place)]) == 4
        assert message in capsys.readouterr().err
    (tmp_path / "dir" / "report.md").mkdir(parents=True)
    assert main([*arguments, str(tmp_path / "dir")]) == 4
    assert "has a report.md" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "new"), "--against", str(tmp_path / "none.json")]) == 4
    assert "there is no file" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_place_where_nothing_can_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused, and it is said which place that is; in /proc root cannot write either."""
    result_files.write(tmp_path / "result.json", small())
    assert main(["report", str(tmp_path / "result.json"), "/proc/report"]) == 4
    assert "/proc/report is not writable" in capsys.readouterr().err


def test_without_the_packages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says what to install."""
    result_files.write(tmp_path / "result.json", small())
    monkeypatch.setattr("pytest_qsens.report.directory.write.find_spec", lambda _: None)
    assert main(["report", str(tmp_path / "result.json"), str(tmp_path / "dir")]) == 4
    assert "needs jinja2 and vl_convert" in (told := capsys.readouterr().err)
    assert "pip install 'pytest-qsens[report]'" in told


def test_a_result_of_nothing(tmp_path: Path) -> None:
    """Without ops, or without scores, there are still four files."""
    for result in (replace(large(1), ops=(), total=None), replace(small(), ops=small().ops[2:], total=None)):
        write_report(tmp_path, of(result))
        assert sorted(path.name for path in tmp_path.iterdir()) == FILES


def test_heat_maps_have_a_chart_for_each_stack() -> None:
    """A square is one op, or the worst of those that differ in a further index; what is in no block is left out."""
    names = [f"visual.blocks.{block}.attn.qkv" for block in range(2)]
    names += [f"model.layers.{block}.mlp.experts.{expert}.up" for block in range(3) for expert in range(4)]
    result = replace(
        large(1), ops=(*(measured(name, (place + 1) / 100) for place, name in enumerate(names)), measured("head", 0.5))
    )
    charts = heat_maps(of(result))
    assert [chart.title for chart in charts] == ["visual.blocks", "model.layers"]
    cells = charts[1].spec["data"]["values"]
    assert [(cell["k"], cell["b"], cell["o"]) for cell in cells] == [
        ("mlp.experts.#.up", block, f"model.layers.{block}.mlp.experts.3.up") for block in range(3)
    ]
    assert cells[0]["v"] == (names.index("model.layers.0.mlp.experts.3.up") + 1) / 100


def test_isolated_against_fallback() -> None:
    """Points are what was measured in both modes; gains below zero get a scale that has them."""
    assert agreement(of(small())) is None
    chart = agreement(of(large(40)))
    assert chart is not None
    points = chart.spec["layer"][1]["data"]["values"]
    assert {point["o"]: (point["x"], point["y"]) for point in points} == {
        op.op: (op.isolated["nmse"], op.fallback["gain"]) for op in large(40).ops if op.isolated and op.fallback
    }
    axis = chart.spec["layer"][1]["encoding"]["y"]
    assert axis["scale"]["type"] == "symlog"
    ticks = axis["axis"]["values"]
    assert ticks == sorted(ticks)
    assert 0.0 in ticks
    assert len(ticks) < 20


def test_ranges_are_of_the_worst() -> None:
    """They are drawn for the most sensitive ops, of a group for its first members."""
    result = large(40)
    assert wanted(result) == [op.op for op in ranked(result)[:12]]
    group = replace(measured("all", 0.9), ops=tuple("abcdef"))
    assert wanted(replace(result, ops=(group, *result.ops)))[:5] == [*"abcd", ranked(result)[0].op]
    keys = replace(measured("a:k", 0.95), type="k", weights=None)
    assert wanted(replace(result, ops=(keys, *result.ops)))[:2] == ["a:k", ranked(result)[0].op]
    assert without_ranges(replace(result, ops=(keys, *result.ops))) is None
    product = replace(keys, op="a:qk", type="qk")
    assert wanted(replace(result, ops=(product, *result.ops))) == wanted(result)
    assert "1 of the 1 worst op is none (type qk), a:qk" in (without_ranges(replace(result, ops=(product,))) or "")
    found = range_cards(of(hostile()), hostile().details or Details())
    assert [card.op for card in found] == [op.op for op in ranked(hostile())[:12] if op.op in TEXTS]
    assert "20.0 times the median channel's" in found[0].charts[1].caption
    assert Channels(2, (0.0, 0.0), 0.0, ((0, 0.0),)).ratio is None


def test_equal_results_give_equal_files(tmp_path: Path) -> None:
    """Nothing in them is of the day or the place."""
    for name in ("one", "two"):
        write_report(tmp_path / name, of(hostile(), hostile()))
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_ops_of_a_config_and_others_rank_together() -> None:
    """What keeping one op gains and what adding another one loses are of one unit: no op is missing for its mode."""
    names = [f"b.{index}.up" for index in range(4)]
    values = (0.1, 0.4, 0.2, 0.3)
    ops = [
        OpResult(name, "linear", f"b.{index}", "measured", weights=64, **{mode: scores(value) | {metric: value}})  # type: ignore[arg-type]  # scores
        for index, (name, value) in enumerate(zip(names, values, strict=True))
        for mode, metric in [("fallback", "gain") if index % 2 else ("added", "loss")]
    ]
    result = replace(large(1), ops=tuple(ops), total=None)
    order = ["b.1.up", "b.3.up", "b.2.up", "b.0.up"]
    assert [op.op for op in ranked(result)] == order
    assert wanted(result) == order
    text = as_markdown(of(result))
    assert re.findall(r"^\| \d \| (\S+) \| linear \| (\S+ \(\w+\)) ", text, re.MULTILINE) == [
        ("b.1.up", "0.4 (fallback)"),
        ("b.3.up", "0.3 (fallback)"),
        ("b.2.up", "0.2 (added)"),
        ("b.0.up", "0.1 (added)"),
    ]
    (chart,) = heat_maps(of(result))
    assert {cell["v"] for cell in chart.spec["data"]["values"]} == set(values)
    assert "fallback gain or added loss" in text


def test_gates_of_a_finished_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Limits are judged by themselves, orders against the old file; what lacks that is refused."""
    old = replace(large(30), interactions=None)
    worst = ranked(old)[0]
    swapped = {op.op: other.isolated for op, other in zip(ranked(old), reversed(ranked(old)), strict=True)}
    new = replace(old, ops=tuple(replace(op, isolated=swapped[op.op]) for op in old.ops))
    result_files.write(tmp_path / "old.json", old)
    result_files.write(tmp_path / "new.json", new)
    out = tmp_path / "a b"
    bound = (worst.isolated or {})["nmse"] or 0
    assert main(["report", str(tmp_path / "old.json"), str(out), "--fail", f"{worst.op}.nmse<={bound / 2!r}"]) == 0
    text = (out / "report.md").read_text()
    assert "❌ 1 op is past a limit" in text
    assert f"is past the limit of {bound / 2:.6g}" in text
    sheet = csv.DictReader(io.StringIO((out / "report.csv").read_text()))
    assert [line["op"] for line in sheet if line["limits"]] == [worst.op]
    assert main(["report", str(tmp_path / "old.json"), str(out), "--fail", "nmse<=1e9"]) == 0
    assert "✅ No op is past a limit" in (out / "report.md").read_text()

    given = ["report", str(tmp_path / "new.json"), str(out), "--fail", "kendall:0.9"]
    assert main([*given, "--against", str(tmp_path / "old.json")]) == 0
    assert "kendall:0.9 failed" in (out / "report.md").read_text()
    capsys.readouterr()
    assert main(given) == 4
    assert "Give --against OLD" in capsys.readouterr().err


def test_what_to_do_next_can_be_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command of a report runs as it stands, and none is given where it would be refused."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "a b"
    never = OpResult("b", "linear", "b", "unexercised", "the data never reached it")
    keys = replace(measured("a:k", 0.1), type="k", weights=None)
    cached = replace(large(1), ops=(keys, replace(keys, op="a:v", type="v")))
    cached = replace(cached, run=replace(cached.run, scheme="kv_fp8"))
    given = (large(30), small(), replace(large(1), ops=(keys,)), replace(large(1), ops=(never,)), cached)
    offered = []
    for result in given:
        result_files.write(tmp_path / "r.json", result)
        assert main(["report", "r.json", str(out)]) == 0
        commands = re.findall(r": `(.*)`$", (out / "report.md").read_text(), re.MULTILINE)
        for command in commands:
            program, *arguments = shlex.split(command)
            assert program == "qsens"
            assert main(arguments) == 0, capsys.readouterr().err
        offered.append(len(commands))
    assert offered == [1, 1, 0, 0, 1]


def test_no_table_of_nothing() -> None:
    """Ops that were not run are counted, and have no table of their own."""
    ops = (measured("a", 0.1), OpResult("b", "linear", "", "unrun"))
    text = as_markdown(of(replace(large(1), ops=ops)))
    assert "- 1 unrun" in text
    assert "| op | status | reason |" not in text
