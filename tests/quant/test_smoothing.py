"""SmoothQuant: its scales, what it leaves as it is, and what it is good for."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torchao.prototype.smoothquant import SmoothQuantConfig
from torchao.prototype.smoothquant.core import SmoothQuantObserver
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

from pytest_qsens.calibrated import calibrate
from pytest_qsens.graph.calls import Call, unquantized
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.models.spec import ModelSpec
from pytest_qsens.preparation import observe_all
from pytest_qsens.quant.calibration import Calibration
from pytest_qsens.quant.integers import QuantizedWeight
from pytest_qsens.quant.schemes import scheme_named
from pytest_qsens.quant.simulate import Simulator
from pytest_qsens.quant.smoothing import smoothing_scale
from tests.architectures import ARCHITECTURES
from tests.quant.questions import ALPHAS, mlp
from tests.quant.test_simulate import kernel_weight, randn

if TYPE_CHECKING:
    from collections.abc import Mapping

CHANNELS = st.lists(st.floats(0, 1e4, width=32), min_size=3, max_size=3)


def calibrated(schemes: str | Mapping[str, str], spec: ModelSpec) -> tuple[Calibration, Simulator]:
    """Calibrate a model, with one scheme or some of its ops with one each."""
    named = schemes if isinstance(schemes, str) else {op: scheme_named(name, "x") for op, name in schemes.items()}
    known = scheme_named(named, "x") if isinstance(named, str) else named
    calibration = Calibration(known)
    assert isinstance(spec.model, nn.Module)
    with torch.no_grad():
        observe_all(spec.model, spec.calibration, spec, calibration)
    return calibration, Simulator(known, calibration)


def scale_of(calibration: Calibration, op: str) -> Tensor:
    """Return an op's scales."""
    found = calibration.smoothing(op)
    assert found is not None
    return found


