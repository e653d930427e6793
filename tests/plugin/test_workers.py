"""Measuring in parallel: the same numbers, nothing lost to a crash, cores shared."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from pytest_qsens.ops import Op
from pytest_qsens.report.attention import attention
from pytest_qsens.result_payloads import to_payload
from pytest_qsens.results import OpResult
from pytest_qsens.session.run import Run
from pytest_qsens.workers import cores, fitting
from tests.plugin.harness import MODEL, OPS, listing, op_id, snapshot_file, snapshot_ops, write_model

COUNT = len(OPS) + 1

REVERSED = """
import pytest
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items): items.reverse()
"""


def run(pytester: pytest.Pytester, workers: int, *args: str) -> pytest.RunResult:
    """Run the built-in suite; without workers in a process of its own, as torch reads ``OMP_NUM_THREADS`` once."""
    start = pytester.runpytest_inprocess if workers else pytester.runpytest_subprocess
    return start("--qsens-model", MODEL, "-n", str(workers), "-p", "no:randomly", *args)


def test_the_snapshot_does_not_depend_on_how_it_was_measured(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At equal threads the file is identical byte for byte: without workers, with 2 and 4, in any order."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_model(pytester, spare="used")
    found = set()
    for workers, conftest in ((0, ""), (0, REVERSED), (2, ""), (4, ""), (2, REVERSED)):
        pytester.makeconftest(conftest)
        run(pytester, workers, "--snapshot-update", "--qsens-mode", "both").assert_outcomes(passed=COUNT + 1)
        found.add(snapshot_file(pytester).read_bytes())
        snapshot_file(pytester).unlink()
    assert len(found) == 1


def test_syrupy_counts_with_workers(pytester: pytest.Pytester) -> None:
    """Syrupy's own summary and exit code are right with workers, with its snapshots beside ours."""
    write_model(pytester)
    pytester.makepyfile(test_amber="def test_a(snapshot): assert 1 == snapshot")
    run(pytester, 2, "--snapshot-update").assert_outcomes(passed=COUNT + 1)
    result = run(pytester, 2)
    result.assert_outcomes(passed=COUNT + 1)
    result.stdout.fnmatch_lines([f"{COUNT + 1} snapshots passed."])


CRASH = """
import os, signal
def pytest_runtest_call(item):
    if "{op}]" in item.nodeid and "PYTEST_XDIST_WORKER" in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("op", "phase"), [("embed", "call"), ("blocks.1.up", "call"), ("head", "teardown")])
def test_a_killed_worker_costs_the_op_it_was_running(pytester: pytest.Pytester, op: str, phase: str) -> None:
    """``kill -9`` fails the op under measurement alone, which keeps its line; it is not tried on other workers.

    In the teardown as well, when the op has a score and its call has passed.
    """
    write_model(pytester)
    run(pytester, 0, "--snapshot-update")
    recorded = snapshot_ops(pytester)
    content = json.loads(snapshot_file(pytester).read_text())
    for entry in content["ops"].values():
        entry["isolated"] = {"nmse": 1.0}
    snapshot_file(pytester).write_text(json.dumps(content))
    pytester.makeconftest(CRASH.format(op=op).replace("_call", f"_{phase}"))
    result = run(pytester, 2, "--snapshot-update", "--qsens-json", "out.json")
    result.assert_outcomes(passed=COUNT - (phase == "call"), failed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.re_match_lines([rf"FAILED: {re.escape(op)}: worker 'gw\d' crashed while running .*"])
    assert result.stdout.str().count("replacing crashed worker") == 1
    result.stdout.fnmatch_lines([f"qsens: wrote {snapshot_file(pytester)} ({len(OPS) - 1} lines new or changed)"])
    after = snapshot_ops(pytester)
    assert after.pop(op)["isolated"] == {"nmse": 1.0}
    assert after == {name: entry for name, entry in recorded.items() if name != op}
    ops = {entry["op"]: entry for entry in json.loads((pytester.path / "out.json").read_text())["ops"]}
    assert (ops[op]["status"], ops[op]["isolated"]) == ("failed", None)
    assert "crashed" in ops[op]["reason"]
    assert {entry["status"] for name, entry in ops.items() if name != op} == {"measured"}


def test_a_killed_worker_costs_the_whole_models_score(pytester: pytest.Pytester) -> None:
    """The whole model's score is lost like an op's, and the summary says so with ``-q``, too."""
    write_model(pytester)
    pytester.makeconftest(CRASH.format(op="w8a8").replace("_call", "_teardown"))
    result = run(pytester, 2, "--snapshot-update", "-q")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.re_match_lines([r"FAILED: total: worker 'gw\d' crashed while running .*"])
    assert set(snapshot_ops(pytester)) == set(OPS)
    assert "total" not in json.loads(snapshot_file(pytester).read_text())


@pytest.mark.parametrize("crash_first", [False, True])
def test_a_crash_outweighs_other_tests_of_the_op(*, crash_first: bool) -> None:
    """Where one test of an op kills its worker and another passes, the op is failed in whatever order they end."""
    run = Run("m", "w8a8", Path("m.json"), (Op("head", "linear"),))
    result = OpResult("head", "linear", "", "measured", isolated={"nmse": 0.1})
    entry = {"type": "linear", "isolated": {"nmse": 0.1}}
    reports = [
        lambda: run.add(
            {
                "result": to_payload(result),
                "spent": 0.1,
                "verdict": "new",
                "lines": [],
                "within_noise": [],
                "compared": [],
                "entry": entry,
            },
            passed=True,
        ),
        lambda: run.crashed("head", "worker crashed"),
    ]
    for report in reversed(reports) if crash_first else reports:
        report()
    assert (run.results["head"].status, run.results["head"].isolated) == ("failed", None)
    assert not run.entries
    assert not run.compared
    assert not run.verdicts


OWN = """
import pytest
@pytest.mark.parametrize("n", [7])
@pytest.mark.qsens(model="{model}")
def test_own(qsens_score, n, snapshot): assert qsens_score == snapshot
"""


def test_own_tests_with_parameters_of_their_own(pytester: pytest.Pytester) -> None:
    """Crashes and blocks go by what a test measures, not by how its id is spelled."""
    write_model(pytester)
    pytester.makepyfile(test_user=OWN.format(model=MODEL))
    pytester.makeconftest(
        """
        import os, signal
        def pytest_runtest_call(item):
            with open("where.txt", "a") as file:
                file.write(item.callspec.params["qsens_op"].name + " " + os.environ["PYTEST_XDIST_WORKER"] + "\\n")
            if "-head-7]" in item.nodeid:
                os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    result = run_marked(pytester, "--snapshot-update", "--qsens-json", "out.json", "-v")
    result.assert_outcomes(passed=len(OPS) - 1, failed=1)
    result.stdout.fnmatch_lines(["*scheduling tests via BlockScheduling"])
    statuses = {op["op"]: op["status"] for op in json.loads((pytester.path / "out.json").read_text())["ops"]}
    assert statuses == {op: "failed" if op == "head" else "measured" for op in OPS}
    where = dict(line.split() for line in (pytester.path / "where.txt").read_text().splitlines())
    for block in range(3):
        assert where[f"blocks.{block}.up"] == where[f"blocks.{block}.down"]


