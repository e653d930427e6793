"""Writes the files of torchao in this directory, by torchao 0.18.0 itself: ``python make_torchao.py``."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import torch
from torchao.core.config import config_to_dict
from torchao.quantization import (
    FqnToConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    PerRow,
)

HERE = Path(__file__).parent

if __name__ == "__main__":
    config = FqnToConfig(
        OrderedDict(
            [
                ("lm_head", None),
                (r"re:model\.layers\.\d+\.mlp\.(gate|up|down)_proj", Int4WeightOnlyConfig(group_size=128)),
                ("model.layers.0.self_attn.q_proj", IntxWeightOnlyConfig(torch.int4, PerGroup(64))),
                ("_default", Int8DynamicActivationInt8WeightConfig(granularity=PerRow())),
            ]
        )
    )
    (HERE / "torchao_fqn_to_config.json").write_text(json.dumps(config_to_dict(config), indent=2) + "\n")
