"""A small CNN trained on scikit-learn's digits, in seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from pytest_qsens.models.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

TRAINED_ON = 1500
_EPOCHS = 10


class Block(nn.Module):
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


class Net(nn.Module):
    """Logits ``(N, 10)`` of images ``(N, 1, 8, 8)``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.first = nn.Sequential(*(Block(16) for _ in range(3)))
        self.down = nn.Conv2d(16, 32, 2, stride=2)
        self.second = nn.Sequential(*(Block(32) for _ in range(3)))
        self.hidden = nn.Linear(32, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits."""
        x = torch.relu(self.down(self.first(torch.relu(self.stem(x)))))
        return self.head(torch.relu(self.hidden(self.second(x).mean((2, 3)))))


def digits(seed: int = 0) -> ModelSpec:
    """Train on 1500 digits, calibrate with 256 of them, evaluate on the other 297."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Net()
        optimizer = torch.optim.Adam(net.parameters(), 2e-3)
        for _ in range(_EPOCHS):
            for rows in torch.randperm(TRAINED_ON).split(64):
                optimizer.zero_grad()
                functional.cross_entropy(net(images[rows]), labels[rows]).backward()
                optimizer.step()
    net.eval().requires_grad_(requires_grad=False)
    return ModelSpec(net, [{"x": images[:256]}], [{"x": images[TRAINED_ON:]}], lambda out, _: out, logits=True)
