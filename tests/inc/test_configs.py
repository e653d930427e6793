"""Configs of Neural Compressor, beside what its own strategy makes of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from neural_compressor import PostTrainingQuantConfig, quantization

from pytest_qsens.graph.modules import list_ops
from tests.configs.files.make_neural_compressor import Net
from tests.configs.ops import says, write

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")  # its own, of torch

OFF = {"activation": {"dtype": ["fp32"]}, "weight": {"dtype": ["fp32"]}}
ON = {"activation": {"dtype": ["uint8"]}, "weight": {"dtype": ["int8"]}}
ON_SYMMETRIC = {"activation": {"dtype": ["uint8"], "scheme": ["sym"]}, "weight": {"dtype": ["int8"]}}


@pytest.mark.parametrize(
    "given_config",
    [
        {"approach": "static"},
        {"approach": "static", "op_type_dict": {"Lin.*": OFF, "Linea": {}}},
        {"approach": "static", "op_type_dict": {"Linear": OFF}, "op_name_dict": {".*1": ON_SYMMETRIC, "fc": ON}},
        {"approach": "static", "op_name_dict": {"fc.": OFF, "fc2": {"activation": {"scheme": ["sym"]}}}},
        {"approach": "static", "op_name_dict": {"fc2": {"activation": {"scheme": ["sym"]}}, "fc.*": ON}},
        {"approach": "static", "op_name_dict": {"fc1": {"activation": {"scheme": ["sym", "asym"]}}}},
        {"approach": "static", "op_name_dict": {"fc1": {"activation": {"dtype": ["fp32"]}}}},
        {"approach": "static", "op_name_dict": {"fc1": {"weight": {"dtype": ["fp32"]}}, "embed": OFF}},
        {
            "approach": "static",
            "op_name_dict": {"fc1": {"activation": {"dtype": ["fp32"]}, "weight": {"dtype": ["int8"]}}},
        },
        {
            "approach": "static",
            "op_name_dict": {"fc1": {"activation": {"dtype": ["uint8"]}, "weight": {"dtype": ["fp32"]}}},
        },
        {"approach": "static", "op_name_dict": {"fc1": {"weight": {"dtype": ["int4"], "granularity": ["per_tensor"]}}}},
        {"approach": "static", "op_name_dict": {"fc1": ON_SYMMETRIC, "fc[1]": OFF, "f.*": ON}},
        {"approach": "dynamic", "op_name_dict": {"fc1": OFF, "fc2": {"activation": {"scheme": ["sym"]}}}},
    ],
)
def test_configs_mean_what_the_strategy_makes_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given_config: dict[str, Any]
) -> None:
    """What a run is told is what its strategy writes down, types before names and the last word counting."""
    monkeypatch.chdir(tmp_path)  # it writes logs where it is
    net = Net().eval()
    ops = list_ops(net)
    said = says(write(tmp_path / "given.json", given_config), ops, "neural-compressor")
    loader = torch.utils.data.DataLoader([(torch.randint(16, (8,)), 0) for _ in range(2)])
    loaders = {"calib_dataloader": loader} if given_config["approach"] == "static" else {}
    model = quantization.fit(net, PostTrainingQuantConfig(**given_config), **loaders)
    chosen = dict(model.q_config)
    chosen["op"] = {str(key): value for key, value in chosen["op"].items()}
    text = json.dumps(chosen, default=str)
    assert said == says(write(tmp_path / "chosen.json", text), ops)
