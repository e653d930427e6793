"""Graphs that one process captures and another one reads: the same bits, clean and changed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from pytest_qsens.engines.replay import _changed
from pytest_qsens.graph.capture import OWNER, Graph, capture
from pytest_qsens.graph.narrow import keep_narrow
from pytest_qsens.graph.replay import Run
from pytest_qsens.graph.serialize import NotSerializable, from_builtin, to_builtin
from pytest_qsens.metrics import same
from tests.architectures import ARCHITECTURES


def passed_on(graph: Graph, model: nn.Module, batch: Any) -> Graph:  # noqa: ANN401 - keyword arguments
    """Take a graph apart, through text, and put it together."""
    content, tensors = to_builtin(graph, model)
    return from_builtin(json.loads(json.dumps(content)), tensors, model, batch)


def aliases(run: Run) -> set[tuple[str, ...]]:
    """Names of the nodes in each group that is written into."""
    return {tuple(node.name for node in group) for groups in run.groups.values() for group in groups}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_replays_of_a_graph_that_was_passed_on(name: str) -> None:
    """All that a replay or a score depends on comes through: values, owners, forms, aliases."""
    spec = ARCHITECTURES[name].spec()
    model: Any = spec.model
    keep_narrow(model.bfloat16())
    (batch,) = spec.evaluation
    with torch.no_grad():
        graph = capture(model, batch, spec.output)
        other = passed_on(graph, model, batch)
        assert (other.out_of_reach, other.functional) == (graph.out_of_reach, graph.functional)
        assert [node.meta.get(OWNER) for node in other.nodes] == [node.meta.get(OWNER) for node in graph.nodes]
        runs = Run(graph), Run(other)
        assert same(*(run.output for run in runs))
        assert aliases(runs[0]) == aliases(runs[1])
        for op in list(graph.calls)[::3]:
            changed = [run.replay({node: _changed(node.target) for node in run.graph.calls[op]}) for run in runs]
            assert same(*changed), op


def test_constants_keep_their_strides() -> None:
    """Kernels choose their way by them."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            turned = torch.arange(12.0).view(3, 4).t().contiguous().t()
            return self.layer(x) + turned + torch.tensor([[1.0], [2.0], [3.0]]).expand(3, 4)

    model = Net().requires_grad_(requires_grad=False)
    graph = capture(model, {"x": torch.randn(3, 4)}, lambda out, _: out)
    other = passed_on(graph, model, {"x": torch.randn(3, 4)})
    for old, new in zip(graph.constants.values(), other.constants.values(), strict=True):
        assert torch.equal(old, new)
        assert (old.stride(), old.dtype) == (new.stride(), new.dtype)
    assert {id(value) for value in other.constants.values()} >= {id(value) for value in model.parameters()}


def test_what_cannot_be_passed_on_is_said() -> None:
    """A function that is not torch's, or an object that is no value."""
    model = nn.Sequential(nn.Linear(4, 4)).requires_grad_(requires_grad=False)
    graph = capture(model, {"input": torch.randn(3, 4)}, lambda out, _: out)
    (node,) = graph.calls["0"]
    node.target = json.dumps
    with pytest.raises(NotSerializable, match="operator <function dumps"):
        to_builtin(graph, model)
    content, tensors = to_builtin(capture(model, {"input": torch.randn(3, 4)}, lambda out, _: out), model)
    (call,) = (told for told in content["nodes"] if told["op"] == "call_function")
    call["target"] = "os::system"
    with pytest.raises(NotSerializable, match="os::system"):
        from_builtin(content, tensors, model, {"input": torch.randn(3, 4)})
