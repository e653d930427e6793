"""Plans of keys and values: bits of a cached value, queries that go with them, and configs that say it."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import pytest

from pytest_qsens.cli import main
from pytest_qsens.configs.decisions import decide, scheme_name
from pytest_qsens.configs.read import read_config
from pytest_qsens.ops import Op
from pytest_qsens.plans.bits import cache_bits
from pytest_qsens.result_files import write
from pytest_qsens.results import Cost, OpResult, RunInfo, RunResult

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

RUN = RunInfo("m", "kv_int8", "delta", "isolated", {"torch": "2.13", "cpu": "x"}, Cost(1.0), data="d", reference="r")
HEADS = {"l.0.attn": (2, 64), "l.1.attn": (4, 32), "l.2.attn": (1, 128)}
"""Module → heads of its keys and values, and channels of a head."""
ERRORS = dict(zip([f"{m}:{kind}" for m in HEADS for kind in "kv"], (5.0, 1.0, 40.0, 2.0, 0.3, 7.0), strict=True))
STATES = [Op(f"{module}:{kind}", kind) for module in HEADS for kind in "qkv"]


def entry(op: Op, nmse: float) -> OpResult:
    """Make a measured op; queries have no size."""
    heads, dim = HEADS[op.name.partition(":")[0]]
    sizes = {} if op.type == "q" else {"kv_values": heads * dim, "kv_heads": heads}
    return OpResult(op.name, op.type, "", "measured", None, {"nmse": nmse * 1e-4}, weights=0, **sizes)  # type: ignore[arg-type]


def entries(factor: float = 1.0, kinds: str = "kv") -> list[OpResult]:
    """Make measured keys and values, and queries whose error is half of their keys'."""
    errors = ERRORS | {f"{module}:q": ERRORS[f"{module}:k"] / 2 for module in HEADS}
    return [entry(op, factor * errors[op.name]) for op in STATES if op.type in kinds]


def result(path: Path, scheme: str, listed: Iterable[OpResult]) -> str:
    """Write a result file."""
    write(path, RunResult(replace(RUN, scheme=scheme), tuple(listed)))
    return str(path)


def planned(path: Path, ops: Iterable[Op] = STATES) -> dict[str, str]:
    """Read a config: op → name of its scheme."""
    decisions, problems = decide(read_config(path), list(ops))
    assert not problems
    return {decision.op.name: scheme_name(decision.scheme) for decision in decisions}


SCHEMES = {"kv_int8_dynamic": 1.0, "kv_int4_dynamic_g32_asym": 30.0, "kv_fp8": 4.0}
"""Scheme → factor of its errors."""
BITS = {"kv_int8_dynamic": None, "kv_int4_dynamic_g32_asym": 4 + (16 + 4) / 32, "kv_fp8": 8.0, "unquantized": 16.0}


def bits_of(scheme: str, op: str) -> float:
    """Bits of a value, its share of scales included: one of 16 bits for each token and head, where it is per token."""
    known = BITS[scheme]
    return 8 + 16 / HEADS[op.partition(":")[0]][1] if known is None else known


def everything() -> list[tuple[dict[str, str], float, float]]:
    """List every choice there is: schemes, mean bits, and error."""
    size = {op: heads * dim for op in ERRORS for heads, dim in [HEADS[op.partition(":")[0]]]}
    found = []
    for choice in product(BITS, repeat=len(ERRORS)):
        schemes = dict(zip(ERRORS, choice, strict=True))
        bits = sum(bits_of(scheme, op) * size[op] for op, scheme in schemes.items()) / sum(size.values())
        error = sum(ERRORS[op] * 1e-4 * SCHEMES.get(scheme, 0.0) for op, scheme in schemes.items())
        found.append((schemes, bits, error))
    return found


