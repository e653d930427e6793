"""The gate of a quantization config: what is measured, compared, recorded and told is what the file says."""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qsens import QsensError
from pytest_qsens.configs.gate import ConfigRequest, assign, label_of
from pytest_qsens.options import Options
from tests.configs.ops import NET
from tests.plugin.harness import LABEL, MODEL, OPS, listing, op_id, snapshot_file, snapshot_ops, write_model

if TYPE_CHECKING:
    from pathlib import Path

RULES = {
    "head": "unquantized",
    "blocks.0.up": "w8a8_dynamic",
    "blocks.1.up": "w8a8_dynamic",
    "embed": "w8a16_asym",
    "blocks.*": "w8a8",
}
SCHEMES = {op: RULES.get(op, "w8a8") for op in OPS}


def write_config(pytester: pytest.Pytester, rules: dict[str, str], name: str = "quant.json") -> Path:
    """Write rules, op or glob → scheme."""
    path = pytester.path / name
    listed = [{"ops": ops, "scheme": scheme} for ops, scheme in rules.items()]
    path.write_text(json.dumps({"schema": 1, "rules": listed}))
    return path


def run(pytester: pytest.Pytester, *args: str) -> pytest.RunResult:
    """Run the built-in suite on the config."""
    return pytester.runpytest_inprocess("--qsens-model", MODEL, "--qsens-config", "quant.json", *args)


def result_file(pytester: pytest.Pytester) -> dict[str, Any]:
    """Read the result file."""
    content: dict[str, Any] = json.loads((pytester.path / "out.json").read_text())
    return content


def test_the_life_of_a_config(pytester: pytest.Pytester) -> None:
    """Accepted, it is the gate of what the file says; an edit that hurts fails it by name, and is recorded as one."""
    write_model(pytester)
    path = write_config(pytester, RULES)
    result = run(pytester, "--snapshot-update", "--qsens-json", "out.json")
    result.assert_outcomes(passed=len(OPS))  # without the head, with the whole model
    result.stdout.fnmatch_lines(
        [
            f"*qsens: model {LABEL}, config quant, engine delta*",
            "8 ops: 7 measured, 1 unquantized; *8 new",
            f"config: {path} (qsens): 4 w8a8, 2 w8a8_dynamic, 1 w8a16_asym, 1 unquantized",
        ]
    )
    content = result_file(pytester)
    assert content["run"]["scheme"] == "quant"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert content["run"]["config"] == {"path": str(path), "format": "qsens", "sha256": digest}
    assert {op["op"]: op["scheme"] for op in content["ops"]} == SCHEMES
    assert [op["op"] for op in content["ops"] if op["status"] != "measured"] == ["head"]
    assert [op["status"] for op in content["ops"] if op["op"] == "head"] == ["unquantized"]
    assert content["total"]["isolated"]["nmse"] > max(op["isolated"]["nmse"] for op in content["ops"][:-1])
    recorded = snapshot_file(pytester, "quant").read_bytes()
    assert {op: entry["scheme"] for op, entry in json.loads(recorded)["ops"].items()} == {
        op: scheme for op, scheme in SCHEMES.items() if op != "head"
    }

    write_config(pytester, RULES | {"blocks.0.up": "w8a8"})
    result = run(pytester, "-n", "2")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            "*worse than the snapshot of blocks.0.up in *",
            "*  scheme w8a8_dynamic → w8a8",
            "*  isolated nmse * → * (+* %, limit *",
            "the snapshot was measured with another scheme of 1 ops: blocks.0.up (w8a8_dynamic → w8a8); record with*",
        ]
    )
    failed = [line.split(" ")[1] for line in result.outlines if line.startswith("FAILED ")]
    assert set(failed) <= {op_id("blocks.0.up", "quant"), f"qsens::test_total[{LABEL}-quant]"}
    assert op_id("blocks.0.up", "quant") in failed
    assert snapshot_file(pytester, "quant").read_bytes() == recorded

    # within its threshold nothing fails, and what is recorded is of the new scheme all the same
    before = json.loads(recorded)
    run(pytester, "--snapshot-update", "--qsens-fail", "nmse:1000000%").assert_outcomes(passed=len(OPS))
    after = json.loads(snapshot_file(pytester, "quant").read_text())
    changed = {op for op in after["ops"] if after["ops"][op] != before["ops"][op]}
    assert changed == {"blocks.0.up"}
    assert after["ops"]["blocks.0.up"]["scheme"] == "w8a8"
    assert after["ops"]["blocks.0.up"]["isolated"]["nmse"] > before["ops"]["blocks.0.up"]["isolated"]["nmse"]
    assert after["total"] != before["total"]


