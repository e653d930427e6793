"""Writes the files of ModelOpt in this directory, by nvidia-modelopt 0.47.0 itself: ``python make_modelopt.py``."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
from modelopt.torch.export.quant_utils import get_quant_config
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
IDS = torch.arange(8).reshape(1, 8)


def llama() -> torch.nn.Module:
    """Make a Llama of two layers."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
    )


def write(name: str, value: object) -> None:
    """Write JSON."""
    (HERE / name).write_text(json.dumps(value, indent=1, default=str) + "\n")


def main() -> None:
    """Quantize and write what an exported checkpoint would have."""
    for name in ("FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", "INT8_SMOOTHQUANT_CFG"):
        config = copy.deepcopy(getattr(mtq, name))
        model = mtq.quantize(llama(), config, lambda it: it(IDS))
        exported = get_quant_config(model)
        short = name.partition("_")[0].lower()
        write(f"modelopt_{short}_hf_quant_config.json", exported)
        if short == "nvfp4":
            write("modelopt_nvfp4_config.json", {"quantization_config": convert_hf_quant_config_format(exported)})
        if short == "fp8":
            write("modelopt_fp8_quant_cfg.json", config)
    model, state = mtq.auto_quantize(
        llama(),
        constraints={"effective_bits": 6.0},
        quantization_formats=[mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG, mtq.FP8_DEFAULT_CFG],
        data_loader=[IDS, IDS],
        forward_step=lambda it, ids: it(ids, labels=ids),
        loss_func=lambda output, _: output.loss,
        disabled_layers=["*lm_head*", "*layers.1.mlp.down_proj"],
        num_calib_steps=2,
        num_score_steps=2,
    )
    write("modelopt_mixed_hf_quant_config.json", get_quant_config(model))
    write("modelopt_auto_quant_cfg.json", mtq.get_auto_quantize_config(state))


if __name__ == "__main__":
    main()