def test_the_best_of_all_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No other choice of schemes has a lower error at the size, or is smaller with the error; the file says it."""
    files = [result(tmp_path / f"{name}.json", name, entries(factor)) for name, factor in SCHEMES.items()]
    out = tmp_path / "plan.yaml"
    every = everything()
    for budget in (4.625, 5.5, 8.1, 11.0):
        assert main(["plan", *files, "--budget-bits", str(budget), "--out", str(out)]) == 0
        best = min(error for _, bits, error in every if bits <= budget + 1e-9)
        schemes = {op: scheme for op, scheme in planned(out).items() if op in ERRORS}
        (found,) = (each for each in every if each[0] == schemes)
        assert found[1] <= budget + 1e-9
        assert found[2] == pytest.approx(best, rel=1e-6)
        told = capsys.readouterr().out
        assert f"bits a cached value: {found[1]:.4g}; a token takes {found[1] * 768 / 8:.6g} bytes" in told
        assert f"unquantized {16 * 768 / 8:.6g}\n" in told
    for limit in (2e-4, 1e-3, 5e-2):
        assert main(["plan", *files, "--budget-nmse", str(limit), "--out", str(out)]) == 0
        least = min(bits for _, bits, error in every if error <= limit)
        schemes = {op: scheme for op, scheme in planned(out).items() if op in ERRORS}
        (found,) = (each for each in every if each[0] == schemes)
        assert found[1] == pytest.approx(least)
        assert found[2] <= limit
    assert "keys: " in capsys.readouterr().out


def test_keys_and_values_as_one(tmp_path: Path) -> None:
    """A pattern gives both of a module one scheme."""
    file, out = result(tmp_path / "a.json", "kv_fp8", entries()), tmp_path / "plan.yaml"
    arguments = ["plan", file, "--keep", "34%", "--out", str(out)]
    assert main(arguments) == 0
    assert {op for op, scheme in planned(out).items() if scheme == "unquantized"} >= {"l.1.attn:k", "l.2.attn:v"}
    assert main([*arguments, "--fused", "*:{k,v}"]) == 0
    kept = {op for op, scheme in planned(out).items() if scheme == "unquantized" and op in ERRORS}
    assert kept == {"l.1.attn:k", "l.1.attn:v"}


def test_queries_go_with_their_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They count no bits and as ops; beside a scheme of keys and values alone they are left as they are."""
    attention = result(tmp_path / "a.json", "attn_fp8", entries(kinds="qkv"))
    out = tmp_path / "plan.yaml"
    assert main(["plan", attention, "--budget-bits", "13", "--out", str(out)]) == 0
    # a module is 128 values of keys and as many of values: one of three at 8 bits
    told = capsys.readouterr().out
    assert "note: queries are in no cache and count no bits" in told
    assert "bits a cached value: 10.67;" in told
    assert "queries: 2 attn_fp8, 1 unquantized" in told
    assert "6 attn_fp8, 3 unquantized of 9 ops" in told
    names = planned(out)
    assert {names[f"l.1.attn:{kind}"] for kind in "qkv"} == {"unquantized"}
    assert [names[f"l.0.attn:{kind}"] for kind in "qkv"] == ["attn_fp8", "kv_fp8", "kv_fp8"]
    cache = result(tmp_path / "b.json", "kv_int4_dynamic_g32_asym", entries(0.01))
    for files in ([attention, cache], [cache, attention]):
        assert main(["plan", *files, "--budget-bits", "5", "--out", str(out)]) == 0
        assert set(planned(out).values()) == {"unquantized", "kv_int4_dynamic_g32_asym"}
        assert {planned(out)[f"{module}:q"] for module in HEADS} == {"unquantized"}
        assert "queries: 3 unquantized" in capsys.readouterr().out


