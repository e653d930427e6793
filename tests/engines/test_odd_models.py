"""Models that do unusual things get right numbers from both engines, or a status that says why there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

from pytest_qsens.calibrated import CalibratedModel, calibrate
from pytest_qsens.errors import QsensError
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.models.spec import ModelSpec
from pytest_qsens.threads import one_thread

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_qsens.results import OpResult

ENGINES = ("replay", "eager")


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Return seeded normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def calibrated(
    build: Callable[[], nn.Module],
    inputs: list[Tensor],
    engine: str = "auto",
    **more: Any,  # noqa: ANN401 - fields of ModelSpec
) -> CalibratedModel:
    """Calibrate a seeded model; the inputs shrunk a little are the calibration data."""
    torch.manual_seed(0)
    model = build()
    settings: dict[str, Any] = {
        "calibration": [{"x": x * 0.9} for x in inputs],
        "evaluation": [{"x": x} for x in inputs],
        "output": lambda out, _: out,
    }
    return calibrate(ModelSpec(model, **settings | more), list_ops(model), "w8a8", engine=engine)


def scored(
    build: Callable[[], nn.Module],
    inputs: list[Tensor],
    engine: str,
    **more: Any,  # noqa: ANN401 - fields of ModelSpec
) -> dict[str, OpResult]:
    """Score every op in both modes."""
    model = calibrated(build, inputs, engine, **more)
    return {op.name: model.score(op, ["isolated", "fallback"]) for op in list_ops(build())}


def both(
    build: Callable[[], nn.Module],
    inputs: list[Tensor],
    **more: Any,  # noqa: ANN401 - fields of ModelSpec
) -> dict[str, OpResult]:
    """Score with both engines, which must agree on every bit and status."""
    replay, eager = (scored(build, inputs, engine, **more) for engine in ENGINES)
    for op, result in replay.items():
        other = eager[op]
        assert (result.status, result.isolated, result.fallback) == (other.status, other.isolated, other.fallback)
    return replay


class Chain(nn.Module):
    """Modules one after the other; the first is called ``first``."""

    def __init__(self, first: nn.Module, *others: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.others = nn.Sequential(*others)

    def forward(self, x: Tensor) -> Tensor:
        """Run all."""
        out: Tensor = self.others(self.first(x))
        return out


def pruned() -> nn.Module:
    """Mask half of a linear's weight."""
    linear = nn.Linear(4, 4)
    prune.l1_unstructured(linear, "weight", amount=0.5)
    return linear


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(lambda: parametrizations.weight_norm(nn.Linear(4, 4)), id="weight_norm"),
        pytest.param(lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), id="spectral_norm"),
        pytest.param(lambda: parametrizations.orthogonal(nn.Linear(4, 4)), id="orthogonal"),
        pytest.param(pruned, id="pruned"),
    ],
)
def test_computed_weights_are_measured(first: Callable[[], nn.Module]) -> None:
    """An op whose weight is computed for every call is an op like any other."""
    results = both(lambda: Chain(first(), nn.Tanh(), nn.Linear(4, 3)), [randn(8, 4)])
    assert {result.status for result in results.values()} == {"measured"}
    assert all((result.isolated or {})["nmse"] for result in results.values())


class Transposed(nn.Linear):
    """Multiplies with its weight in a way of its own."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name
        """Multiply."""
        return input @ self.weight.T


class Joined(nn.Module):
    """Two linears that run as one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Join the weights."""
        out: Tensor = self.head(functional.linear(x, torch.cat([self.a.weight, self.b.weight])))
        return out


class Blind(nn.Linear):
    """Runs without its weight."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name
        """Pass through."""
        return input * 2


@pytest.mark.parametrize(
    ("build", "ops", "reason"),
    [
        (lambda: Chain(Transposed(4, 4), nn.Linear(4, 3)), {"first"}, "outside of its own forward"),
        (Joined, {"a", "b"}, "outside of its own forward"),
        (lambda: Chain(Blind(4, 4), nn.Linear(4, 3)), {"first"}, "no call with its weight"),
    ],
)
def test_ops_that_ran_are_never_called_unexercised(build: Callable[[], nn.Module], ops: set[str], reason: str) -> None:
    """An op that took part but cannot be replaced is unquantizable, with the reason."""
    results = both(build, [randn(8, 4)])
    assert {op for op, result in results.items() if result.status == "unquantizable"} == ops
    assert all(reason in (results[op].reason or "") for op in ops)


