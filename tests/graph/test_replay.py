"""Replaying a captured graph is exact on every architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pytest_qsens.graph.capture import Graph, capture, run_model
from pytest_qsens.graph.replay import Run
from pytest_qsens.metrics import same
from tests.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.fx import Node


def constant(value: Tensor) -> Callable[..., Tensor]:
    """Return an override that gives ``value`` whatever the arguments."""
    return lambda *_, **__: value.clone()


def perturbed(run: Run, node: Node) -> Tensor:
    """Return the node's value with seeded noise, about as large as int8 rounding makes it."""
    value = run.values(node)
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    return value + 0.01 * value.abs().mean() * noise


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request: pytest.FixtureRequest) -> tuple[Tensor, Graph]:
    """Give a model's own output and its graph, on one batch."""
    architecture = ARCHITECTURES[request.param]
    spec = architecture.spec()
    assert isinstance(spec.model, nn.Module)
    batch = spec.evaluation[0]
    with torch.no_grad():
        return run_model(spec.model, batch, spec.output), capture(spec.model, batch, spec.output)


def test_clean_run_is_the_model(case: tuple[Tensor, Graph]) -> None:
    """The graph gives the model's output to the last bit."""
    reference, graph = case
    with torch.no_grad():
        assert torch.equal(Run(graph).output, reference)


def test_nothing_flipped_changes_no_bit(case: tuple[Tensor, Graph]) -> None:
    """Replaying from any op with its own clean value gives the clean output to the last bit."""
    reference, graph = case
    assert graph.calls
    with torch.no_grad():
        run = Run(graph)
        for nodes in graph.calls.values():
            assert torch.equal(run.replay({node: constant(run.values(node)) for node in nodes}), reference)
            assert torch.equal(run.replay({node: node.target for node in nodes}), reference)


def test_changed_value_equals_whole_run(case: tuple[Tensor, Graph]) -> None:
    """Replaying from any op with another value equals running the whole graph with that value put in, bit for bit."""
    reference, graph = case
    changed = 0
    with torch.no_grad():
        run = Run(graph)
        for nodes in graph.calls.values():
            overrides = {node: constant(perturbed(run, node)) for node in nodes}
            replayed = run.replay(overrides)
            assert torch.equal(replayed, Run(graph, overrides).output)
            changed += not torch.equal(replayed, reference)
        # clean values survive all of it
        assert torch.equal(run.replay({}), reference)
    assert changed > len(graph.calls) / 2


class InPlace(nn.Module):
    """Writes into views, into an op's input after the op has read it, and into an op's output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Mix in-place writes between the three ops."""
        state = torch.zeros(4, 6)
        state[1:3] += x[1:3]
        first = self.a(state)
        state.mul_(2.0).add_(1.0)  # after a has read it
        view = first[:, ::2]
        view.sigmoid_()  # into a's output, through a view
        second = self.b(first + state)
        first[0].copy_(second[1])
        state[3] = second[2]
        return self.c(first) * state


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), chosen=st.sets(st.sampled_from("abc"), min_size=1))
def test_in_place_writes(seed: int, chosen: set[str]) -> None:
    """Any set of changed ops around in-place writes replays like the whole run."""
    torch.manual_seed(seed)
    model = InPlace().requires_grad_(False)
    graph = capture(model, {"x": torch.randn(4, 6)}, lambda out, _: out)
    with torch.no_grad():
        run = Run(graph)

        def shifted(node: Node) -> Callable[..., Any]:
            return lambda *args, **kwargs: node.target(*args, **kwargs) + 0.25  # type: ignore[operator] # a call

        overrides = {node: shifted(node) for op in chosen for node in graph.calls[op]}
        assert torch.equal(run.replay(overrides), Run(graph, overrides).output)
        assert not torch.equal(run.replay(overrides), run.output)
        assert torch.equal(run.replay({}), run.output)


def test_module_called_twice_sees_its_own_change() -> None:
    """When one op runs twice, the second call gets what the changed first one led to."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(self.shared(x).tanh())

    torch.manual_seed(0)
    model = Twice().requires_grad_(False)
    x = torch.randn(3, 5)
    graph = capture(model, {"x": x}, lambda out, _: out)
    assert {op: len(nodes) for op, nodes in graph.calls.items()} == {"shared": 2}
    with torch.no_grad():
        doubled = Run(graph).replay(
            {
                node: lambda *args, _target=node.target, **kwargs: 2 * _target(*args, **kwargs)
                for node in graph.calls["shared"]
            }
        )
        assert torch.equal(doubled, 2 * model.shared((2 * model.shared(x)).tanh()))


@pytest.mark.parametrize("memory", [None, 0, 10**9])
def test_other_aliases_than_expected_are_noticed(memory: int | None) -> None:
    """A run that is told the aliases of another one drops nothing too early if its own are others."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x).t().contiguous()  # a copy, unless what comes before it is laid out the other way
            z = self.second(y.relu())
            y.add_(1.0)
            return z + y

    torch.manual_seed(0)
    model = Net().requires_grad_(requires_grad=False)
    graph = capture(model, {"x": torch.randn(4, 4)}, lambda out, _: out)
    clean = Run(graph)
    (node,) = graph.calls["first"]

    def turned(*args: Tensor) -> Tensor:
        value: Tensor = node.target(*args)  # type: ignore[operator] # a call
        return value.t().contiguous().t() * 2

    expected = Run(graph, {node: turned})
    assert {n.name for n in expected.groups} != {n.name for n in clean.groups}
    for groups in (clean.groups, expected.groups):
        found = Run(graph, {node: turned}, memory, groups)
        assert same(found.output, expected.output)
        assert found.groups.keys() == expected.groups.keys()
