"""Models that stress what Intel Neural Compressor does at the edges of ops, and the data they are measured on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from pytest_qsens.models.resolve import resolve
from pytest_qsens.models.source import ModelRequest
from pytest_qsens.models.spec import ModelSpec
from tests.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_qsens.models.spec import Batch

PATCH_EMBEDDING = "model.visual.patch_embed.proj"
"""The op of Qwen2.5-VL that Intel Neural Compressor cannot quantize: the forward asks for its weight's dtype."""


class MLP(nn.Module):
    """Linears with GELU in between, traced as a whole; the last op gives the output."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.act = nn.GELU()
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers."""
        for layer in self.layers:
            x = self.act(layer(x))
        out: Tensor = self.head(x)
        return out


class Block(nn.Module):
    """A residual block: a relu that is fused into a convolution, and one that is fused into the addition."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.down: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Run both convolutions and add."""
        y = self.relu1(self.bn1(self.conv1(x)))
        out: Tensor = self.relu2(self.bn2(self.conv2(y)) + self.down(x))
        return out


class ResNet(nn.Module):
    """A small residual network, traced as a whole; the last op gives the output."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn, self.relu = nn.BatchNorm2d(width), nn.ReLU()
        self.blocks = nn.Sequential(Block(width, width), Block(width, 2 * width, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Classify ``(N, 3, H, W)``."""
        y = self.blocks(self.relu(self.bn(self.stem(x))))
        out: Tensor = self.fc(torch.flatten(self.pool(y), 1))
        return out


class Edges(nn.Module):
    """Ops next to everything that has a rule of its own in torch's FX quantization."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)  # shares the observer of its input
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.sigmoid = nn.Sigmoid()  # has a fixed scale
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.linear1 = nn.Linear(8 * 16, 24)  # behind a flatten, before a relu that is fused
        self.norm = nn.LayerNorm(24)  # stays in fp32
        self.linear2 = nn.Linear(24, 24)
        self.linear3 = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Classify ``(N, 3, 8, 8)``."""
        y = self.pool(self.conv1(x))
        y = self.sigmoid(self.conv2(y))
        y = torch.flatten(self.conv3(y), 1)
        y = torch.relu(self.linear1(y))
        out: Tensor = self.linear3(self.linear2(self.norm(y)) + y)
        return out


class Neighbours(nn.Module):
    """Two convolutions with something in between, which works on ``(N, 8, 8, 8)``."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        """Run all."""
        out: Tensor = self.conv2(self.between(self.conv1(x)))
        return out


BETWEEN: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "sigmoid": nn.Sigmoid,
    "torch_sigmoid": lambda: torch.sigmoid,
    "tensor_sigmoid": lambda: lambda x: x.sigmoid(),
    "tanh": nn.Tanh,
    "hardsigmoid": nn.Hardsigmoid,
    "softmax": lambda: nn.Softmax(1),
    "swish": lambda: lambda x: x * torch.sigmoid(x),
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "batch_norm": lambda: nn.BatchNorm2d(8),
    "group_norm": lambda: nn.GroupNorm(2, 8),
    "instance_norm": lambda: nn.InstanceNorm2d(8, affine=True),
    "layer_norm": lambda: nn.LayerNorm(8),
    "functional_layer_norm": lambda: lambda x: functional.layer_norm(x, (8,)),
    "dropout": nn.Dropout,
    "transposed": lambda: nn.ConvTranspose2d(8, 8, 2),
    "max_pool": lambda: nn.MaxPool2d(2),
    "mean_pool": lambda: nn.AvgPool2d(2),
    "interpolate": lambda: lambda x: functional.interpolate(x, scale_factor=2),
    "permute": lambda: lambda x: x.permute(0, 1, 3, 2),
    "view": lambda: lambda x: x.view(-1, 8, 4, 16),
    "add": lambda: lambda x: x + x,
    "mul": lambda: lambda x: x * 2,
}
"""What stands between two convolutions, each with a rule of its own in torch's FX quantization."""


def randn(*shape: int, seed: int) -> Tensor:
    """Return seeded normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spec_of(model: nn.Module, *shape: int, one_batch: bool = False) -> ModelSpec:
    """Seeded random data; with one batch, the calibration data is the evaluation data."""
    evaluation = {"x": randn(*shape, seed=2)}
    calibration = [evaluation] if one_batch else [{"x": randn(*shape, seed=seed)} for seed in (0, 1)]
    return ModelSpec(model, calibration, [evaluation], lambda out, _: out, logits=True)


def mlp(*, seed: int = 0, one_batch: bool = False) -> ModelSpec:
    """Build the MLP."""
    torch.manual_seed(seed)
    return spec_of(MLP().eval(), 16, 32, one_batch=one_batch)


def resnet(*, one_batch: bool = False) -> ModelSpec:
    """Build the residual network, with running statistics that are not those of an untrained model."""
    torch.manual_seed(0)
    model = ResNet()
    with torch.no_grad():
        for seed in range(3):
            model(2 * randn(8, 3, 8, 8, seed=10 + seed) + 1)
    return spec_of(model.eval(), 4, 3, 8, 8, one_batch=one_batch)


def edges(*, one_batch: bool = False) -> ModelSpec:
    """Build the network of edges."""
    torch.manual_seed(0)
    return spec_of(Edges().eval(), 4, 3, 8, 8, one_batch=one_batch)


def neighbours(between: str) -> ModelSpec:
    """Build two convolutions with one of `BETWEEN` in between."""
    torch.manual_seed(0)
    return spec_of(Neighbours(BETWEEN[between]()).eval(), 2, 3, 8, 8)


def vl_image() -> ModelSpec:
    """Build a small Qwen2.5-VL, with an image and text in every batch."""
    return ARCHITECTURES["qwen2_5_vl"].spec()


def vl_text(*, one_batch: bool = False) -> ModelSpec:
    """Build a small Qwen2.5-VL that sees no image."""
    spec = vl_image()

    def text(batch: Batch) -> Batch:
        ids = batch["input_ids"].clamp_max(99)  # no id of an image
        return {"input_ids": ids, "attention_mask": batch["attention_mask"], "use_cache": False}

    evaluation = [text(b) for b in spec.evaluation]
    calibration = evaluation if one_batch else [text(b) for b in spec.calibration]
    return replace(spec, calibration=calibration, evaluation=evaluation)


def minilm() -> ModelSpec:
    """MiniLM with its real weights, on a part of the shipped data."""
    spec = resolve(ModelRequest("minilm")).load()
    return replace(spec, calibration=spec.calibration[:1], evaluation=spec.evaluation[:1])


MODELS: dict[str, Callable[[], ModelSpec]] = {
    "mlp": mlp,
    "resnet": resnet,
    "edges": edges,
    "vl_text": vl_text,
    "vl_image": vl_image,
    "minilm": minilm,
}

WHOLE = ("mlp", "resnet", "edges")
"""Those that are traced as a whole."""
