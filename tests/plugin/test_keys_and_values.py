"""Keys and values on the command line: their own tests, snapshots and gates, and none where nothing is said of them."""

from __future__ import annotations

import json
import re
from importlib import import_module

import pytest
import torch
import transformers.models.llama.modeling_llama  # noqa: F401 - likewise
import vl_convert  # noqa: F401 - before a run in this process, which forgets what it imports: it cannot be twice

import pytest_qsens.report.directory.page  # noqa: F401 - keeps its library from run to run
from pytest_qsens.cli import main
from pytest_qsens.ops import CACHED as CACHED_TYPES
from pytest_qsens.result_files import load
from tests.plugin.harness import MODEL as WITHOUT
from tests.plugin.harness import write_model

MODEL = "attending:spec"
LAYERS = ("blocks.0.qkv", "blocks.0.out", "blocks.1.qkv", "blocks.1.out")
CACHED = tuple(f"blocks.{i}:{kind}" for i in range(2) for kind in "kv")
_SOURCE = """
import torch
from torch import nn
from torch.nn import functional

from pytest_qsens import ModelSpec


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def spec():
    torch.manual_seed(0)
    net = Net().eval()
    batches = [{"x": torch.randn(2, 5, 16)} for _ in range(2)]
    return ModelSpec(net, batches[:1], batches[1:], lambda out, _: out, logits=False)
"""


def run(pytester: pytest.Pytester, *args: str) -> pytest.RunResult:
    """Run the built-in suite on a model that attends by itself."""
    (pytester.path / "attending.py").write_text(_SOURCE)
    pytester.syspathinsert()
    return pytester.runpytest_inprocess("--qsens-model", MODEL, *args)


def measured(pytester: pytest.Pytester) -> dict[str, float]:
    """Op → NMSE in the result file, of those that have one, and of the total."""
    content = json.loads((pytester.path / "out.json").read_text())
    entries = [*content["ops"], content["total"]]
    return {entry["op"]: entry["isolated"]["nmse"] for entry in entries if entry["isolated"]}


def test_a_scheme_of_a_cache_has_their_tests(pytester: pytest.Pytester) -> None:
    """There is one for each key and value; accepted, they are gated as layers are."""
    result = run(pytester, "--qsens-scheme", "kv_int4_dynamic_g4", "--snapshot-update", "--qsens-json", "out.json")
    result.assert_outcomes(passed=len(CACHED) + 1)
    assert set(measured(pytester)) == {*CACHED, "total"}
    assert all(nmse > 0 for nmse in measured(pytester).values())
    again = run(pytester, "--qsens-scheme", "kv_int4_dynamic_g4", "--qsens-ops", "*:v", "-n", "2")
    again.assert_outcomes(passed=2)
    snapshot = next(pytester.path.rglob("kv_int4_dynamic_g4.json"))
    content = snapshot.read_text()
    snapshot.write_text(
        content.replace(f'"nmse": {json.loads(content)["ops"]["blocks.0:v"]["isolated"]["nmse"]}', '"nmse": 1e-9')
    )
    worse = run(pytester, "--qsens-scheme", "kv_int4_dynamic_g4")
    worse.assert_outcomes(passed=len(CACHED), failed=1)
    worse.stdout.fnmatch_lines(["*FAILED*blocks.0:v*"])


def test_other_schemes_have_the_tests_that_they_had(pytester: pytest.Pytester) -> None:
    """A scheme of layers knows nothing of them."""
    result = run(pytester, "--qsens-scheme", "w8a8", "--qsens-json", "out.json", "--snapshot-update")
    result.assert_outcomes(passed=len(LAYERS) + 1)
    assert set(measured(pytester)) == {*LAYERS, "total"}


def test_a_config_has_both(pytester: pytest.Pytester) -> None:
    """Each op has its own scheme; what is said of caches alone has no other tests."""
    rules = [{"ops": "*", "scheme": "attn_fp8"}, {"ops": "blocks.1.*", "scheme": "w8a8_dynamic"}]
    (pytester.path / "quant.json").write_text(json.dumps({"schema": 1, "rules": rules}))
    arguments = ("--qsens-config", "quant.json", "--qsens-mode", "both", "--qsens-json", "out.json")
    result = run(pytester, *arguments, "--snapshot-update")
    queries = ("blocks.0:q", "blocks.1:q")
    assert set(measured(pytester)) == {*CACHED, *queries, *LAYERS[2:], "total"}
    result.assert_outcomes(passed=len(CACHED) + len(queries) + 2 + 1)
    content = json.loads((pytester.path / "out.json").read_text())
    schemes = {entry["op"]: entry["scheme"] for entry in content["ops"] if entry["isolated"]}
    assert {schemes[op] for op in CACHED} == {"kv_fp8"}
    assert {schemes[op] for op in queries} == {"attn_fp8"}


def test_factors_of_one_product_are_measured_as_one(pytester: pytest.Pytester) -> None:
    """A pattern of names groups queries and keys."""
    arguments = ("--qsens-scheme", "attn_fp8", "--qsens-granularity", "fused", "-o", "qsens_fused=*:{q,k}")
    result = run(pytester, *arguments, "--snapshot-update", "--qsens-json", "out.json")
    assert set(measured(pytester)) == {"blocks.0:q+k", "blocks.0:v", "blocks.1:q+k", "blocks.1:v", "total"}
    result.assert_outcomes(passed=5)


