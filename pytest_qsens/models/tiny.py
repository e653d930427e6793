"""``tiny_qwen2_5_vl``: a Qwen2.5-VL with the true architecture, small sizes and seeded random weights.

It needs no file but what ships with transformers: pictures go through Qwen2-VL's own image processor, words become
token ids by a hash.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from typing import TYPE_CHECKING, Any

from pytest_qsens.models.batches import select_samples
from pytest_qsens.models.outputs import ROWS, token_logits
from pytest_qsens.models.spec import ModelSpec
from pytest_qsens.models.tasks import Task
from pytest_qsens.models.transformers_model import on_meta

if TYPE_CHECKING:
    from torch import nn
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from pytest_qsens.models.data import Data, Sample, Samples
    from pytest_qsens.models.spec import Batch

SEED = 20250219
VOCABULARY = 1024
PAD, BOS, EOS, IMAGE, VIDEO, VISION_START, VISION_END = range(7)
FIRST_WORD = 16

CONFIG: dict[str, Any] = {
    "text_config": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 1024,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        # Sections of the 16 rotary frequencies for time, height and width, in the proportions of the real model.
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 64,
        "num_heads": 4,
        "intermediate_size": 128,
        "out_hidden_size": 128,
        "window_size": 56,
        "fullatt_block_indexes": [1],  # block 0 attends within windows
    },
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "tie_word_embeddings": True,
}
PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
"""Limits on the area of an image: 4 to 16 tokens of 28 x 28 pixels."""


def token_ids(text: str) -> list[int]:
    """Map every word and punctuation mark to an id by its CRC-32: the same on every machine, collisions and all."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return [FIRST_WORD + zlib.crc32(word.encode()) % (VOCABULARY - FIRST_WORD) for word in words]


class TinyQwen25VL:
    """The preset; follows ``ModelSource``."""

    label = "tiny_qwen2_5_vl"

    def __init__(self, data: Data) -> None:
        self.data = data

    def check(self) -> None:
        """Check the user's data files; there is nothing else to go wrong."""
        self.data.check()
        self.samples()

    def fingerprint(self) -> str:
        """Hash of the config and the seed."""
        return self.label + ":" + hashlib.sha256(json.dumps([CONFIG, SEED], sort_keys=True).encode()).hexdigest()

    def identity(self, *, hash_weights: bool) -> str:  # noqa: ARG002  # the protocol's
        """Hash of the config and the seed: the weights are drawn from these."""
        return self.fingerprint()

    def data_fingerprint(self) -> str:
        """Short hash of the data."""
        return self.data.fingerprint()

    def evaluation_fingerprint(self) -> str:
        """Short hash of the evaluation data."""
        return self.data.evaluation_fingerprint()

    def weights_digest(self) -> None:
        """Return ``None``: the weights are drawn, there is no file."""

    def weight_bytes(self) -> int:
        """Next to nothing."""
        return 0

    def skeleton(self) -> nn.Module:
        """Build the model on the meta device."""
        return on_meta(_build)

    def load(self) -> ModelSpec:
        """Draw the weights, in fp32 and independently of the caller's random state, and make the batches."""
        import torch

        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(SEED)
            model = _build()
        model.train(mode=False)
        model.requires_grad_(requires_grad=False)
        calibration, evaluation = self.samples()
        return ModelSpec(
            model,
            [_batch(s) for s in calibration],
            [_batch(s) for s in evaluation],
            output=token_logits,
            logits=True,
            rows=ROWS[token_logits],
        )

    def samples(self) -> tuple[Samples, Samples]:
        """Return the user's samples, or pictures with questions and plain texts."""
        return select_samples(Task.IMAGE_TEXT, self.data, self.label)


def _build() -> Qwen2_5_VLForConditionalGeneration:
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration(_config())


def _config() -> Qwen2_5_VLConfig:
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(**CONFIG)


def _batch(sample: Sample) -> Batch:
    """Make what Qwen2.5-VL's processor makes of an image and a text; (1, tokens) and (patches, 1176)."""
    import torch
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    ids = [BOS]
    pixels: dict[str, torch.Tensor] = {}
    if sample.image is not None:
        processor = Qwen2VLImageProcessorPil(size=PIXELS)
        pixels = dict(processor(sample.open_image(), return_tensors="pt"))
        tokens = int(pixels["image_grid_thw"].prod()) // processor.merge_size**2
        ids += [VISION_START, *[IMAGE] * tokens, VISION_END]
    ids += [*token_ids(sample.text), EOS]
    input_ids = torch.tensor([ids])
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == IMAGE).long(),
        **pixels,
        "use_cache": False,
    }
