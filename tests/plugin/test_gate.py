"""The snapshot gate: what a run accepts, refuses, keeps and writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_qsens.environment import environment
from pytest_qsens.results import round_score
from pytest_qsens.snapshot import dumps, load
from pytest_qsens.time_budget import NOT_MEASURED
from tests.plugin.harness import (
    MODEL,
    OPS,
    TOTAL_ID,
    listing,
    op_id,
    snapshot_file,
    snapshot_ops,
    write_model,
)

COUNT = len(OPS) + 1


def run(pytester: pytest.Pytester, *args: str) -> pytest.RunResult:
    """Run the built-in suite in this process."""
    return pytester.runpytest_inprocess("--qsens-model", MODEL, *args)


def test_the_life_of_a_snapshot(pytester: pytest.Pytester) -> None:
    """First everything is new and fails with the command that accepts it; accepted, it passes; worse, it fails."""
    write_model(pytester)
    before = listing(pytester)
    result = run(pytester)
    result.assert_outcomes(failed=COUNT)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert listing(pytester) == before
    accept = f"accept with: pytest --qsens-model {MODEL} --snapshot-update"
    result.stdout.fnmatch_lines([f"E *no snapshot yet for head in {snapshot_file(pytester)}", f"E *{accept}", accept])

    run(pytester, "--snapshot-update").assert_outcomes(passed=COUNT)
    assert set(snapshot_ops(pytester)) == set(OPS)
    accepted = snapshot_file(pytester).read_bytes()

    result = run(pytester)
    result.assert_outcomes(passed=COUNT)
    assert result.ret == pytest.ExitCode.OK

    (pytester.path / "worse").write_text("30")
    result = run(pytester)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.re_match_lines(
        [
            r"E .*worse than the snapshot of blocks\.1\.down in ",
            r"E .*isolated nmse [\d.e-]+ → [\d.e-]+ \(\+[\d.]+ %, limit [\d.e-]+ = \+5 %\)",
            rf"E .*{accept}",
        ]
    )
    assert snapshot_file(pytester).read_bytes() == accepted

    run(pytester, "--snapshot-update").assert_outcomes(passed=COUNT)
    assert snapshot_file(pytester).read_bytes() != accepted


def test_a_failed_comparison_shows_what_it_says_alone(pytester: pytest.Pytester) -> None:
    """Source lines of the built-in tests and their arguments are the same for every op; ``--tb`` brings them back."""
    write_model(pytester)
    ours = ["*assert qsens_score == snapshot", "*builtin_suite.py*"]
    result = run(pytester, "--qsens-ops", "head", "-n", "1")
    result.stdout.fnmatch_lines(["E *no snapshot yet for head in *", "E *isolated nmse *", "E *accept with: pytest *"])
    for line in (*ours, "qsens_score = *"):
        result.stdout.no_fnmatch_line(line)
    run(pytester, "--qsens-ops", "head", "--tb=long").stdout.fnmatch_lines(ours)

    pytester.makepyfile(
        test_mine="""
        import pytest

        @pytest.mark.qsens(model="net:spec", ops="head")
        def test_mine(qsens_score, snapshot):
            assert qsens_score == snapshot
        """
    )
    mine = pytester.runpytest_inprocess("test_mine.py")
    mine.stdout.fnmatch_lines([">*assert qsens_score == snapshot", "E *no snapshot yet for *", "test_mine.py:*"])


def test_improvements_pass_and_are_recorded_on_update(pytester: pytest.Pytester) -> None:
    """A better score passes, the summary says so, and updating records it."""
    write_model(pytester)
    run(pytester, "--snapshot-update")
    content = json.loads(snapshot_file(pytester).read_text())
    measured = content["ops"]["head"]["isolated"]["nmse"]
    content["ops"]["head"]["isolated"]["nmse"] = 2 * measured
    snapshot_file(pytester).write_text(json.dumps(content))
    result = run(pytester)
    result.assert_outcomes(passed=COUNT)
    result.stdout.fnmatch_lines(["*ops: *; against the snapshot: 1 improved"])
    run(pytester, "--snapshot-update").assert_outcomes(passed=COUNT)
    assert snapshot_ops(pytester)["head"]["isolated"]["nmse"] == measured


def test_new_only(pytester: pytest.Pytester) -> None:
    """``--snapshot-update-new-only`` records new ops, and leaves and fails a worse one."""
    write_model(pytester)
    run(pytester, "--snapshot-update", "--qsens-ops", "blocks.1.down").assert_outcomes(passed=1)
    recorded = snapshot_ops(pytester)["blocks.1.down"]
    (pytester.path / "worse").write_text("30")
    run(pytester, "--snapshot-update-new-only").assert_outcomes(passed=COUNT - 1, failed=1)
    assert snapshot_ops(pytester)["blocks.1.down"] == recorded
    assert set(snapshot_ops(pytester)) == set(OPS)


def test_a_partial_update_keeps_the_other_lines(pytester: pytest.Pytester) -> None:
    """Ops that were not selected, and failures, keep their lines whatever else is accepted."""
    write_model(pytester)
    run(pytester, "--snapshot-update")
    before = snapshot_ops(pytester)
    (pytester.path / "worse").write_text("30")
    for args in (["-k", "embed"], [op_id("embed")], ["--qsens-max-ops", "1"], ["--deselect", op_id("blocks.1.down")]):
        run(pytester, "--snapshot-update", *args)
        after = snapshot_ops(pytester)
        assert set(after) == set(before)
        assert after["blocks.1.down"] == before["blocks.1.down"]


def test_modes_are_recorded_side_by_side(pytester: pytest.Pytester) -> None:
    """Accepting one mode keeps what the other has recorded."""
    write_model(pytester)
    run(pytester, "--snapshot-update")
    isolated = snapshot_ops(pytester)["head"]["isolated"]
    run(pytester, "--snapshot-update", "--qsens-mode", "fallback").assert_outcomes(passed=COUNT)
    assert snapshot_ops(pytester)["head"]["isolated"] == isolated
    assert "gain" in snapshot_ops(pytester)["head"]["fallback"]
    result = run(pytester, "--qsens-mode", "both")
    result.assert_outcomes(passed=COUNT)
    result.stdout.fnmatch_lines(["worst ops, isolated (*higher nmse is worse)", "worst ops, fallback (*gain*"])


def test_thresholds(pytester: pytest.Pytester) -> None:
    """``--qsens-fail`` and the per-op overrides of the ini file decide what counts as worse."""
    write_model(pytester)
    run(pytester, "--snapshot-update")
    (pytester.path / "worse").write_text("30")
    assert run(pytester).ret == pytest.ExitCode.TESTS_FAILED
    assert run(pytester, "--qsens-fail", "nmse:1000000%").ret == pytest.ExitCode.OK
    assert run(pytester, "--qsens-fail", "sqnr_db:100").ret == pytest.ExitCode.OK
    assert run(pytester, "--qsens-fail", "sqnr_db:0.5").ret == pytest.ExitCode.TESTS_FAILED
    pytester.makeini("[pytest]\nqsens_fail_overrides =\n    blocks.1.* = nmse:1000000%\n    total = nmse:1000000%")
    failing = run(pytester, "-rf").stdout.str()
    assert f"FAILED {op_id('blocks.1.down')}" not in failing
    assert f"FAILED {TOTAL_ID}" not in failing


def test_a_metric_that_no_op_has_stops_the_run(pytester: pytest.Pytester) -> None:
    """Gating on a metric that is not measured is a usage error, not a failure of every op."""
    write_model(pytester)
    result = run(pytester, "--qsens-fail", "gain:5%")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: qsens: embed: none of the gated metrics (gain) was measured*"])
    assert run(pytester, "--qsens-fail", "gain:5%", "--qsens-mode", "fallback").ret == pytest.ExitCode.TESTS_FAILED


def test_unexercised_ops_are_skipped_loudly(pytester: pytest.Pytester) -> None:
    """An op that the data never reaches has no score: skipped with the reason, loud in the summary, with -q too."""
    write_model(pytester, spare="unused")
    result = run(pytester, "--snapshot-update", "-rs", "-q")
    result.assert_outcomes(passed=COUNT, skipped=1)
    result.stdout.fnmatch_lines(
        [
            f"NOT EXERCISED: 1 of {COUNT} ops have no score, nothing is known about them: spare (1)",
            "  the evaluation data never reached it: give data that do (--qsens-calib, --qsens-eval)",
        ]
    )
    assert "repeat with" not in result.stdout.str()
    assert "spare" not in snapshot_ops(pytester)


def test_lost_coverage_fails(pytester: pytest.Pytester) -> None:
    """An op that has a score recorded and is not reached any more fails, until its line is removed explicitly."""
    write_model(pytester, spare="used")
    run(pytester, "--snapshot-update").assert_outcomes(passed=COUNT + 1)
    write_model(pytester, spare="unused")
    result = run(pytester, "--qsens-ops", "spare", "--snapshot-update")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*spare is unexercised*this run covers less*--qsens-snapshot-prune*"])
    result.stdout.fnmatch_lines(
        [
            "LOST: 1 op of the snapshot has no score any more",
            "  spare: the evaluation data never reached it",
            "  if that is meant, remove its line with --snapshot-update --qsens-snapshot-prune",
            f"repeat with: pytest --qsens-model {MODEL} --qsens-ops spare '{op_id('spare')}'",
        ]
    )
    assert not {"NOT EXERCISED", "accept with"} & {line.partition(":")[0] for line in result.outlines}
    assert "spare" in snapshot_ops(pytester)
    run(pytester, "--snapshot-update", "--qsens-snapshot-prune").assert_outcomes(passed=COUNT, skipped=1)
    assert set(snapshot_ops(pytester)) == set(OPS)


def test_pruning_needs_a_complete_run(pytester: pytest.Pytester) -> None:
    """Lines are only removed by a run in which every op was seen, and never without being asked for."""
    write_model(pytester, spare="used")
    run(pytester, "--snapshot-update")
    write_model(pytester)
    run(pytester, "--snapshot-update")
    assert "spare" in snapshot_ops(pytester)
    result = run(pytester, "--snapshot-update", "--qsens-snapshot-prune", "-k", "head")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines([f"*was not pruned: {len(OPS) - 1} ops were not measured*such as embed"])
    assert "spare" in snapshot_ops(pytester)
    run(pytester, "--snapshot-update", "--qsens-snapshot-prune").assert_outcomes(passed=COUNT)
    assert set(snapshot_ops(pytester)) == set(OPS)


NAN_WHEN_QUANTIZED = """
import torch
from pytest_qsens import ModelSpec

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.good = torch.nn.Linear(4, 4)
        self.tiny = torch.nn.Linear(4, 4, bias=False)
    def forward(self, x):
        # All outputs positive; rounded to 256 steps, the smallest become zero, whose logarithm is infinite.
        return self.good(x) + torch.log(self.tiny(x))

