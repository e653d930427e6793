"""Gradients by segments are those of autograd through the eager model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pytest_qsens.calibrated import calibrate
from pytest_qsens.graph.backward import Backward, Gradient
from pytest_qsens.graph.calls import CONVOLUTIONS, Call, convolution_gradient
from pytest_qsens.graph.capture import run_model
from pytest_qsens.graph.delta import Weights
from pytest_qsens.graph.intercept import OpInterceptor
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.graph.narrow import narrow_transposed
from pytest_qsens.models.spec import ModelSpec
from tests.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_qsens.graph.replay import Run


def clean_run(spec: ModelSpec, memory: int | None = None) -> Run:
    """Run the graph of the only evaluation batch."""
    assert isinstance(spec.model, nn.Module)
    engine: Any = calibrate(spec, list_ops(spec.model), "w8a8_static", engine="replay", memory=memory)._engine
    (run,) = engine._clean
    found: Run = run
    return found


def by_segments(run: Run, start: Tensor, memory: int) -> tuple[dict[str, list[Gradient]], Backward]:
    """Gradients at the calls of every op, the last call first; of the second pass, which starts from twice as much."""
    names = {node: op for op, nodes in run.graph.calls.items() for node in nodes}
    found: dict[str, list[Gradient]] = {}

    def watch(gradient: Gradient) -> None:
        if 1 in gradient.passes:
            second = gradient.passes.index(1)
            parts = (gradient.output, gradient.input)
            output, entering = (None if part is None else part[second] for part in parts)
            found.setdefault(names[gradient.node], []).append(gradient._replace(output=output, input=entering))

    backward = Backward(run, Weights(fast_bf16=False), memory)
    backward.passes([lambda: start, lambda: 2 * start], watch)
    return found, backward


def by_autograd(spec: ModelSpec, start: Tensor) -> dict[str, list[Tensor]]:
    """Gradients at the calls of every op of the eager model."""
    assert isinstance(spec.model, nn.Module)
    taps: list[tuple[str, Tensor]] = []

    def handler(op: str, _: Call, call: Callable[[], Tensor]) -> Tensor:
        output = call()
        taps.append((op, torch.zeros_like(output, requires_grad=True)))
        return output + taps[-1][1]

    with torch.enable_grad(), OpInterceptor(spec.model, handler):
        output = run_model(spec.model, spec.evaluation[0], spec.output)
    gradients = torch.autograd.grad(output, [tap for _, tap in taps], start, allow_unused=True)
    found: dict[str, list[Tensor]] = {}
    for (op, _), gradient in zip(taps, gradients, strict=True):
        if gradient is not None:
            found.setdefault(op, []).append(gradient)
    return found


@pytest.mark.parametrize("memory", [0, 10**9], ids=["every segment", "all at once"])
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore")  # of transformers, about these configurations
def test_they_are_those_of_autograd(name: str, memory: int) -> None:
    """At every call of every op, whatever the graph writes in place, with values dropped or kept."""
    spec = ARCHITECTURES[name].spec()
    run = clean_run(spec, 100_000 if memory == 0 else None)
    start = torch.randn(run.output.shape, generator=torch.Generator().manual_seed(0))
    found, backward = by_segments(run, start, memory)
    expected = by_autograd(spec, start)
    assert not backward.blocked
    assert found.keys() == {op for op in expected if op in run.graph.calls}
    for op, gradients in found.items():
        for gradient, autograd in zip(reversed(gradients), expected[op], strict=True):
            assert (gradient.output - 2 * autograd).norm() <= 1e-5 * (2 * autograd).norm()


def test_the_gradient_of_an_input_is_its_own() -> None:
    """What an op brings to its input holds nothing of others that read the same."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(8, 4), nn.Conv1d(3, 3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x).sum() + self.other(x).square().sum() + x.sum()

    torch.manual_seed(0)
    batch = {"x": torch.randn(2, 3, 8)}
    spec = ModelSpec(Two().requires_grad_(requires_grad=False), [batch], [batch], lambda out, _: out[None])
    run = clean_run(spec)
    found, _ = by_segments(run, torch.ones(1), 0)
    x = batch["x"].clone().requires_grad_()
    model: Any = spec.model
    for op, value in (("one", model.one(x).sum()), ("other", model.other(x).square().sum())):
        expected = torch.autograd.grad(2 * value, x)[0]
        gradient = found[op][0].input
        assert gradient is not None
        torch.testing.assert_close(gradient, expected)


def test_narrow_weights() -> None:
    """The product with a narrow weight's transpose is the derivative of the product with it, part by part."""
    torch.manual_seed(0)
    dtype = torch.float64
    weight = torch.randn(3000, 700).bfloat16()
    x, gradient = torch.randn(5, 700, dtype=dtype, requires_grad=True), torch.randn(5, 3000, dtype=dtype)
    (expected,) = torch.autograd.grad(functional.linear(x, weight.to(dtype)), x, gradient)
    torch.testing.assert_close(narrow_transposed(gradient, weight), expected)


