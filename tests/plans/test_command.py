"""``qsens plan``: from result files to a config that says what was planned, and nothing written where that fails."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pytest_qsens.cli import main
from pytest_qsens.configs.decisions import decide, scheme_name
from pytest_qsens.configs.read import read_config
from pytest_qsens.interactions import encode
from pytest_qsens.ops import Op
from pytest_qsens.plans.bits import scheme_bits
from pytest_qsens.result_files import write
from pytest_qsens.results import Cost, OpResult, RunInfo, RunResult
from pytest_qsens.shards import Shard

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

RUN = RunInfo("m", "w8a8", "delta", "isolated", {"torch": "2.13", "cpu": "x"}, Cost(1.0), data="d", reference="r")
NMSE = {"l.0.q_proj": 1.0, "l.0.k_proj": 2.0, "l.0.o": 4.0, "l.1.o": 8.0, "head": 16.0}
"""Op → error under the first scheme; under the second it is four times as large."""
NAMES = tuple(NMSE)
FUNCTIONAL = OpResult("l.0:qk", "qk", "l.0", "unquantizable", "w8a8 does not quantize qk products")


def ops(factor: float = 1.0) -> list[OpResult]:
    """Make measured ops with as many weights as 100, 200, ...; q and k are fused."""
    return [
        OpResult(name, "linear", "", "measured", None, {"nmse": factor * nmse * 1e-4}, weights=100 * number)
        for number, (name, nmse) in enumerate(NMSE.items(), 1)
    ]


def result(path: Path, listed: Sequence[OpResult] | None = None, **facts: Any) -> str:  # noqa: ANN401 - any of the run
    """Write a result file."""
    write(path, RunResult(replace(RUN, **facts), (*(ops() if listed is None else listed), FUNCTIONAL)))
    return str(path)


def changed(name: str, **fields: Any) -> list[OpResult]:  # noqa: ANN401 - any of an op
    """Change one op."""
    return [replace(op, **fields) if op.op == name else op for op in ops()]


def planned(path: Path) -> dict[str, str]:
    """Read a config: op → name of its scheme."""
    decisions, problems = decide(read_config(path), [Op(name, "linear") for name in NAMES])
    assert [problem for problem in problems if "cannot be simulated" not in str(problem)] == []
    return {decision.op.name: scheme_name(decision.scheme) for decision in decisions}


def unquantized(path: Path) -> set[str]:
    """Names of ops that a config leaves as they are."""
    return {op for op, scheme in planned(path).items() if scheme == "unquantized"}


def test_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The lowest error at a size: q and k together, as one scheme is for both; the file says what is printed."""
    out = tmp_path / "plan.yaml"
    # all but 400 and 500 weights quantized: (600 · 8 + 900 · 16) / 1500
    assert main(["plan", result(tmp_path / "a.json"), "--budget-bits", "12.8", "--out", str(out)]) == 0
    assert unquantized(out) == {"l.1.o", "head"}
    printed = capsys.readouterr().out
    assert "3 w8a8, 2 unquantized of 5 ops" in printed
    assert "bits a weight: 12.8\n" in printed
    assert "predicted nmse: 0.0007\n" in printed
    assert "unquantized by choice: l.1.o, head" in printed
    assert printed.endswith(f"\n\nwrote {out}\n")
    # k and o would be enough; q goes with k
    assert main(["plan", str(tmp_path / "a.json"), "--budget-bits", "13.8", "--out", str(out)]) == 0
    assert unquantized(out) == {"l.1.o", "head"}
    assert "bits a weight: 12.8\n" in capsys.readouterr().out


def test_several_schemes(tmp_path: Path) -> None:
    """Each op gets the scheme that is worth its bits; four bits cost four times the error."""
    files = [result(tmp_path / "a.json"), result(tmp_path / "b.json", ops(4), scheme="w4a16_g128")]
    out = tmp_path / "plan.json"
    assert main(["plan", *files, "--budget-bits", "100", "--out", str(out)]) == 0
    assert set(planned(out).values()) == {"unquantized"}
    least = scheme_bits("w4a16_g128", 16)
    assert least == 4.125
    assert main(["plan", *files, "--budget-bits", str(least), "--out", str(out)]) == 0
    assert set(planned(out).values()) == {"w4a16_g128"}
    assert main(["plan", *files, "--budget-nmse", "24.5e-4", "--out", str(out)]) == 0
    # of the sums of 1 + 2, 4, 8, 16 and four times these that are 24 at most, the one that saves the most
    assert planned(out) == {
        **dict.fromkeys(("l.0.q_proj", "l.0.k_proj"), "w4a16_g128"),
        "l.0.o": "w8a8",
        "l.1.o": "w8a8",
        "head": "unquantized",
    }


