"""Processes that die: whenever it happens, the files are whole, and the next run comes to what none would disturb."""

from __future__ import annotations

import os
import random
import signal
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import pytest

from tests.control_groups import little_memory
from tests.plugin.faults import COUNT, GONE, wait_for_the_end

if TYPE_CHECKING:
    from pathlib import Path

    from tests.plugin.faults import Undisturbed

_IN_CI = bool(os.environ.get("QSENS_CI"))
"""Asked while the environment is still that of the machine."""

_SCORE = r"/results/.*\.(isolated|total)\."
MOMENTS: dict[str, dict[str, str]] = {
    "before": {"moment": "setup"},
    "the model is loaded": {"moment": "load"},
    "the artifact gets its name": {"moment": "rename", "path": r"/artifacts/.*/calibrated\.safetensors$"},
    "it is measured": {"moment": "measure"},
    "it was measured": {"moment": "measured"},
    "the score's file is made": {"moment": "create", "path": _SCORE},
    "half of it is written": {"moment": "written", "path": _SCORE, "act": "halve"},
    "it gets its name": {"moment": "rename", "path": _SCORE},
    "it has its name": {"moment": "replaced", "path": _SCORE},
    "the score was reported": {"moment": "teardown"},
}
ONCE = ("the model is loaded", "the artifact gets its name")
"""Moments at whatever op is the first one."""

KEPT = ("it has its name", "the score was reported")
"""Moments when the score is in the cache already."""


@pytest.mark.parametrize("seed", range(20))
def test_a_worker_is_killed(undisturbed: Undisturbed, tmp_path: Path, seed: int) -> None:
    """At any block and moment: it costs that block at most. The run says so, and the next measures what is missing."""
    chosen = random.Random(seed)
    moment = [*MOMENTS][seed % len(MOMENTS)]
    op = chosen.choice(undisturbed.firsts)
    goes_on = chosen.random() < 0.3
    site = undisturbed.copy(tmp_path / "site", *(["artifacts"] if moment not in ONCE else []))
    fault = {"role": "worker", "act": "kill"} | MOMENTS[moment] | ({} if moment in ONCE else {"op": op})

    workers = "2" if seed < len(MOMENTS) else "1"
    killed = site.run("-n", workers, *([] if goes_on else ["--max-worker-restart", "0"]), fault=fault)
    _, _, lost = site.struck()
    assert lost == op or moment in ONCE
    [(_, status)] = map(str.split, site.log("down"))
    assert int(status) == -signal.SIGKILL
    assert killed.code == pytest.ExitCode.TESTS_FAILED
    assert killed.lines(f"FAILED: {lost}: worker 'gw", "crashed while running")
    found = site.scores()
    assert found[lost]["status"] == "failed"
    others = {name: result for name, result in found.items() if name != lost and result["status"] != "unrun"}
    assert others == {name: undisturbed.scores[name] for name in others}
    assert len(others) == COUNT - 1 or not goes_on
    assert undisturbed.check_file(site) == {name: name in others for name in undisturbed.lines} | {GONE: True}
    reported, measured = site.reported() | others.keys(), site.measured()
    assert lost not in others
    assert (lost in reported) == (moment == "the score was reported")
    assert measured >= others.keys()

    again = undisturbed.resume(site, "-n", "2" if seed < 2 else "0")
    assert not again & reported
    if not undisturbed.mates(lost) & measured:  # the rest of the block went to another worker, with the lost op
        assert (lost in again) == (moment not in KEPT)
    assert moment not in KEPT or lost not in again
    assert again <= {*undisturbed.ops} - others.keys()
    assert site.result()["run"]["cached"] == COUNT - 1 - len(again - {"total"})


