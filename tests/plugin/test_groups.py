"""Groups of ops as tests: one item each, with snapshots, cached scores and shards of their own."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qsens import cli
from tests.checkpoints import bert
from tests.plugin.harness import (
    LABEL,
    MODEL,
    OPS,
    TOTAL_ID,
    collected,
    listing,
    op_id,
    snapshot_file,
    snapshot_ops,
    write_model,
)
from tests.plugin.test_cache import LABEL as CHECKPOINT
from tests.plugin.test_cache import LOGGING, cached, log, names, written
from tests.plugin.test_cache import run as run_checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

BLOCKS = tuple(f"blocks.{i}" for i in range(3))
UNITS = {
    "fused": ("embed", *(f"{block}.up+down" for block in BLOCKS), "head"),
    "block": ("embed", *BLOCKS, "head"),
    "type": ("embed", "blocks.*.up", "blocks.*.down", "head"),
}
FUSED = "qsens_fused = blocks.*.{up,down}"
INI = f"[pytest]\n{FUSED}\n"


@pytest.fixture(autouse=True)
def _model(pytester: pytest.Pytester) -> None:
    write_model(pytester)
    pytester.makeini(INI)


def run(pytester: pytest.Pytester, granularity: str, *args: str) -> pytest.RunResult:
    """Run the built-in suite by groups; with workers in a process of its own."""
    start = pytester.runpytest_subprocess if "2" in args else pytester.runpytest_inprocess
    return start("--qsens-model", MODEL, "--qsens-granularity", granularity, "-p", "no:randomly", *args)


def group_file(pytester: pytest.Pytester, granularity: str) -> Path:
    """Where the snapshot of groups goes."""
    return snapshot_file(pytester, f"w8a8-{granularity}")


def recorded(pytester: pytest.Pytester, granularity: str) -> dict[str, Any]:
    """Entries of a snapshot of groups."""
    entries: dict[str, Any] = json.loads(group_file(pytester, granularity).read_text())["ops"]
    return entries


def result_file(pytester: pytest.Pytester, name: str = "out.json") -> dict[str, Any]:
    """Read a result file."""
    content: dict[str, Any] = json.loads((pytester.path / name).read_text())
    return content


@pytest.mark.parametrize(("granularity", "workers"), [("fused", "0"), ("block", "0"), ("type", "1")])
def test_the_life_of_a_snapshot_of_groups(pytester: pytest.Pytester, granularity: str, workers: str) -> None:
    """One item a group, with a line, a JUnit case and a result of its own; that of ops is another file."""
    pytester.runpytest_inprocess("--qsens-model", MODEL, "--snapshot-update").assert_outcomes(passed=len(OPS) + 1)
    of_ops, before = snapshot_file(pytester).read_bytes(), snapshot_ops(pytester)
    units = UNITS[granularity]
    result = run(pytester, granularity, "-n", workers)
    result.assert_outcomes(failed=len(units) + 1)
    result.stdout.fnmatch_lines([f"E *no snapshot yet for {units[1]} in {group_file(pytester, granularity)}"])

    args = ("--snapshot-update", "--qsens-json", "out.json", "--junitxml", "junit.xml", "-n", workers)
    result = run(pytester, granularity, *args)
    result.assert_outcomes(passed=len(units) + 1)
    result.stdout.fnmatch_lines(
        [
            f"*qsens: model {LABEL}, scheme w8a8, granularity {granularity}, engine delta*",
            f"{len(units)} groups of {len(OPS)} ops: {len(units)} measured*",
            "worst groups, isolated (only this group quantized; higher nmse is worse)",
        ]
    )
    entries = recorded(pytester, granularity)
    assert set(entries) == set(units)
    assert json.loads(group_file(pytester, granularity).read_text())["granularity"] == granularity
    assert snapshot_file(pytester).read_bytes() == of_ops
    assert entries["head"] == before["head"]  # by itself: the score of the op
    cases = {case.get("name") for case in ET.parse(pytester.path / "junit.xml").iter("testcase")}
    assert {op_id(unit).partition("::")[2] for unit in units} <= cases

    content = result_file(pytester)
    assert content["run"]["granularity"] == granularity
    members = {entry["op"]: entry.get("ops") for entry in content["ops"]}
    assert tuple(members) == units
    assert members["head"] is None
    assert sorted(op for unit, ops in members.items() for op in (ops or [unit])) == sorted(OPS)
    blocks = {entry["op"]: entry["block"] for entry in content["ops"]}
    assert blocks[units[1]] == ("blocks.*.up" if granularity == "type" else "blocks.0")

    assert run(pytester, granularity, "-n", workers).ret == pytest.ExitCode.OK
    (pytester.path / "worse").write_text("30")
    result = run(pytester, granularity, "-n", workers)
    worse = {"fused": "blocks.1.up+down", "block": "blocks.1", "type": "blocks.*.down"}[granularity]
    result.stdout.fnmatch_lines([f"E *worse than the snapshot of {worse} in *"])
    assert set(snapshot_ops(pytester)) == set(OPS)


def test_workers_and_modes_give_the_same(pytester: pytest.Pytester) -> None:
    """Scores by group do not depend on who measured what, in both modes; the files are the same."""
    found = []
    for workers, engine in (("0", "delta"), ("2", "delta"), ("0", "replay"), ("0", "eager")):
        args = ("--snapshot-update", "--qsens-mode", "both", "--qsens-engine", engine, "-n", workers)
        run(pytester, "type", *args).assert_outcomes(passed=len(UNITS["type"]) + 1)
        found.append(recorded(pytester, "type"))
        group_file(pytester, "type").unlink()
    for unit, entry in found[0].items():
        for other in found[1:]:
            for mode in ("isolated", "fallback"):
                assert other[unit][mode]["nmse"] == pytest.approx(entry[mode]["nmse"], rel=2e-5), unit
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--qsens-ops", "blocks.1"], ["blocks.1"]),
        (["--qsens-ops", "blocks.1.up"], ["blocks.1"]),
        (["--qsens-ops", "*.down"], [*BLOCKS]),
        (["--qsens-ops", "total", "--qsens-ops", "e*"], ["embed", None]),
        (["--qsens-max-ops", "2"], ["embed", "blocks.0"]),
        (["-k", "blocks.1 or head"], ["blocks.1", "head"]),
        ([op_id("blocks.2")], ["blocks.2"]),
    ],
)
def test_selection(pytester: pytest.Pytester, args: Sequence[str], expected: Sequence[str | None]) -> None:
    """A glob selects a group by its name or that of a member; pytest's own selection goes by the names of groups."""
    result = run(pytester, "block", "--collect-only", "-q", *args)
    assert collected(result) == [TOTAL_ID if unit is None else op_id(unit) for unit in expected]