def model():
    net = Net()
    with torch.no_grad():
        net.tiny.weight.copy_(torch.diag(torch.tensor([1e-6, 1.0, 1.0, 1.0])))
        net.good.weight.copy_(torch.eye(4))
    return net

def spec():
    batches = [{"x": torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) + 1}]
    return ModelSpec(model, batches, batches, output=lambda out, batch: out)
"""


def test_an_op_that_breaks_the_model_fails_alone(pytester: pytest.Pytester) -> None:
    """NaN or infinity that only quantizing brings fails that op, as a failure and not as an error; others go on."""
    pytester.makepyfile(bad=NAN_WHEN_QUANTIZED)
    result = pytester.runpytest_inprocess("--qsens-model", "bad:spec", "--snapshot-update", "--qsens-json", "out.json")
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(["FAILED: tiny: *NaN or infinite values when only this op is quantized*"])
    statuses = {op["op"]: op["status"] for op in json.loads((pytester.path / "out.json").read_text())["ops"]}
    assert statuses == {"good": "measured", "tiny": "failed"}
    snapshot = json.loads((pytester.path / "qsens_snapshots" / "bad.spec" / "w8a8.json").read_text())
    assert set(snapshot["ops"]) == {"good"}


def test_nothing_measured_is_not_success(pytester: pytest.Pytester) -> None:
    """A run in which every op was skipped does not pass."""
    write_model(pytester, spare="unused")
    result = run(pytester, "--qsens-ops", "spare")
    result.assert_outcomes(skipped=1)
    assert result.ret == NOT_MEASURED
    result.stdout.fnmatch_lines(["qsens: nothing was measured"])


def test_interrupted_runs_keep_what_was_accepted(pytester: pytest.Pytester) -> None:
    """After Ctrl-C the ops accepted so far are recorded: they were measured, and the user asked for them."""
    write_model(pytester)
    pytester.makeconftest(
        """
        def pytest_runtest_setup(item):
            if "blocks.1.up" in item.nodeid: raise KeyboardInterrupt
        """
    )
    result = pytester.runpytest_subprocess("--qsens-model", MODEL, "--snapshot-update", "--qsens-json", "out.json")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    assert set(snapshot_ops(pytester)) == {"embed", "blocks.0.up", "blocks.0.down"}
    statuses = [op["status"] for op in json.loads((pytester.path / "out.json").read_text())["ops"]]
    assert statuses == ["measured"] * 3 + ["unrun"] * 5


@pytest.mark.parametrize("what", ["RuntimeError('theirs')", "pytest.exit('theirs')"])
def test_another_plugin_that_fails_at_the_end_costs_nothing(pytester: pytest.Pytester, what: str) -> None:
    """What was measured is recorded and summarized although a plugin raises at the end, and its error is not hidden."""
    write_model(pytester)
    pytester.makeconftest(f"import pytest\ndef pytest_sessionfinish(): raise {what}")
    result = run(pytester, "--snapshot-update", "--qsens-json", "out.json")
    result.stderr.fnmatch_lines(["*theirs"])
    result.stdout.fnmatch_lines(["8 ops: 8 measured*", f"qsens: wrote {snapshot_file(pytester)}*"])
    assert set(snapshot_ops(pytester)) == set(OPS)
    assert {op["status"] for op in json.loads((pytester.path / "out.json").read_text())["ops"]} == {"measured"}


def test_a_changed_environment_is_pointed_out(pytester: pytest.Pytester) -> None:
    """A snapshot measured elsewhere still gates, and the summary says what is different."""
    write_model(pytester)
    run(pytester, "--snapshot-update")
    path = snapshot_file(pytester)
    content = json.loads(path.read_text())
    assert set(content["environment"]) == {"cpu", "device", "machine", "pytest-qsens", "torch", "transformers"}
    path.write_text(path.read_text().replace(f'"torch": "{content["environment"]["torch"]}"', '"torch": "1.0"'))
    result = run(pytester)
    result.assert_outcomes(passed=COUNT)
    result.stdout.fnmatch_lines(["the snapshot was measured elsewhere*torch 1.0 → *"])


def test_an_environment_is_that_of_the_whole_file(pytester: pytest.Pytester) -> None:
    """Updating a part of a file measured elsewhere keeps saying so; updating all of it, changed or not, ends it."""
    write_model(pytester)
    run(pytester, "--snapshot-update", "--qsens-mode", "both")
    path = snapshot_file(pytester)
    here = json.loads(path.read_text())
    elsewhere = {**here["environment"], "torch": "1.0"}
    path.write_text(json.dumps({**here, "environment": elsewhere}))
    measured_elsewhere = "the snapshot was measured elsewhere*torch 1.0 → *"
    (pytester.path / "worse").write_text("30")
    result = run(pytester, "--snapshot-update", "-k", "blocks.1.down")
    result.stdout.fnmatch_lines([measured_elsewhere, f"qsens: wrote {path} (1 line new or changed)"])
    assert json.loads(path.read_text())["environment"] == elsewhere
    assert snapshot_ops(pytester)["blocks.1.down"] != here["ops"]["blocks.1.down"]
    result = run(pytester, "--snapshot-update")  # all ops, but of each only one of two recorded modes
    result.stdout.fnmatch_lines([measured_elsewhere])
    assert json.loads(path.read_text())["environment"] == elsewhere

    run(pytester, "--snapshot-update", "--qsens-mode", "both")
    accepted = json.loads(path.read_text())
    assert accepted["environment"] == here["environment"]
    path.write_text(json.dumps({**accepted, "environment": elsewhere}))
    result = run(pytester, "--snapshot-update-new-only", "--qsens-mode", "both")
    result.stdout.no_fnmatch_line("the snapshot was measured elsewhere*")
    assert json.loads(path.read_text()) == accepted


def move(pytester: pytest.Pytester, *ops: str, **environment: str) -> dict[str, Any]:
    """Make the snapshot one of another environment, where the NMSE of these ops came out 1 % larger."""
    content: dict[str, Any] = json.loads(snapshot_file(pytester).read_text())
    content["environment"].update(environment)
    for op in ops:
        scores = (content["ops"][op] if op in content["ops"] else content[op])["isolated"]
        scores["nmse"] = round_score(1.01 * scores["nmse"])
    snapshot_file(pytester).write_text(json.dumps(content))
    snapshot_file(pytester).write_text(dumps(load(snapshot_file(pytester))))
    return content


@pytest.mark.parametrize("workers", ["0", "1"])
def test_updating_a_whole_file_elsewhere_takes_all_of_it(pytester: pytest.Pytester, workers: str) -> None:
    """Where every line was measured, those within their thresholds get this environment's numbers with its name."""
    write_model(pytester)
    run(pytester, "--snapshot-update")
    path = snapshot_file(pytester)
    here = path.read_bytes()
    move(pytester, "blocks.0.up", "total", cpu="another")
    result = run(pytester)
    result.assert_outcomes(passed=COUNT)
    result.stdout.fnmatch_lines(["the snapshot was measured elsewhere*cpu another → *"])
    result = run(pytester, "--snapshot-update", "-n", workers)
    result.assert_outcomes(passed=COUNT)
    result.stdout.fnmatch_lines([f"qsens: wrote {path} (2 lines new or changed)"])
    result.stdout.no_fnmatch_line("the snapshot was measured elsewhere*")
    assert path.read_bytes() == here


