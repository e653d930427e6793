"""The command ``qsens proxies``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qsens.cli import main
from pytest_qsens.models.resolve import resolve
from pytest_qsens.models.source import ModelRequest
from pytest_qsens.proxies.functions import PROXIES
from pytest_qsens.result_files import load, write
from pytest_qsens.results import Cost, OpResult, RunInfo, RunResult

if TYPE_CHECKING:
    from collections.abc import Callable

TINY = "tiny_qwen2_5_vl"
PAGE = (Path(__file__).parents[2] / "docs" / "proxies.md").read_text()
OPS = ("model.visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.proj", "model.language_model.layers.0.mlp.up_proj")


def measured(name: str, nmse: float) -> OpResult:
    """Make an exact score."""
    return OpResult(name, "linear", "", "measured", None, {"nmse": nmse})


def write_result(path: Path, *ops: OpResult, **facts: Any) -> str:  # noqa: ANN401 - fields of `RunInfo`
    """Write a result of the tiny model."""
    run = replace(RunInfo(TINY, "w8a8", "replay", "isolated", {}, Cost(1.0, 0.01, 0.5)), **facts)
    write(path, RunResult(run, ops))
    return str(path)


def scored() -> tuple[OpResult, ...]:
    """Give scores of a few ops."""
    return tuple(measured(name, 0.1 * index) for index, name in enumerate(OPS))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: [write_result(path, *scored()), "--model", "minilm"], "is a result of model 'tiny_qwen2_5_vl'"),
        (lambda path: [write_result(path, *scored()), "--scheme", "w8a8_static"], "is a result of scheme 'w8a8', not"),
        (lambda path: [write_result(path, *scored(), data="0")], r"was measured with other data \(hash 0, not"),
        (lambda path: [write_result(path, OpResult(OPS[0], "linear", "", "unrun", "-k"))], r"no exact score in it \("),
        (
            lambda path: [
                write_result(path, replace(measured(OPS[0], 1), isolated=None, fallback={"nmse": 1}), mode="fallback")
            ],
            r"no exact score in it \(measured, mode fallback\)",
        ),
        (
            lambda path: [write_result(path, *(replace(op, status="estimated") for op in scored()))],
            r"no exact score in it \(estimated\)",
        ),
        (lambda path: [write_result(path, *scored(), measured("x.y", 1))], r"1 of its 4 measured ops .* \(x\.y\)"),
        (
            lambda path: [write_result(path, *scored()[1:], replace(scored()[0], type="conv2d"))],
            "or of another type there",
        ),
        (lambda path: [write_result(path, *scored()[:2])], "2 exact scores, and 3 are needed"),
        (
            lambda path: [write_result(path, *(measured(name, 0.5) for name in OPS))],
            r"all 3 exact scores are the same \(0\.5\)",
        ),
        (lambda path: [write_result(path, model="mine")], "is a result of 'mine', which is no preset"),
        (lambda path: [str(path / "none.json")], "there is no result file"),
        (lambda _: [], "give a model with --model"),
        (lambda _: ["--model", "minilmm"], r"did you mean minilm"),
        (lambda _: ["--model", TINY, "--scheme", "w4"], r"no scheme 'w4'"),
        (
            lambda _: ["--model", TINY, "--only", "hesian_trace"],
            r"no proxy 'hesian_trace' \(did you mean",
        ),
        (lambda path: ["--model", TINY, "--json", str(path / "no" / "out.json")], "there is no directory"),
        (
            lambda path: [write_result(path, *scored()), "--json", str(path)],
            "would overwrite the result that the exact scores come from",
        ),
        (
            lambda path: ["--model", TINY, "--json", write_result(path, *scored())],
            "was not written by `qsens proxies`",
        ),
    ],
)
def test_bad_input(
    make: Callable[[Path], list[str]], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What does not fit is told in one line, before a model is loaded."""
    target = tmp_path / "result.json" if "none" not in message and "directory" not in message else tmp_path
    before = None
    arguments = make(target)
    if target.is_file():
        before = target.read_bytes()
    assert main(["proxies", *arguments]) == 4
    found = capsys.readouterr()
    assert re.search(message, found.err)
    assert found.err.count("\n") == 1
    assert found.out == ""
    assert before is None or target.read_bytes() == before