def test_queries_take_nothing_from_keys_and_values(tmp_path: Path) -> None:
    """Where queries could be quantized, too, the plan is the best of all, and has keys and values apart."""
    caches = {name: SCHEMES[name] for name in ("kv_int8_dynamic", "kv_int4_dynamic_g32_asym")}
    files = [result(tmp_path / f"{name}.json", name, entries(factor)) for name, factor in caches.items()]
    files.append(result(tmp_path / "attn.json", "attn_fp8", entries(0.6, kinds="qkv")))
    of_module: list[list[tuple[dict[str, str], float, float]]] = []
    for module, (heads, dim) in HEADS.items():
        key, value = f"{module}:k", f"{module}:v"
        choices = []
        for pair in product((*caches, "unquantized"), repeat=2):
            schemes = dict(zip((key, value), pair, strict=True))
            bits = sum(bits_of(scheme, op) for op, scheme in schemes.items()) * heads * dim
            error = sum(ERRORS[op] * 1e-4 * caches.get(scheme, 0.0) for op, scheme in schemes.items())
            choices.append((schemes | {f"{module}:q": "unquantized"}, bits, error))
        together = {key: "kv_fp8", value: "kv_fp8", f"{module}:q": "attn_fp8"}
        error = 0.6e-4 * (1.5 * ERRORS[key] + ERRORS[value])
        of_module.append([*choices, (together, 8.0 * 2 * heads * dim, error)])
    out, seen = tmp_path / "plan.yaml", set()
    for budget in (4.625, 6.0, 8.1, 9.0, 13.0):
        assert main(["plan", *files, "--budget-bits", str(budget), "--out", str(out)]) == 0
        able = [c for c in product(*of_module) if sum(bits for _, bits, _ in c) <= budget * 768 + 1e-9]
        names = planned(out)
        (found,) = (c for c in able if {op: name for schemes, _, _ in c for op, name in schemes.items()} == names)
        assert sum(error for *_, error in found) == pytest.approx(min(sum(e for *_, e in c) for c in able), rel=1e-6)
        seen |= {(names[f"{module}:q"], names[f"{module}:k"] == names[f"{module}:v"]) for module in HEADS}
    assert seen == {("attn_fp8", True), ("unquantized", True), ("unquantized", False)}


def test_patterns_where_queries_can_be_quantized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keys and values as one leave queries with their module; what is never quantized leaves the others free."""
    attention = result(tmp_path / "a.json", "attn_fp8", entries(kinds="qkv"))
    cache, out = result(tmp_path / "b.json", "kv_int8_dynamic", entries(0.1)), tmp_path / "plan.yaml"
    for share in ("30%", "60%"):
        assert main(["plan", attention, "--keep", share, "--fused", "*:{k,v}", "--out", str(out)]) == 0
        names = planned(out)
        for module in HEADS:
            assert len({names[f"{module}:{kind}"] == "unquantized" for kind in "qkv"}) == 1
    assert main(["plan", attention, cache, "--keep", "45%", "--fused", "*:{k,v}", "--out", str(out)]) == 0
    assert all(planned(out)[f"{module}:k"] == planned(out)[f"{module}:v"] for module in HEADS)
    assert main(["plan", attention, cache, "--keep", "78%", "--never", "l.*:k", "--out", str(out)]) == 0
    names = planned(out)
    assert sum(names[f"{module}:v"] == "kv_int8_dynamic" for module in HEADS) == 2
    assert {names[f"{module}:{kind}"] for module in HEADS for kind in "qk"} == {"unquantized"}
    capsys.readouterr()
    assert main(["plan", attention, cache, "--keep", "0%", "--fused", "l.{*}.attn:k", "--out", str(out)]) == 4
    assert "--fused joins keys and values of 3 modules, l.0.attn and l.1.attn for two" in capsys.readouterr().err
    run = replace(RUN, scheme="attn_fp8", granularity="type")
    write(tmp_path / "type.json", RunResult(run, tuple(entries(kinds="qkv"))))
    assert main(["plan", str(tmp_path / "type.json"), "--keep", "0%", "--out", str(out)]) == 4
    assert "is of granularity type, which has queries apart from keys and values" in capsys.readouterr().err


def test_layers_are_planned_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both at once are refused; as told, the rules of both plans make one config."""
    layers = [Op("l.0.attn.q_proj", "linear"), Op("l.0.mlp", "linear")]
    listed = [
        OpResult(op.name, op.type, "", "measured", None, {"nmse": 1e-4 * (place + 1)}, weights=64)
        for place, op in enumerate(layers)
    ]
    of_layers, cache = result(tmp_path / "l.json", "w8a16", listed), result(tmp_path / "c.json", "kv_fp8", entries())
    for files in ([of_layers, cache], [cache, of_layers]):
        assert main(["plan", *files, "--budget-bits", "9", "--out", str(tmp_path / "x.yaml")]) == 4
        told = capsys.readouterr().err
        assert f"{of_layers} is of layers (w8a16) and {cache} of keys and values (kv_fp8)" in told
    assert not (tmp_path / "x.yaml").exists()
    documents = []
    for file, share in ((cache, "84%"), (of_layers, "50%")):
        out = tmp_path / "part.json"
        assert main(["plan", file, "--keep", share, "--out", str(out)]) == 0
        documents.append(json.loads(out.read_text()))
    merged = tmp_path / "merged.json"
    merged.write_text(json.dumps({"schema": 1, "rules": [*documents[0]["rules"], *documents[1]["rules"]]}))
    names = planned(merged, [*STATES, *layers])
    assert [op for op, scheme in names.items() if scheme != "unquantized"] == ["l.2.attn:k", "l.0.attn.q_proj"]