def test_what_is_wrong_with_a_config(pytester: pytest.Pytester) -> None:
    """It ends the run, or all of it is told, and the ops that cannot be simulated are missing by name in the total."""
    write_model(pytester)
    wrong = {"nothing.*": "w8a8", "blocks.2.up": "wnf4a16", **RULES}
    write_config(pytester, wrong)
    before = listing(pytester)
    result = run(pytester, "--snapshot-update")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        [
            f"ERROR: qsens: 2 things are wrong with the config {pytester.path / 'quant.json'}:",
            "*nothing.*matches no op of the model.*",
            "*blocks.2.up is quantized as 'wnf4a16', which cannot be simulated: weights are nf4*",
            "*--qsens-config-problems warn",
        ]
    )
    assert listing(pytester) == before

    down = ("--qsens-config-down", "w8a8_static", "--qsens-mode", "both", "--qsens-json", "out.json")
    result = run(pytester, "--snapshot-update", "--qsens-config-problems", "warn", *down)
    result.assert_outcomes(passed=len(OPS), skipped=1)
    result.stdout.fnmatch_lines(
        [
            "worst ops, added (*loss*",
            "  head *",
            "total, everything quantized as the config says: *(without blocks.2.up, whose schemes cannot be simulated)",
            "CONFIG: 2 things are wrong with *",
            "*nothing.*matches no op*",
            "*blocks.2.up is quantized as 'wnf4a16'*",
            "NOT SIMULATED: the config quantizes 1 of 8 ops * without them: blocks.2.up",
        ]
    )
    content = result_file(pytester)
    ops = {op["op"]: op for op in content["ops"]}
    assert ops["blocks.2.up"]["status"] == "unquantizable"
    assert ops["head"]["scheme"] == "unquantized, added as w8a8_static"
    assert ops["head"]["fallback"] is None
    whole, head = content["total"]["isolated"]["nmse"], ops["head"]["added"]
    assert head["loss"] == pytest.approx(head["nmse"] - whole)
    others = [op for name, op in ops.items() if name not in ("head", "blocks.2.up")]
    assert [(op["fallback"]["gain"] != 0, "added" in op) for op in others] == [(True, False)] * 6
    assert snapshot_ops(pytester, "quant")["head"]["added"]["loss"] == pytest.approx(head["loss"], rel=1e-5)