@pytest.mark.parametrize(
    ("granularity", "unit", "keyword"),
    [("fused", "blocks.0.up+down", "blocks.0.up+down"), ("type", "blocks.*.up", ".up")],
)
def test_names_with_other_characters(pytester: pytest.Pytester, granularity: str, unit: str, keyword: str) -> None:
    """Plus signs and stars in node ids, keywords, globs, and in what failed last."""
    pytester.runpytest_inprocess("--version")
    for args in ([op_id(unit)], ["--qsens-ops", unit], ["-k", keyword]):
        assert collected(run(pytester, granularity, "--collect-only", "-q", *args)) == [op_id(unit)], args
    run(pytester, granularity, "--snapshot-update")
    content = json.loads(group_file(pytester, granularity).read_text())
    content["ops"][unit]["isolated"]["nmse"] /= 2
    group_file(pytester, granularity).write_text(json.dumps(content))
    run(pytester, granularity).assert_outcomes(failed=1, passed=len(UNITS[granularity]))
    assert collected(run(pytester, granularity, "--lf", "--collect-only", "-q")) == [op_id(unit)]


def test_snapshots_are_not_mixed(pytester: pytest.Pytester) -> None:
    """A file of ops in the place of one of groups, and of another kind of groups, is refused and left as it is."""
    pytester.runpytest_inprocess("--qsens-model", MODEL, "--snapshot-update")
    run(pytester, "block", "--snapshot-update")
    for source, granularity, found in (("w8a8", "type", "op"), ("w8a8-block", "fused", "block")):
        shutil.copy(snapshot_file(pytester, source), group_file(pytester, granularity))
        before = listing(pytester)
        result = run(pytester, granularity, "--snapshot-update")
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines([f"ERROR: qsens: *is the snapshot of granularity '{found}', not '{granularity}'*"])
        assert listing(pytester) == before
    shutil.copy(group_file(pytester, "block"), snapshot_file(pytester))
    result = pytester.runpytest_inprocess("--qsens-model", MODEL)
    result.stderr.fnmatch_lines(["ERROR: qsens: *is the snapshot of granularity 'block', not 'op'*"])


OWN = """
import pytest

@pytest.mark.qsens(granularity="block", ops="blocks.*")
def test_blocks(qsens_op, qsens_score, snapshot):
    assert len(qsens_op.members) == len(qsens_score.result.ops) == 2
    assert qsens_score == snapshot
"""


