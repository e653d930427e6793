"""Small nets trained on scikit-learn's digits, in seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from pytest_qsens.models.spec import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Callable

_TRAINED_ON = 1500
_CALIBRATED_ON = 256


class ConvBlock(nn.Module):
    """Two convolutions with batch norms, and what they are added to."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, channels, H, W)`` to the same shape."""
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


class Cnn(nn.Module):
    """Logits ``(N, 10)`` of images ``(N, 1, 8, 8)``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.first = nn.Sequential(*(ConvBlock(16) for _ in range(3)))
        self.down = nn.Conv2d(16, 32, 2, stride=2)
        self.second = nn.Sequential(*(ConvBlock(32) for _ in range(3)))
        self.hidden = nn.Linear(32, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits."""
        x = torch.relu(self.down(self.first(torch.relu(self.stem(x)))))
        return self.head(torch.relu(self.hidden(self.second(x).mean((2, 3)))))


class MlpBlock(nn.Module):
    """Two linear layers, and what they are added to."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, width)`` to the same shape."""
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class Mlp(nn.Module):
    """Logits ``(N, 10)`` of images ``(N, 64)``: 14 linear layers, which groups of 32 and 128 weights divide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 128)
        self.blocks = nn.Sequential(*(MlpBlock(128) for _ in range(6)))
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits."""
        return self.head(self.blocks(self.stem(x)))


def digits_cnn(seed: int = 0) -> ModelSpec:
    """Train the CNN."""
    return _trained(Cnn, (1, 8, 8), epochs=10, seed=seed)


def digits_mlp() -> ModelSpec:
    """Train the MLP."""
    return _trained(Mlp, (64,), epochs=12)


def _trained(make: Callable[[], nn.Module], shape: tuple[int, ...], epochs: int, seed: int = 0) -> ModelSpec:
    """Train on 1500 digits of a shape, calibrate with 256 of them, evaluate on the other 297."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32).view(-1, *shape) / 16
    labels = torch.tensor(data.target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = make()
        optimizer = torch.optim.Adam(net.parameters(), 2e-3)
        for _ in range(epochs):
            for rows in torch.randperm(_TRAINED_ON).split(64):
                optimizer.zero_grad()
                functional.cross_entropy(net(images[rows]), labels[rows]).backward()
                optimizer.step()
    net.eval().requires_grad_(requires_grad=False)
    calibration, evaluation = images[:_CALIBRATED_ON], images[_TRAINED_ON:]
    return ModelSpec(net, [{"x": calibration}], [{"x": evaluation}], lambda output, _: output, logits=True)
