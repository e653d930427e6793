"""Writes the names of nodes that torch.onnx 2.13 gives to a Llama's products: ``python make_onnx_runtime.py``.

Needs onnx==1.23.2 and onnxruntime==1.32.0, which quantizes the model with two of its nodes left out.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

HERE = Path(__file__).parent


class Block(torch.nn.Module):
    """Two layers without a bias, one with."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = torch.nn.Linear(8, 8, bias=False)
        self.fc2 = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run it."""
        return x + self.fc2(torch.relu(self.fc1(x)))


class Net(torch.nn.Module):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(16, 8)
        self.layers = torch.nn.ModuleList([Block(), Block()])
        self.lm_head = torch.nn.Linear(8, 16, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Run it."""
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


class Reader(CalibrationDataReader):
    """One batch."""

    def __init__(self) -> None:
        self.left = [{"ids": torch.arange(4).reshape(1, 4).numpy()}]

    def get_next(self) -> dict | None:
        """Give it once."""
        return self.left.pop() if self.left else None


def main() -> None:
    """Export, quantize, and write what was left out."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        path, quantized = Path(directory) / "net.onnx", Path(directory) / "int8.onnx"
        torch.onnx.export(Net(), (torch.arange(4).reshape(1, 4),), str(path), input_names=["ids"], dynamo=False)
        nodes = [node.name for node in onnx.load(path).graph.node if node.op_type in ("MatMul", "Gemm")]
        left_out = [name for name in nodes if "lm_head" in name or "layers.1/fc2" in name]
        quantize_static(
            path, quantized, Reader(), nodes_to_exclude=left_out, per_channel=True, weight_type=QuantType.QInt8
        )
        graph = onnx.load(quantized).graph
        scaled = {out for node in graph.node if node.op_type == "DequantizeLinear" for out in node.output}
        found = [node.name for node in graph.node if node.name in nodes and node.input[1] not in scaled]
        if found != left_out:
            raise SystemExit(f"ONNX Runtime left {found} in float")
    (HERE / "onnxruntime_nodes.txt").write_text("\n".join(left_out) + "\n")
    arguments = {"nodes_to_exclude": left_out, "per_channel": True, "weight_type": "QInt8"}
    (HERE / "onnxruntime_static.json").write_text(json.dumps(arguments, indent=1) + "\n")


if __name__ == "__main__":
    main()