def test_bad_input_imports_no_torch(tmp_path: Path) -> None:
    """A wrong name is told at once."""
    script = "import sys; from pytest_qsens.cli import main; sys.exit(main() + 50 * ('torch' in sys.modules))"
    command = [sys.executable, "-c", script, "proxies", "--model", TINY, "--only", "x"]
    assert subprocess.run(command, capture_output=True, check=False, cwd=tmp_path).returncode == 4


NET = """
import torch
from pytest_qsens import ModelSpec

def model():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 8, bias=False) for _ in range(4)]
    with torch.no_grad():
        for step, layer in enumerate(layers):
            layer.weight[:, 0] *= 4.0**step
    return torch.nn.Sequential(*layers)

def spec():
    batches = [{"input": torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))} for seed in (1, 2)]
    return ModelSpec(model, batches[:1], batches[1:], output=lambda out, batch: out)
"""


def test_scores_are_measured_where_none_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a result file the exact scores are measured first; every proxy gets a row; the file has all values."""
    (tmp_path / "a_net_for_proxies.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    assert main(["proxies", "--model", "a_net_for_proxies:spec", "--json", "out.json"]) == 0
    text = capsys.readouterr().out
    assert "exact: isolated nmse, measured by engine delta" in text
    assert {line.split()[0] for line in text.split("\n\n")[1].splitlines()[1:-2]} == set(PROXIES)
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found["exact"]["values"]) == {"0", "1", "2", "3"}
    assert all(set(proxy["values"]) == {"0", "1", "2", "3"} for proxy in found["proxies"])
    correlations = [proxy["spearman"] for proxy in found["proxies"]]
    assert correlations == sorted(correlations, reverse=True)
    assert main(["proxies", "--model", "a_net_for_proxies:spec", "--only", "weight_mse", "--json", "out.json"]) == 0
    (only,) = json.loads((tmp_path / "out.json").read_text())["proxies"]
    assert only["proxy"] == "weight_mse"
    assert only["forwards"] > 0


def tables() -> dict[str, list[list[str]]]:
    """Rows of the page's tables by model."""
    blocks = re.findall(r"model (\w+), scheme w8a8: proxies.*?\n\n(.*?)\n\n", PAGE, re.DOTALL)
    return {
        model: [re.split(r"\s{2,}", line.strip()) for line in block.splitlines()[1:] if line.strip()]
        for model, block in blocks
    }


def test_the_page_lists_every_proxy() -> None:
    """Each has a line with its source, and a row in the tables of both models."""
    for name in PROXIES:
        assert f"| `{name}` |" in PAGE
    assert {model: {row[0] for row in rows} for model, rows in tables().items()} == {
        "minilm": {*PROXIES, "exact scores"},
        TINY: {*PROXIES, "exact scores"},
    }


def test_the_page_shows_what_the_command_prints(tmp_path: Path) -> None:
    """Measured anew, the correlations of the tiny model are those of the page, but for what machines differ by."""
    out = tmp_path / "out.json"
    assert main(["proxies", "--model", TINY, "--json", str(out)]) == 0
    found = {proxy["proxy"]: proxy["spearman"] for proxy in json.loads(out.read_text())["proxies"]}
    printed = {row[0]: float(row[2]) for row in tables()[TINY] if row[0] in PROXIES}
    assert printed == pytest.approx(found, abs=0.05)


def test_a_result_of_the_plugin_fits(pytester: pytest.Pytester) -> None:
    """What a run writes is taken, with its data and without naming the model again; the two ways agree."""
    result = pytester.runpytest_subprocess("--qsens-model", TINY, "--qsens-json", "qsens.json", "--snapshot-update")
    assert result.ret == 0
    assert main(["proxies", str(pytester.path / "qsens.json"), "--only", "weight_mse"]) == 0
    run = load(pytester.path / "qsens.json").run
    assert run.data == resolve(ModelRequest(TINY)).data_fingerprint()