class _Odd(nn.Module):
    """A layer before what cannot be differentiated, one beside it, one after it."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.beside, self.after = (nn.Linear(8, 8) for _ in range(3))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.between(self.before(x)) + self.beside(x))


@torch.library.custom_op("qsens_tests::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    """Triple a tensor without telling autograd."""
    return x * 3


@opaque.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize(
    ("between", "reason"), [(torch.round, "derivative of aten.round"), (opaque, "cannot be differentiated")]
)
def test_what_cannot_be_differentiated_is_told(between: Callable[[Tensor], Tensor], reason: str) -> None:
    """Ops whose change goes through it are named, with what it is; others are not, if the pass can go on."""
    torch.manual_seed(0)
    batch = {"x": torch.randn(4, 8)}
    spec = ModelSpec(_Odd(between).requires_grad_(requires_grad=False), [batch], [batch], lambda out, _: out)
    run = clean_run(spec)
    _, backward = by_segments(run, torch.ones_like(run.output), 0)
    names = {node: op for op, nodes in run.graph.calls.items() for node in nodes}
    blocked = {names[node]: why for node, why in backward.blocked.items()}
    assert "before" in blocked
    assert "after" not in blocked
    assert reason in blocked["before"]


@torch.library.custom_op("qsens_tests::tripled", mutates_args=())
def tripled(x: Tensor) -> Tensor:
    """Triple a tensor; the derivative leaves torch, and cannot be taken for several passes together."""
    return x * 3


@tripled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


tripled.register_autograd(lambda _, gradient: torch.from_numpy(3 * gradient.numpy()))


def test_passes_one_by_one_where_they_cannot_go_together() -> None:
    """What can be differentiated for one pass at a time only stops nothing, and gives the same."""
    torch.manual_seed(0)
    batch = {"x": torch.randn(4, 8)}
    model = _Odd(tripled).requires_grad_(requires_grad=False)
    spec = ModelSpec(model, [batch], [batch], lambda out, _: out)
    run = clean_run(spec)
    found, backward = by_segments(run, torch.ones_like(run.output), 10**9)
    assert not backward.blocked
    assert found["before"][0].passes == range(1, 2)
    torch.testing.assert_close(found["before"][0].output, 3 * found["beside"][0].output)


def test_only_what_is_watched_is_told_of() -> None:
    """Of other calls no gradient is taken, nor of what is before them all."""
    torch.manual_seed(0)
    batch = {"x": torch.randn(4, 8)}
    spec = ModelSpec(_Odd(torch.tanh).requires_grad_(requires_grad=False), [batch], [batch], lambda out, _: out)
    run = clean_run(spec)
    nodes = run.graph.calls["beside"]
    told: list[Gradient] = []
    Backward(run, Weights(fast_bf16=False), 10**9, nodes).passes([lambda: torch.ones_like(run.output)] * 3, told.append)
    assert [(gradient.node, gradient.passes) for gradient in told] == [(nodes[0], range(3))]


@pytest.mark.parametrize(
    ("kind", "shape", "weight", "options"),
    [
        pytest.param(
            *("conv1d", (2, 4, 9), (6, 4, 4), {"padding": "same"}),
            marks=pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
        ),
        ("conv1d", (4, 9), (6, 4, 3), {"padding": (1,)}),
        ("conv1d", (2, 4, 9), (6, 4, 3), {"padding": "same", "dilation": 2}),
        ("conv2d", (2, 4, 8, 7), (6, 2, 3, 2), {"stride": (2, 1), "padding": 1, "groups": 2}),
        ("conv2d", (4, 8, 7), (6, 4, 2, 3), {"padding": "same"}),
        ("conv2d", (2, 4, 8, 7), (6, 4, 3, 3), {"padding": "valid", "dilation": (1, 2)}),
        ("conv3d", (2, 3, 4, 4, 4), (5, 3, 2, 2, 2), {"stride": 2}),
        ("conv2d", (2, 3, 9, 8), (5, 3, 2, 3), {"stride": (2, 3)}),
        ("conv1d", (3, 9), (5, 3, 2), {"stride": 2}),
    ],
)
def test_gradients_of_convolutions(
    kind: str, shape: tuple[int, ...], weight: tuple[int, ...], options: dict[str, Any]
) -> None:
    """They are those of autograd, whatever the padding, with a batch or without, for several passes together, too."""
    torch.manual_seed(0)
    conv = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | options
    call = Call(kind, torch.randn(shape), torch.randn(weight), None, conv)
    x = call.x.clone().requires_grad_()
    output = CONVOLUTIONS[kind](x, call.weight, None, **conv)
    starts = torch.randn(3, *output.shape)
    expected = torch.stack([torch.autograd.grad(output, x, start, retain_graph=True)[0] for start in starts])
    torch.testing.assert_close(convolution_gradient(call, starts[0]), expected[0])
    torch.testing.assert_close(torch.vmap(lambda start: convolution_gradient(call, start))(starts), expected)


def test_detached_values_pass_gradients() -> None:
    """A model that detaches computes the same function, whose derivative is wanted."""
    torch.manual_seed(0)
    batch = {"x": torch.randn(4, 8)}
    spec = ModelSpec(
        _Odd(torch.Tensor.detach).requires_grad_(requires_grad=False), [batch], [batch], lambda out, _: out
    )
    run = clean_run(spec)
    found, _ = by_segments(run, torch.ones_like(run.output), 0)
    torch.testing.assert_close(found["before"][0].output, found["beside"][0].output)
