"""Values that were dropped come back with the same bits, in every kind of replay."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pytest_qsens.graph.capture import Graph, capture
from pytest_qsens.graph.delta import DeltaRun, Weights
from pytest_qsens.graph.replay import Change, Run
from pytest_qsens.graph.segments import find_segments
from pytest_qsens.metrics import same
from tests.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="module", params=ARCHITECTURES)
def graph(request: pytest.FixtureRequest) -> Graph:
    """Give the graph of one batch of every architecture."""
    spec = ARCHITECTURES[request.param].spec()
    assert isinstance(spec.model, nn.Module)
    with torch.no_grad():
        return capture(spec.model, spec.evaluation[0], spec.output)


def changes(graph: Graph, count: int = 5) -> list[Change]:
    """Return seeded changes of a few ops, spread over the graph, the first and the last among them."""

    def shifted(value: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: value(*args, **kwargs) * 1.01

    ops = list(graph.calls)
    chosen = [*ops[:: max(1, len(ops) // count)], ops[-1]]
    return [{node: shifted(node.target) for node in graph.calls[op]} for op in chosen]  # type: ignore[arg-type] # calls


def bits(values: list[Tensor]) -> list[bytes]:
    """Return what the tensors hold, to the last bit."""
    return [value.contiguous().numpy().tobytes() for value in values]


def test_replays_without_memory(graph: Graph) -> None:
    """With no memory for values, replays give the same bits, one change by itself and several together."""
    with torch.no_grad():
        kept, dropping = Run(graph), Run(graph, memory=0)
        segments = {i for i in kept.segment_of if i is not None}
        assert dropping._dropped or len(segments) == 1 or dropping.groups
        assert bits([dropping.output]) == bits([kept.output])
        some = changes(graph)
        for change in some:
            assert bits([dropping.replay(change)]) == bits([kept.replay(change)])
        deltas = DeltaRun(kept, Weights(fast_bf16=False)), DeltaRun(dropping, Weights(fast_bf16=False))
        expected, found = (bits(list(delta.outputs(some))) for delta in deltas)
        assert found == expected
        assert deltas[1].errors(some) == deltas[0].errors(some)
        dropping.release_all()
        assert not dropping._restored
        dropped = [position for positions in dropping._dropped.values() for position in positions]
        assert all(dropping.clean[position] is None for position in dropped)
        for node in graph.nodes:
            pairs = zip(tree_leaves(dropping.values(node)), tree_leaves(kept.values(node)), strict=True)
            assert all(same(one, other) for one, other in pairs if isinstance(one, Tensor))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "bert", "gpt2"])
def test_what_is_kept_fits_into_the_memory(name: str) -> None:
    """Products are kept before all else, and of both those at the end, as many as fit."""
    spec = ARCHITECTURES[name].spec()
    assert isinstance(spec.model, nn.Module)
    with torch.no_grad():
        graph = capture(spec.model, spec.evaluation[0], spec.output)
        everything = Run(graph)
        inner = [segment.inner for segment in everything._segments]
        products, others = zip(*(everything._sizes(i) for i in range(len(inner))), strict=True)
        assert sum(map(bool, products)) > 3

        memory = sum(products) + sum(others) // 2
        run = Run(graph, memory=memory)
        kept = [i for i in range(len(inner)) if i not in run._dropped]
        assert kept == list(range(kept[0], len(inner)))
        assert not any(run._products.intersection(positions) for positions in run._dropped.values())
        held = sum(products) + sum(others[i] for i in kept)
        assert held <= memory < held + sum(others[: kept[0]])

        memory = sum(products) // 2
        run = Run(graph, memory=memory)
        last = len(inner) - 1  # what replays start from
        assert run._dropped.keys() <= set(range(last))
        kept = [i for i in range(len(inner)) if run._dropped.get(i) != inner[i]]
        held = sum(products[i] for i in kept) + sum(size for i, size in enumerate(others) if i not in run._dropped)
        assert held <= memory or kept == [last]


class Ladder(nn.Module):
    """Two blocks on a stream, with a mask that depends on no op."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Add each block to the stream."""
        mask = (x > 0).float()
        y = self.a(x).relu() * mask
        z = y + self.b(y.tanh()) * mask
        return z.exp()


def test_segments_end_where_one_value_goes_on() -> None:
    """No segment holds what later ones read, and what depends on no op is in none."""
    graph = capture(Ladder().requires_grad_(requires_grad=False), {"x": torch.randn(3, 4)}, lambda out, _: out)
    order = {node: i for i, node in enumerate(graph.nodes)}
    segments = find_segments(graph.nodes, order, {node for nodes in graph.calls.values() for node in nodes})
    names = [[graph.nodes[position].name for position in segment.inner] for segment in segments]
    inner = {name for segment in names for name in segment}
    mask = next(node.name for node in graph.nodes if "gt" in node.name)
    assert mask not in inner
    for segment in segments:
        for position in segment.inner:
            assert all(order[user] <= segment.end for user in graph.nodes[position].users if user in order)
    assert sum(len(segment) for segment in names) >= 3