def test_attention_module_is_measured() -> None:
    """PyTorch's own transformer runs a fused kernel when nobody watches; it is measured all the same."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    results = both(lambda: Chain(nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)), [randn(2, 5, 8)])
    statuses = {op.rpartition(".")[2]: result.status for op, result in results.items()}
    assert statuses["linear1"] == statuses["linear2"] == "measured"
    assert statuses["out_proj"] == "unquantizable"
    assert torch.backends.mha.get_fastpath_enabled()


def test_functional_ops_are_listed() -> None:
    """Products with parameters that no op owns are listed wherever they are, and so are recurrent layers."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))
            self.recurrent, self.head = nn.LSTM(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.recurrent(functional.linear(x, self.w))[0])
            return out

    listed = calibrated(Functional, [randn(2, 3, 4)]).functional_ops
    assert [(op.op, op.status) for op in listed] == [(":linear", "unquantizable"), ("recurrent:lstm", "unquantizable")]


def test_autocast_goes_to_the_eager_engine() -> None:
    """A replay of a part of a model would run outside of its autocast."""

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.b(self.a(x).relu()).tanh().float()

    assert "autocast" in (calibrated(Cast, [randn(8, 4)]).engine_reason or "")


class Routed(nn.Module):
    """Sends rows to one of two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, high: Tensor) -> Tensor:
        """Send the rows that ``high`` names to one, the others to the other."""
        y = torch.zeros_like(x)
        y[high] = self.high(x[high])
        y[~high] = self.low(x[~high])
        out: Tensor = self.head(y)
        return out


def routed(rows: int) -> dict[str, Tensor]:
    """Send the first ``rows`` of 6 rows to the high expert."""
    return {"x": randn(6, 4, seed=rows), "high": torch.arange(6) < rows}


def test_a_call_with_no_rows_measures_nothing() -> None:
    """An op that was called with nothing to compute was not exercised, nor calibrated."""
    results = both(Routed, [], calibration=[routed(3)], evaluation=[routed(0)])
    assert (results["high"].status, results["high"].isolated) == ("unexercised", None)
    results = both(Routed, [], calibration=[routed(0)], evaluation=[routed(3)])
    assert (results["high"].status, results["high"].isolated) == ("unexercised", None)
    assert "calibration" in (results["high"].reason or "")


def test_an_op_reached_in_some_batches() -> None:
    """Batches that an op does not reach count with their reference: their error is 0."""
    batches = [routed(0), routed(2), routed(6)]
    results = both(Routed, [], calibration=[routed(3)], evaluation=batches)
    alone = both(Routed, [], calibration=[routed(3)], evaluation=batches[1:])
    assert (results["high"].isolated or {})["sse"] == (alone["high"].isolated or {})["sse"]


@pytest.mark.parametrize("threads", [1, 2])
def test_convolutions_agree_on_any_number_of_threads(threads: int) -> None:
    """Convolutions round by the number of threads on some CPUs; the engines agree, and with one thread's numbers."""

    def net() -> nn.Module:
        layers: list[nn.Module] = []
        for i in range(3):
            layers += [nn.Conv2d(8 if i else 3, 8, 3, padding=1), nn.ReLU()]
        return Chain(*layers, nn.Flatten(), nn.Linear(8 * 56 * 56, 3))

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = both(net, [randn(2, 3, 56, 56)])
    finally:
        torch.set_num_threads(before)
    with one_thread():
        expected = scored(net, [randn(2, 3, 56, 56)], "replay")
    for op, result in found.items():
        nmse = (expected[op].isolated or {})["nmse"] or 0.0
        assert (result.isolated or {})["nmse"] == pytest.approx(nmse, rel=1e-12)


def test_rows_of_the_head_are_written_later() -> None:
    """What overwrites scored rows of the last layer counts in every mode."""

    class Suppressed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 40)
            self.register_buffer("rows", torch.tensor([3, 1]))

        def forward(self, x: Tensor) -> Tensor:
            y = self.head(self.b(self.a(x).tanh()).tanh())[self.rows]
            y[:, 0] = 5.0
            out: Tensor = y
            return out

    fast, exact = (scored(Suppressed, [randn(8, 8)], engine) for engine in ("delta", "replay"))
    for op, result in exact.items():
        assert fast[op].modes.keys() == result.modes.keys() >= {"isolated"}, op
        for mode, scores in result.modes.items():
            assert fast[op].modes[mode]["nmse"] == pytest.approx(scores["nmse"], rel=2e-3), (op, mode)