def test_sizes_that_are_not_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files of older versions keep a share; what no data reached has no size, and bits are told to be without it."""
    old = [replace(op, kv_values=None, kv_heads=None) for op in entries()]
    file, out = result(tmp_path / "old.json", "kv_int8_dynamic", old), tmp_path / "plan.yaml"
    assert main(["plan", file, "--budget-bits", "9", "--out", str(out)]) == 4
    assert "--budget-bits needs the size of every op, and the result files do not tell that of l.0.attn:k" in (
        capsys.readouterr().err
    )
    assert main(["plan", file, "--keep", "20%", "--out", str(out)]) == 0
    assert "bits" not in capsys.readouterr().out
    newer = result(tmp_path / "new.json", "kv_fp8", entries(9))  # of the same ops: their sizes are the same
    assert main(["plan", file, newer, "--budget-bits", "8.2", "--out", str(out)]) == 0
    capsys.readouterr()
    never = [replace(op, status="unexercised", isolated=None) if "l.2" in op.op else op for op in entries()]
    never = [replace(op, kv_values=None, kv_heads=None) if "l.2" in op.op else op for op in never]
    file = result(tmp_path / "never.json", "kv_fp8", never)
    assert main(["plan", file, "--budget-bits", "8", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "note: bits are without l.2.attn:k and 1 more, whose size the result files do not tell" in told
    assert "bits a cached value: 8; a token takes 512 bytes" in told
    assert "unquantized, unexercised: l.2.attn:k, l.2.attn:v" in told


def test_other_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a tool can say of one layer is written; where it says one thing of all, another plan is refused by name."""
    file = result(tmp_path / "a.json", "kv_fp8", entries())
    some, every = ["plan", file, "--keep", "17%"], ["plan", file, "--keep", "0%"]
    out = tmp_path / "modelopt.yaml"
    assert main([*some, "--out", str(out), "--to", "modelopt-quant-cfg"]) == 0
    assert planned(out)["l.1.attn:k"] == "unquantized"
    assert planned(out)["l.1.attn:v"] == "kv_fp8"
    for target in ("compressed-tensors", "modelopt"):
        path = tmp_path / f"{target}.json"
        assert main([*some, "--out", str(path), "--to", target]) == 4
        assert "it says one thing of the keys and values of all attention modules" in capsys.readouterr().err
        assert main([*every, "--out", str(path), "--to", target]) == 0
        assert {scheme for op, scheme in planned(path).items() if op in ERRORS} == {"kv_fp8"}
    for share in ("17%", "100%"):
        assert main(["plan", file, "--keep", share, "--out", str(tmp_path / "t.json"), "--to", "torchao"]) == 4
        assert "it quantizes layers, and no keys and values of attention" in capsys.readouterr().err
    assert main(["plan", file, "--spectrum", "0,100", "--out", str(tmp_path / "s.yaml")]) == 0
    assert set(planned(tmp_path / "s-0.yaml").values()) == {"unquantized"}


@pytest.mark.parametrize(
    ("scheme", "head_dim", "bits"),
    [
        ("kv_fp8", 64, 8),
        ("kv_int8_channel", 64, 8),
        ("kv_fp8_dynamic_tensor", 64, 8),
        ("kv_int8_dynamic", 128, 8.125),
        ("kv_int4_dynamic_asym", 80, 4 + 20 / 80),
        ("kv_int4_dynamic_g32_asym", 64, 4.625),
        ("kv_nvfp4_local", 64, 4.5),
        ("kv_mxfp4_dynamic", 64, 4.25),
        ("attn_int8_dynamic", 64, 8.25),
        ("kv_int8_dynamic", None, 8),
    ],
)
def test_bits(scheme: str, head_dim: int | None, bits: float) -> None:
    """Scales that grow with the cache count: of tokens, 16 bits for each head, and of groups."""
    assert cache_bits(scheme, head_dim) == bits
