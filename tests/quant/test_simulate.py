"""The simulation's integers are those of torch's own int8 kernels."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pytest_qsens.graph.calls import Call
from pytest_qsens.quant.calibration import Calibration
from pytest_qsens.quant.integers import quantize_activation, quantize_weight, quantized_embedding
from pytest_qsens.quant.observers import QParams
from pytest_qsens.quant.schemes import SCHEMES
from pytest_qsens.quant.simulate import Simulator
from tests.schemes import INTEGER

# torch announces the end of its quantized tensor types; while they exist, they are the reference
pytestmark = pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions")


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Return seeded normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kernel_weight(weight: Tensor) -> Tensor:
    """Quantize a weight with torch's own per-channel type."""
    scale = quantize_weight(weight).scale
    return torch.quantize_per_channel(weight, scale.double(), torch.zeros(len(scale)).long(), 0, torch.qint8)


@settings(max_examples=50, deadline=None)
@given(scale=st.floats(1e-4, 10), zero_point=st.integers(0, 255), seed=st.integers(0, 1000))
def test_activation_integers(scale: float, zero_point: int, seed: int) -> None:
    """Activation integers equal torch.quantize_per_tensor's."""
    values = randn(1003, seed=seed) * 50 * scale
    expected = torch.quantize_per_tensor(values, scale, zero_point, torch.quint8).int_repr()
    assert torch.equal(quantize_activation(values, QParams(scale, zero_point)), expected.float())


@settings(max_examples=50, deadline=None)
@given(scale=st.floats(1e-4, 10), zero_point=st.integers(0, 255), seed=st.integers(0, 1000))
def test_quantize_after_dequantize_is_the_identity(scale: float, zero_point: int, seed: int) -> None:
    """Rounding what was rounded before changes nothing."""
    qparams = QParams(scale, zero_point)
    once = quantize_activation(randn(257, seed=seed) * 50 * scale, qparams)
    real = (once - zero_point) * torch.tensor(scale)
    assert torch.equal(quantize_activation(real, qparams), once)


def test_weight_integers() -> None:
    """Weight integers equal torch.quantize_per_channel's."""
    weight = randn(64, 3, 7, 7) * torch.rand(64, 1, 1, 1)
    assert torch.equal(quantize_weight(weight).values, kernel_weight(weight).int_repr())


def test_embedding_equals_the_kernel() -> None:
    """Looked-up rows equal embedding_byte's to the last bit."""
    table, indices = randn(100, 64), torch.randint(0, 100, (5, 7))
    observer = torch.ao.quantization.observer.PerChannelMinMaxObserver(
        ch_axis=0, dtype=torch.quint8, qscheme=torch.per_channel_affine_float_qparams
    )
    observer(table)
    scale, zero_point = observer.calculate_qparams()
    quantized = torch.quantize_per_channel(table, scale.float(), zero_point.float(), 0, torch.quint8)
    packed = torch.ops.quantized.embedding_bag_prepack(quantized)
    expected = torch.ops.quantized.embedding_byte(packed, indices, pruned_weights=False)
    assert torch.equal(quantized_embedding(table[indices]), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "conv3d"])
