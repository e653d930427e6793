"""The small files of a Qwen2.5-VL snapshot: config, tokenizer, image processor, chat format. No weights.

Everything is as in Qwen/Qwen2.5-VL-3B-Instruct but the vocabulary: that one's 151 643 entries are not ours to give, so
a byte-level BPE is trained on the sentences of this package and filled up, and all special tokens have their true ids.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pytest_qsens.models.data import default_calibration, default_evaluation

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CONFIG_3B: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}
"""``config.json`` of Qwen/Qwen2.5-VL-3B-Instruct, flat as it is on the hub: transformers 5 reads and nests it."""

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Their ids follow each other; the first one's is ``bos_token_id``, 151643."""

MARKS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
"""Tokens after the special ones that are never split, but belong to the text."""

PREPROCESSOR: dict[str, Any] = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}

CHAT_TEMPLATE = """\
{%- if messages and messages[0].role != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type in ('image', 'video') -%}
{{ '<|vision_start|><|' + part.type + '_pad|><|vision_end|>' }}
{%- else -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


def write_files(directory: Path, config: Mapping[str, Any] = CONFIG_3B) -> None:
    """Write all files but the weights into an existing directory.

    ``config`` is a flat one like ``CONFIG_3B``. There must be room for all single bytes before ``bos_token_id``, which
    the special tokens' ids start at.
    """
    generation = {
        "bos_token_id": config["bos_token_id"],
        "pad_token_id": config["bos_token_id"],
        "eos_token_id": [config["eos_token_id"], config["bos_token_id"]],
        "do_sample": True,
        "repetition_penalty": 1.05,
        "temperature": 1e-6,
    }
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("preprocessor_config.json", PREPROCESSOR),
    ):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _write_tokenizer(directory, config["bos_token_id"], config["max_position_embeddings"])


def _write_tokenizer(directory: Path, first_special: int, max_length: int) -> None:
    from transformers import AddedToken, Qwen2Tokenizer

    vocabulary, merges = _trained(first_special)
    tokenizer_class: Any = Qwen2Tokenizer  # annotated as if merges were one text each; they are pairs
    # No hole below the special tokens' ids: tokenizers gives new tokens the ids that follow, and warns of holes.
    vocabulary |= {f"<|unused_{number}|>": number for number in range(len(vocabulary), first_special)}
    vocabulary |= {token: first_special + number for number, token in enumerate((*SPECIAL_TOKENS, *MARKS))}
    tokenizer = tokenizer_class(
        vocab=vocabulary,
        merges=merges,
        eos_token="<|im_end|>",  # noqa: S106 - not a password
        extra_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=max_length,
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    tokenizer.save_pretrained(directory)


def _trained(size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Train on the default samples, splitting text as Qwen's tokenizer does; at most ``size`` entries, ids from 0."""
    from tokenizers import Tokenizer, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    core = Tokenizer.from_str(Qwen2Tokenizer().backend_tokenizer.to_str())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    samples = default_calibration(), default_evaluation()
    core.train_from_iterator([sample.text for split in samples for sample in split.texts + split.captioned], trainer)
    model = json.loads(core.to_str())["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]