def test_a_worker_with_another_config_ends_the_run(pytester: pytest.Pytester, tmp_path: Path) -> None:
    """Every worker reads its own file: one that says something else is told by name, and nothing is written."""
    write_model(pytester)
    write_config(pytester, RULES)
    far = tmp_path / "far"
    shutil.copytree(pytester.path, far)
    (far / "quant.json").write_text((far / "quant.json").read_text().replace("w8a8_dynamic", "w8a8_static"))
    before = listing(pytester)
    result = run(pytester, "--dist", "load", "--tx", f"popen//chdir={far}", "--snapshot-update")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*quant.json of {LABEL}: this process and *have not the same config (hashes *"])
    assert listing(pytester) == before


def options(pytester: pytest.Pytester, *args: str) -> Options:
    """Read the options of a run in pytester's directory."""
    return Options.from_config(pytester.parseconfig("--qsens-model", MODEL, *args))


def test_the_closer_one_of_scheme_and_config(pytester: pytest.Pytester) -> None:
    """A marker goes before the command line, that before the ini file; two in one place are one too many."""
    pytester.makeini("[pytest]\nqsens_config = sub/mixed.yaml\nqsens_config_down = w8a8")
    found = options(pytester)
    assert found.label == "mixed"
    assert found.run_spec.config == ConfigRequest(str(pytester.path / "sub/mixed.yaml"), None, True, "w8a8")
    assert found.snapshot_path("m").name == "mixed.json"
    assert (options(pytester, "--qsens-scheme", "w8a8_static").label, found.override({}).label) == (
        "w8a8_static",
        "mixed",
    )
    marked = found.override({"scheme": "w8a8_dynamic"})
    assert (marked.label, marked.run_spec.config) == ("w8a8_dynamic", None)
    assert marked.override({"config": "other.json"}).label == "other"
    both = options(pytester, "--qsens-config", "a.json", "--qsens-scheme", "w8a8_dynamic")
    assert (both.label, both.run_spec.config) == (
        "a",
        ConfigRequest(str(pytester.path / "a.json"), None, True, "w8a8", "w8a8_dynamic"),
    )
    marked = both.override({"config": "b.json"}).run_spec.config
    assert marked == ConfigRequest(str(pytester.path / "b.json"), None, True, "w8a8")
    marked = found.override({"config": "b.json", "scheme": "w8a16"}).run_spec.config
    assert marked == ConfigRequest(str(pytester.path / "b.json"), None, True, "w8a8", "w8a16")
    assert both.override({"scheme": "w8a16"}).run_spec.config is None
    pytester.makeini("[pytest]")
    with pytest.raises(QsensError, match=r"--qsens-config-format is about a config\. Give one"):
        options(pytester, "--qsens-config-format", "qsens")
    with pytest.raises(QsensError, match=r"did you mean torchao\?"):
        options(pytester, "--qsens-config", "a.json", "--qsens-config-format", "torchoa")


@pytest.mark.parametrize(
    ("content", "embedding"),
    [
        ({"nodes_to_exclude": ["/head/MatMul", "/blocks.0/up/MatMul"]}, "w8a16_asym"),
        ({"disabled_layers": ["head", "*0.up"]}, "unquantized"),  # AutoQuantize leaves embeddings as they are
    ],
)
def test_a_scheme_beside_exclusions(pytester: pytest.Pytester, content: dict[str, Any], embedding: str) -> None:
    """What is not excluded is quantized with it, as in a run of the scheme alone; without it nothing is told."""
    write_model(pytester)
    (pytester.path / "quant.json").write_text(json.dumps(content))
    result = run(pytester, "--qsens-json", "out.json")
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*--qsens-scheme beside it*"])
    run(pytester, "--qsens-scheme", "w8a8", "--snapshot-update", "--qsens-json", "out.json")
    found = result_file(pytester)
    assert found["run"]["config"]["scheme"] == "w8a8"
    excluded = {"head": "unquantized", "blocks.0.up": "unquantized", "embed": embedding}
    assert {op["op"]: op["scheme"] for op in found["ops"]} == {op: excluded.get(op, "w8a8") for op in OPS}
    pytester.runpytest_inprocess("--qsens-model", MODEL, "--qsens-scheme", "w8a8", "--qsens-json", "out.json")
    alone = {op["op"]: op["isolated"] for op in result_file(pytester)["ops"]}
    measured = {op["op"]: op["isolated"] for op in found["ops"] if op["status"] == "measured"}
    assert len(measured) == len(OPS) - [*excluded.values()].count("unquantized")
    assert measured == {op: alone[op] for op in measured}


def test_a_scheme_beside_a_config_of_schemes(pytester: pytest.Pytester) -> None:
    """One says what the other says, so it is refused; the message names both."""
    write_model(pytester)
    write_config(pytester, RULES)
    before = listing(pytester)
    result = run(pytester, "--qsens-scheme", "w8a8")
    assert result.ret == 4
    result.stderr.fnmatch_lines(
        ["*quant.json says the scheme of each op, and the scheme that is given beside it, w8a8, that of all. Leave*"]
    )
    assert listing(pytester) == before
    (pytester.path / "quant.json").write_text('{"nodes_to_exclude": []}')
    assert run(pytester, "--qsens-scheme", "kv_fp8").ret == 4


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("w8a8.yaml", "'w8a8' is a scheme"),
        ("w4a16_g128.json", "'w4a16_g128' is a scheme"),
        ("my config.json", "is no name for test ids and files"),
        ("[a].json", "is no name for test ids and files"),
        ("mine-fused.json", "the snapshot of 'mine' with another granularity"),
    ],
)
def test_names_that_a_config_cannot_have(name: str, why: str, tmp_path: Path) -> None:
    """Node ids and snapshots are called as the file is, and nothing else may be called so."""
    with pytest.raises(QsensError) as error:
        label_of(tmp_path / name, "--qsens-config")
    assert why in str(error.value)
    assert str(error.value).endswith("Rename the file")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "there is no file"),
        ("{", "malformed JSON"),
        ('{"schema": 1, "rules": [{"ops": "*", "scheme": "unquantized"}]}', "quantizes none of the 4 ops"),
        (
            '{"schema": 1, "rules": [{"ops": "*", "scheme": "wnf4a16"}]}',
            "4 of them have schemes that cannot be simulated",
        ),
        ('{"layer_sensitivity": {}}', "is a list of sensitivities"),
    ],
)
def test_files_that_cannot_be_gated(content: str | None, why: str, tmp_path: Path) -> None:
    """Nothing is measured of a file that cannot be read, or that quantizes nothing."""
    path = tmp_path / "quant.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(QsensError) as error:
        assign(ConfigRequest(str(path), strict=False), NET)
    assert why in str(error.value)


