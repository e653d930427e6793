"""A run that measures one part of the ops."""

from __future__ import annotations

import json
from typing import Any

import pytest

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


def run(pytester: pytest.Pytester, shard: str, *args: str) -> pytest.RunResult:
    """Run one shard of the built-in suite."""
    return pytester.runpytest_inprocess(
        "--qsens-model", MODEL, "--qsens-shard", shard, "-p", "no:randomly", "-p", "no:cacheprovider", *args
    )


def document(pytester: pytest.Pytester, name: str = "out.json") -> dict[str, Any]:
    """Read a result file."""
    content: dict[str, Any] = json.loads((pytester.path / name).read_text())
    return content


@pytest.mark.parametrize("workers", ["0", "1"])
def test_shards_measure_everything_once(pytester: pytest.Pytester, workers: str) -> None:
    """Together the shards write the snapshot of one run, each its own lines; with workers, too."""
    write_model(pytester, spare="used")
    pytester.runpytest_subprocess("--qsens-model", MODEL, "--snapshot-update").assert_outcomes(passed=len(OPS) + 2)
    whole = snapshot_ops(pytester)
    snapshot_file(pytester).unlink()
    seen: list[str] = []
    for index in (1, 2, 3):
        result = run(pytester, f"{index}/3", "--snapshot-update", "--qsens-json", "out.json", "-n", workers)
        assert result.ret == 0
        result.stdout.fnmatch_lines([f"*qsens: model {LABEL}, scheme w8a8, engine *, shard {index}/3*"])
        content = document(pytester)
        assert content["run"]["shard"] == {"index": index, "count": 3}
        entries = [*content["ops"], content["total"]]
        mine = [entry["op"] for entry in entries if entry["status"] == "measured"]
        assert {entry["reason"] for entry in entries if entry["op"] not in mine} == {"in another shard"}
        seen += mine
    assert sorted(seen) == sorted([*OPS, "spare", "total"])
    assert set(snapshot_ops(pytester)) == set(whole)
    assert "total" in json.loads(snapshot_file(pytester).read_text())


def test_options_choose_before_the_shard(pytester: pytest.Pytester) -> None:
    """``--qsens-ops`` and ``--qsens-max-ops`` say what is divided; ops that they leave out are in no shard."""
    write_model(pytester)
    found = []
    for index in (1, 2):
        chosen = ("--qsens-ops", "blocks.*", "--qsens-max-ops", "4")
        found.append(collected(run(pytester, f"{index}/2", *chosen, "--collect-only", "-q")))
    blocks = [[op_id(f"blocks.{n}.up"), op_id(f"blocks.{n}.down")] for n in (0, 1)]
    assert found == blocks
    run(pytester, "1/2", *chosen, "--qsens-json", "out.json", "--snapshot-update")
    reasons = {entry["op"]: entry["reason"] for entry in document(pytester)["ops"]}
    assert reasons["blocks.0.up"] is None
    assert reasons["blocks.1.up"] == "in another shard"
    assert reasons["blocks.2.up"] == "not selected by --qsens-ops or --qsens-max-ops"
    assert document(pytester)["total"]["reason"] == "only some ops were asked for"


@pytest.mark.parametrize("chosen", [("-k", "head or total"), (op_id("head"), TOTAL_ID)])
def test_pytests_own_selection_chooses_within_a_shard(pytester: pytest.Pytester, chosen: tuple[str, ...]) -> None:
    """The division stays as it is, so each machine can repeat a part of its own; what is elsewhere is deselected."""
    write_model(pytester)
    found = [collected(run(pytester, f"{index}/3", *chosen, "--collect-only", "-q")) for index in (1, 2, 3)]
    assert sorted(nodeid for ids in found for nodeid in ids) == sorted([op_id("head"), TOTAL_ID])
    empty = next((index for index, ids in enumerate(found, 1) if not ids), None)
    if empty is not None:
        result = run(pytester, f"{empty}/3", *chosen)
        assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_failed_ops_are_repeated_in_their_shard(pytester: pytest.Pytester) -> None:
    """``--lf`` is of one machine, and does not change what its shard is."""
    write_model(pytester)
    shard = ("--qsens-model", MODEL, "--qsens-shard", "2/3", "-p", "no:randomly")
    ids = collected(pytester.runpytest_inprocess(*shard, "--collect-only", "-q"))
    pytester.runpytest_inprocess(*shard, "--snapshot-update", "-k", "down")
    pytester.runpytest_inprocess(*shard)
    failed = [nodeid for nodeid in ids if "up]" in nodeid]
    assert failed
    result = pytester.runpytest_inprocess(*shard, "--lf", "--collect-only", "-q")
    assert sorted(collected(result)) == sorted(failed)


