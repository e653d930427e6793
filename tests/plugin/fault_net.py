"""A model for runs that something happens to; torch is imported only by those who build it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pytest_qsens import ModelSpec

BLOCKS = 4


def build() -> nn.Module:
    """Build a residual network on embedded tokens."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(16, 32)
            self.down = nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            positions = torch.linspace(0, 1, 64)[:, None]
            return x + self.down(torch.relu(self.up(x + positions)))  # type: ignore[no-any-return] # of a module

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 16)
            self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
            self.head = nn.Linear(16, 8)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x)
            return self.head(x)  # type: ignore[no-any-return] # of a module

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval()


def batches(seed: int) -> list[dict[str, Tensor]]:
    """Make two batches of tokens."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return [{"ids": torch.randint(0, 50, (16, 64), generator=generator)} for _ in range(2)]


def spec() -> ModelSpec:
    """Put them together."""
    from pytest_qsens import ModelSpec

    return ModelSpec(build, batches(1), batches(2), output=lambda out, _: out, logits=True)