def test_a_bias_for_all_channels() -> None:
    """A bias of one number is added to every channel, in whatever way the head is computed."""

    def build() -> nn.Module:
        head = nn.Linear(8, 40_000)
        head.bias = nn.Parameter(torch.ones(1))
        return Chain(nn.Linear(8, 8), nn.Tanh(), head)

    fast, exact = (scored(build, [randn(8, 8)], engine) for engine in ("delta", "replay"))
    for op, result in exact.items():
        assert fast[op].status == result.status == "measured"
        assert (fast[op].fallback or {})["nmse"] == pytest.approx((result.fallback or {})["nmse"], rel=1e-9)


@torch.library.custom_op("qsens_tests::by_threads", mutates_args=())
def by_threads(x: Tensor) -> Tensor:
    """Return other bits on one thread than on several, as kernels that split sums do."""
    return x * (1 + 1e-6 * torch.get_num_threads())


@by_threads.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize("in_place", [False, True])
def test_kernels_that_depend_on_threads(*, in_place: bool) -> None:
    """One such kernel anywhere, and the whole model is measured on one thread, with one thread's numbers."""

    class Between(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = by_threads(x.tanh())
            return x.add_(1) if in_place else x

    def net() -> nn.Module:
        return Chain(nn.Linear(4, 4), nn.Linear(4, 4), Between(), nn.Linear(4, 3))

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = both(net, [randn(8, 4)])
    finally:
        torch.set_num_threads(before)
    with one_thread():
        expected = scored(net, [randn(8, 4)], "replay")
    for op, result in found.items():
        assert result.isolated == expected[op].isolated, op


def test_batches_may_be_written_into() -> None:
    """A model that works in place on its input sees the user's values in every run, and so does the user."""

    class InPlace(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.add_(1))

    x = randn(8, 4)
    results = both(lambda: InPlace(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), [x])
    assert {result.status for result in results.values()} == {"measured"}
    assert torch.equal(x, randn(8, 4))


def test_not_finite_rows_that_nobody_reads() -> None:
    """NaN at padded positions neither stops calibration nor spoils the other rows."""
    x = randn(8, 4)
    x[2] = torch.nan
    kept = torch.arange(8) != 2
    results = both(lambda: Chain(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), [x], output=lambda out, _: out[kept])
    assert {result.status for result in results.values()} == {"measured"}
    assert all(1e-6 < ((result.isolated or {})["nmse"] or 0.0) < 1e-2 for result in results.values())


def test_exception_under_quantization_fails_that_op() -> None:
    """What a model raises only for quantized values is the op's reason; the other ops are measured."""

    class Fussy(Chain):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            if not torch.equal(y, functional.linear(x, self.first.weight, self.first.bias)):  # type: ignore[arg-type]
                raise ValueError("not what it was")
            out: Tensor = self.others(y)
            return out

    results = scored(lambda: Fussy(nn.Linear(4, 4), nn.Linear(4, 3)), [randn(8, 4)], "eager")
    assert (results["first"].status, results["first"].isolated) == ("failed", None)
    assert "ValueError: not what it was" in (results["first"].reason or "")
    assert results["others.0"].isolated is not None


def test_another_shape_under_quantization_fails_that_op() -> None:
    """A selection that depends on values can change its size; such outputs cannot be compared."""
    results = scored(
        lambda: Chain(nn.Linear(4, 4), nn.Linear(4, 3)),
        [randn(500, 4)],
        "eager",
        output=lambda out, _: out[out > 0.1],
    )
    assert results["first"].status == "failed"
    assert "shape" in (results["first"].reason or "")


def test_one_failed_mode_keeps_the_other() -> None:
    """Where only the fallback breaks, the isolated numbers are there, and the op is failed with the reason."""

    class Breaks(Chain):
        def forward(self, x: Tensor) -> Tensor:
            y, exact = self.first(x), functional.linear(x, self.first.weight, self.first.bias)  # type: ignore[arg-type]
            z: Tensor = self.others(y)
            clean = self.others[0].weight @ y.T  # type: ignore[operator, union-attr]
            same = torch.equal(y, exact)
            return z if same or torch.allclose(clean.T, z, atol=1e-6, rtol=0) else z * torch.nan

    results = scored(
        lambda: Breaks(nn.Linear(4, 4), nn.Linear(4, 3, bias=False), nn.Identity()), [randn(8, 4)], "eager"
    )
    assert {result.status for result in results.values()} == {"measured"}

    class Third(Breaks):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 4), nn.Linear(4, 3, bias=False))
            self.last = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(super().forward(x))
            return out

    result = scored(Third, [randn(8, 4)], "eager")["last"]
    assert (result.status, result.fallback) == ("failed", None)
    assert (result.isolated or {})["nmse"]
    assert "everything but this op is quantized" in (result.reason or "")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"output": lambda out, _: (out, out)}, "gives tuple on calibration batch 1"),
        ({"output": lambda out, _: out.argmax(-1)}, "gives int64 of shape"),
        ({"output": lambda out, _: out.sum(), "logits": True}, "dimension of classes"),
        ({"output": lambda out, _: out[:0]}, "not empty"),
        ({"output": lambda out, _: out.logits}, "AttributeError: .*'logits'.*test_odd_models.py"),
        ({"evaluation": [{"wrong": torch.ones(1, 4)}]}, r"evaluation batch 1 \(keys wrong\): TypeError"),
    ],
)
def test_output_that_cannot_be_scored(more: dict[str, Any], message: str) -> None:
    """The error names the batch and what was wrong with it or with the output."""
    with pytest.raises(QsensError, match=message):
        calibrated(lambda: Chain(nn.Linear(4, 4), nn.Linear(4, 3)), [randn(8, 4)], **more)


