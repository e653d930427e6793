"""The models that benchmarks/performance.py measures: true sizes, random weights where nothing depends on them."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, ResNetConfig, ResNetForImageClassification

from pytest_qsens.graph.modules import list_ops
from pytest_qsens.models.resolve import resolve
from pytest_qsens.models.source import ModelRequest
from pytest_qsens.models.spec import ModelSpec

if TYPE_CHECKING:
    from torch import nn

    from pytest_qsens.ops import Op

CALIBRATION = """\
A clock tower rises above the market square.
Two boats lie on the sand by the sea.
The train leaves the platform before anybody has closed its doors.
She writes a letter.
An old map of the city hangs in the hall of the library, next to a window.
Snow fell during the night.
The baker opens at six, and sells the first bread to those who come home late.
Children run after a ball on the wet grass of the park.
"""
EVALUATION = """\
A man repairs the chain of his bicycle at the side of the road.
Three cups of coffee stand on a table.
The orchestra waits until the last of the audience has found a seat.
It rains.
A dog sleeps in front of the fire while the wind moves the trees outside.
The bridge was closed for the whole summer, and the ferry came back.
Somebody has left an umbrella in the waiting room.
The pilot reads the list aloud and her colleague checks every switch.
"""


@dataclass(frozen=True)
class Subject:
    """A model with its data.

    Attributes:
        title: What it is, with the sizes that decide its cost.
        spec: The model and its batches; what calibrates it may change it.
        model: The model in fp32, in evaluation mode.
        listed: All its ops.
        ops: Those that are scored.
        narrow: Whether its weights are bf16 to begin with.

    """

    title: str
    spec: ModelSpec
    model: nn.Module
    listed: tuple[Op, ...]
    ops: tuple[Op, ...]
    narrow: bool


def language_model(layers: int, vocabulary: int, tokens: int, batches: int = 1) -> Subject:
    """Build a text model of the sizes of Qwen2.5-0.5B; calibration and evaluation differ in their random tokens."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=896,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen2ForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    model.requires_grad_(requires_grad=False)
    calibration, *evaluation = (
        {"input_ids": torch.randint(0, vocabulary, (1, tokens)), "use_cache": False} for _ in range(1 + batches)
    )
    listed = list_ops(model)
    many = f"{batches} batches of {tokens} tokens" if batches > 1 else f"{tokens} tokens"
    return Subject(
        f"text model, {layers} layers, vocabulary {vocabulary}, {many}",
        ModelSpec(model, [calibration], evaluation, lambda out, _: out.logits, logits=True),
        copy.deepcopy(model).float(),
        listed,
        tuple(op for op in listed if op.type == "linear"),
        narrow=True,
    )


def minilm() -> Subject:
    """MiniLM with its trained weights, on eight sentences."""
    with tempfile.TemporaryDirectory() as directory:
        files = {name: Path(directory) / f"{name}.txt" for name in ("calib", "eval")}
        files["calib"].write_text(CALIBRATION)
        files["eval"].write_text(EVALUATION)
        spec = resolve(ModelRequest("minilm", calib=str(files["calib"]), eval=str(files["eval"]))).load()
    return _whole("MiniLM, 8 sentences", spec)


def resnet(name: str, images: int, pixels: int) -> Subject:
    """Build a ResNet of true sizes; its batch norms have seen random images, so that they do something."""
    torch.manual_seed(0)
    config = (
        ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic")
        if name == "resnet-18"
        else ResNetConfig()
    )
    model = ResNetForImageClassification(config).requires_grad_(False)
    model.train()
    for _ in range(2):
        model(torch.randn(images, 3, pixels, pixels))
    calibration, evaluation = ({"pixel_values": torch.randn(images, 3, pixels, pixels)} for _ in range(2))
    spec = ModelSpec(model.eval(), [calibration], [evaluation], lambda out, _: out.logits, logits=True)
    return _whole(f"{name}, {images} images of {pixels}x{pixels}", spec)


def _whole(title: str, spec: ModelSpec) -> Subject:
    assert isinstance(spec.model, torch.nn.Module)
    spec.model.eval().requires_grad_(False)
    listed = list_ops(spec.model)
    return Subject(title, spec, spec.model, listed, listed, narrow=False)
