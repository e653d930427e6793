"""Gates on the order of the ops: judged once a run, with workers too, and never by a part of the ops."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pytest_qsens.cli import main
from pytest_qsens.time_budget import NOT_MEASURED
from tests.plugin.harness import LABEL, MODEL, OPS, listing, op_id, snapshot_file, snapshot_ops, write_model

ANY = "nmse:1000000%"
PROBLEM = f"qsens: the order of the ops of {LABEL} w8a8: "
"""A threshold that every score passes: what fails then is the order."""


def run(pytester: pytest.Pytester, *args: str) -> pytest.RunResult:
    """Run the built-in suite in this process."""
    return pytester.runpytest_inprocess("--qsens-model", MODEL, "-p", "no:randomly", "-p", "no:cacheprovider", *args)


@pytest.fixture
def recorded(pytester: pytest.Pytester) -> list[str]:
    """Write the model and its snapshot; gives the ops, the most sensitive first."""
    write_model(pytester)
    assert run(pytester, "--snapshot-update").ret == 0
    ops = snapshot_ops(pytester)
    return sorted(ops, key=lambda op: -ops[op]["isolated"]["nmse"])


def swap(pytester: pytest.Pytester, one: str, other: str, scheme: str = "w8a8") -> None:
    """Record of each of two ops what the other has."""
    content: dict[str, Any] = json.loads(snapshot_file(pytester, scheme).read_text())
    ops = content["ops"]
    ops[one]["isolated"], ops[other]["isolated"] = ops[other]["isolated"], ops[one]["isolated"]
    snapshot_file(pytester, scheme).write_text(json.dumps(content))


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_order_that_changed_fails_once(pytester: pytest.Pytester, recorded: list[str], workers: str) -> None:
    """Every test passes, the run does not: exit code 1, and the summary tells who left and who entered."""
    swap(pytester, recorded[0], recorded[5])
    result = run(pytester, "--qsens-fail", f"{ANY},top3:3,top4:3,kendall:0.9", "-n", workers)
    moves = f"left: {recorded[5]} (1 → 6); entered: {recorded[0]} (6 → 1) (of 8 ops)"
    result.assert_outcomes(passed=len(OPS) + 1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            "order of ops: top4:3 held, isolated nmse: 3 of the 4 most sensitive *",
            "accept with: *--snapshot-update",
            f"{PROBLEM}top3:3 failed, isolated nmse: 2 of the 3 most sensitive *; {moves}",
            f"{PROBLEM}kendall:0.9 failed, isolated nmse: Kendall's tau-b with the snapshot is 0.3571; moved: *",
        ]
    )
    assert result.stdout.str().count("top3:3 failed") == 1  # told once
    assert run(pytester, "--qsens-fail", f"{ANY},top3:2,kendall:0.3", "-n", workers).ret == 0


def test_a_real_change_of_a_weight(pytester: pytest.Pytester, recorded: list[str]) -> None:
    """Not the snapshot but the model changes: an op that was among the last is the first."""
    (pytester.path / "worse").write_text("3000")
    assert recorded.index("blocks.1.down") > 4
    result = run(pytester, "--qsens-fail", f"{ANY},top3:3", "-q")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines([f"{PROBLEM}top3:3 failed*entered: *blocks.1.down (* → 2) *"])


def test_accepting_an_order_records_all_of_it(pytester: pytest.Pytester, recorded: list[str]) -> None:
    """Scores within their thresholds are recorded, too, or the order would stay; only new ones are no acceptance."""
    truth = snapshot_ops(pytester)
    swap(pytester, recorded[0], recorded[5])
    swapped = snapshot_ops(pytester)
    fail = ("--qsens-fail", f"{ANY},top3:3")
    assert run(pytester, *fail, "--snapshot-update-new-only").ret == pytest.ExitCode.TESTS_FAILED
    assert snapshot_ops(pytester) == swapped
    result = run(pytester, *fail, "--snapshot-update")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["order of ops: top3:3 accepted, *", "qsens: wrote *(2 lines new or changed)"])
    assert snapshot_ops(pytester) == truth
    assert run(pytester, *fail).ret == 0


def test_the_first_run(pytester: pytest.Pytester) -> None:
    """Nothing is recorded: nothing can be judged, and accepting makes the order that later runs are compared with."""
    write_model(pytester)
    fail = ("--qsens-fail", "top3:3")
    result = run(pytester, *fail)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines([f"{PROBLEM}top3:3 not judged, isolated nmse: the snapshot has 0 of the model's ops*"])
    for update in ("--snapshot-update-new-only", "--snapshot-update"):
        snapshot_file(pytester).unlink(missing_ok=True)
        result = run(pytester, *fail, update)
        assert result.ret == 0
        assert "order of ops" not in result.stdout.str().lower()
        assert set(snapshot_ops(pytester)) == set(OPS)


@pytest.mark.parametrize(
    "chosen",
    [("-k", "blocks"), (op_id("head"), op_id("embed")), ("--deselect", op_id("head")), ("-k", "not head", "-n", "2")],
)
def test_a_part_is_not_judged(pytester: pytest.Pytester, recorded: list[str], chosen: tuple[str, ...]) -> None:
    """What was selected passes, but its order is that of other ops, and tells nothing. Thresholds alone pass."""
    assert len(recorded) == len(OPS)
    result = run(pytester, "--qsens-fail", "nmse:5%,top3:1", *chosen)
    assert result.ret == NOT_MEASURED
    assert "failed=" not in str(result.parseoutcomes())
    result.stdout.fnmatch_lines(
        [f"{PROBLEM}top3:1 not judged, isolated nmse: * of the 8 ops in the snapshot were not measured (*); *all ops,*"]
    )
    assert run(pytester, "--qsens-fail", "nmse:5%", *chosen).ret == 0
    before = listing(pytester)
    assert run(pytester, "--qsens-fail", "nmse:5%,top3:1", "--snapshot-update", *chosen).ret == 0
    assert listing(pytester) == before


def test_an_op_that_is_lost_leaves_the_order_unjudged(pytester: pytest.Pytester, recorded: list[str]) -> None:
    """A worker that dies takes a score with it: of the others no order is made."""
    assert recorded[0] == "head"
    pytester.makeconftest(
        """
        import os

        def pytest_runtest_call(item):
            if "head" in item.name:
                os._exit(3)
        """
    )
    result = run(pytester, "--qsens-fail", "nmse:5%,top3:1", "-n", "2")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines([f"{PROBLEM}top3:1 not judged*1 of the 8 ops * were not measured (head)*"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("--qsens-max-ops", "3"),
            ": top3:2 * the order of the 8 *, and --qsens-max-ops leaves out 5 of them. *",
        ),
        (
            ("--qsens-ops", "blocks.*"),
            ": top3:2 * the order of the 8 *, and --qsens-ops leaves out 2 of them. *",
        ),
        (("--qsens-shard", "1/2"), ": top3:2 *--qsens-shard 1/2 measures a part *: qsens merge --fail top3:2"),
        (("--qsens-engine", "probe"), ": top3:2 compares exact scores, and engine probe estimates. *"),
        (("--qsens-fail", "top8:7"), ": top8:7 needs 9 ops at least, or it says nothing, and net.spec has 8. *"),
        (("--qsens-fail", "top3:4"), " 'top3:4': 'top3:4' is no gate*"),
    ],
)
def test_options_that_leave_no_order(
    pytester: pytest.Pytester, recorded: list[str], args: tuple[str, ...], message: str
) -> None:
    """What is clear before anything is measured is a usage error, with the way out."""
    assert recorded
    before = listing(pytester)
    result = run(pytester, "--qsens-fail", "top3:2", *args)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: qsens: --qsens-fail{message}"])
    assert listing(pytester) == before


def test_ops_chosen_when_the_snapshot_was_made(pytester: pytest.Pytester) -> None:
    """The order of some ops is one, if the snapshot has these and no others."""
    write_model(pytester)
    chosen = ("--qsens-ops", "blocks.*", "--qsens-fail", "nmse:5%,top3:3,kendall:1")
    assert run(pytester, *chosen, "--snapshot-update").ret == 0
    result = run(pytester, *chosen)
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        ["order of ops: top3:3 held, *(of 6 ops)", "order of ops: kendall:1.0 held, *(of 6 ops)"]
    )


def test_single_ops_have_no_order(pytester: pytest.Pytester) -> None:
    """An override gates one op: refused before anything runs."""
    write_model(pytester)
    result = run(pytester, "-o", "qsens_fail_overrides=head = top3:2")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: qsens: qsens_fail_overrides, head: 'top3:2': top3 compares the order *"])


OWN = """
import pytest