def one_linear(*, outlier: float = 40.0) -> tuple[ModelSpec, Call]:
    """Return a model of one linear with an outlier channel and one that never fires, and a call of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48)).eval().requires_grad_(requires_grad=False)
    x = randn(32, 64)
    x[:, 5] *= outlier
    x[:, 9] = 0
    call = Call("linear", x, model[0].weight, model[0].bias)
    return ModelSpec(model, [{"input": x[:20]}, {"input": x[20:]}], [{"input": x}], lambda out, _: out), call


@given(CHANNELS, CHANNELS, st.floats(0, 1), st.integers(0, 2**32))
def test_an_op_is_unchanged_where_nothing_is_rounded(x: list[float], w: list[float], alpha: float, seed: int) -> None:
    """Whatever inputs, weights and strength are, scales are positive and finite, and undo each other."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(5, 3, generator=generator, dtype=torch.float64).mul(2).sub(1) * torch.tensor(x)
    weight = torch.rand(4, 3, generator=generator, dtype=torch.float64).mul(2).sub(1) * torch.tensor(w)
    scale = smoothing_scale(inputs.abs().amax(0).float(), weight.abs().amax(0).float(), alpha)
    assert scale.dtype == torch.float32
    assert bool((scale.isfinite() & (scale > 0)).all())
    assert bool((scale[inputs.abs().amax(0).float() == 0] == 1).all())
    exact = functional.linear(inputs, weight)
    found = functional.linear(inputs / scale.double(), weight * scale.double())
    bound = functional.linear(inputs.abs(), weight.abs())
    assert bool(((found - exact).abs() <= 1e-13 * bound + 1e-300).all())


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_scales_are_torchaos(alpha: float) -> None:
    """Of channels that fire; where one does not, torchao's is tiny, and here it is 1."""
    spec, call = one_linear()
    name = f"w8a8_dynamic_smoothquant{alpha:g}" if alpha != 0.5 else "w8a8_dynamic_smoothquant"
    found = scale_of(calibrated(name, spec)[0], "0")
    observer = SmoothQuantObserver(call.weight, alpha)
    observer(call.x)
    expected, _, _ = observer.calculate_qparams()  # type: ignore[no-untyped-call]
    fires = call.x.abs().amax(0) > 0
    assert int(fires.sum()) == 63
    torch.testing.assert_close(found[fires], expected[fires], rtol=1e-5, atol=0)
    assert bool((found[~fires] == 1).all())


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions")
def test_static_products_are_the_kernels() -> None:
    """Inputs divided and weights multiplied by the scales go through torch's int8 kernel, and come out bit for bit."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.fail("this torch build has no fbgemm kernels to compare with")
    torch.backends.quantized.engine = "fbgemm"
    spec, call = one_linear()
    calibration, simulator = calibrated("w8a8_smoothquant0.75", spec)
    scale = scale_of(calibration, "0")
    x, y = calibration.input_qparams("0"), calibration.output_qparams("0")
    quantized = torch.quantize_per_tensor(call.x / scale, x.scale, x.zero_point, torch.quint8)
    packed = torch.ops.quantized.linear_prepack(kernel_weight(call.weight * scale), call.bias)
    expected = torch.ops.quantized.linear(quantized, packed, y.scale, y.zero_point).dequantize()
    assert torch.equal(simulator.output("0", call), expected)
    assert x.scale < float(call.x.abs().max()) / 255  # the range is that of smoothed inputs


@pytest.mark.filterwarnings("ignore")
def test_dynamic_products_are_torchaos() -> None:
    """Torchao's own flow gives the same up to its steps, which are 127.5 to a side where torch's primitive has 127."""
    spec, call = one_linear()
    call.x[:, 9] = randn(32)  # torchao divides by next to nothing where a channel does not fire
    spec = ModelSpec(spec.model, [{"input": call.x}], spec.evaluation, spec.output)
    _, simulator = calibrated("w8a8_dynamic_smoothquant", spec)
    assert isinstance(spec.model, nn.Module)
    model = copy.deepcopy(spec.model)
    for step in ("prepare", "convert"):
        quantize_(model, SmoothQuantConfig(Int8DynamicActivationInt8WeightConfig(version=2), step))
        if step == "prepare":
            model(call.x)
    own, weight = simulator._weight("0", call), model[0].weight
    assert isinstance(own, QuantizedWeight)
    torch.testing.assert_close(weight.scale.flatten(), own.scale, rtol=1e-5, atol=0)
    assert float((weight.qdata != own.values).float().mean()) < 0.002  # next to a boundary, for the last bit of a scale
    theirs, ours, exact = model(call.x), simulator.output("0", call), unquantized(call)
    errors = [float((one - exact).square().sum()) for one in (theirs, ours)]
    assert 0.5 < errors[0] / errors[1] < 2
    assert max(errors) < 0.001 * float(exact.square().sum())


@pytest.mark.parametrize("number", range(len(ALPHAS)))
def test_modelopt_finds_the_same(number: int, modelopt: dict[str, Any]) -> None:
    """``INT8_SMOOTHQUANT_CFG``: each layer's own scales, and ranges of the largest magnitude of what is smoothed."""
    alpha, (model, x) = ALPHAS[number], mlp()
    theirs = modelopt["smoothed"][number]
    strength = "" if alpha == 0.5 else f"{alpha:g}"
    spec = ModelSpec(model, [{"input": x}], [{"input": x}], lambda out, _: out)
    scheme = f"w8a8_static_act_sym_minmax_smoothquant{strength}_unshared"
    calibration, simulator = calibrated(scheme, spec)
    for op, inverse in theirs["scales"].items():
        fires = (x if op == "0" else model[:2](x)).abs().amax(0) > 1e-3
        torch.testing.assert_close(scale_of(calibration, op)[fires], 1 / inverse.flatten()[fires], rtol=1e-4, atol=0)
    with torch.no_grad():
        exact = model(x)
        hidden = simulator.output("0", Call("linear", x, model[0].weight, model[0].bias)).relu()
        ours = simulator.output("2", Call("linear", hidden, model[2].weight, model[2].bias))
    errors = [float((one - exact).square().sum()) for one in (theirs["output"], ours)]
    assert 0.6 < errors[0] / errors[1] < 1.6
    # its steps are a bit wider, 127 to a side, so that both round by themselves
    assert float((theirs["output"] - ours).square().sum()) < 1.5 * sum(errors) < 0.01 * float(exact.square().sum())


@pytest.mark.parametrize("scheme", ["w8a8_smoothquant", "w8a8_dynamic_smoothquant", "w4a8_dynamic_g32_smoothquant0.3"])
def test_a_linear_in_all_its_ways(scheme: str) -> None:
    """Whole, part by part, and in errors of its weight and its input, it is the same."""
    spec, call = one_linear()
    calibration, simulator = calibrated(scheme, spec)
    output = simulator.output("0", call)
    parts = torch.cat(list(simulator.blocks("0", call, 20)), -1)
    assert torch.equal(parts, output)
    estimated, rounding = simulator.rounded("0", call)
    assert torch.equal(estimated, output)
    assert torch.equal(rounding, simulator.input_error("0", call))
    weight = call.weight + torch.cat([error for _, error in simulator.weight_errors("0", call, 7)])
    assert call.bias is not None
    expected = functional.linear(call.x + rounding, weight, call.bias)
    step = calibration.output_qparams("0").scale if scheme == "w8a8_smoothquant" else 0.0
    assert float((output - expected).abs().max()) <= 0.501 * step + 1e-4
    plain = calibrated(scheme.partition("_smoothquant")[0], spec)[1].output("0", call)
    exact = unquantized(call)
    assert float((output - exact).square().sum()) < float((plain - exact).square().sum())