def test_small_moves_leave_a_file_as_it_is(pytester: pytest.Pytester) -> None:
    """In the environment of the file, an update makes no diff of what is within its thresholds."""
    write_model(pytester)
    run(pytester, "--snapshot-update")
    move(pytester, "blocks.0.up", "total")
    before = snapshot_file(pytester).read_bytes()
    result = run(pytester, "--snapshot-update")
    result.stdout.no_fnmatch_line("qsens: wrote*")
    assert snapshot_file(pytester).read_bytes() == before


FAILS_AFTER_COMPARING = """
import pytest
@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    result = yield
    assert "-blocks.2.down]" not in pyfuncitem.nodeid
    return result
"""


@pytest.mark.parametrize(
    ("conftest", "args"),
    [("", ["-k", "not blocks.2.down"]), (FAILS_AFTER_COMPARING, [])],
    ids=["not selected", "failed for another reason"],
)
def test_updating_a_part_elsewhere_leaves_the_rest(pytester: pytest.Pytester, conftest: str, args: list[str]) -> None:
    """If one line was not measured, what is within its thresholds stays, under the environment that it is of."""
    write_model(pytester)
    run(pytester, "--snapshot-update")
    here = snapshot_ops(pytester)
    before = move(pytester, "blocks.0.up", "blocks.2.down", cpu="another")
    before["ops"]["head"]["isolated"]["nmse"] /= 2
    del before["ops"]["embed"]
    snapshot_file(pytester).write_text(json.dumps(before))
    pytester.makeconftest(conftest)
    result = run(pytester, "--snapshot-update", *args)
    result.stdout.fnmatch_lines(
        ["the snapshot was measured elsewhere*", f"qsens: wrote {snapshot_file(pytester)} (2 lines new or changed)"]
    )
    after = json.loads(snapshot_file(pytester).read_text())
    assert after == {**before, "ops": {**before["ops"], "embed": here["embed"], "head": here["head"]}}