def test_a_share_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The most sensitive ops are kept, with what must never be quantized among them."""
    file, out = result(tmp_path / "a.json"), tmp_path / "plan.yaml"
    assert main(["plan", file, "--keep", "20%", "--out", str(out)]) == 0
    assert unquantized(out) == {"head"}
    assert main(["plan", file, "--keep", "40%", "--never", "*.k_proj", "--out", str(out)]) == 0
    assert unquantized(out) == {"l.0.q_proj", "l.0.k_proj"}
    assert "unquantized, never to be quantized: l.0.q_proj+k_proj" in capsys.readouterr().out
    assert main(["plan", file, "--keep", "39%", "--never", "*.k_proj", "--out", str(out)]) == 4
    assert "2 have to stay unquantized, l.0.q_proj+k_proj for one" in capsys.readouterr().err
    assert main(["plan", file, "--keep", "20%", "--fused", "l.{0,1}.o", "--out", str(out)]) == 0
    assert unquantized(out) == {"head"}
    assert main(["plan", file, "--keep", "60%", "--fused", "l.{0,1}.o", "--out", str(out)]) == 0
    assert unquantized(out) == {"l.0.o", "l.1.o", "head"}


def test_a_spectrum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One file for each share of the bits that can be saved, from nothing to everything."""
    file = result(tmp_path / "a.json")
    assert main(["plan", file, "--spectrum", "0,40,100", "--out", str(tmp_path / "s.yaml")]) == 0
    found = {share: unquantized(tmp_path / f"s-{share}.yaml") for share in (0, 40, 100)}
    assert found == {0: set(NAMES), 40: {"l.1.o", "head"}, 100: set()}
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if " % " in line]
    assert [row[0] for row in rows] == ["0", "40", "100"]
    assert [row[2] for row in rows] == ["16", "12.8", "8"]
    assert rows[-1][-1] == "0.0031"


