"""``qsens merge``: the shards of one run, and nothing else, become its result."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qsens.cli import main
from pytest_qsens.errors import QsensError
from pytest_qsens.merge import merge
from pytest_qsens.ops import TOTAL
from pytest_qsens.profile import Profile
from pytest_qsens.result_files import load, write
from pytest_qsens.results import Cost, OpResult, RunInfo, RunResult
from pytest_qsens.shards import ELSEWHERE, Shard
from tests.plugin.harness import LABEL, MODEL, OPS, write_model

if TYPE_CHECKING:
    from collections.abc import Callable

ENVIRONMENT = {"cpu": "AuthenticAMD AVX512", "device": "cpu", "machine": "x86_64", "torch": "2.13.0"}
RUN = RunInfo("m", "w8a8", "delta", "isolated", ENVIRONMENT, Cost(10.0, 0.5, 1.0), data="d1", reference="r1")
NAMES = ("layers.0.q", "layers.0.k", "layers.1.q", "layers.1.k", "head")
FUNCTIONAL = OpResult("layers.0:qk", "qk", "layers.0", "unquantizable", "w8a8 does not quantize qk products")


CONFIG = {"path": "/one/quant.yaml", "format": "qsens", "sha256": "c1"}


def measured(name: str, nmse: float = 0.1, seconds: float = 1.0) -> OpResult:
    """Make a measured op."""
    return OpResult(name, "linear", name, "measured", None, {"nmse": nmse, "sqnr_db": 10.0}, seconds=seconds)


def unrun(name: str, reason: str = ELSEWHERE) -> OpResult:
    """Make an op without a result."""
    return OpResult(name, TOTAL if name == TOTAL else "linear", name, "unrun", reason)


def shard(index: int, *own: str, count: int = 3) -> RunResult:
    """Make a shard that measured some ops, or the whole model."""
    ops = [measured(name, 0.1 * index) if name in own else unrun(name) for name in NAMES]
    total = replace(measured(TOTAL), type=TOTAL) if TOTAL in own else unrun(TOTAL)
    cost = Cost(10.0 * index, 0.5 / index, 1.0)
    return RunResult(replace(RUN, cost=cost, shard=Shard(index, count)), (*ops, FUNCTIONAL), total)


SHARDS = (shard(1, "layers.0.q", "layers.0.k"), shard(2, "layers.1.q", "layers.1.k"), shard(3, "head", TOTAL))


def files(directory: Path, *results: RunResult) -> list[Path]:
    """Write result files."""
    paths = [directory / f"part{number}.json" for number in range(len(results))]
    for path, result in zip(paths, results, strict=True):
        write(path, result)
    return paths


def changed(result: RunResult, name: str, op: OpResult) -> RunResult:
    """Put another result of one op into a shard."""
    return replace(result, ops=tuple(op if old.op == name else old for old in result.ops))


def test_the_whole_result(tmp_path: Path) -> None:
    """Ops come in model order, each from its own shard, costs add up, and the order of files does not matter."""
    paths = files(tmp_path, *SHARDS)
    whole = merge(paths).result
    assert [(op.op, op.isolated and op.isolated["nmse"]) for op in whole.ops] == [
        *(("layers.0.q", 0.1), ("layers.0.k", 0.1), ("layers.1.q", 0.2), ("layers.1.k", 0.2)),
        *(("head", pytest.approx(0.3)), ("layers.0:qk", None)),
    ]
    assert whole.total is not None
    assert whole.total.status == "measured"
    assert whole.run == replace(RUN, cost=Cost(30.0, 0.5 / 3, 6.0, 60.0))
    assert all(merge(order).result == whole for order in permutations(paths))


def test_a_merged_file_is_one_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It can be read, shown and compared like any result; it is no shard, so it is not merged again."""
    paths, out = files(tmp_path, *SHARDS), tmp_path / "out.json"
    assert main(["merge", *map(str, paths), "-o", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "6 ops of 3 shards: 5 measured, 1 unquantizable",
        f"wrote {out}",
    ]
    assert load(out) == merge(paths).result
    assert json.loads(out.read_text())["run"]["cost"]["machine_seconds"] == 60.0
    assert main(["show", str(out)]) == 0
    assert main(["merge", str(out), "-o", str(tmp_path / "again.json")]) == 4
    assert f"{out} is no shard" in capsys.readouterr().err


def test_shards_of_a_config(tmp_path: Path) -> None:
    """Of one file, wherever each shard has it; what the config leaves unquantized is in all shards alike."""
    unquantized = OpResult(
        "head", "linear", "", "unquantized", "the config leaves it unquantized", scheme="unquantized"
    )
    parts = [changed(other_run(config=CONFIG)(part), "head", unquantized) for part in SHARDS]
    elsewhere = [*parts[:2], other_run(config={**CONFIG, "path": "/two/quant.yaml"})(parts[2])]
    result = merge(files(tmp_path, *elsewhere)).result
    assert result.run.config == CONFIG
    assert [op for op in result.ops if op.op == "head"] == [unquantized]
    with pytest.raises(QsensError, match="not of one run: config sha256 'c1' and 'c2'"):
        merge(files(tmp_path, *parts[:2], other_run(config={**CONFIG, "sha256": "c2"})(parts[2])))


def test_one_of_one(tmp_path: Path) -> None:
    """A matrix of one machine is a matrix, too."""
    alone = merge(files(tmp_path, shard(1, *NAMES, TOTAL, count=1))).result
    assert alone.run.shard is None
    assert {op.status for op in alone.ops} == {"measured", "unquantizable"}


def test_profiles_add_up(tmp_path: Path) -> None:
    """Where the time went is told of all machines together, if all tell."""
    told = Profile(2, {"load": 1.0}, {"linear": 2.0}, 1.5)
    parts = [replace(part, run=replace(part.run, profile=told)) for part in SHARDS]
    assert merge(files(tmp_path, *parts)).result.run.profile == Profile(6, {"load": 3.0}, {"linear": 6.0}, 4.5)
    assert merge(files(tmp_path, *parts[:2], SHARDS[2])).result.run.profile is None


def test_ops_that_were_not_selected(tmp_path: Path) -> None:
    """What no shard was asked for is left as an unsharded run leaves it."""
    reason = "not selected by --qsens-ops or --qsens-max-ops"
    parts = [changed(part, "head", unrun("head", reason)) for part in SHARDS]
    parts = [replace(part, total=unrun(TOTAL, "only some ops were asked for")) for part in parts]
    whole = merge(files(tmp_path, *parts)).result
    assert whole.ops[4] == unrun("head", reason)
    assert whole.total == unrun(TOTAL, "only some ops were asked for")


def test_failed_ops_stay_and_are_told(tmp_path: Path) -> None:
    """What failed in its shard is in the merged file, which can be complete without it."""
    failed = OpResult("head", "linear", "head", "failed", "NaN when quantized")
    merged = merge(files(tmp_path, *SHARDS[:2], changed(SHARDS[2], "head", failed)))
    assert merged.result.ops[4] == failed
    assert "FAILED: head: NaN when quantized" in merged.notes


def test_what_was_not_run_makes_it_incomplete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A shard that was stopped is refused, unless a part is good enough; then the file and the output say so."""
    paths = files(tmp_path, *SHARDS[:2], changed(SHARDS[2], "head", unrun("head", "not run")))
    command = ["merge", *map(str, paths), "-o", str(tmp_path / "out.json")]
    assert main(command) == 4
    message = f"qsens: {paths[2]} (shard 3/3) is not complete: 1 op of all shards not run, head. Run it again"
    assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "out.json").exists()
    assert main([*command, "--partial"]) == 0
    assert "not complete: 1 op not run in their shards, head" in capsys.readouterr().out
    assert load(tmp_path / "out.json").ops[4] == unrun("head", "not run")


def other_run(**values: object) -> Callable[[RunResult], RunResult]:
    """Change what the run of a shard was."""
    return lambda part: replace(part, run=replace(part.run, **values))  # type: ignore[arg-type]  # any field


def other_environment(**values: str) -> Callable[[RunResult], RunResult]:
    """Change where a shard was measured."""
    return other_run(environment={**ENVIRONMENT, **values})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_run(model="n"), "not of one run: model 'm' and 'n'. Measure all shards with the same command"),
        (other_run(scheme="w8a8_static"), "not of one run: scheme 'w8a8' and 'w8a8_static'"),
        (other_run(mode="both"), "not of one run: mode 'isolated' and 'both'"),
        (other_run(engine="eager"), "not of one run: engine 'delta' and 'eager'"),
        (other_run(data=None), "not of one run: data 'd1' and not recorded"),
        (other_run(checkpoint="c2"), "not of one run: checkpoint not recorded and 'c2'"),
        (other_run(config=CONFIG), "not of one run: config format not recorded and 'qsens'"),
        (other_run(shard=Shard(2, 4)), "not of one run: number of shards 3 and 4"),
        (other_environment(torch="2.14.0"), "not of one run: torch '2.13.0' and '2.14.0'"),
        (other_environment(kernels="torch x86"), "not of one run: kernels not recorded and 'torch x86'"),
        (other_environment(cpu="GenuineIntel AVX2"), "different environments: cpu 'Auth.* with --mixed-environments"),
        (other_run(reference="r2"), r"contradict each other: the unquantized outputs differ \(reference r1 and r2\)"),
        (other_run(shard=None), "part1.json is no shard"),
        (other_run(environment={}), "part1.json, shard 2/3, has no environment: nothing was measured. Run it again"),
        (lambda part: replace(part, ops=part.ops[1:]), "6 and 5, in one of them only: layers.0.q"),
        (lambda part: replace(part, ops=part.ops[::-1]), "6 and 6, the same in another order"),
        (
            lambda part: changed(part, "head", measured("head", 0.1 * 3)),
            r"part1.json \(shard 2/3\) and .*part2.json \(shard 3/3\) both report head \(measured, isolated nmse 0.3",
        ),
        (
            lambda part: changed(part, "head", measured("head", 0.5)),
            "contradict each other about head: measured, isolated nmse 0.5 and measured, isolated nmse 0.3",
        ),
        (lambda part: changed(part, "head", unrun("head", "not run")), "contradict each other about head: unrun and"),
        (lambda part: changed(part, "layers.1.q", unrun("layers.1.q")), "layers.1.q is in no shard: each of the 3"),
        (lambda part: replace(part, total=replace(measured(TOTAL), type=TOTAL)), "both report total"),
    ],
)
def test_what_is_not_one_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[RunResult], RunResult], message: str
) -> None:
    """Foreign, overlapping and contradictory files: exit code 4, one line with the reason, nothing written."""
    paths = files(tmp_path, SHARDS[0], change(SHARDS[1]), SHARDS[2])
    before = sorted(tmp_path.iterdir())
    assert main(["merge", *map(str, paths), "-o", str(tmp_path / "out.json")]) == 4
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(Exception, match=message) as caught:
        merge(paths)
    assert str(caught.value) in error
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ((0, 2), "1 of 3 shards missing: 2/3. Run `pytest ... --qsens-shard 2/3"),
        ((1,), "2 of 3 shards missing: 1/3, 3/3."),
        ((0, 1, 2, 1), "part1.json and .*part1.json are both shard 2/3"),
    ],
)
def test_each_shard_is_needed_once(tmp_path: Path, chosen: tuple[int, ...], message: str) -> None:
    """Missing shards are named, and so are two files of one, identical or not."""
    paths = files(tmp_path, *SHARDS)
    with pytest.raises(Exception, match=message):
        merge([paths[index] for index in chosen])


def test_a_shard_measured_twice(tmp_path: Path) -> None:
    """Two runs of one shard are refused: which of the two is meant is not for us to guess."""
    with pytest.raises(Exception, match=r"part1.json and .*part3.json are both shard 2/3"):
        merge(files(tmp_path, *SHARDS, SHARDS[1]))


def test_mixed_environments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They can be merged if that is asked for; the file has all of them, and the output says what that means."""
    far = other_run(environment={**ENVIRONMENT, "cpu": "GenuineIntel AVX2"}, reference="r0")(SHARDS[1])
    paths, out = files(tmp_path, SHARDS[0], far, SHARDS[2]), tmp_path / "out.json"
    assert main(["merge", *map(str, paths), "-o", str(out), "--mixed-environments"]) == 0
    assert "different environments: scores differ by about 1e-4" in capsys.readouterr().out
    run = load(out).run
    assert run.environment["cpu"] == "AuthenticAMD AVX512 + GenuineIntel AVX2"
    assert run.environment["torch"] == "2.13.0"
    assert run.reference == "r0+r1"


def test_nothing_else_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a shard nor a file of someone else becomes the output; an older result does."""
    paths = files(tmp_path, *SHARDS)
    before = paths[0].read_bytes()
    assert main(["merge", *map(str, paths), "-o", str(paths[0])]) == 4
    assert "is one of the shards" in capsys.readouterr().err
    assert paths[0].read_bytes() == before
    (tmp_path / "setup.py").write_text("x")
    assert main(["merge", *map(str, paths), "-o", str(tmp_path / "setup.py")]) == 4
    assert (tmp_path / "setup.py").read_text() == "x"
    write(tmp_path / "old.json", RunResult(RUN, ()))
    assert main(["merge", *map(str, paths), "-o", str(tmp_path / "old.json")]) == 0


def without_times(path: Path) -> dict[str, Any]:
    """Give what of a result file does not depend on how fast the machine was."""
    content: dict[str, Any] = json.loads(path.read_text())
    for op in (*content["ops"], content["total"]):
        del op["seconds"]
    return {"ops": content["ops"], "total": content["total"]}


def test_a_sharded_run_is_the_unsharded_run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Really measured: three shards merged are the file of one run, byte for byte but for times."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_model(pytester, spare="unused")
    run = ("--qsens-model", MODEL, "--qsens-mode", "both", "-p", "no:randomly", "--qsens-json")
    pytester.runpytest_subprocess(*run, "whole.json")
    names = [f"part{index}.json" for index in (1, 2, 3)]
    for index, name in enumerate(names, 1):
        pytester.runpytest_subprocess(*run, name, "--qsens-shard", f"{index}/3")
    assert main(["merge", *names, "-o", "merged.json"]) == 0
    whole, merged = without_times(Path("whole.json")), without_times(Path("merged.json"))
    assert json.dumps(merged) == json.dumps(whole)
    facts = [json.loads(Path(name).read_text())["run"] for name in ("whole.json", "merged.json")]
    for fact in facts:
        del fact["cost"]
    assert facts[0] == facts[1]
    assert main(["accept", "merged.json"]) == 0
    accepted = Path(f"qsens_snapshots/{LABEL}/w8a8.json").read_bytes()
    pytester.runpytest_subprocess(*run[:-1], "--snapshot-update", "--qsens-snapshot-dir", "direct")
    assert accepted == Path(f"direct/{LABEL}/w8a8.json").read_bytes()
    assert len(json.loads(accepted)["ops"]) == len(OPS)