def test_not_finite_input_is_not_blamed_on_the_op() -> None:
    """NaN that came with the data is said to be in the input."""
    more = {"calibration": [{"x": randn(8, 4)}]}
    with pytest.raises(QsensError, match="already in the input of op first"):
        calibrated(lambda: Chain(nn.Linear(4, 4), nn.Linear(4, 3)), [torch.full((2, 4), torch.nan)], **more)


class Picked(nn.Module):
    """Scores the logit of a class that an op chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 9)
        self.head = nn.Linear(6, 40, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Choose rows by the values of the second op."""
        h = self.a(x)
        rows = self.b(h).sum(-1).argsort()
        return self.head(h + self.p(h))[rows]


class WrittenLater(nn.Module):
    """Reads a buffer before it is overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.z, self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        """Scale by the buffer, write into it, and scale again."""
        buffer = torch.ones(6)
        h = self.a(self.z(x))
        h = h + self.b(h * buffer)
        buffer[:4] = x[0, :4]
        return self.d(self.c(h.relu()).relu()) * buffer


class WrittenThroughAView(nn.Module):
    """Gives on what was written through a view, which no argument leads to."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Write into a part, and read the whole."""
        out = torch.zeros(x.shape[0], 8)
        out[:, :4] = self.a(x)
        return out * 2


class ChannelsLast(nn.Module):
    """Flattens the output of a convolution as its layout in memory allows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve in channels-last layout; a view of it has the channels last."""
        return self.last(self.conv(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1).view(-1, 6))


@pytest.mark.parametrize("memory", [10**9, 1])
@pytest.mark.parametrize("engine", ["delta", "replay"])
@pytest.mark.parametrize("build", [Picked, WrittenLater, WrittenThroughAView, ChannelsLast])
def test_graphs_that_are_followed_with_care(build: type[nn.Module], engine: str, memory: int) -> None:
    """Indices that ops decide, memory written later or through views, and layouts give what running the model gives."""
    torch.manual_seed(0)
    model = build().eval().requires_grad_(requires_grad=False)
    shape = (2, 3, 6, 6) if build is ChannelsLast else (8, 6)
    data = [torch.randn(shape) for _ in range(2)]
    spec = ModelSpec(model, [{"x": data[0]}], [{"x": data[1]}], lambda out, _: out)
    ops = list_ops(model)
    fast = calibrate(spec, ops, "w8a8", engine=engine, memory=memory)
    assert fast.engine == engine
    exact = calibrate(spec, ops, "w8a8", engine="eager")
    for op in ops:
        found, expected = (scored.score(op, ["isolated"]).isolated for scored in (fast, exact))
        assert found is not None
        assert expected is not None
        assert found["nmse"] == pytest.approx(expected["nmse"], rel=2e-3, abs=1e-12), op