def test_the_controller_is_killed_while_workers_measure(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """They end by themselves, in the middle of an op as well, and what they had reported is not measured again."""
    site = undisturbed.copy(tmp_path / "site")
    op = undisturbed.firsts[-3]
    killed = site.run("-n", "2", fault={"role": "worker", "moment": "measure", "act": "orphan", "op": op})
    assert killed.code == -signal.SIGKILL
    processes = site.processes()
    assert len(processes) == 3
    assert int(site.struck()[0]) in processes
    wait_for_the_end(processes)
    assert site.file.read_text() == undisturbed.old
    reported = site.reported()
    assert reported
    site.measured()

    assert op in (again := undisturbed.resume(site, "-n", "2"))
    assert not again & reported


_LOCK = r"/\.w8a8\.json\.lock$"
WRITING = {
    "lock": "old",
    "create": "old",
    "write": "old",
    "half": "old",
    "rename": "old",
    "replaced": "new",
    "unlock": "new",
}
"""Moment → what is in the snapshot file when the controller dies: before it is locked, before the temporary file is
made, inside of the system's write, when half of it is written, before it gets its name, after, and when all is done."""


@pytest.mark.parametrize("moment", WRITING)
def test_the_controller_is_killed_while_it_writes_the_snapshot(
    undisturbed: Undisturbed, tmp_path: Path, moment: str
) -> None:
    """The file is the old one or the new one, and what lies beside it is gone after the next run."""
    site = undisturbed.copy(tmp_path / "site", "results")
    place = _LOCK if moment in ("lock", "unlock") else "/qsens_snapshots/"
    fault: dict[str, object] = {"role": "controller", "moment": moment, "act": "kill", "path": place}
    if moment == "write":
        fault |= {"moment": "create", "act": "let the system kill", "size": 1000}
    elif moment == "half":
        fault |= {"moment": "written", "act": "halve"}
    killed = site.run("-n", "1", fault=fault)
    assert killed.code == -(signal.SIGXFSZ if moment == "write" else signal.SIGKILL), killed.output
    site.struck()
    wait_for_the_end(site.processes())
    assert undisturbed.check_file(site) == dict.fromkeys(undisturbed.lines, WRITING[moment] == "new") | {GONE: True}
    left = [path for path in site.file.parent.iterdir() if path.suffix == ".tmp"]
    assert len(left) == (moment in ("write", "half", "rename"))
    for path in left:
        size = path.stat().st_size
        assert size == {"write": 1000, "half": len(undisturbed.snapshot.encode()) // 2}.get(moment, size)
        assert (path.read_text() == undisturbed.snapshot) == (moment == "rename")

    assert undisturbed.resume(site) == set()


@pytest.mark.parametrize("parts", [("blocks.0.*", "blocks.1.*"), ("blocks.[01].*", "blocks.[01].*")])
def test_two_runs_update_one_snapshot(undisturbed: Undisturbed, tmp_path: Path, parts: tuple[str, str]) -> None:
    """One waits while the other writes, and each leaves the lines of the other alone."""
    site = undisturbed.copy(tmp_path / "site", "results")
    faults = [
        {"role": "controller", "moment": "rename", "act": "stay", "path": "/qsens_snapshots/"},
        {"role": "controller", "moment": "lock", "act": "come", "path": _LOCK},
    ]
    running = [
        site.start("-n", "2", "--qsens-ops", part, f"--qsens-json={run}.json", fault=fault, run=run)
        for run, part, fault in zip("ab", parts, faults, strict=True)
    ]
    for ended in [one.wait() for one in running]:
        assert ended.code == 0, ended.output
    for run, part in zip("ab", parts, strict=True):
        site.struck(run)
        wanted = {op: score for op, score in undisturbed.scores.items() if fnmatchcase(op, part)}
        found = site.scores(f"{run}.json")
        assert {op: found[op] for op in wanted} == wanted
    assert undisturbed.check_file(site) == {
        name: name.startswith(("blocks.0.", "blocks.1.", GONE)) for name in undisturbed.lines
    }
    assert [found.name for found in site.file.parent.iterdir()] == [site.file.name]
    undisturbed.resume(site)


def test_a_worker_is_killed_for_its_memory(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """By the system, as any other kill: it costs the op."""
    site = undisturbed.copy(tmp_path / "site")
    op = "head"
    try:
        with little_memory(32 * 2**20) as group:
            fault = {"role": "worker", "moment": "measure", "act": "exhaust", "op": op, "group": str(group.path)}
            killed = site.run("-n", "2", fault=fault | {"size": 128 * 2**20})
            assert group.kills() == 1
    except PermissionError as error:
        (pytest.fail if _IN_CI else pytest.skip)(f"no control group can be made on this machine: {error}")
    site.struck()
    assert site.log("survived") == []
    [(_, status)] = map(str.split, site.log("down"))
    assert int(status) == -signal.SIGKILL
    assert killed.code == pytest.ExitCode.TESTS_FAILED
    assert killed.lines(f"FAILED: {op}: worker 'gw", "crashed while running")
    assert undisturbed.check_file(site) == dict.fromkeys(undisturbed.lines, True) | {op: False}
    site.measured()

    assert undisturbed.resume(site) == {op}


def test_no_memory_is_left_for_an_op(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """The op fails, which is not remembered; what the process measures afterwards is as right as before."""
    site = undisturbed.copy(tmp_path / "site")
    op = undisturbed.ops[3]
    failed = site.run("-n", "1", fault={"role": "worker", "moment": "measure", "act": "starve", "op": op})
    site.struck()
    assert failed.code == pytest.ExitCode.TESTS_FAILED
    assert failed.lines(f"FAILED: {op}: ", "memory")
    assert {name: score for name, score in site.scores().items() if name != op} == {
        name: score for name, score in undisturbed.scores.items() if name != op
    }
    assert undisturbed.check_file(site) == dict.fromkeys(undisturbed.lines, True) | {op: False}
    site.measured()

    assert undisturbed.resume(site) == {op}