def test_new_only_elsewhere_moves_nothing(pytester: pytest.Pytester) -> None:
    """``--snapshot-update-new-only`` replaces no line, so it keeps the environment of one that came out otherwise."""
    write_model(pytester)
    run(pytester, "--snapshot-update")
    before = move(pytester, "blocks.0.up", cpu="another")
    run(pytester, "--snapshot-update-new-only").assert_outcomes(passed=COUNT)
    assert json.loads(snapshot_file(pytester).read_text()) == before


def test_workers_of_two_environments_move_nothing(pytester: pytest.Pytester) -> None:
    """Where workers differ, no line is put under the environment of another worker."""
    write_model(pytester)
    run(pytester, "--snapshot-update")
    before = move(pytester, "blocks.0.up", cpu="another")
    pytester.makeconftest(
        """
        import os
        from pytest_qsens import measure
        worker = os.environ.get("PYTEST_XDIST_WORKER")
        if worker:
            here = measure.environment
            measure.environment = lambda *options: {**here(*options), "cpu": worker}
        """
    )
    result = run(pytester, "--snapshot-update", "-n", "2")
    result.assert_outcomes(passed=COUNT)
    result.stdout.fnmatch_lines(["workers run in different environments*"])
    assert json.loads(snapshot_file(pytester).read_text()) == before


