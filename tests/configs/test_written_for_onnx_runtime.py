"""ONNX Runtime leaves out the ops that a file for it says, and quantizes all others."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from pytest_qsens.configs.write import write_config
from pytest_qsens.graph.modules import list_ops
from tests.configs.test_real_matching import tool
from tests.configs.test_write import scheme_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")  # its own, and torch's of its older exporter


class Block(nn.Module):
    """A layer, and two in containers that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8, bias=False)
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8)))

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        found: Tensor = x + self.mlp(torch.relu(self.fc(x)))
        return found


class Net(nn.Module):
    """Blocks in a container that is called and in one that is not, a convolution, and a head for one position."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.called = nn.Sequential(Block(), nn.Sequential(nn.Conv1d(4, 4, 1)))
        self.lm_head = nn.Linear(8, 16)

    def forward(self, ids: Tensor) -> Tensor:
        """Run it."""
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        found: Tensor = self.lm_head(self.called(x)[:, 0])
        return found


OPS = list_ops(Net())
IDS = torch.arange(4).reshape(1, 4)
WEIGHTS = {"MatMul": 1, "Gemm": 1, "Conv": 1, "Gather": 0}
"""Kind of node → which of its inputs is the weight."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export the model once."""
    tool("onnxruntime")
    path: Path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    torch.onnx.export(Net().eval(), (IDS,), str(path), input_names=["ids"], dynamo=False)
    return path


@pytest.mark.parametrize("part", [0, 1, 2])
def test_nodes_are_left_out(exported: Path, tmp_path: Path, part: int) -> None:
    """Each op is left out by one of three files: its weight stays in floats there, and is quantized by the others."""
    onnx, quantization = tool("onnx"), tool("onnxruntime.quantization")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]  # a class of a module
        left = [{"ids": IDS.numpy()}]  # noqa: RUF012 - for one use

        def get_next(self) -> dict[str, Any] | None:
            return self.left.pop() if self.left else None

    left_out = {op.name for op in OPS[part::3]}
    rest = {"embedding": "w8a16_tensor"}
    usual = "w8a8_tensor_act_sym" + ("_minmax", "_percentile", "_percentile99.9")[part]
    assignment = {op.name: None if op.name in left_out else scheme_of(rest.get(op.type, usual)) for op in OPS}
    arguments = json.loads(write_config(assignment, OPS, "onnxruntime"))
    for key in ("weight_type", "activation_type"):
        arguments[key] = quantization.QuantType.from_string(arguments[key])
    assert arguments["calibrate_method"] == ("MinMax", "Percentile", "Percentile")[part]
    arguments["calibrate_method"] = quantization.CalibrationMethod[arguments["calibrate_method"]]
    quantization.quantize_static(str(exported), str(tmp_path / "int8.onnx"), Reader(), **arguments)
    nodes = onnx.load(tmp_path / "int8.onnx").graph.node
    integers = {output for node in nodes if node.op_type == "DequantizeLinear" for output in node.output}
    weights = {
        node.name: node.input[WEIGHTS[node.op_type]] in integers
        for node in nodes
        if node.op_type in WEIGHTS and node.name.count("/") > 1
    }
    floats = {name for name, is_quantized in weights.items() if not is_quantized}
    assert len(floats) == len(left_out)
    assert len(weights) == len(OPS)
    assert floats <= set(arguments["nodes_to_exclude"])
    assert not (weights.keys() - floats) & set(arguments["nodes_to_exclude"])
