"""Two small seeded nets that torch.fx traces as a whole, with data: what quantizing a whole graph looks like."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from pytest_qsens.models.spec import ModelSpec


class Mlp(nn.Module):
    """Seven linears with GELU between them."""

    def __init__(self) -> None:
        super().__init__()
        widths = (256, *[512] * 6)
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in pairwise(widths)])
        self.act = nn.GELU()
        self.head = nn.Linear(512, 64)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(rows, 256)`` to ``(rows, 64)``."""
        for layer in self.layers:
            x = self.act(layer(x))
        return self.head(x)


class Block(nn.Module):
    """Two convolutions with batch norm and a residual addition, as in ResNet."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.down = nn.Sequential()
        if stride != 1 or before != after:
            self.down = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        """Add the input to what the convolutions make of it."""
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + self.down(x))


class Cnn(nn.Module):
    """A stem, three residual blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(32)
        self.relu = nn.ReLU()
        self.blocks = nn.Sequential(Block(32, 32), Block(32, 64, 2), Block(64, 128, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(images, 3, 32, 32)`` to ``(images, 10)``."""
        x = self.blocks(self.relu(self.bn(self.stem(x))))
        return self.head(torch.flatten(self.pool(x), 1))


def mlp() -> ModelSpec:
    """Return the MLP with random inputs."""
    torch.manual_seed(0)
    return _spec(Mlp(), (64, 256))


def cnn() -> ModelSpec:
    """Return the CNN with random images; its batch norms have seen some of them."""
    torch.manual_seed(0)
    model = Cnn().train()
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(16, 3, 32, 32))
    return _spec(model, (16, 3, 32, 32))


def _spec(model: nn.Module, shape: tuple[int, ...]) -> ModelSpec:
    calibration, evaluation = torch.randn(shape), torch.randn(shape)
    return ModelSpec(model.eval(), [{"x": calibration}], [{"x": evaluation}], lambda out, _: out)
