"""Writes the files of compressed-tensors and llm-compressor in this directory, by the packages themselves.

Needs compressed-tensors==0.20.0 and llmcompressor==0.14.0.1: ``python make_llm_compressor.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.recipe import Recipe
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
TINY = {
    "vocab_size": 32,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def config_json(name: str, given: dict) -> None:
    """Apply a configuration to a Llama and write the ``config.json`` that its checkpoint would get."""
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    apply_quantization_config(model, QuantizationConfig(**given), show_progress=False)
    config = model.config.to_dict()
    config["quantization_config"] = QuantizationConfig.from_pretrained(model, "int-quantized").model_dump(mode="json")
    (HERE / name).write_text(json.dumps(config, indent=2) + "\n")


def recipe(name: str, *modifiers: object) -> None:
    """Write a ``recipe.yaml``."""
    Recipe.from_modifiers(list(modifiers)).yaml(str(HERE / name))


if __name__ == "__main__":
    config_json("compressed_tensors_w8a8.json", {"config_groups": {"W8A8": ["Linear"]}, "ignore": ["lm_head"]})
    config_json(
        "compressed_tensors_mixed.json",
        {
            "config_groups": {"FP8_DYNAMIC": ["re:.*self_attn.*"], "W4A16": ["re:.*mlp.*"]},
            "ignore": ["re:.*layers.1.*"],
        },
    )
    recipe(
        "llm_compressor_recipe.yaml",
        SmoothQuantModifier(smoothing_strength=0.8),
        GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"]),
    )
    recipe(
        "llm_compressor_fp8.yaml", QuantizationModifier(targets=["Linear"], scheme="FP8_DYNAMIC", ignore=["lm_head"])
    )