@pytest.mark.parametrize(
    ("op", "told"),
    [
        ({"status": "failed", "isolated": None, "reason": "NaN"}, "unquantized, failed: NaN: head"),
        ({"status": "unexercised", "isolated": None}, "unquantized, unexercised: head"),
        (
            {"status": "estimated", "intervals": {"isolated": (1e-5, 1e-2)}},
            "estimated (--allow-estimated plans with it)",
        ),
    ],
)
def test_without_a_score(op: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is not known is not quantized, and that is told; estimates are taken if that is asked for."""
    file, out = result(tmp_path / "a.json", changed("head", **op)), tmp_path / "plan.yaml"
    assert main(["plan", file, "--keep", "20%", "--out", str(out)]) == 0
    assert unquantized(out) == {"head"}
    assert told in capsys.readouterr().out
    if op["status"] == "estimated":
        assert main(["plan", file, "--keep", "0%", "--allow-estimated", "--out", str(out)]) == 0
        assert unquantized(out) == set()


def test_a_group_that_was_measured_in_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its score is not that of what a plan would quantize, so it stays unquantized."""
    group = changed("head", ops=("x", "y"), reason="without y (unquantizable: 192 cannot be divided)")
    file, out = result(tmp_path / "a.json", group, granularity="block"), tmp_path / "plan.yaml"
    assert main(["plan", file, "--keep", "40%", "--out", str(out)]) == 0
    assert "unquantized, measured without y (unquantizable: 192 cannot be divided): head" in capsys.readouterr().out
    decisions, _ = decide(read_config(out), [Op("x", "linear"), Op("y", "linear"), Op("l.0.o", "linear")])
    assert [scheme_name(decision.scheme) for decision in decisions] == ["unquantized", "unquantized", "w8a8"]


def test_interactions_choose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Changes that undo each other go together, also those of one group, also of two schemes."""
    directions = {"l.0.q_proj": (1, 0), "l.0.k_proj": (0, 1), "l.0.o": (1, 0), "l.1.o": (0, 1), "head": (-1, 0)}

    def sketched(factor: float = 1.0) -> list[OpResult]:
        return [
            replace(op, sketch=encode(np.array(directions[op.op]) * np.sqrt(op.isolated["nmse"])))
            for op in ops(factor)
            if op.isolated and op.isolated["nmse"]
        ]

    file, out = result(tmp_path / "a.json", sketched()), tmp_path / "plan.yaml"
    assert main(["plan", file, "--keep", "60%", "--out", str(out)]) == 0
    assert unquantized(out) == {"l.0.o", "l.1.o", "head"}  # 1 + 2, and o with head is (2 - 4)²
    assert main(["plan", file, "--keep", "20%", "--out", str(out)]) == 0
    assert unquantized(out) == {"l.1.o"}  # (1 + 2 - 4)² + 2; without head it is (1 + 2)² + (√2 + √8)²
    printed = capsys.readouterr().out
    assert "from sketches (exact)" in printed
    assert "predicted nmse: 0.0003 (additive 0.0023)" in printed
    assert "additive scores alone would choose another plan: predicted nmse 0.0027 at " in printed
    other = result(tmp_path / "b.json", [replace(op, sketch=None) for op in sketched(4)], scheme="w4a16_g128")
    assert main(["plan", file, other, "--keep", "60%", "--out", str(out)]) == 0
    assert f"note: no interactions in {other}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"model": "n"}, "model 'm' and 'n'"),
        ({"data": "e"}, "data 'd' and 'e'"),
        ({"checkpoint": "c"}, "checkpoint not recorded and 'c'"),
        ({"granularity": "block"}, "granularity 'op' and 'block'"),
        ({"environment": {"torch": "2.14", "cpu": "x"}}, "torch '2.13' and '2.14'"),
        ({"reference": "s"}, "unquantized outputs, reference r and s"),
        ({"scheme": "w8a8"}, "are both of scheme w8a8"),
        ({"shard": Shard(1, 2)}, "is shard 1/2. Put all shards together"),
        ({"scheme": "odd"}, "'odd', which is no name of a scheme"),
    ],
)
def test_foreign_files(facts: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only schemes may differ; what differs is named, and nothing is written."""
    files = [result(tmp_path / "a.json"), result(tmp_path / "b.json", **{"scheme": "w8a8_dynamic", **facts})]
    assert main(["plan", *files, "--keep", "20%", "--out", str(tmp_path / "plan.yaml")]) == 4
    assert told in capsys.readouterr().err
    assert not (tmp_path / "plan.yaml").exists()


def test_other_machines_and_other_ops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another CPU is told; another op is refused, and so is one of another size."""
    first, out = result(tmp_path / "a.json"), str(tmp_path / "plan.yaml")
    there = {"environment": {"torch": "2.13", "cpu": "y"}, "reference": "s", "scheme": "w8a8_dynamic"}
    assert main(["plan", first, result(tmp_path / "b.json", **there), "--keep", "20%", "--out", out]) == 0
    assert "note: measured on different machines" in capsys.readouterr().out
    for listed, told in (
        (ops()[:-1], "5 and 4, in one of them only: head"),
        (changed("head", weights=7), "5 and 5, not the same in both: head"),
    ):
        other = result(tmp_path / "b.json", listed, scheme="w8a8_dynamic")
        assert main(["plan", first, other, "--keep", "20%", "--out", out]) == 4
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "nothing given: a plan is made for one of"),
        (["--keep", "10%", "--budget-bits", "9"], "--budget-bits and --keep given"),
        (["--budget-bits", "7.9"], "8 bits a weight is the least that w8a8 reach."),
        (["--budget-bits", "8", "--never", "head"], "10.6667 bits a weight is the least that w8a8 reach with 1 ops"),
        (["--keep", "110%"], "--keep takes percentages from 0 to 100, not '110%'"),
        (["--spectrum", "0,x"], "--spectrum takes percentages from 0 to 100, not 'x'"),
        (["--keep", "10%", "--never", "tail"], "--never 'tail' matches none"),
        (["--keep", "10%", "--fused", "*.{a,b}"], "--fused '*.{a,b}' matches no op"),
        (["--keep", "10%", "--fused", "*.a"], "is no pattern"),
        (["--keep", "100%", "--never", "*"], "nothing can be quantized, l.0.q_proj+k_proj for one: never to be"),
    ],
)
def test_what_cannot_be(arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused with the value and the reason, and nothing written."""
    file = result(tmp_path / "a.json")
    assert main(["plan", file, *arguments, "--out", str(tmp_path / "plan.yaml")]) == 4
    assert told in capsys.readouterr().err
    assert not list(tmp_path.glob("plan*"))


def test_without_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files of older versions do not tell the sizes of ops: a share can be kept, and bits cannot be counted."""
    file = result(tmp_path / "a.json", [replace(op, weights=None) for op in ops()])
    out = str(tmp_path / "plan.yaml")
    for aim in (["--budget-bits", "9"], ["--budget-nmse", "1"], ["--spectrum", "0,50"]):
        assert main(["plan", file, *aim, "--out", out]) == 4
        assert f"{aim[0]} needs the size of every op" in capsys.readouterr().err
    assert main(["plan", file, "--keep", "20%", "--out", out]) == 0
    assert unquantized(tmp_path / "plan.yaml") == {"head"}
    assert "bits" not in capsys.readouterr().out


def test_sizes_that_torchao_may_not_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Results do not tell the sizes of weights, which matter to it under float8, and the plan says so."""
    for scheme, told in (("fp8_dynamic", True), ("w8a8_dynamic", False)):
        file, out = result(tmp_path / f"{scheme}.json", scheme=scheme), tmp_path / f"{scheme}-plan.json"
        assert main(["plan", file, "--keep", "40%", "--to", "torchao", "--out", str(out)]) == 0
        assert ("note: result files do not tell the sizes" in capsys.readouterr().out) == told
        assert main(["plan", file, "--keep", "40%", "--out", str(tmp_path / "own.json")]) == 0
        assert "sizes of weights" not in capsys.readouterr().out
        arguments = [
            "config",
            str(out),
            "--ops-from",
            file,
            "--to",
            "torchao",
            "--out",
            str(tmp_path / f"{scheme}-2.json"),
        ]
        assert main([*arguments, "--strict"]) == (4 if told else 0)
        assert ("sizes of weights" in capsys.readouterr().err) == told


def test_files_that_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan takes the place of a plan, and of nothing else."""
    file, out = result(tmp_path / "a.json"), tmp_path / "plan.yaml"
    out.write_text("rules: not ours\n")
    assert main(["plan", file, "--keep", "20%", "--out", str(out)]) == 4
    assert "is left untouched" in capsys.readouterr().err
    assert out.read_text() == "rules: not ours\n"
    assert main(["plan", file, "--keep", "20%", "--out", file]) == 4
    assert main(["plan", file, "--keep", "20%", "--out", str(tmp_path / "plan.txt")]) == 4
    assert "qsens is written to a file whose name ends in .json, .yaml, .yml, .toml" in capsys.readouterr().err
    out.unlink()
    for share in ("20%", "40%"):
        assert main(["plan", file, "--keep", share, "--out", str(out)]) == 0
    assert unquantized(out) == {"l.1.o", "head"}
    (tmp_path / "s-50.yaml").write_text("notes")
    assert main(["plan", file, "--spectrum", "0,50", "--out", str(tmp_path / "s.yaml")]) == 4
    assert not (tmp_path / "s-0.yaml").exists()


def test_groups_that_were_measured(tmp_path: Path) -> None:
    """Results of groups give every member the scheme of its group."""
    groups = [
        OpResult(name, "linear", "", "measured", None, {"nmse": nmse}, ops=members, weights=100)
        for name, nmse, members in (("l.0", 1e-4, NAMES[:3]), ("l.1", 1e-3, NAMES[3:]))
    ]
    file, out = result(tmp_path / "a.json", groups, granularity="block"), tmp_path / "plan.yaml"
    assert main(["plan", file, "--budget-bits", "12", "--out", str(out)]) == 0
    assert unquantized(out) == {"l.1.o", "head"}
    assert main(["plan", file, "--keep", "60%", "--never", "l.0.o", "--out", str(out)]) == 0
    assert unquantized(out) == set(NAMES[:3])