def test_models_without_any_are_refused(pytester: pytest.Pytester) -> None:
    """The message says what was looked for."""
    write_model(pytester)
    result = pytester.runpytest_inprocess("--qsens-model", WITHOUT, "--qsens-scheme", "kv_fp8")
    assert result.ret == 4
    result.stderr.fnmatch_lines(
        ["*scheme 'kv_fp8' quantizes keys and values of attention, and net.spec has no module*"]
    )
    assert not list(pytester.path.rglob("kv_fp8.json"))


def test_a_report_shows_their_channels(pytester: pytest.Pytester) -> None:
    """Largest magnitudes by channel, head after head, are those that attention is given; there is no weight."""
    run(pytester, "--qsens-scheme", "attn_int8", "--qsens-report", "out")
    content = load(pytester.path / "out" / "report.json")
    assert content.details is not None
    assert content.details.notes == ()
    ranges = {one.op: one for one in content.details.ranges}
    assert set(ranges) == {*CACHED, "blocks.0:q", "blocks.1:q"}
    assert {(one.weight, one.head_dim) for one in ranges.values()} == {(None, 8)}
    spec = import_module("attending").spec()
    with torch.no_grad():
        x = spec.evaluation[0]["x"]
        states = dict(zip("qkv", spec.model.blocks[0].qkv(x).chunk(3, -1), strict=True))
    for kind, state in states.items():  # heads are parts of the channels that follow each other
        found = ranges[f"blocks.0:{kind}"].inputs
        assert found is not None
        assert found.largest == pytest.approx(state.abs().amax((0, 1)).tolist(), rel=1e-3)
    text = (pytester.path / "out" / "report.md").read_text()
    assert re.search(r"`qsens plan \S*report.json --keep 10% --out plan.yaml`", text)
    page = (pytester.path / "out" / "report.html").read_text()
    assert "channel, head after head" in page
    assert main(["plan", "out/report.json", "--keep", "10%", "--out", "plan.yaml"]) == 0


def test_from_scores_to_a_plan_and_its_gate(pytester: pytest.Pytester, capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes are those of two heads of 16; what --verify measures is what a run does, and near its prediction."""
    (pytester.path / "llama.py").write_text(
        "from tests.architectures import ARCHITECTURES\n\n\ndef spec():\n    return ARCHITECTURES['llama'].spec()\n"
    )
    pytester.syspathinsert()
    model, files = ("--qsens-model", "llama:spec"), []
    for scheme in ("kv_int8_dynamic", "kv_int4_dynamic_g8_asym"):
        files.append(f"{scheme}.json")
        arguments = ("--qsens-scheme", scheme, "--qsens-interactions", "--qsens-json", files[-1])
        assert pytester.runpytest_inprocess(*model, *arguments, "--snapshot-update").ret == 0
        listed = [op for op in load(pytester.path / files[-1]).ops if op.type in CACHED_TYPES]
        assert [(op.kv_values, op.kv_heads) for op in listed] == [(32, 2)] * 4
    capsys.readouterr()
    aims = ["--budget-bits", "8", "--verify", "--model", "llama:spec"]
    assert main(["plan", *files, *aims, "--out", "plan.json"]) == 0
    told = capsys.readouterr().out
    # of four, two have 8 bits and a scale for 16 values, the others 4, and a scale and a zero point for 8
    assert f"bits a cached value: {(8 + 16 / 16 + 4 + 20 / 8) / 2:g}; a token takes 124 bytes, unquantized 256" in told
    predicted = float(told.partition("predicted nmse: ")[2].partition("predicted nmse: ")[2].split()[0])
    verified = float(told.partition("measured nmse: ")[2].split()[0])
    assert verified == pytest.approx(predicted, rel=0.1)
    pytester.runpytest_inprocess(*model, "--qsens-config", "plan.json", "--qsens-json", "out.json", "--snapshot-update")
    assert measured(pytester)["total"] == pytest.approx(verified, rel=1e-3)


def test_inspecting_them(pytester: pytest.Pytester, capsys: pytest.CaptureFixture[str]) -> None:
    """From the result of a run, with as many words as for a layer; proxies of weights are refused."""
    run(pytester, "--qsens-scheme", "kv_int8", "--qsens-json", "out.json", "--snapshot-update")
    assert main(["inspect", "out.json", "blocks.1:v", "--model", MODEL, "--json", "found.json"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "values of attention; 2x2x5x8 (batch x heads x tokens x channels); op 4 of 4" in told
    assert "scheme kv_int8: values int8 per tensor, static; 8 bits a cached value" in told
    found = json.loads((pytester.path / "found.json").read_text())["inspection"]
    assert found["whole"]["nmse"] == pytest.approx(measured(pytester)["blocks.1:v"], rel=1e-3)
    assert main(["proxies", "out.json", "--model", MODEL]) == 4
    assert "quantizes keys and values of attention, and proxies are of layers" in capsys.readouterr().err
