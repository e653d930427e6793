"""Squared gradients of the scored outputs, by each op's weight: traces of Hessians, and Fisher information."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from pytest_qsens.graph.capture import run_model
from pytest_qsens.graph.intercept import OpInterceptor, unchanged_state
from pytest_qsens.metrics import energy
from pytest_qsens.proxies.observe import rounding_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from torch import Tensor, nn

    from pytest_qsens.graph.calls import Call
    from pytest_qsens.models.spec import Batch, ModelSpec
    from pytest_qsens.quant.simulate import Simulator

    Draw = Callable[[Tensor, torch.Generator], Tensor]
    """From outputs to a random vector of their shape, whose product with the Jacobian is taken."""

    Measure = Callable[[str, Call, Tensor], float]
    """From an op, a call of it, and a gradient of the shape of its weight, fp32, to what is summed."""


def signs(output: Tensor, generator: torch.Generator) -> Tensor:
    """Draw ±1, each with probability 1/2 (Rademacher): for an op's Jacobian J, E‖Jᵀv‖² = Tr(JJᵀ) = Tr(JᵀJ).

    Hutchinson, "A stochastic estimator of the trace of the influence matrix", Comm. Stat. Simul. 1989.
    """
    return torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1


def likelihood_gradient(output: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a value from the normal distribution of variance 1 around every output; gradient of its -log likelihood."""
    return torch.randn(output.shape, generator=generator).to(output)


def class_likelihood_gradient(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a class from each row of logits ``(*, classes)``; gradient of its -log likelihood, softmax - one-hot."""
    probabilities = logits.double().softmax(-1)
    rows = probabilities.reshape(-1, logits.shape[-1]).cpu()
    drawn = torch.multinomial(rows, 1, generator=generator).view(logits.shape[:-1]).to(logits.device)
    return (probabilities - functional.one_hot(drawn, logits.shape[-1])).to(logits)


def squared_gradients(
    model: nn.Module, batches: Sequence[Batch], spec: ModelSpec, ops: Collection[str], draws: int, draw: Draw
) -> dict[str, float]:
    """Estimate E‖Jᵀv‖² for the weight of each op, summed over batches: the trace of its part of E[JᵀvvᵀJ].

    Args:
        model: In evaluation mode, computing in fp32.
        batches: Evaluation data.
        spec: What else is known of the model.
        ops: Names of the wanted ones; those that are not reached are not in the result.
        draws: Random vectors for each batch.
        draw: Gives one.

    """
    return _summed(model, batches, spec, ops, draws, draw, lambda _op, _call, gradient: energy(gradient))


def weighted_squared_gradients(
    model: nn.Module,
    batches: Sequence[Batch],
    spec: ModelSpec,
    ops: Collection[str],
    draws: int,
    draw: Draw,
    simulator: Simulator,
) -> dict[str, float]:
    """Estimate Σᵢ E[(Jᵀv)ᵢ²]·ΔWᵢ² for the weight of each op, summed over batches.

    Arguments as above; ΔW is how the simulator rounds.
    """

    def measure(op: str, call: Call, gradient: Tensor) -> float:
        return sum(
            energy(gradient[start : start + len(error)] * error)
            for start, error in rounding_errors(simulator, op, call)
        )

    return _summed(model, batches, spec, ops, draws, draw, measure)


def _summed(
    model: nn.Module,
    batches: Sequence[Batch],
    spec: ModelSpec,
    ops: Collection[str],
    draws: int,
    draw: Draw,
    measure: Measure,
) -> dict[str, float]:
    found: dict[str, float] = {}

    def receive(op: str, call: Call, gradient: Tensor) -> None:
        found[op] += measure(op, call, gradient) / draws

    for number, batch in enumerate(batches):
        generator = torch.Generator().manual_seed(number)
        weights = _Weights(ops, receive)
        with unchanged_state(model), OpInterceptor(model, weights.handle), torch.enable_grad():
            output = run_model(model, batch, spec.output)
        for op in weights.variables:
            found.setdefault(op, 0.0)  # what the output does not depend on has no gradient
        if output.requires_grad:
            for left in reversed(range(draws)):
                torch.autograd.backward(output, draw(output.detach(), generator), retain_graph=left > 0)
        weights.variables.clear()  # their hooks refer to each other and to activations
    return found


class _Weights:
    """Puts a variable in the place of each op's weight, so that a weight that two ops share is two.

    Gradients are passed on as they are made and not kept: together they take the memory of the model.
    """

    def __init__(self, ops: Collection[str], receive: Callable[[str, Call, Tensor], None]) -> None:
        self._ops = ops
        self._receive = receive
        self.variables: dict[str, Tensor] = {}

    def handle(self, op: str, call: Call, run: Callable[[], Tensor]) -> Tensor:
        if op not in self._ops:
            return run()
        if op not in self.variables:
            variable = call.weight.detach().float().requires_grad_()
            variable.register_post_accumulate_grad_hook(partial(self._pass_on, op, call))  # type: ignore[no-untyped-call] # torch leaves it untyped
            self.variables[op] = variable
        return _output(call, self.variables[op])

    def _pass_on(self, op: str, call: Call, variable: Tensor) -> None:
        gradient, variable.grad = variable.grad, None
        if gradient is not None:
            self._receive(op, call, gradient)


def _output(call: Call, weight: Tensor) -> Tensor:
    """Compute a call with another weight."""
    if call.kind == "linear":
        return functional.linear(call.x, weight, call.bias)
    if call.kind == "embedding":
        return functional.embedding(call.x, weight)
    convolve: Callable[..., Tensor] = getattr(functional, call.kind)
    return convolve(call.x, weight, call.bias, **(call.conv or {}))
