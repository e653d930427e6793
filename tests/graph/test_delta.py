"""The rules by which differences go through linear calls, and what goes by values beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pytest_qsens.graph.capture import Graph, capture
from pytest_qsens.graph.delta import RULES, DeltaRun, Weights
from pytest_qsens.graph.narrow import LINEAR
from pytest_qsens.graph.replay import Change, Run

aten = torch.ops.aten

ARGUMENTS: dict[Any, Any] = {
    aten.linear.default: lambda x, weight, bias: (x, weight.t().contiguous(), bias),
    LINEAR: lambda x, weight, bias: (x, weight.t().contiguous().bfloat16(), bias),
    aten.addmm.default: lambda x, weight, bias: (bias, x, weight),
}
"""Rule → the arguments of a call, from ``(rows, in)``, ``(in, out)`` and ``(out,)``."""


def test_every_rule_is_tried() -> None:
    """A rule without an entry here would be untested."""
    assert ARGUMENTS.keys() == RULES.keys()


@pytest.mark.parametrize("target", RULES)
@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 9)] * 4),
    scale=st.floats(1e-6, 1e3),
    seed=st.integers(0, 2**16),
)
def test_rules(target: Any, sizes: tuple[int, int, int, int], scale: float, seed: int) -> None:  # noqa: ANN401
    """For each of several changes δ, the rule gives f(c + δ) - f(c), as float64 has it."""
    changes, rows, inputs, outputs = sizes
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, weight, bias, delta = draw(rows, inputs), draw(inputs, outputs), draw(outputs), draw(changes, rows, inputs)
    delta *= scale
    rule = RULES[target]
    args = ARGUMENTS[target](x, weight, bias)
    assert args[rule.argument] is x
    found = rule.apply(delta, args[rule.weight])
    assert found.shape == (changes, rows, outputs)
    for i in range(changes):
        expected = target(*ARGUMENTS[target](x + delta[i], weight, bias)) - target(*args)
        assert torch.allclose(found[i], expected, rtol=1e-9, atol=1e-9 * max(1.0, scale))


class Router(nn.Module):
    """Routes each row by the largest of the scores, splits, counts, and writes in place after the linears."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.experts = nn.Linear(8, 3), nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.pair, self.last = nn.Linear(8, 16), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Send rows through experts and back."""
        x = self.pair(x)
        left, right = x.split(8, dim=-1)
        chosen = self.score(left).argmax(-1)
        y = torch.zeros_like(left)
        for i, expert in enumerate(self.experts):
            y += torch.where((chosen == i)[:, None], expert(right), 0.0)
        first, second = y.unbind(0)[:2]
        y[0].copy_(second.tanh() + first)
        y.mul_(chosen[:, None] + 1.0)
        return self.last(y)


def graph_of(model: nn.Module, x: Tensor) -> Graph:
    """Capture the forward of one batch."""
    return capture(
        model.eval().requires_grad_(requires_grad=False),
        {"input" if isinstance(model, nn.Sequential) else "x": x},
        lambda out, _: out,
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), size=st.floats(1e-3, 2.0))
def test_changed_routes_and_writes_in_place(seed: int, size: float) -> None:
    """Where a change sends rows to other experts, the other experts' values come out as in a replay."""
    torch.manual_seed(seed)
    graph = graph_of(Router(), torch.randn(6, 8))

    def moved(target: Any) -> Any:  # noqa: ANN401 - a call
        return lambda *args: target(*args).roll(1, 0) * size + target(*args)

    some: list[Change] = [{node: moved(node.target) for node in nodes} for nodes in graph.calls.values()]
    with torch.no_grad():
        run = Run(graph)
        delta = DeltaRun(run, Weights(fast_bf16=False))
        for change, output in zip(some, delta.outputs(some), strict=True):
            exact = run.replay(change)
            assert torch.allclose(output, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))
        routed = [node for node in graph.nodes if node.target is aten.argmax.default]
        assert routed


def test_several_changes_have_the_bits_of_one() -> None:
    """What a change gives does not depend on those beside it."""
    torch.manual_seed(0)
    graph = graph_of(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 40)), x_of())
    some: list[Change] = [
        {node: lambda *args, t=node.target: t(*args) * 1.01 for node in nodes} for nodes in graph.calls.values()
    ]
    with torch.no_grad():
        delta = DeltaRun(Run(graph), Weights(fast_bf16=True))
        together, alone = delta.errors(some), [error for change in some for error in delta.errors([change])]
    assert together == alone
    assert all(error.whole for error in together)


def test_nothing_is_computed_for_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that were dropped for want of memory stay so."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 40)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x).tanh()
            out: Tensor = self.head(x)
            return out

    with torch.no_grad():
        run = Run(graph_of(Residual(), x_of()), memory=0)
        assert run._dropped
        delta = DeltaRun(run, Weights(fast_bf16=False))
        monkeypatch.setattr(Run, "_compute", None)
        assert delta.errors([]) == []


def x_of() -> Tensor:
    """Return seeded rows."""
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