class Attention(nn.Module):
    """Three layers read one tensor, a fourth a view of it, and others what was written over or made anew."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        names = ("q", "k", "v", "viewed", "copied", "written", "out")
        for number, name in enumerate(names):
            layer = nn.Linear(8, 8)
            layer.weight.data *= 1 + number
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """Sum what all layers give."""
        x = self.norm(x)
        found = self.q(x) + self.k(x) + self.v(x)
        found = found + self.viewed(x.view(-1, 8)).view(x.shape) + self.copied(x.clone())
        x.mul_(2)
        return self.out(found + self.written(x))


def attention() -> ModelSpec:
    """Return the model with data."""
    torch.manual_seed(0)
    model = Attention().eval().requires_grad_(requires_grad=False)
    return ModelSpec(
        model, [{"x": randn(2, 5, 8, seed=s)} for s in (1, 2)], [{"x": randn(2, 5, 8)}], lambda out, _: out
    )


def test_layers_that_read_one_tensor_share_scales() -> None:
    """The largest weight of them counts, in whatever way they are quantized; what reads another has its own."""
    spec = attention()
    calibration, _ = calibrated("w8a8_smoothquant", spec)
    shared = [scale_of(calibration, op) for op in ("q", "k", "v", "viewed")]
    assert all(torch.equal(shared[0], other) for other in shared)
    others = [scale_of(calibration, op) for op in ("copied", "written", "out")]
    assert not any(torch.equal(shared[0], other) for other in others)
    some, _ = calibrated({"k": "w8a8_dynamic_smoothquant", "v": "w8a8"}, spec)
    assert torch.equal(scale_of(some, "k"), shared[0])
    assert some.smoothing("v") is None
    alone, _ = calibrated("w8a8_smoothquant_unshared", spec)
    largest = scale_of(alone, "viewed")
    assert torch.equal(largest, shared[0])  # its weights are the largest
    assert bool((scale_of(alone, "q") > largest).all())


def test_what_was_found_is_passed_on() -> None:
    """Another process that is given the state gives the same outputs."""
    spec, call = one_linear()
    calibration, simulator = calibrated("w8a8_percentile_smoothquant", spec)
    schemes = scheme_named("w8a8_percentile_smoothquant", "x")
    again = Calibration.from_state(schemes, calibration.reached, calibration.refused, calibration.state())
    assert torch.equal(Simulator(schemes, again).output("0", call), simulator.output("0", call))


def planted(outlier: float) -> ModelSpec:
    """Return a language model whose norms stretch three channels and whose next layers undo it: its outputs stay."""
    spec = ARCHITECTURES["llama"].spec()
    assert isinstance(spec.model, nn.Module)
    with torch.no_grad():
        for layer in spec.model.get_submodule("model.layers").children():
            for norm, readers in (
                ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
            ):
                channels = torch.tensor([2, 11, 17])
                layer.get_parameter(f"{norm}.weight")[channels] *= outlier
                for reader in readers:
                    layer.get_parameter(f"{reader}.weight")[:, channels] /= outlier
    return spec


def nmse(spec: ModelSpec, scheme: str, ops: str = "") -> dict[str, float]:
    """Measure ops whose names end so, and the whole model."""
    assert isinstance(spec.model, nn.Module)
    model = calibrate(spec, list_ops(spec.model), scheme, engine="replay", divergence=False)
    results = [model.score(op, ["isolated"]) for op in list_ops(spec.model) if op.name.endswith(ops)] + [model.total()]
    return {result.op: (result.isolated or {})["nmse"] or 0.0 for result in results}


@pytest.mark.parametrize("scheme", ["w8a8_static", "w8a8_dynamic"])
def test_outlier_channels_lose_their_effect(scheme: str) -> None:
    """The paper's claim: a few channels a hundred times as large as others break W8A8; smoothed, they do not."""
    plain = nmse(ARCHITECTURES["llama"].spec(), scheme, "q_proj")
    broken = nmse(planted(100.0), scheme, "q_proj")
    smoothed = nmse(planted(100.0), f"{scheme}_smoothquant", "q_proj")
    assert plain.keys() == broken.keys() == smoothed.keys()
    assert len(plain) > 1
    for op, value in broken.items():
        assert value > 20 * plain[op], op
        assert smoothed[op] < value / 20, op


def test_ops_that_are_not_smoothed() -> None:
    """Convolutions are left as they are, with the reason; embeddings are rounded as ever."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 8), nn.Conv1d(5, 5, 3, padding=1), nn.Linear(8, 4)).eval()
    ids = torch.randint(0, 9, (2, 5))
    spec = ModelSpec(model, [{"input": ids}], [{"input": ids}], lambda out, _: out)
    found = calibrate(spec, list_ops(model), "w8a8_smoothquant", divergence=False)
    results = {op.name: found.score(op, ["isolated"]) for op in list_ops(model)}
    assert [result.status for result in results.values()] == ["measured", "unquantizable", "measured"]
    reason = "w8a8_smoothquant scales the input features of linear layers, and a conv1d is none"
    assert results["1"].reason == reason
    plain = calibrate(spec, list_ops(model), "w8a8", divergence=False).score(list_ops(model)[0], ["isolated"])
    assert plain.isolated == results["0"].isolated