def test_a_line_that_could_not_be_accepted_keeps_its_environment(pytester: pytest.Pytester) -> None:
    """A worse op that ``--snapshot-update-new-only`` leaves alone has still the number of the old environment."""
    write_model(pytester)
    run(pytester, "--snapshot-update")
    path = snapshot_file(pytester)
    content = json.loads(path.read_text())
    content["environment"]["torch"] = "1.0"
    del content["ops"]["head"]
    path.write_text(json.dumps(content))
    (pytester.path / "worse").write_text("30")
    run(pytester, "--snapshot-update-new-only")
    assert "head" in snapshot_ops(pytester)
    assert json.loads(path.read_text())["environment"]["torch"] == "1.0"


def test_the_environment_tells_vendors_apart() -> None:
    """CPUs of two vendors with the same instruction set have different kernels, and different scores."""
    information = Path("/proc/cpuinfo").read_text()
    if "vendor_id" not in information:
        pytest.skip("this machine names no vendor")
    vendor, capability = environment("cpu", "auto")["cpu"].split(maxsplit=1)
    assert f": {vendor}\n" in information
    assert capability == torch.backends.cpu.get_cpu_capability()


def test_lines_of_ops_that_are_gone(pytester: pytest.Pytester) -> None:
    """A line of an op that the model no longer has is pointed out, until it is removed."""
    write_model(pytester, spare="used")
    run(pytester, "--snapshot-update")
    write_model(pytester)
    for args in ([], ["--snapshot-update", "-q"], ["-k", "head"]):
        run(pytester, *args).stdout.fnmatch_lines(
            [f"1 line in {snapshot_file(pytester)} of no op of this model: spare; remove with *-snapshot-prune"]
        )
    result = run(pytester, "--snapshot-update", "--qsens-snapshot-prune")
    result.stdout.no_fnmatch_line("*of no op of this model*")