SMOOTHED = """\
import torch
from pytest_qsens import ModelSpec

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(16)
        self.up = torch.nn.Linear(16, 32)
        self.down = torch.nn.Linear(32, 16)

    def forward(self, x):
        return self.down(self.up(self.norm(x)).relu())

def spec():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net().eval()
    batch = {"x": torch.linspace(-1, 2, 64).reshape(4, 16) ** 3}
    return ModelSpec(net, [batch], [batch], lambda output, _: output)
"""

RECIPE = """\
quant_stage:
  quant_modifiers:
    SmoothQuantModifier: {smoothing_strength: 0.8, mappings: [[[up], norm]]}
    QuantizationModifier: {targets: [Linear], scheme: W8A8}
"""


def test_a_recipe_that_smooths(pytester: pytest.Pytester) -> None:
    """Layers that a mapping smooths by the modules of the model, which are no ops, are measured so."""
    pytester.makepyfile(smoothed=SMOOTHED)
    path = pytester.path / "quant.yaml"
    path.write_text(RECIPE)
    options = ("--qsens-model", "smoothed:spec", "--qsens-config", "quant.yaml")
    result = pytester.runpytest_inprocess(*options, "--snapshot-update", "--qsens-json", "out.json")
    result.assert_outcomes(passed=3)
    schemes = {op["op"]: op["scheme"] for op in result_file(pytester)["ops"]}
    assert schemes == {"up": "w8a8_dynamic_smoothquant0.8_range", "down": "w8a8_dynamic"}
    path.write_text(RECIPE.replace("norm]", "norm9]"))
    result = pytester.runpytest_inprocess(*options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*cannot be applied by llm-compressor to Net: there is up, and nothing that 'norm9'*"])
