"""From what a factory returns to the module that is measured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pytest_qsens.graph.narrow import NarrowWeight
from pytest_qsens.models.spec import ModelSpec, built, ready


class Net(nn.Module):
    """A layer in bf16, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, dtype=torch.bfloat16)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer."""
        out: Tensor = self.dropout(self.layer(x))
        return out


def spec_of(model: nn.Module | type[Net]) -> ModelSpec:
    """Give a spec without data."""
    return ModelSpec(model, [], [], lambda out, _: out)


def test_a_module_is_itself_and_a_callable_builds_anew() -> None:
    """What the user holds is not copied."""
    net = Net()
    assert built(spec_of(net)) is net
    spec = spec_of(Net)
    one, other = built(spec), built(spec)
    assert isinstance(one, Net)
    assert one is not other


@pytest.mark.parametrize("wide", [False, True])
def test_a_model_is_ready(*, wide: bool) -> None:
    """In evaluation mode, without gradients, computing in fp32 with the bits of a model that was widened as a whole."""
    torch.manual_seed(0)
    net = Net()
    x = torch.randn(3, 4)
    expected = nn.functional.linear(x, net.layer.weight.float(), net.layer.bias.float()).detach()
    model = ready(spec_of(net), wide=wide)
    assert model is net
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert isinstance(net.layer.weight, NarrowWeight) is not wide
    assert torch.equal(model(x), expected)