def run_marked(pytester: pytest.Pytester, *args: str) -> pytest.RunResult:
    """Run tests whose markers choose the model, on two workers."""
    return pytester.runpytest_inprocess("-n", "2", "-p", "no:randomly", *args)


@pytest.mark.parametrize("dist", ["loadscope", "loadfile", "loadgroup", "each"])
def test_unfit_distribution_of_models_chosen_in_code(pytester: pytest.Pytester, dist: str) -> None:
    """A ``--dist`` that defeats measuring in parallel is refused where a marker chooses the model, too."""
    write_model(pytester)
    pytester.makepyfile(test_user=OWN.format(model=MODEL))
    before = listing(pytester)
    result = run_marked(pytester, "--dist", dist, "--snapshot-update")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: qsens: --dist {dist} *"])
    assert listing(pytester) == before


@pytest.mark.parametrize("dist", ["load", "worksteal", "loadscope"])
def test_runs_without_us_are_scheduled_as_ever(pytester: pytest.Pytester, dist: str) -> None:
    """Where nothing is measured, xdist's own schedulers distribute."""
    pytester.makepyfile("def test_one(): pass\ndef test_two(): pass")
    result = run_marked(pytester, "--dist", dist, "-v")
    result.assert_outcomes(passed=2)
    names = {"load": "Load", "worksteal": "WorkStealing", "loadscope": "LoadScope"}
    result.stdout.fnmatch_lines([f"*scheduling tests via {names[dist]}Scheduling"])


UNSEEDED = """
import torch
from pytest_qsens import ModelSpec

def model():
    torch.seed()
    return torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(6)))

def spec():
    batches = [{"input": torch.ones(2, 4)}]
    return ModelSpec(model, batches, batches, output=lambda out, batch: out)
"""


def test_workers_must_have_the_same_model(pytester: pytest.Pytester) -> None:
    """A factory that makes another model in every worker would fill a snapshot with numbers of both: refused."""
    pytester.makepyfile(unseeded=UNSEEDED)
    before = listing(pytester)
    run = ("--qsens-model", "unseeded:spec", "-n", "2", "--snapshot-update", "--qsens-json", "out.json")
    result = pytester.runpytest_inprocess(*run)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: qsens: unseeded.spec: *the unquantized outputs differ. Seed what is random*"])
    assert listing(pytester) == before


