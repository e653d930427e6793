"""The whole way: measure, plan, write for another tool, let that tool do it, and gate."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from pytest_qsens.cli import main
from pytest_qsens.graph.narrow import make_wide
from pytest_qsens.models.resolve import resolve
from pytest_qsens.models.source import ModelRequest
from pytest_qsens.result_files import load
from tests.installed import required

if TYPE_CHECKING:
    from pytest_qsens.models.spec import ModelSpec

core = required("torchao.core.config")
quantization = required("torchao.quantization")

pytestmark = pytest.mark.filterwarnings("ignore")  # torchao's own


def applied(spec: ModelSpec, config: str) -> float:
    """Let torchao quantize the real model, and return the NMSE of its outputs on the evaluation data."""
    net = (spec.model if isinstance(spec.model, torch.nn.Module) else spec.model()).eval()
    make_wide(net)
    quantized = deepcopy(net)
    quantization.quantize_(quantized, core.config_from_dict(json.loads(config)), filter_fn=None)
    error = size = 0.0
    with torch.no_grad():
        for batch in spec.evaluation:
            reference, found = (spec.output(each(**batch), batch).double() for each in (net, quantized))
            error += float((found - reference).square().sum())
            size += float(reference.square().sum())
    return error / size


@pytest.mark.parametrize(
    ("model", "chosen", "keep"),
    [("tiny_qwen2_5_vl", (), "60%"), ("minilm", ("--qsens-ops", "encoder.layer.0.*"), "90%")],
)
def test_from_scores_to_a_gated_config(
    pytester: pytest.Pytester, model: str, chosen: tuple[str, ...], keep: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error that was verified is that of the model which torchao makes, and that which is gated."""
    spec = resolve(ModelRequest(model, root=str(Path.cwd()))).load()  # first: what a run imports is forgotten
    run = ("--qsens-model", model, "--snapshot-update", "-q")
    scores = (*run, "--qsens-scheme", "w8a8_dynamic", "--qsens-json", "scores.json", *chosen)
    assert pytester.runpytest_inprocess(*scores).ret == 0
    capsys.readouterr()

    plan = ["plan", "scores.json", "--keep", keep]
    assert main([*plan, "--verify", "--out", "plan.yaml"]) == 0
    told = re.findall(r"^measured nmse: (\S+) \(prediction", capsys.readouterr().out, re.MULTILINE)
    verified = float(told[0])
    assert main([*plan, "--to", "torchao", "--out", "torchao.json"]) == 0
    assert applied(spec, Path("torchao.json").read_text()) == pytest.approx(verified, rel=0.1)

    gate = ("--qsens-model", model, "--qsens-config", "torchao.json", "--qsens-ops", "total", "-q")
    assert pytester.runpytest_inprocess(*gate, "--snapshot-update", "--qsens-json", "gated.json").ret == 0
    total = load(pytester.path / "gated.json").total
    assert total is not None
    assert total.isolated is not None
    assert total.isolated["nmse"] == pytest.approx(verified, rel=1e-3)
    assert pytester.runpytest_inprocess(*gate).ret == 0
    assert main(["plan", "scores.json", "--spectrum", "100", "--to", "torchao", "--out", "more.json"]) == 0
    Path("torchao.json").write_bytes(Path("more-100.json").read_bytes())
    worse = pytester.runpytest_inprocess(*gate)
    assert worse.ret == pytest.ExitCode.TESTS_FAILED
    worse.stdout.fnmatch_lines(["E *worse than the snapshot of total in *torchao.json"])
