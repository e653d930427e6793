"""Writes the files of Intel Neural Compressor in this directory, by neural-compressor 3.7.1 itself.

Needs neural-compressor==3.7.1, numpy<2, setuptools<81 and six: ``python make_neural_compressor.py``.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch
import yaml
from neural_compressor import PostTrainingQuantConfig, quantization
from neural_compressor.torch.quantization import RTNConfig, convert, prepare

HERE = Path(__file__).parent


class Net(torch.nn.Module):
    """An embedding, a block of two layers, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(16, 32)
        self.fc1 = torch.nn.Linear(32, 64)
        self.fc2 = torch.nn.Linear(64, 32)
        self.lm_head = torch.nn.Linear(32, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Run it."""
        return self.lm_head(self.fc2(torch.relu(self.fc1(self.embed(ids)))))


def strategy_files() -> None:
    """Tuned by ``quantization.fit``: the strategy's chosen configuration, as YAML (2.x) and as JSON."""
    loader = torch.utils.data.DataLoader([(torch.randint(16, (8,)), 0) for _ in range(2)])
    given = {
        "approach": "static",
        "op_type_dict": {"Linear": {"weight": {"dtype": ["int8"]}, "activation": {"dtype": ["uint8"]}}},
        "op_name_dict": {"fc2": {"activation": {"dtype": ["fp32"]}, "weight": {"dtype": ["fp32"]}}},
    }
    (HERE / "neural_compressor_ptq.json").write_text(json.dumps(given, indent=2) + "\n")
    model = quantization.fit(Net().eval(), PostTrainingQuantConfig(**given), calib_dataloader=loader)
    chosen = dict(model.q_config)
    (HERE / "neural_compressor_best_configure.yaml").write_text(yaml.dump(chosen))
    ops = {str(key): value for key, value in chosen["op"].items()}
    (HERE / "neural_compressor_best_configure.json").write_text(
        json.dumps({**chosen, "op": ops}, indent=1, default=str) + "\n"
    )


def weight_only_files() -> None:
    """``save`` of 3.x: qconfig.json."""
    config = RTNConfig(bits=4, group_size=32, use_sym=False)
    config.set_local("fc2", RTNConfig(dtype="fp32"))
    config.set_local("fc1", RTNConfig(dtype="int8", group_size=-1))
    model = convert(prepare(Net().eval(), config))
    model.save(str(HERE / "saved"))
    (HERE / "saved" / "qconfig.json").rename(HERE / "neural_compressor_qconfig.json")
    for file in (HERE / "saved").iterdir():
        file.unlink()
    (HERE / "saved").rmdir()


if __name__ == "__main__":
    os.chdir(tempfile.mkdtemp())  # it writes logs where it is
    torch.manual_seed(0)
    strategy_files()
    weight_only_files()
