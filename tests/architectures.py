"""Tiny seeded models of true architectures: name → model, one batch, the output to score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

from pytest_qsens.models.spec import Batch, ModelSpec

if TYPE_CHECKING:
    from collections.abc import Callable

_SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 128,
}
_ENCODER = {key: value for key, value in _SMALL.items() if key != "num_key_value_heads"}
_VISION = {key: value for key, value in _ENCODER.items() if key != "vocab_size"} | {"image_size": 64, "patch_size": 16}


@dataclass(frozen=True)
class Architecture:
    """A model class with everything that makes it small."""

    model: str
    config: Callable[[], Any]
    batch: Callable[[], Batch]
    output: Callable[[Any, Batch], Tensor] = lambda out, _: out.logits
    logits: bool = True

    def build(self) -> nn.Module:
        """Build the model with seeded random weights."""
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, self.model)(self.config())
        return model.eval().requires_grad_(False)

    def spec(self) -> ModelSpec:
        """Model and data; one calibration and one evaluation batch, which differ."""
        torch.manual_seed(1)
        calibration = self.batch()
        torch.manual_seed(2)
        return ModelSpec(self.build(), [calibration], [self.batch()], self.output, self.logits)


def _ids(*shape: int) -> Tensor:
    return torch.randint(0, 100, shape)


def _text() -> Batch:
    return {"input_ids": _ids(2, 16), "use_cache": False}


def _image_and_text(pixels: int, image: int, start: int, end: int) -> Batch:
    ids = torch.cat(
        [_ids(1, 4), torch.tensor([[start]]), torch.full((1, 16), image), torch.tensor([[end]]), _ids(1, 6)], 1
    )
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(64, pixels),
        "image_grid_thw": torch.tensor([(1, 8, 8)]),
        "mm_token_type_ids": (ids == image).int(),
        "use_cache": False,
    }


def _qwen2_5_vl() -> transformers.PretrainedConfig:
    return transformers.Qwen2_5_VLConfig(
        text_config={**_SMALL, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2]}},
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "num_heads": 4,
            "intermediate_size": 128,
            "out_hidden_size": 64,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=127,
        video_token_id=126,
        vision_start_token_id=125,
        vision_end_token_id=124,
        tie_word_embeddings=True,
    )


def _qwen3_vl() -> transformers.PretrainedConfig:
    return transformers.Qwen3VLConfig(
        text_config={**_SMALL, "head_dim": 16, "rope_scaling": {"mrope_section": [4, 2, 2], "rope_type": "default"}},
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "num_heads": 4,
            "intermediate_size": 128,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0, 1],
            "patch_size": 16,
            "num_position_embeddings": 64,
        },
        image_token_id=127,
        video_token_id=126,
        vision_start_token_id=125,
        vision_end_token_id=124,
    )


def _whisper() -> transformers.PretrainedConfig:
    return transformers.WhisperConfig(
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        vocab_size=128,
        max_source_positions=50,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )


ARCHITECTURES: dict[str, Architecture] = {
    "qwen2_5_vl": Architecture(
        "Qwen2_5_VLForConditionalGeneration", _qwen2_5_vl, lambda: _image_and_text(3 * 2 * 14 * 14, 127, 125, 124)
    ),
    "qwen3_vl": Architecture(
        "Qwen3VLForConditionalGeneration", _qwen3_vl, lambda: _image_and_text(3 * 2 * 16 * 16, 127, 125, 124)
    ),
    "llama": Architecture("LlamaForCausalLM", lambda: transformers.LlamaConfig(**_SMALL), _text),
    "gemma3": Architecture("Gemma3ForCausalLM", lambda: transformers.Gemma3TextConfig(**_SMALL, head_dim=16), _text),
    "mixtral": Architecture(
        "MixtralForCausalLM", lambda: transformers.MixtralConfig(**_SMALL, num_local_experts=4), _text
    ),
    "qwen3_moe": Architecture(
        "Qwen3MoeForCausalLM",
        lambda: transformers.Qwen3MoeConfig(
            **_SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=16
        ),
        _text,
    ),
    "bert": Architecture(
        "BertModel",
        lambda: transformers.BertConfig(**_ENCODER),
        lambda: {"input_ids": _ids(2, 16)},
        lambda out, _: out.last_hidden_state,
        logits=False,
    ),
    "vit": Architecture(
        "ViTForImageClassification",
        lambda: transformers.ViTConfig(**_VISION),
        lambda: {"pixel_values": torch.randn(2, 3, 64, 64)},
    ),
    "resnet": Architecture(
        "ResNetForImageClassification",
        lambda: transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1]),
        lambda: {"pixel_values": torch.randn(2, 3, 64, 64)},
    ),
    "t5": Architecture(
        "T5ForConditionalGeneration",
        lambda: transformers.T5Config(d_model=64, d_ff=128, num_layers=2, num_heads=4, d_kv=16, vocab_size=128),
        lambda: {"input_ids": _ids(2, 16), "decoder_input_ids": _ids(2, 8), "use_cache": False},
    ),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        _whisper,
        lambda: {"input_features": torch.randn(2, 80, 100), "decoder_input_ids": _ids(2, 8), "use_cache": False},
    ),
    "clip": Architecture(
        "CLIPModel",
        lambda: transformers.CLIPConfig(
            text_config={**_ENCODER, "max_position_embeddings": 32, "eos_token_id": 2},
            vision_config=_VISION,
            projection_dim=32,
        ),
        lambda: {"input_ids": _ids(2, 16), "pixel_values": torch.randn(2, 3, 64, 64)},
        lambda out, _: out.logits_per_image,
    ),
    "mamba": Architecture(
        "MambaForCausalLM",
        lambda: transformers.MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=128, state_size=8),
        _text,
    ),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        lambda: transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=64),
        _text,
    ),
}