@pytest.mark.qsens(model="net:spec"{more})
def test_own(qsens_op, qsens_score, snapshot):
    assert qsens_score == snapshot
"""


def test_tests_of_the_user_and_the_ini_file(pytester: pytest.Pytester) -> None:
    """Of a model that only a marker names, ops are compared as well; a marker itself gates single ops only."""
    write_model(pytester)
    pytester.makepyfile(test_own=OWN.format(more=""))
    pytester.makeini("[pytest]\nqsens_fail = nmse:5%,top3:3")
    assert pytester.runpytest_inprocess("test_own.py", "--snapshot-update").ret == 0
    result = pytester.runpytest_inprocess("test_own.py")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["order of ops: top3:3 held, *(of 8 ops)"])
    assert pytester.runpytest_inprocess("test_own.py", "-k", "head").ret == NOT_MEASURED
    pytester.makepyfile(test_own=OWN.format(more=", fail='top3:3'"))
    result = pytester.runpytest_inprocess("test_own.py")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stdout.fnmatch_lines(["*fail= of @pytest.mark.qsens 'top3:3': top3 compares the order of all ops of a run*"])


def test_both_modes(pytester: pytest.Pytester) -> None:
    """Each mode has its order: by nmse, and by gain."""
    write_model(pytester)
    args = ("--qsens-mode", "both", "--qsens-fail", "nmse:5%,top3:3")
    assert run(pytester, *args, "--snapshot-update").ret == 0
    result = run(pytester, *args)
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        ["order of ops: top3:3 held, isolated nmse: *", "order of ops: top3:3 held, fallback gain: *"]
    )


def test_the_whole_model_has_no_order(pytester: pytest.Pytester, recorded: list[str]) -> None:
    """With gates of the order alone, ops need a line and no more; the whole model keeps the default threshold."""
    assert recorded
    (pytester.path / "worse").write_text("30")
    result = run(pytester, "--qsens-fail", "kendall:0", "-rf")
    result.assert_outcomes(passed=len(OPS), failed=1)
    result.stdout.fnmatch_lines(["FAILED qsens::test_total*"])


def test_shards_are_judged_when_they_are_merged(
    pytester: pytest.Pytester, recorded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """``qsens merge --fail`` has all ops: exit code 1 and the names, with the merged file written; then accepted."""
    for index in (1, 2):
        assert run(pytester, "--qsens-shard", f"{index}/2", "--qsens-json", f"{index}.json").ret == 0
    truth = snapshot_ops(pytester)
    merge = ["merge", "1.json", "2.json", "-o", "all.json"]
    assert main([*merge, "--fail", "top3:3,kendall:1"]) == 0
    assert (
        "kendall:1.0 held, isolated nmse: Kendall's tau-b with the snapshot is 1 (of 8 ops)" in capsys.readouterr().out
    )
    swap(pytester, recorded[0], recorded[5])
    assert main([*merge, "--fail", "top3:3"]) == 1
    out = capsys.readouterr().out
    assert (
        f"top3:3 failed, isolated nmse: 2 of the 3 most sensitive ops of the snapshot still are; left: {recorded[5]}"
        in out
    )
    assert "wrote all.json" in out
    assert main([*merge, "--fail", "nmse:5%"]) == 4
    assert "no gate of all ops together" in capsys.readouterr().err
    assert main([*merge, "--fail", "top3:3", "--snapshot-dir", "elsewhere"]) == 1
    assert "not judged" in capsys.readouterr().out
    assert main(["accept", "all.json", "--fail", f"{ANY},top3:2"]) == 0
    assert snapshot_ops(pytester) != truth
    assert main(["accept", "all.json", "--fail", f"{ANY},top3:3"]) == 0
    assert snapshot_ops(pytester) == truth


def test_a_run_of_skipped_tests_is_not_judged(pytester: pytest.Pytester, recorded: list[str]) -> None:
    """Tests that are skipped before they measure anything leave nothing that a gate could hold on: the run fails."""
    assert recorded
    pytester.makeconftest(
        """
        import pytest

        def pytest_collection_modifyitems(items):
            for item in items:
                item.add_marker(pytest.mark.skip(reason="not today"))
        """
    )
    for workers in ("0", "2"):
        result = run(pytester, "--qsens-fail", "nmse:5%,top3:1", "-n", workers)
        result.assert_outcomes(skipped=len(OPS) + 1)
        assert result.ret == NOT_MEASURED
        result.stdout.fnmatch_lines(
            [f"{PROBLEM}top3:1 not judged, isolated nmse: 8 of the 8 ops * were not measured *"]
        )
    assert run(pytester, "--qsens-fail", "nmse:5%").ret == 0  # thresholds are of single tests, as pytest's own


def test_what_would_be_added_to_a_config_has_no_rank(pytester: pytest.Pytester) -> None:
    """The order is that of the ops which the config quantizes, however sensitive the others are."""
    write_model(pytester)
    (pytester.path / "quant.yaml").write_text(
        "{schema: 1, rules: [{ops: [head, blocks.0.up], scheme: unquantized}, {ops: '*', scheme: w8a8}]}"
    )
    arguments = ("--qsens-config", "quant.yaml", "--qsens-config-down", "w8a8", "--qsens-json", "all.json")
    fail = ("--qsens-fail", f"{ANY},top3:3,kendall:1")
    assert run(pytester, *arguments, *fail, "--snapshot-update").ret == 0
    assert set(snapshot_ops(pytester, "quant")) == set(OPS)
    swap(pytester, "head", "blocks.0.up", "quant")  # of the two that would be added
    result = run(pytester, *arguments, *fail)
    assert result.ret == 0
    result.stdout.fnmatch_lines(["order of ops: top3:3 held, *(of 6 ops)", "order of ops: kendall:1.0 held, *"])
    few = run(pytester, *arguments, "--qsens-fail", "nmse:5%,top6:6")
    assert few.ret == pytest.ExitCode.USAGE_ERROR
    few.stderr.fnmatch_lines(["*top6:6 needs 7 ops at least, or it says nothing, and net.spec has 6.*"])
