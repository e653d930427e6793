"""``qsens inspect``: what cannot be inspected is told in one line, and nothing is written."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qsens.cli import main
from pytest_qsens.manifest import load_manifest
from pytest_qsens.models.resolve import resolve
from pytest_qsens.models.source import ModelRequest
from pytest_qsens.ops import layers
from pytest_qsens.result_files import write
from pytest_qsens.results import Cost, OpResult, RunInfo, RunResult
from tests.inspection.harness import printed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pytest_qsens.ops import Op

TINY = "tiny_qwen2_5_vl"
OP = "model.visual.blocks.0.attn.qkv"
PAGE = (Path(__file__).parents[2] / "docs" / "inspect.md").read_text()


@cache
def ops() -> tuple[Op, ...]:
    """Ops of the tiny model."""
    return load_manifest(resolve(ModelRequest(TINY)), None)


def result(path: Path, changes: Mapping[str, Mapping[str, Any]] | None = None, **facts: Any) -> str:  # noqa: ANN401 - fields
    """Write a result of the tiny model with made-up scores; ``changes`` are to fields of ops."""
    listed = [
        OpResult(op.name, op.type, op.block, "measured", None, {"nmse": 0.1}, weights=op.elements) for op in ops()
    ]
    listed.append(
        OpResult("model.visual.blocks.0.attn:qk", "qk", "x", "unquantizable", "w8a8 does not quantize qk products")
    )
    changes = changes or {}
    run = replace(RunInfo(TINY, "w8a8", "delta", "isolated", {}, Cost(1.0)), **facts)
    write(path, RunResult(run, tuple(replace(op, **changes.get(op.op, {})) for op in listed)))
    return str(path)


def without(status: str, reason: str, **fields: Any) -> dict[str, dict[str, Any]]:  # noqa: ANN401 - fields
    """Take the op its score."""
    return {OP: {"status": status, "reason": reason, "isolated": None, **fields}}


GROUPED = {OP: {"ops": ("q", "k", "v", "o"), "type": "linear"}}

BAD: list[tuple[Callable[[Path], list[str]], str]] = [
    (lambda path: [str(path), OP], "there is no result file"),
    (lambda path: [result(path), OP.replace("qkv", "qvk")], f"(did you mean {OP}?). `qsens show"),
    (lambda path: [result(path), "total"], "'total' is the whole model"),
    (lambda path: [result(path), "model.visual.blocks.0.attn:qk"], "is a product of two activations (qk), and"),
    (lambda path: [result(path, without("unexercised", "never reached")), OP], f"{OP} is unexercised in"),
    (
        lambda path: [result(path, without("unquantizable", "an odd shape")), OP],
        "another scheme with --scheme, for a linear",
    ),
    (
        lambda path: [result(path, without("unquantized", "left"), config={"path": "c", "format": "f"}), OP],
        "leaves model.visual.blocks.0.attn.qkv unquantized. Ask about a scheme with --scheme",
    ),
    (
        lambda path: [result(path, {OP: {"scheme": "w8a16"}}, config={"path": "c"}), OP, "--mode", "fallback"],
        "is of the config w8a8, whose other ops have schemes that it does not tell",
    ),
    (
        lambda path: [result(path, GROUPED, granularity="fused"), OP],
        "is a group of 4 ops. Inspect one of them: q, k, v and 1",
    ),
    (lambda path: [result(path), OP, "--scheme", "w4"], "no --scheme 'w4'. Known: w8a8"),
    (lambda path: [result(path), OP, "--against", "w8a"], "no --against 'w8a'"),
    (
        lambda path: [result(path), OP, "--scheme", "w4a16_g128"],
        "64 of them cannot be divided by 128. Ask about another",
    ),
    (lambda path: [result(path), OP, "--model", "minilm"], "is a result of model 'tiny_qwen2_5_vl', not 'minilm'"),
    (lambda path: [result(path, model="mine"), OP], "is a result of 'mine', which is no preset"),
    (lambda path: [result(path, data="0"), OP], "was measured with other data (hash 0, not"),
    (lambda path: [result(path, {OP: {"weights": 7}}), OP], "1 op is with another type or another number of weights"),
    (lambda path: [result(path, {OP: {"type": "conv2d"}}), OP], "Is it the same model? Measure it again."),
    (
        lambda path: [result(path, {OP: {"op": "gone"}}), "gone"],
        "2 ops are in the result or in the model only, gone for one",
    ),
    (lambda path: [result(path), OP, "--json", str(path)], "would overwrite the result that is inspected"),
    (lambda path: [result(path), OP, "--json", str(path.parent / "no" / "x.json")], "there is no directory"),
    (
        lambda path: [result(path), OP, "--json", result(path.with_name("other.json"))],
        "was not written by `qsens inspect`",
    ),
]


def test_keys_are_in_results_of_their_schemes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A result of layers lists none, so no name of it is the one that was meant."""
    measured = tuple(OpResult(op.name, op.type, op.block, "measured", None, {"nmse": 0.1}) for op in layers(ops()))
    write(tmp_path / "out.json", RunResult(RunInfo(TINY, "w8a8", "delta", "isolated", {}, Cost(1.0)), measured))
    assert main(["inspect", str(tmp_path / "out.json"), "model.language_model.layers.0.self_attn:k"]) == 4
    assert "nor other keys, values or queries: measure them, for example" in capsys.readouterr().err


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_input(
    make: Callable[[Path], list[str]], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends in one line on stderr and exit code 4, and no file changes."""
    arguments = make(tmp_path / "result.json")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["inspect", *arguments]) == 4
    found = capsys.readouterr()
    assert message in found.err
    assert (found.err.count("\n"), found.out) == (1, "")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_bad_input_imports_no_torch(tmp_path: Path) -> None:
    """A wrong name is told at once."""
    path = result(tmp_path / "r.json")
    script = "import sys; from pytest_qsens.cli import main; sys.exit(main() + 50 * ('torch' in sys.modules))"
    command = [sys.executable, "-c", script, "inspect", path, "x"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 4


def test_a_score_of_another_model_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that leaves no fingerprint may have changed: what is measured now is not what the result says."""
    found = printed(Path(result(tmp_path / "r.json")), OP, "--against", "w8a16")
    assert found["recorded"]["scores"]["nmse"] == 0.1
    assert "THAT IS NOT WHAT IS MEASURED NOW" in " ".join(capsys.readouterr().out.split())


def test_an_estimate_is_called_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the result only estimates is measured."""
    estimated = {OP: {"status": "estimated", "intervals": {"isolated": (0.01, 0.3)}}}
    found = printed(Path(result(tmp_path / "r.json", estimated)), OP, "--against", "w8a16")
    assert found["whole"]["nmse"] < 1e-6
    text = " ".join(capsys.readouterr().out.split())
    assert "says an estimated 0.1 under w8a8" in text
    assert "THAT IS NOT" not in text


def test_a_member_of_a_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An op of a result of groups is inspected all the same; its group has the only score."""
    path = Path(result(tmp_path / "r.json", granularity="fused"))
    document = json.loads(path.read_text())
    ops = {op["op"]: op for op in document["ops"]}
    pair = [f"model.language_model.layers.0.self_attn.{name}_proj" for name in ("q", "k")]
    document["ops"] = [op for name, op in ops.items() if name not in pair]
    document["ops"].append(ops[pair[0]] | {"op": "layers.0.qk", "ops": pair})
    path.write_text(json.dumps(document))
    assert printed(path, pair[1], "--against", "w8a16")["op"] == pair[1]
    assert "has only the score of the group layers.0.qk" in " ".join(capsys.readouterr().out.split())


def test_a_config_tells_the_scheme(tmp_path: Path) -> None:
    """Of a result of a config, an op is inspected under its own scheme."""
    path = Path(result(tmp_path / "r.json", {OP: {"scheme": "w8a8_dynamic"}}, config={"path": "c"}))
    found = printed(path, OP, "--against", "w8a16")
    assert found["scheme"] == "w8a8_dynamic"
    assert [part["name"] for part in found["parts"]] == ["weight", "input"]
    again = printed(path, OP, "--against", "w8a16", "--scheme", "w8a16")  # writes over its own file
    assert again["scheme"] == "w8a16"
    assert again["alternatives"] == []


def test_the_page_tells_all_options() -> None:
    """The usage on the page is complete."""
    from argparse import ArgumentParser

    from pytest_qsens.commands import inspect

    parser = ArgumentParser()
    commands = parser.add_subparsers()
    inspect.register(commands)
    options = [flag for action in commands.choices["inspect"]._actions for flag in action.option_strings]
    assert [flag for flag in options if flag not in ("-h", "--help") and f"`{flag}" not in PAGE] == []
