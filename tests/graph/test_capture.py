"""What capture finds in a model, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental import proxy_tensor

from pytest_qsens.graph.capture import CaptureRefused, Graph, capture
from pytest_qsens.graph.modules import list_ops
from tests.architectures import ARCHITECTURES


def captured(model: nn.Module, **batch: Tensor) -> Graph:
    """Capture a model that returns its output tensor."""
    return capture(model.eval().requires_grad_(False), batch, lambda out, _: out)


def test_torch_internals_are_as_expected() -> None:
    """The parts of torch.fx that are used and not public do on this torch version what capture relies on."""
    assert proxy_tensor.get_proxy_mode() is None
    owners = {}

    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).relu()

    graph = captured(Probe(), x=torch.ones(1, 2))
    for node in graph.nodes:
        if node.op == "call_function":
            owners[str(node.target)] = node.meta["qsens_owner"]
    assert owners == {"aten.linear.default": "inner", "aten.relu.default": ""}
    assert len(graph.constants) == 2


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_op_is_accounted_for(name: str) -> None:
    """Every quantizable module is called in the graph, is out of reach with a reason, or did not run."""
    spec = ARCHITECTURES[name].spec()
    assert isinstance(spec.model, nn.Module)
    ran: set[str] = set()
    for op in list_ops(spec.model):
        spec.model.get_submodule(op.name).register_forward_hook(lambda *_, op=op.name: ran.add(op))
    graph = capture(spec.model, spec.evaluation[0], spec.output)
    listed = {op.name for op in list_ops(spec.model)}
    assert set(graph.calls) | set(graph.out_of_reach) >= ran & listed
    assert set(graph.calls) <= ran
    expected = {
        "mamba": {f"backbone.layers.{i}.mixer.{op}" for i in (0, 1) for op in ("conv1d", "dt_proj")},
        "whisper": {"model.decoder.embed_positions"},
    }
    assert set(graph.out_of_reach) == expected.get(name, set())


def test_functional_products_have_owners() -> None:
    """Attention's two products and expert products are named by the module that runs them."""
    spec = ARCHITECTURES["qwen3_moe"].spec()
    assert isinstance(spec.model, nn.Module)
    graph = capture(spec.model, spec.evaluation[0], spec.output)
    names = [name for name, _ in graph.functional]
    assert names.count("model.layers.1.self_attn:qk") == 1
    assert names.count("model.layers.1.self_attn:pv") == 1
    assert "model.layers.0.mlp.experts:grouped_mm" in names
    assert len(set(names)) == len(names)
    assert not any("rotary" in name for name in names)


def test_tied_weights_are_two_ops() -> None:
    """A head that shares the embedding's weight is its own op, found in its own module."""
    spec = ARCHITECTURES["qwen2_5_vl"].spec()
    assert isinstance(spec.model, nn.Module)
    graph = capture(spec.model, spec.evaluation[0], spec.output)
    (head,) = graph.calls["lm_head"]
    (embedding,) = graph.calls["model.language_model.embed_tokens"]
    assert str(head.target) == "aten.linear.default"
    assert str(embedding.target) == "aten.embedding.default"


class Branching(nn.Module):
    """Chooses its path by what an op computed."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.op = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Depend on the data in the way ``kind`` says."""
        y = self.op(x)
        if self.kind == "if":
            return y * 2 if y.sum() > 0 else y
        if self.kind == "item":
            return y * y.max().item()
        if self.kind == "nonzero":
            return y.sum() * torch.ones(len((y > 0).nonzero()), 1)
        return y[y > 0].sum() * y


@pytest.mark.parametrize("kind", ["if", "item", "nonzero", "mask"])
def test_data_dependence_is_refused(kind: str) -> None:
    """A value of an op that became a Python number, a branch or a shape makes the graph wrong for other values."""
    with pytest.raises(CaptureRefused, match="depend on activations"):
        captured(Branching(kind), x=torch.ones(2, 4))


def test_data_dependence_on_inputs_is_fine() -> None:
    """Sizes and masks that come from the inputs alone are constants of the batch."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.op = nn.Linear(4, 4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.op(x)[mask] * int(mask.sum())

    graph = captured(Masked(), x=torch.ones(3, 4), mask=torch.tensor([True, False, True]))
    assert list(graph.calls) == ["op"]


def test_changed_state_is_refused() -> None:
    """A model that counts in a buffer cannot be replayed in any order."""

    class Counting(nn.Module):
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.op = nn.Linear(4, 4)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return self.op(x) * self.count

    with pytest.raises(CaptureRefused, match="count"):
        captured(Counting(), x=torch.ones(2, 4))


def test_failing_trace_is_refused_with_the_reason() -> None:
    """Whatever tracing raises is said, because another engine takes over."""

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.op = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            raise NotImplementedError("no such kernel")

    with pytest.raises(CaptureRefused, match="tracing failed: NotImplementedError: no such kernel"):
        captured(Failing(), x=torch.ones(2, 4))
