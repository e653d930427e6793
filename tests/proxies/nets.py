"""Small nets with a weight of every kind."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pytest_qsens.models.spec import ModelSpec


class Mixed(nn.Module):
    """An embedding, convolutions and linears; the last linear is called twice, and its weight is tied to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.up = nn.Linear(6, 6)
        self.twice = nn.Linear(6, 6)
        self.aside = nn.Linear(6, 6)
        self.twice.weight = self.up.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Give ``(batch, positions, 6)``; what ``aside`` computes is of no use."""
        x = self.embed(ids)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = self.twice(functional.gelu(self.twice(functional.gelu(self.up(x)))))
        self.aside(x)
        return x


def mixed(*, logits: bool = False) -> ModelSpec:
    """Give the net with seeded weights, and two evaluation batches."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mixed().eval().requires_grad_(requires_grad=False)
    batches = [{"ids": torch.randint(0, 20, (2, 5), generator=generator)} for _ in range(3)]
    return ModelSpec(model, batches[:1], batches[1:], lambda out, _: out, logits)