def test_a_model_that_is_another_one_each_time_it_is_loaded(pytester: pytest.Pytester) -> None:
    """The same in one process that has to load the model again: the other's memory was needed in between."""
    pytester.makepyfile(
        unseeded=UNSEEDED,
        test_user="""
        import pytest
        @pytest.mark.parametrize("m", [1])
        @pytest.mark.qsens(model="unseeded:spec")
        class Test:
            @pytest.mark.qsens(ops="0")
            def test_a(self, m, qsens_score, snapshot): assert qsens_score == snapshot
            @pytest.mark.qsens(scheme="w8a8_dynamic", ops="0")
            def test_b(self, m, qsens_score, snapshot): assert qsens_score == snapshot
            @pytest.mark.qsens(ops="1", mode="fallback")
            def test_c(self, m, qsens_score, snapshot): assert qsens_score == snapshot
        """,
    )
    before = listing(pytester)
    pytester.makeconftest("def pytest_collection_modifyitems(items): items.sort(key=lambda item: item.name)")
    result = pytester.runpytest_inprocess("--snapshot-update")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: qsens: unseeded.spec: *Seed what is random*"])
    assert set(listing(pytester)) == {*before, "conftest.py"}


def test_machines_may_round_differently() -> None:
    """Between machines different outputs are no contradiction, and pointed out; on one machine they are."""

    def run(*places: tuple[str, str]) -> Run:
        facts = {"environment": {}, "engine": "replay", "engine_reason": None}
        found = [{**facts, "machine": machine, "reference": reference} for machine, reference in places]
        return Run("m", "w8a8", Path("m.json"), facts=found)

    assert run(("", "a"), ("", "b")).contradictory
    assert run(("far", "a"), ("", "b"), ("far", "b")).contradictory
    assert not run(("", "a"), ("", "a"), ("far", "b")).contradictory
    assert any("differ between machines" in line for line in attention(run(("", "a"), ("far", "b"))))
    assert not list(attention(run(("", "a"), ("far", "a"))))


def test_several_crashes_lose_nothing(pytester: pytest.Pytester) -> None:
    """However many ops kill their worker, every other op is measured and the run ends."""
    write_model(pytester)
    pytester.makeconftest(CRASH.replace('"{op}]" in item.nodeid', '".up]" in item.nodeid'))
    result = run(pytester, 2, "--snapshot-update")
    result.assert_outcomes(passed=COUNT - 3, failed=3)
    assert set(snapshot_ops(pytester)) == {op for op in OPS if not op.endswith(".up")}


def test_a_crash_without_replacements(pytester: pytest.Pytester) -> None:
    """With restarts disabled, what the other worker measures is kept, and the rest is listed as not run.

    Syrupy warns at the end of such a run, which here is an error: pytest ends with it, and nothing is lost.
    """
    write_model(pytester)
    pytester.makeini("[pytest]\nfilterwarnings = error")
    pytester.makeconftest(CRASH.format(op="blocks.0.up"))
    args = ("-n", "2", "--max-worker-restart", "0", "--snapshot-update", "--qsens-json", "out.json")
    result = pytester.runpytest_subprocess("--qsens-model", MODEL, "-p", "no:randomly", *args)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stderr.fnmatch_lines(["*UserWarning: syrupy: received 1 of 2 xdist worker snapshot reports*"])
    statuses = {op["op"]: op["status"] for op in json.loads((pytester.path / "out.json").read_text())["ops"]}
    assert statuses["blocks.0.up"] == "failed"
    assert {status for op, status in statuses.items() if op != "blocks.0.up"} <= {"measured", "unrun"}
    measured = {op for op, status in statuses.items() if status == "measured"}
    assert measured
    assert set(snapshot_ops(pytester)) == measured
    result.stdout.fnmatch_lines(["FAILED: blocks.0.up: *", f"qsens: wrote {snapshot_file(pytester)}*"])


def test_blocks_stay_together(pytester: pytest.Pytester) -> None:
    """The ops of one block run on one worker, which shares what it recomputes for them."""
    write_model(pytester)
    pytester.makeconftest(
        """
        import os
        def pytest_runtest_call(item):
            with open("where.txt", "a") as file:
                file.write(item.nodeid + " " + os.environ["PYTEST_XDIST_WORKER"] + "\\n")
        """
    )
    run(pytester, 2, "--snapshot-update").assert_outcomes(passed=COUNT)
    where = dict(line.split() for line in (pytester.path / "where.txt").read_text().splitlines())
    for block in range(3):
        assert where[op_id(f"blocks.{block}.up")] == where[op_id(f"blocks.{block}.down")]
    assert len(set(where.values())) == 2