def test_result_file(pytester: pytest.Pytester) -> None:
    """``--qsens-json`` lists every op of the model, whatever its status, and what the run cost."""
    write_model(pytester, spare="unused")
    run(pytester, "--qsens-json", "out.json", "--qsens-ops", "spare", "--qsens-ops", "blocks.*", "-k", "not blocks.2")
    content = json.loads((pytester.path / "out.json").read_text())
    statuses = {op["op"]: (op["status"], op["reason"]) for op in content["ops"]}
    assert list(statuses) == [*OPS[:-1], "spare", "head"]
    not_selected = ("unrun", "not selected by --qsens-ops or --qsens-max-ops")
    assert statuses["embed"] == statuses["head"] == not_selected
    assert statuses["blocks.2.up"] == ("unrun", "not run")
    assert statuses["blocks.0.up"] == ("measured", None)
    assert statuses["spare"][0] == "unexercised"
    assert content["total"]["status"] == "unrun"
    assert content["run"]["engine"] == "delta"
    assert content["run"]["mode"] == "isolated"
    cost = content["run"]["cost"]
    assert cost["wall_seconds"] > cost["reference_seconds"] > 0
    assert cost["forwards_per_op"] > 0


def test_a_foreign_file_in_the_way_is_left_alone(pytester: pytest.Pytester, tmp_path: Path) -> None:
    """A result never replaces a file that is none, and an older result is replaced."""
    write_model(pytester)
    target = tmp_path / "out.json"
    run(pytester, "--qsens-json", str(target), "--qsens-ops", "head")
    first = target.read_bytes()
    run(pytester, "--qsens-json", str(target), "--qsens-ops", "embed")
    assert target.read_bytes() != first
    target.write_text('{"mine": true}')
    assert run(pytester, "--qsens-json", str(target)).ret == pytest.ExitCode.USAGE_ERROR
    assert target.read_text() == '{"mine": true}'


def test_stock_snapshots_beside_ours(pytester: pytest.Pytester) -> None:
    """Syrupy's own snapshots in the same run are written, compared and cleaned up as ever, and ours are no part."""
    write_model(pytester)
    pytester.makepyfile(
        test_amber="def test_a(snapshot): assert 1 == snapshot\ndef test_b(snapshot): assert 2 == snapshot"
    )
    result = run(pytester, "--snapshot-update")
    result.assert_outcomes(passed=COUNT + 2)
    amber = pytester.path / "__snapshots__" / "test_amber.ambr"
    assert "test_b" in amber.read_text()
    ours = snapshot_file(pytester).read_bytes()
    result = run(pytester)
    result.assert_outcomes(passed=COUNT + 2)
    result.stdout.fnmatch_lines([f"{COUNT + 2} snapshots passed."])
    pytester.makepyfile(test_amber="def test_a(snapshot): assert 1 == snapshot")
    result = run(pytester)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*1 snapshot unused.*"])
    pytester.runpytest_inprocess("--qsens-model", MODEL, op_id("head"), "--snapshot-update").assert_outcomes(passed=1)
    assert "test_b" in amber.read_text()  # a run that does not collect its tests does not clean up after them
    run(pytester, "--snapshot-update")
    assert "test_b" not in amber.read_text()
    assert snapshot_file(pytester).read_bytes() == ours