def test_w8a8_equals_the_kernels(kind: str, bias: bool) -> None:
    """An op's output under w8a8 equals torch's int8 kernel with the same scales, to the last bit."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.fail("this torch build has no fbgemm kernels to compare with")
    torch.backends.quantized.engine = "fbgemm"
    offset = randn(16, seed=3) if bias else None
    if kind == "linear":
        call = Call(kind, randn(5, 9, 33, seed=1), randn(16, 33, seed=2), offset)
        plain = torch.nn.functional.linear(call.x, call.weight, call.bias)
    else:
        n = int(kind[4])
        options = {"stride": 2, "padding": 1, "dilation": 1, "groups": 2}
        call = Call(kind, randn(2, 8, *[13] * n, seed=1), randn(16, 4, *[3] * n, seed=2), offset, options)
        plain = getattr(torch.nn.functional, kind)(call.x, call.weight, call.bias, **options)
    calibration = Calibration(SCHEMES["w8a8"])
    calibration.observe("op", call, plain)
    simulated = Simulator(SCHEMES["w8a8"], calibration).output("op", call)

    x, y = calibration.input_qparams("op"), calibration.output_qparams("op")
    quantized = torch.quantize_per_tensor(call.x, x.scale, x.zero_point, torch.quint8)
    if kind == "linear":
        packed = torch.ops.quantized.linear_prepack(kernel_weight(call.weight), offset)
        expected = torch.ops.quantized.linear(quantized, packed, y.scale, y.zero_point)
    else:
        prepack = getattr(torch.ops.quantized, f"{kind}_prepack")
        packed = prepack(kernel_weight(call.weight), offset, [2] * n, [1] * n, [1] * n, 2)
        expected = getattr(torch.ops.quantized, kind)(quantized, packed, y.scale, y.zero_point)
    assert torch.equal(simulated, expected.dequantize())
    assert not torch.equal(simulated, plain)


@pytest.mark.parametrize("scheme", ["w8a8_static", "w8a8_dynamic"])
def test_other_schemes_are_near(scheme: str) -> None:
    """Without output rounding the error is that of 8-bit inputs and weights: small, and not zero."""
    call = Call("linear", randn(64, 256), randn(32, 256, seed=1), randn(32, seed=2))
    plain = torch.nn.functional.linear(call.x, call.weight, call.bias)
    calibration = Calibration(SCHEMES[scheme])
    calibration.observe("op", call, plain)
    error = Simulator(SCHEMES[scheme], calibration).output("op", call) - plain
    assert 1e-6 < float(error.square().sum() / plain.square().sum()) < 1e-3


@pytest.mark.parametrize("channels", [1, 7, 32, 99])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", INTEGER)
def test_channels_by_themselves(scheme: str, bias: bool, channels: int) -> None:
    """Some output channels at a time have the bits of all at once, rows that are not finite included."""
    x = randn(3, 5, 64)
    call = Call("linear", x, randn(32, 64, seed=1), randn(32, seed=2) if bias else None)
    calibration = Calibration(SCHEMES[scheme])
    calibration.observe("op", call, torch.nn.functional.linear(call.x, call.weight, call.bias))
    x[1, 2] = torch.inf
    simulator = Simulator(SCHEMES[scheme], calibration)
    blocks = list(simulator.blocks("op", call, channels))
    assert [block.shape[-1] for block in blocks[:-1]] == [channels] * (len(blocks) - 1)
    whole = simulator.output("op", call)
    assert torch.equal(torch.cat(blocks, -1).nan_to_num(), whole.nan_to_num())
    assert torch.cat(blocks, -1).isnan().all(-1).sum() == whole.isnan().all(-1).sum() == 1


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        *(("linear", scheme) for scheme in INTEGER),
        *((kind, scheme) for kind in ("conv1d", "conv2d") for scheme in ("w8a8", "w8a8_static")),
    ],
)
def test_rounded_for_estimates(kind: str, scheme: str) -> None:
    """It is what is simulated exactly, but for few values in the last integer, and the rounding of the input."""
    if kind == "linear":
        call = Call(kind, randn(5, 9, 33, seed=1), randn(16, 33, seed=2), randn(16, seed=3))
        plain = torch.nn.functional.linear(call.x, call.weight, call.bias)
    else:
        options = {"stride": 1, "padding": 1, "dilation": 1, "groups": 2}
        call = Call(kind, randn(2, 8, *[13] * int(kind[4]), seed=1), randn(16, 4, *[3] * int(kind[4])), None, options)
        plain = getattr(torch.nn.functional, kind)(call.x, call.weight, None, **options)
    calibration = Calibration(SCHEMES[scheme])
    calibration.observe("op", call, plain)
    simulator = Simulator(SCHEMES[scheme], calibration)
    exact, (output, rounding) = simulator.output("op", call), simulator.rounded("op", call)
    assert float((output - exact).abs().gt(1e-4).sum()) <= 0.005 * exact.numel()
    torch.testing.assert_close(rounding, simulator.input_error("op", call))
    if SCHEMES[scheme].needs_ranges:
        qparams = calibration.input_qparams("op")
        real = (quantize_activation(call.x, qparams) - qparams.zero_point) * qparams.scale
        assert float((call.x + rounding - real).abs().gt(1e-4).sum()) <= 0.005 * real.numel()
    assert 0 < float(rounding.abs().max()) < 0.05


@pytest.mark.parametrize("channels", [4, 512])
def test_convolutions_of_any_size_are_exact(channels: int) -> None:
    """Integers are those of a product of integers, whether fp32 holds their sums or not."""
    torch.manual_seed(0)
    x, weight = 1 - torch.rand(2, channels, 9, 9) / 4, 1 - torch.rand(8, channels, 3, 3) / 4
    call = Call("conv2d", x, weight, None, {"stride": 1, "padding": 1, "dilation": 1, "groups": 1})
    calibration = Calibration(SCHEMES["w8a8_static"])
    calibration.observe("op", call, x)
    qparams, quantized = calibration.input_qparams("op"), quantize_weight(weight)
    integers = (quantize_activation(x, qparams) - qparams.zero_point).long()
    columns = torch.nn.functional.unfold(integers.double(), 3, padding=1)
    products = (quantized.values.flatten(1).double() @ columns).view(2, 8, 9, 9)
    assert (products.abs().max() > 2**24) == (channels == 512)
    scale = torch.tensor(qparams.scale) * quantized.scale
    expected = products.float() * scale.view(-1, 1, 1)
    assert torch.equal(Simulator(SCHEMES["w8a8_static"], calibration).output("op", call), expected)


def test_weights_in_passing() -> None:
    """As many are kept as there is room for, until the end; those that were there before stay."""
    calibration, calls = Calibration(SCHEMES["w8a8"]), {}
    for i in range(3):
        calls[f"op{i}"] = Call("linear", randn(4, 8), randn(3, 8, seed=i))
        calibration.observe(f"op{i}", calls[f"op{i}"], torch.nn.functional.linear(randn(4, 8), randn(3, 8, seed=i)))
    simulator = Simulator(SCHEMES["w8a8"], calibration)
    kept = [simulator._weight("op0", calls["op0"])]
    with simulator.passing(24):
        kept += [simulator._weight(op, calls[op]) for op in ("op1", "op2")]
        again = [simulator._weight(op, call) for op, call in calls.items()]
        assert [one is other for one, other in zip(kept, again, strict=True)] == [True, True, False]
    assert [simulator._weight(op, call) is one for (op, call), one in zip(calls.items(), kept, strict=True)] == [
        *(True, False, False)
    ]


def test_long_sums_do_not_overflow() -> None:
    """Sums that do not fit into int32 are exact as well."""
    x, weight = torch.ones(2, 200_000), torch.ones(3, 200_000)
    calibration = Calibration(SCHEMES["w8a8_static"])
    call = Call("linear", x, weight)
    calibration.observe("op", call, x[:, :3])
    scale, zero_point = calibration.input_qparams("op")
    rounded = (quantize_activation(x[:1, :1], QParams(scale, zero_point)) - zero_point) * scale
    expected = float(rounded) * 200_000 * 127 / 127.5  # torch's symmetric scale divides the range by 127.5
    output = Simulator(SCHEMES["w8a8_static"], calibration).output("op", call)
    assert output.flatten().tolist() == pytest.approx([expected] * 6, rel=1e-6)


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE", "DEFAULT"])
def test_integers_do_not_depend_on_the_cpu(instructions: str) -> None:
    """Where torch's int8 product saturates, as without VNNI, another one is used."""
    code = """
import torch
from pytest_qsens.quant.integers import integer_linear
g = torch.Generator().manual_seed(0)
x = torch.randint(-128, 128, (5, 7, 300), generator=g).to(torch.int8)
w = torch.randint(-128, 128, (40, 300), generator=g).to(torch.int8)
assert torch.equal(integer_linear(x, w).long(), x.long() @ w.long().t())
"""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_not_finite_input_stays_so() -> None:
    """NaN is not rounded away into some integer, and spoils no other row."""
    x = randn(4, 8)
    call = Call("linear", x, randn(3, 8, seed=1))
    calibration = Calibration(SCHEMES["w8a8"])
    calibration.observe("op", call, torch.nn.functional.linear(x, call.weight))
    x[1, 2] = torch.nan
    output = Simulator(SCHEMES["w8a8"], calibration).output("op", Call("linear", x, call.weight))
    assert output.isnan().all(-1).tolist() == [False, True, False, False]
    assert output.isfinite().all(-1).tolist() == [True, False, True, True]