def test_stopping_early(pytester: pytest.Pytester) -> None:
    """``-x`` ends a distributed run, and what was not run is listed so."""
    write_model(pytester)
    result = run(pytester, 2, "-x", "--qsens-json", "out.json")
    assert result.ret in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.TESTS_FAILED)
    assert len(json.loads((pytester.path / "out.json").read_text())["ops"]) == len(OPS)


@pytest.mark.parametrize("dist", ["load", "worksteal"])
def test_fit_distribution_modes(pytester: pytest.Pytester, dist: str) -> None:
    """Modes that spread tests one by one are taken to mean ours."""
    write_model(pytester)
    result = run(pytester, 2, "--dist", dist, "--snapshot-update", "-v", op_id("head"))
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*scheduling tests via BlockScheduling"])


def test_other_tests_are_spread_one_by_one(pytester: pytest.Pytester) -> None:
    """Tests beside ours run on all workers, as without us."""
    write_model(pytester)
    pytester.makepyfile(
        test_other="""
        import os, time, pytest
        @pytest.mark.parametrize("n", range(12))
        def test_it(n):
            time.sleep(0.1)
            with open("where.txt", "a") as file: file.write(os.environ["PYTEST_XDIST_WORKER"] + "\\n")
        """
    )
    run(pytester, 2, "--snapshot-update", "-k", "test_other").assert_outcomes(passed=12)
    assert len(set((pytester.path / "where.txt").read_text().split())) == 2


THREADS = """
import os, torch
def test_threads(qsens_model):
    with open("threads.txt", "a") as file:
        file.write(f"{torch.get_num_threads()} {os.environ.get('OMP_NUM_THREADS')}\\n")
"""


@pytest.mark.parametrize("workers", [1, cores() + 1])
def test_threads_share_the_cores(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """Every worker gets its share of the cores, at least one thread, whether an option or a marker names the model."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    write_model(pytester)
    share = max(1, cores() // workers)
    pytester.makepyfile(test_user=THREADS)
    pytester.runpytest_inprocess("--qsens-model", MODEL, "-n", str(workers), "-k", "test_threads")
    assert (pytester.path / "threads.txt").read_text().split() == [str(share), str(share)]
    (pytester.path / "threads.txt").unlink()
    pytester.makepyfile(test_user=f"import pytest\npytestmark = pytest.mark.qsens(model='{MODEL}'){THREADS}")
    pytester.runpytest_inprocess("-n", str(workers))
    assert (pytester.path / "threads.txt").read_text().split() == [str(share), "None"]


def test_the_users_thread_count_is_respected(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """``OMP_NUM_THREADS`` in the environment decides, and the run leaves the environment as it was."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    write_model(pytester)
    pytester.makepyfile(test_user=THREADS)
    run = ("--qsens-model", MODEL, "-n", "1", "-k", "test_threads")
    pytester.runpytest_inprocess(*run)
    assert "OMP_NUM_THREADS" not in os.environ
    assert (pytester.path / "threads.txt").read_text().split() == [str(cores())] * 2
    (pytester.path / "threads.txt").unlink()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pytester.runpytest_inprocess(*run)
    assert (pytester.path / "threads.txt").read_text().split() == ["1", "1"]
    assert os.environ["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("available", "free", "weights", "kept", "expected"),
    [
        (8, 64e9, 7_500_000_000, 0, 8),  # cores
        (8, 16e9, 7_500_000_000, 0, 4),  # memory beside the weights, which all share
        (8, 24e9, 7_500_000_000, 1, 2),  # int8 weights that each keeps
        (8, 24e9, 7_500_000_000, 2, 1),  # FP8 in bf16
        (8, 6e9, 7_500_000_000, 0, 1),  # streamed
        (8, 6e9, None, 0, 8),  # nobody knows before it is loaded
    ],
)
def test_workers_that_fit(available: int, free: float, weights: int | None, expected: int, kept: int) -> None:
    """As many as there are cores, and memory."""
    assert fitting(available, free, weights, kept=kept) == expected


def test_auto_goes_by_memory(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """``-n auto`` means as many workers as fit; other suites, and a number in the environment, are left alone."""
    told = []

    def asked(*_: object, **__: object) -> int:
        told.append(1)
        return 3

    monkeypatch.setattr("pytest_qsens.automatic_workers.fitting", asked)
    arguments = ("-n", "auto", "-p", "no:randomly", "--collect-only", "-q")
    config = pytester.parseconfig("--qsens-model", "tiny_qwen2_5_vl", *arguments)
    assert config.hook.pytest_xdist_auto_num_workers(config=config) == 3
    other = pytester.parseconfig(*arguments)
    assert other.hook.pytest_xdist_auto_num_workers(config=other) != 3 or cores() == 3
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", "2")
    assert config.hook.pytest_xdist_auto_num_workers(config=config) == 2
    assert len(told) == 1
