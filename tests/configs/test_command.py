"""The command ``qsens config``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_qsens.cli import main
from pytest_qsens.configs.names import FORMATS, WRITTEN
from pytest_qsens.result_files import write
from pytest_qsens.results import Cost, OpResult, RunInfo, RunResult
from tests.configs.ops import FILES

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = (Path(__file__).parents[2] / "docs" / "configs.md").read_text()
RULES = """\
schema: 1
rules:
  - {ops: "*.output.dense", scheme: unquantized}
  - {ops: "encoder.layer.0.*", scheme: wnf4a16_g64}
  - {ops: "encoder.layer.9.*", scheme: w8a8_dynamic}
  - {ops: "*", scheme: w8a8}
"""


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a file of ours into the working directory."""
    monkeypatch.chdir(tmp_path)
    path = Path("rules.yaml")
    path.write_text(RULES)
    return path


def result(path: Path, *ops: OpResult, granularity: str = "op") -> str:
    """Write a result file."""
    info = RunInfo("mine", "w8a8", "replay", "isolated", {}, Cost(1.0), granularity=granularity)
    write(path, RunResult(info, ops))
    return str(path)


OPS = (
    OpResult("encoder.layer.0.fc", "linear", "", "measured", None, {"nmse": 0.1}),
    OpResult("encoder.layer.0.output.dense", "linear", "", "unexercised"),
    OpResult("embed", "embedding", "", "unrun"),
    OpResult("encoder.layer.0:qk", "qk", "", "unquantizable", "two activations"),
)


def write_cached(path: Path) -> str:
    """Write a config of keys and values, too."""
    config = path / "cached.yaml"
    config.write_text("schema: 1\nrules: [{ops: '*', scheme: kv_fp8}, {ops: '*', scheme: w8a8}]")
    return str(config)


TO_OURS = ["--to", "qsens", "--out", "new.yaml"]


def ops_from(path: Path) -> list[str]:
    """Write a result, and name it."""
    return ["--ops-from", result(path / "r.json", *OPS)]