OWN = """
import pytest

@pytest.mark.qsens(ops="blocks.*")
def test_blocks(qsens_op, qsens_score, snapshot):
    assert qsens_score == snapshot

@pytest.mark.qsens(ops=["blocks.1.*", "head"])
def test_some(qsens_op, qsens_score, snapshot):
    assert qsens_score == snapshot

def test_names(qsens_op):
    pass

def test_other():
    pass
"""


def test_own_tests(pytester: pytest.Pytester) -> None:
    """Tests of one op run in its shard, whatever each of them selects; a test of no op runs in every shard."""
    write_model(pytester)
    pytester.makepyfile(test_own=OWN)
    where: dict[str, set[int]] = {}
    count = 0
    for index in (1, 2):
        ids = collected(run(pytester, f"{index}/2", "--collect-only", "-q"))
        assert "test_own.py::test_other" in ids
        for nodeid in ids:
            if "[" in nodeid:
                count += 1
                op = "total" if "test_total" in nodeid else nodeid.rpartition("w8a8-")[2].rpartition("[")[2].strip("]")
                where.setdefault(op, set()).add(index)
    assert count == 6 + 3 + len(OPS) + 1
    assert set(where) == {*OPS, "total"}
    assert all(len(shards) == 1 for shards in where.values())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--qsens-shard", "0/3"), "--qsens-shard takes i/N, part i of N, *not '0/3'"),
        (("--qsens-shard", "4/3"), "--qsens-shard takes i/N, part i of N, *not '4/3'"),
        (("-o", "qsens_shard=x"), "qsens_shard in the ini file takes i/N, *not 'x'"),
        (("--qsens-shard", "1/10"), "--qsens-shard 1/10: 9 results of net.spec *Use 9 shards at most"),
        (("--qsens-shard", "1/3", "--qsens-ops", "head"), "--qsens-shard 1/3: 1 results *Use 1 shards at most"),
        (
            ("--qsens-shard", "1/3", "--snapshot-update", "--qsens-snapshot-prune"),
            "--qsens-snapshot-prune removes *remove --qsens-ops, --qsens-max-ops and --qsens-shard",
        ),
    ],
)
def test_shards_that_cannot_be(pytester: pytest.Pytester, args: tuple[str, ...], message: str) -> None:
    """A part that does not exist, or that would be empty, and pruning what others measure: refused, nothing written."""
    write_model(pytester)
    before = listing(pytester)
    result = pytester.runpytest_inprocess("--qsens-model", MODEL, *args)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: qsens: {message}*"])
    assert listing(pytester) == before


def test_more_shards_than_blocks(pytester: pytest.Pytester) -> None:
    """As many shards as results: one each."""
    write_model(pytester)
    found = [collected(run(pytester, f"{index}/9", "--collect-only", "-q")) for index in range(1, 10)]
    assert sorted(nodeid for ids in found for nodeid in ids) == sorted([*map(op_id, OPS), TOTAL_ID])
    assert {len(ids) for ids in found} == {1}


def test_the_ini_file_can_hold_it(pytester: pytest.Pytester) -> None:
    """As every option; the command line wins."""
    write_model(pytester)
    pytester.makeini("[pytest]\nqsens_shard = 2/2")
    ini = pytester.runpytest_inprocess("--qsens-model", MODEL, "--collect-only", "-q")
    assert collected(ini) == collected(run(pytester, "2/2", "--collect-only", "-q"))
    assert collected(ini) != collected(run(pytester, "1/2", "--collect-only", "-q"))