def test_ops_and_groups_in_one_run(pytester: pytest.Pytester) -> None:
    """A test by groups stands beside the suite of the ops: each has its snapshot, and the model is loaded once."""
    pytester.makepyfile(test_own=OWN)
    args = ("--qsens-model", MODEL, "--qsens-json", "out.json", "-p", "no:randomly")
    result = pytester.runpytest_subprocess(*args, "--snapshot-update", "--qsens-profile")
    result.assert_outcomes(passed=len(OPS) + 1 + 3)
    assert set(snapshot_ops(pytester)) == set(OPS)
    assert set(recorded(pytester, "block")) == set(BLOCKS)
    assert "total" not in json.loads(group_file(pytester, "block").read_text())
    content = result_file(pytester)
    assert "granularity" not in content["run"]
    assert {entry["op"] for entry in content["ops"]} == set(OPS)
    built = (pytester.path / "built.log").read_text().splitlines()
    assert built.count("cpu") == 1
    pytester.runpytest_subprocess(*args).assert_outcomes(passed=len(OPS) + 1 + 3)
    result = pytester.runpytest_subprocess(*args, "--qsens-granularity", "block")
    result.assert_outcomes(passed=3, failed=1)  # the own test takes the suite's place, whose total is new here


def test_thresholds_of_groups(pytester: pytest.Pytester) -> None:
    """An override gates a group by its name, or by a glob that matches all of its members, not some."""
    run(pytester, "block", "--snapshot-update")
    (pytester.path / "worse").write_text("30")
    for glob, passes in (("blocks.1", True), ("blocks.1.*", True), ("*.down", False), ("blocks.1.up", False)):
        line = f"{glob} = nmse:1000000%"
        result = run(pytester, "block", "-o", f"qsens_fail_overrides={line}", "--qsens-ops", "blocks.1")
        assert (result.ret == pytest.ExitCode.OK) is passes, glob


