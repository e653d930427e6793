"""A small residual MLP trained on scikit-learn's digits, in seconds: groups of 32 and 128 weights divide its layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pytest_qsens.models.spec import ModelSpec

_TRAINED_ON, _CALIBRATED_ON, _EPOCHS = 1500, 256, 12


class Block(nn.Module):
    """Two linear layers, and what they are added to."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, width)`` to the same shape."""
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Logits ``(N, 10)`` of images ``(N, 64)``: 14 linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 128)
        self.blocks = nn.Sequential(*(Block(128) for _ in range(6)))
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits."""
        return self.head(self.blocks(self.stem(x)))


def digits_mlp() -> ModelSpec:
    """Train on 1500 digits, calibrate with 256 of them, evaluate on the other 297."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(_EPOCHS):
        for part in torch.randperm(_TRAINED_ON).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(net(images[part]), labels[part]).backward()
            optimizer.step()
    calibration, evaluation = images[:_CALIBRATED_ON], images[_TRAINED_ON:]
    return ModelSpec(net.eval(), [{"x": calibration}], [{"x": evaluation}], lambda output, _: output, logits=True)