def test_ops_of_a_result(rules: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Op by op the scheme, what it is simulated as and the rule that decided; then everything that is wrong."""
    assert main(["config", str(rules), "--ops-from", result(Path("r.json"), *OPS)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert (
        printed.out
        == """\
rules.yaml: rules of pytest-qsens (--format qsens)
3 ops: 1 wnf4a16_g64, 1 unquantized, 1 w8a16_asym

op                            type       scheme       simulated as  rule
encoder.layer.0.fc            linear     wnf4a16_g64  cannot be     rule 2: encoder.layer.0.*
encoder.layer.0.output.dense  linear     unquantized  -             rule 1: *.output.dense
embed                         embedding  w8a16_asym   w8a8          rule 4: *

2 problems; with --strict they are errors:
  rules.yaml, 'rules', entry 3, 'ops': 'rule 3: encoder.layer.9.*' matches no op of the model. \
Correct it, or take it out.
  rules.yaml, 'rules', entry 2, 'ops': encoder.layer.0.fc is quantized as 'wnf4a16_g64', which cannot be simulated: \
weights are nf4 (simulated: int2 to int8, fp8_e4m3, mxfp8, mxfp4, nvfp4)
"""
    )


def test_strict_makes_errors_of_problems(rules: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With ``--strict`` the same is exit code 4, each problem on a line, and without problems it changes nothing."""
    arguments = ["--ops-from", result(Path("r.json"), *OPS)]
    assert main(["config", str(rules), "--strict", *arguments]) == 4
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("qsens: 2 problems (--strict):\n  rules.yaml, 'rules', entry 3")
    rules.write_text("schema: 1\nrules: [{ops: '*', scheme: w8a8}]")
    assert main(["config", str(rules), "--strict", *arguments]) == 0
    assert capsys.readouterr().out.endswith("\n\nno problems\n")


def test_ops_of_a_model(rules: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model's ops come from its module tree."""
    assert main(["config", str(rules), "--model", "tiny_qwen2_5_vl"]) == 0
    printed = capsys.readouterr().out
    assert "\nmodel.visual.blocks.0.attn.qkv " in printed
    assert "no op of the model" in printed


def test_a_config_is_converted(rules: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file in another format says of every op what the first one says; reading it back into ours gives our text."""
    rules.write_text(
        "schema: 1\nrules: [{ops: '*output*', scheme: unquantized}, {ops: '*fc', scheme: w4a16_g128}, "
        "{ops: '*', scheme: w8a16_asym}]"
    )
    ops = ops_from(tmp_path)
    assert main(["config", "rules.yaml", *TO_OURS, *ops]) == 0
    assert capsys.readouterr().out.endswith("\n\nwrote new.yaml: qsens\n")
    expected = Path("new.yaml").read_text()
    assert expected == (
        "schema: 1\nrules:\n- ops: encoder.layer.0.output.dense\n  scheme: unquantized\n"
        "- ops: embed\n  scheme: w8a16_asym\n- ops: '*'\n  scheme: w4a16_g128\n"
    )
    for target in ("torchao", "compressed-tensors"):
        there, back = Path(f"{target}.json"), f"{target}_back.yaml"
        assert main(["config", "new.yaml", "--to", target, "--out", str(there), *ops]) == 0
        assert main(["config", str(there), "--to", "qsens", "--out", back, *ops]) == 0
        assert Path(back).read_text() == expected


def test_exclusions_alone_say_so(rules: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is written without schemes is told."""
    rules.write_text("schema: 1\nrules: [{ops: '*fc', scheme: w8a8}]")
    arguments = ["--to", "modelopt-disabled-layers", "--out", "new.yaml", *ops_from(tmp_path)]
    assert main(["config", str(rules), *arguments]) == 0
    assert "nothing of how the others are" in capsys.readouterr().out.splitlines()[-1]
    assert Path("new.yaml").read_text() == "disabled_layers:\n- encoder.layer.0.output.dense\n- embed\n"


def test_without_a_model_rules_are_listed(rules: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each rule once, in the order in which they hold, with its place in the file."""
    assert main(["config", str(rules)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["rule", "scheme", "place"]
    assert [line.split("  ")[0] for line in lines[3:6]] == [
        "rule 1: *.output.dense",
        "rule 2: encoder.layer.0.*",
        "rule 3: encoder.layer.9.*",
    ]
    assert lines[3].endswith("'rules', entry 1, 'ops'")


def test_an_exact_name_without_its_prefix_is_recognized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names that begin at a submodule match nothing, and the name that is probably meant is given."""
    names = [f"model.language_model.layers.{layer}.{part}" for layer in range(2) for part in ("a", "b")]
    ops = [OpResult(name, "linear", "", "unrun") for name in names]
    layers = {name.removeprefix("model."): {"quant_algo": "FP8"} for name in names}
    path = tmp_path / "hf_quant_config.json"
    path.write_text(json.dumps({"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}}))
    assert main(["config", str(path), "--ops-from", result(tmp_path / "r.json", *ops)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("matches no op of the model. Is 'model.language_model.layers.") == 4


def test_contradictions_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two rules that a tool does not order are named with the ops that both match."""
    w8, w4 = ({"weights": {"num_bits": bits, "strategy": "channel"}} for bits in (8, 4))
    groups = {"b": {"targets": ["re:.*fc"], **w8}, "a": {"targets": ["re:encoder.*"], **w4}}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config_groups": groups}))
    assert main(["config", str(path), "--ops-from", result(tmp_path / "r.json", *OPS)]) == 0
    printed = capsys.readouterr().out
    assert (
        "encoder.layer.0.fc is matched by 'b: re:.*fc' (w8a16), which holds here, and by 'a: re:encoder.*' (w4a16): "
        "the tool does not say which of them holds" in printed
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda path: [str(path / "none.yaml")], "there is no file"),
        (lambda path: [str(path)], "is a directory"),
        (lambda _: ["rules.yaml", "--format", "modelopt"], "there is neither 'quantization' nor 'quant_cfg'"),
        (lambda _: ["rules.yaml", "--format", "torchao"], "'_type': a string is needed"),
        (lambda _: ["rules.yaml", "--format", "compressed-tensors"], "there are no 'config_groups' in it"),
        (lambda _: ["rules.yaml", "--format", "llm-compressor"], "no modifier in it quantizes"),
        (lambda _: ["rules.yaml", "--format", "neural-compressor"], "is no name of an op"),
        (lambda _: ["rules.yaml", "--format", "onnxruntime"], "there is no 'nodes_to_exclude' in it"),
        (lambda _: [str(FILES / "onnxruntime_nodes.txt"), "--format", "qsens"], "an object is needed"),
        (lambda _: ["rules.yaml", "--model", "minilmm"], "did you mean minilm"),
        (lambda _: ["rules.yaml", "--model", "minilm", "--ops-from", "r.json"], "--model or --ops-from, not both"),
        (lambda _: ["rules.yaml", "--checkpoint", "x"], "--checkpoint goes with --model"),
        (lambda _: ["rules.yaml", "--ops-from", "none.json"], "there is no result file"),
        (
            lambda path: ["rules.yaml", "--ops-from", result(path / "r.json", OPS[3])],
            "there is no op with a weight in it",
        ),
        (
            lambda path: ["rules.yaml", "--ops-from", result(path / "r.json", *OPS, granularity="block")],
            "it is of groups of ops (granularity 'block')",
        ),
        (lambda _: ["rules.yaml", "--to", "qsens", "--model", "minilm"], "--to and --out go together"),
        (lambda _: ["rules.yaml", "--out", "new.yaml", "--model", "minilm"], "--to and --out go together"),
        (lambda _: ["rules.yaml", *TO_OURS], "--to needs the ops of a model"),
        (lambda path: ["rules.yaml", *TO_OURS[:3], "rules.yaml", *ops_from(path)], "rules.yaml exists and is left"),
        (lambda path: ["rules.yaml", *TO_OURS[:3], "new.txt", *ops_from(path)], "ends in .json, .yaml, .yml, .toml"),
        (lambda path: ["rules.yaml", *TO_OURS[:3], "none/new.json", *ops_from(path)], "there is no directory none"),
        (
            lambda path: ["rules.yaml", "--to", "onnxruntime", "--out", "new.json", *ops_from(path)],
            "encoder.layer.0.fc (linear): onnxruntime cannot say 'w",
        ),
        (
            lambda path: [write_cached(path), *TO_OURS, *ops_from(path)],
            "'rule 1: *' quantizes keys and values of attention as kv_fp8, and ",
        ),
        (
            lambda path: [str(FILES / "onnxruntime_nodes.txt"), *TO_OURS, *ops_from(path)],
            "encoder.layer.0.fc is 'not told', which is written nowhere: the file says what is not quantized",
        ),
    ],
)
@pytest.mark.usefixtures("rules")
def test_bad_input_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: Callable[[Path], list[str]], message: str
) -> None:
    """What cannot be used is exit code 4 and one line, with nothing printed to standard output."""
    assert main(["config", *arguments(tmp_path)]) == 4
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert [*Path().glob("new*")] == []


def test_reading_a_config_needs_no_torch(rules: Path) -> None:
    """A config, and the ops of a result, are read without torch."""
    path = result(Path("r.json"), *OPS)
    code = (
        "import sys; from pytest_qsens.cli import main; "
        f"assert main(['config', {str(rules)!r}, '--ops-from', {path!r}]) == 0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_page_lists_every_format() -> None:
    """Each format and each target has its line, and the options of the command are there."""
    assert [name for name in (*FORMATS, *WRITTEN) if f"`{name}`" not in PAGE] == []
    usage = "qsens config FILE [--model MODEL] [--checkpoint DIR] [--ops-from RESULT.json] [--format FORMAT] [--strict]"
    assert f"{usage}\n        [--to TARGET --out FILE]" in PAGE
