"""Estimates from random vectors come to what exact derivatives, computed one by one, give."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from pytest_qsens.graph.calls import Call
from pytest_qsens.proxies.gradients import (
    class_likelihood_gradient,
    likelihood_gradient,
    signs,
    squared_gradients,
    weighted_squared_gradients,
)
from pytest_qsens.proxies.observe import rounding_errors
from pytest_qsens.quant.calibration import Calibration
from pytest_qsens.quant.schemes import SCHEMES
from pytest_qsens.quant.simulate import Simulator
from tests.proxies.nets import mixed

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_qsens.models.spec import Batch, ModelSpec

SIMULATOR = Simulator(SCHEMES["w8a8"], Calibration(SCHEMES["w8a8"]))
DRAWS = 400
WITHIN = 0.15
"""Beyond four standard deviations of the estimates at so many draws."""


class Plain(nn.Module):
    """Two linears with weights of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers."""
        return cast("Tensor", self.second(torch.tanh(self.first(x))))


def plain(*, logits: bool = False) -> ModelSpec:
    """Give the net with seeded weights and two batches of two rows."""
    from pytest_qsens.models.spec import ModelSpec

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batches = Plain(), [{"x": torch.randn(2, 3)} for _ in range(2)]
    return ModelSpec(model.eval().requires_grad_(requires_grad=False), batches, batches, lambda out, _: out, logits)


def function_of(spec: ModelSpec, op: str, batch: Batch) -> Callable[[Tensor], Tensor]:
    """Give outputs of a model as a function of one weight."""
    model = cast("nn.Module", spec.model)
    return lambda weight: cast("Tensor", functional_call(model, {f"{op}.weight": weight}, (), dict(batch)))


def weight_of(spec: ModelSpec, op: str) -> Tensor:
    """Weight of an op."""
    return cast("Tensor", cast("nn.Module", spec.model).get_submodule(op).weight)


@pytest.mark.parametrize("op", ["first", "second"])
def test_the_trace_is_that_of_the_exact_hessian(op: str) -> None:
    """The Hessian of half the sum of squared errors, by double differentiation, has the trace that is estimated."""
    spec = plain()
    weight, exact = weight_of(spec, op), 0.0
    for batch in spec.evaluation:
        outputs = function_of(spec, op, batch)
        reference = outputs(weight)

        def half_sse(weight: Tensor, outputs: Callable[..., Tensor] = outputs, ref: Tensor = reference) -> Tensor:
            return (outputs(weight) - ref).square().sum() / 2

        hessian = torch.autograd.functional.hessian(half_sse, weight)  # type: ignore[no-untyped-call] # torch's
        exact += float(cast("Tensor", hessian).reshape(weight.numel(), -1).trace())
    found = squared_gradients(cast("nn.Module", spec.model), spec.evaluation, spec, [op], DRAWS, signs)
    assert found == {op: pytest.approx(exact, rel=WITHIN)}


def fisher_by_loops(spec: ModelSpec, op: str) -> float:
    """Sum over batches, rows and what can be drawn: probability times squared gradient times squared rounding error."""
    weight = weight_of(spec, op)
    ((_, error),) = rounding_errors(SIMULATOR, "op", Call("linear", weight, weight))
    total = 0.0
    for batch in spec.evaluation:
        outputs = function_of(spec, op, batch)
        for row in range(2):

            def nll(weight: Tensor, row: int = row, outputs: Callable[..., Tensor] = outputs) -> Tensor:
                return -outputs(weight)[row].log_softmax(-1) if spec.logits else outputs(weight)[row]

            chances = outputs(weight)[row].softmax(-1) if spec.logits else torch.ones(3)
            for gradient, chance in zip(jacrev(nll)(weight), chances, strict=True):
                # of a normal distribution the squared gradient has the mean of squared derivatives
                total += float(chance * (gradient * error).square().sum())
    return total


@pytest.mark.parametrize("op", ["first", "second"])
@pytest.mark.parametrize("logits", [False, True])
def test_fisher_is_that_of_loops_over_rows(op: str, *, logits: bool) -> None:
    """Drawing labels for all rows at once gives the sum of what each row gives by itself."""
    spec = plain(logits=logits)
    draw = class_likelihood_gradient if logits else likelihood_gradient
    found = weighted_squared_gradients(
        cast("nn.Module", spec.model), spec.evaluation, spec, [op], DRAWS, draw, SIMULATOR
    )
    assert found == {op: pytest.approx(fisher_by_loops(spec, op), rel=WITHIN)}


def test_shared_weights_and_repeated_calls() -> None:
    """Tied weights are two variables, two calls are one; an op that the output does not depend on has zero."""
    spec = mixed()
    model = cast("nn.Module", spec.model)
    ops = ["embed", "conv", "up", "twice", "aside", "absent"]
    found = squared_gradients(model, spec.evaluation, spec, ops, DRAWS, signs)
    exact = dict.fromkeys(found, 0.0)
    apart = mixed()
    cast("nn.Module", apart.model).get_submodule("twice").weight = nn.Parameter(
        weight_of(spec, "up"), requires_grad=False
    )
    for op in exact:
        for batch in spec.evaluation:
            exact[op] += float(jacrev(function_of(apart, op, batch))(weight_of(apart, op)).square().sum())
    assert found == pytest.approx(exact, rel=WITHIN)
    assert found["aside"] == 0
    assert "absent" not in found
    assert not any(parameter.requires_grad for parameter in model.parameters())