def test_a_killed_worker_costs_a_group(pytester: pytest.Pytester) -> None:
    """The group that it was measuring has failed, and its members are told with it."""
    pytester.makeconftest(
        """
        import os, signal
        def pytest_runtest_call(item):
            if "-blocks.1]" in item.nodeid and "PYTEST_XDIST_WORKER" in os.environ:
                os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    result = run(pytester, "block", "-n", "2", "--snapshot-update", "--qsens-json", "out.json")
    result.assert_outcomes(passed=len(UNITS["block"]), failed=1)
    assert set(recorded(pytester, "block")) == set(UNITS["block"]) - {"blocks.1"}
    (entry,) = (entry for entry in result_file(pytester)["ops"] if entry["op"] == "blocks.1")
    assert (entry["status"], entry["ops"]) == ("failed", ["blocks.1.up", "blocks.1.down"])


def test_shards_are_merged_and_accepted(pytester: pytest.Pytester, capsys: pytest.CaptureFixture[str]) -> None:
    """Groups are divided, merged and accepted as ops are; what is of another granularity is no part of it."""
    run(pytester, "type", "--snapshot-update", "--qsens-json", "whole.json")
    whole = group_file(pytester, "type").read_bytes()
    group_file(pytester, "type").unlink()
    for index in (1, 2):
        run(pytester, "type", "--qsens-shard", f"{index}/2", "--qsens-json", f"{index}.json")
    run(pytester, "block", "--qsens-shard", "2/2", "--qsens-json", "block.json")
    files = {name: str(pytester.path / f"{name}.json") for name in ("1", "2", "block", "merged", "whole")}
    assert cli.main(["merge", files["1"], files["block"], "-o", files["merged"]]) == cli.BAD_INPUT
    assert "not of one run: granularity 'type' and 'block'" in capsys.readouterr().err
    assert cli.main(["merge", files["1"], files["2"], "-o", files["merged"]]) == 0
    merged, expected = (result_file(pytester, f"{name}.json") for name in ("merged", "whole"))
    assert [(e["op"], e.get("ops"), e["isolated"]) for e in merged["ops"]] == [
        (e["op"], e.get("ops"), e["isolated"]) for e in expected["ops"]
    ]
    assert cli.main(["accept", files["merged"], "--snapshot-dir", str(pytester.path / "qsens_snapshots")]) == 0
    assert group_file(pytester, "type").read_bytes() == whole
    assert not snapshot_file(pytester).exists()

    capsys.readouterr()
    assert cli.main(["show", files["merged"]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("mode isolated, granularity type")
    assert any(line.split()[0] == "blocks.*.up" and line.split()[-1] == "3" for line in lines if line)


def test_what_is_of_groups_is_not_compared_with_ops(
    pytester: pytest.Pytester, capsys: pytest.CaptureFixture[str]
) -> None:
    """Single ops have one name in both files, and even they are of two questions: no common list is made."""
    run(pytester, "op", "--qsens-json", "op.json")
    run(pytester, "block", "--qsens-json", "block.json")
    ops, blocks = (str(pytester.path / f"{name}.json") for name in ("op", "block"))
    assert cli.main(["compare", ops, blocks]) == cli.BAD_INPUT
    assert "is of granularity 'op' and" in capsys.readouterr().err
    assert cli.main(["compare", blocks, blocks]) == 0
    other = pytester.path / "inc.json"
    other.write_text(json.dumps({"fp32_fallback_sensitivity": [{"op_name": "head", "mse": 1.0}]}))
    assert cli.main(["compare", str(other), blocks]) == cli.BAD_INPUT


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--qsens-granularity", "blocks"], "no value for --qsens-granularity: 'blocks' (did you mean block?)*"),
        (["--qsens-granularity", ""], "--qsens-granularity is empty. *"),
        (["-o", "qsens_granularity=layer"], "no value for qsens_granularity in the ini file: 'layer'. Known: op, *"),
        (["-o", "qsens_fused=*.up"], "qsens_fused in the ini file '[*].up' is no pattern of ops *"),
        (
            ["-o", "qsens_fused=*.{upp,down_}", "--qsens-granularity=fused"],
            "qsens_fused: '[*].{upp,down_}' matches no op of this run's models*",
        ),
        (
            ["--qsens-granularity=block", "--qsens-engine=probe"],
            "engine probe estimates the errors of single ops*: blocks.0 is a group of 2. *",
        ),
        (["--qsens-granularity=block", "--qsens-ops=bloks.1"], "--qsens-ops 'bloks.1' matches none*(near: blocks.1*"),
    ],
)
@pytest.mark.parametrize("update", [False, True])
def test_bad_values(pytester: pytest.Pytester, args: Sequence[str], message: str, *, update: bool) -> None:
    """What cannot be ends the run before anything is measured or written."""
    before = listing(pytester)
    result = pytester.runpytest_inprocess("--qsens-model", MODEL, *args, *["--snapshot-update"] * update)
    assert result.ret == pytest.ExitCode.USAGE_ERROR, result.stdout.str()
    result.stderr.fnmatch_lines([f"ERROR: qsens: {message}"])
    assert listing(pytester) == before


def test_a_bad_marker(pytester: pytest.Pytester) -> None:
    """The keyword is named."""
    pytester.makepyfile(test_own=OWN.replace('"block"', '"blok"'))
    result = pytester.runpytest_inprocess("--qsens-model", MODEL)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stdout.fnmatch_lines(
        ["*qsens: no value for granularity= of @pytest.mark.qsens: 'blok' (did you mean block?*"]
    )


def test_an_unchanged_check_by_groups_measures_nothing(pytester: pytest.Pytester) -> None:
    """No process of it loads the model; single ops and the whole model come from a run by ops, groups do not."""
    pytester.makeconftest(LOGGING)
    bert(pytester.path / CHECKPOINT)
    args = ("--qsens-mode", "both")
    run_checkpoint(pytester, *args, alone=True)
    log(pytester)
    by_block = ("-o", "qsens_fused=", "--qsens-granularity", "block")
    run_checkpoint(pytester, *args, *by_block, alone=True)
    units = names(pytester)
    assert units[-4:] == ["encoder.layer.0", "encoder.layer.1", "pooler.dense", "total"]
    measured = {line.split()[0] for line in log(pytester)} - {"load"}
    assert measured == {"encoder.layer.0", "encoder.layer.1"}
    assert cached(pytester) == len(units) - 3
    expected = written(pytester)
    log(pytester, "torch")
    again = run_checkpoint(pytester, *args, *by_block, alone=True)
    assert log(pytester) == []
    assert log(pytester, "torch") == ["False"]
    assert written(pytester) == expected
    again.stdout.fnmatch_lines([f"scores: {len(units) - 1} groups from the cache, 0 measured in this run"])


def test_a_group_of_other_members_is_measured_anew(pytester: pytest.Pytester) -> None:
    """Patterns of the ini file decide what is in a group: what keeps its members keeps its score."""
    pytester.makeconftest(LOGGING)
    bert(pytester.path / CHECKPOINT)
    attention = "qsens_fused=*.layer.{*}.attention.self.{query,key}"
    for pattern, expected in (
        ("qsens_fused=*.layer.{*}.{intermediate.dense,output.dense}", 2),  # query, key and value of each layer
        (attention, 3),  # of both layers together; the values of each
        (attention, 0),
    ):
        log(pytester)
        run_checkpoint(pytester, "-o", pattern, "--qsens-granularity", "fused", "--qsens-ops", "encoder.layer.*.self.*")
        assert len([line for line in log(pytester) if line.split()[0] != "load"]) == expected, pattern
