"""What ops return under schemes whose products are of what low precision stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp
from torch import Tensor
from torch.nn import functional

from pytest_qsens.graph.calls import Call, unquantized
from pytest_qsens.quant.calibration import Calibration
from pytest_qsens.quant.formats import round_input, round_weight
from pytest_qsens.quant.integers import QuantizedWeight
from pytest_qsens.quant.schemes import SCHEMES, Scheme, scheme_named
from pytest_qsens.quant.simulate import Simulator

FLOAT = [name for name, scheme in SCHEMES.items() if not scheme.is_integer]
OTHERS = ["w8a8_tensor", "w8a8_static_act_sym", "w8a8_dynamic_act_tensor_asym", "w4a8_static_g128", "wfp8a8_dynamic"]
"""Not in the list, but in files of tools, or of parts that meet nowhere else."""


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Return seeded normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(*, bias: bool = True) -> Call:
    """Return a call of a linear layer with 256 features and 96 outputs."""
    return Call("linear", randn(3, 5, 256, seed=1), randn(96, 256, seed=2) / 16, randn(96, seed=3) if bias else None)


def simulator_of(name: str, call: Call, seen: Tensor | None = None) -> tuple[Scheme, Simulator, Calibration]:
    """Calibrate on one input, by default that of the call."""
    scheme = scheme_named(name, "scheme")
    calibration = Calibration(scheme)
    calibration.observe("op", call if seen is None else Call(call.kind, seen, call.weight), unquantized(call))
    return scheme, Simulator(scheme, calibration), calibration


@pytest.mark.parametrize(
    ("name", "preset", "tolerance"),
    [
        ("fp8_dynamic", "FP8_DYNAMIC", 1e-12),
        ("fp8_static_tensor", "FP8", 1e-12),
        ("fp8_dynamic_block128x128_act_g128", "FP8_BLOCK", 1e-12),
        ("w4a16_g128", "W4A16", 1e-4),
        ("w4a16_g128_asym", "W4A16_ASYM", 1e-6),
        ("w4a8_dynamic_g128", "W4A8", 1e-4),
        ("w4afp8_dynamic_g128", "W4AFP8", 1e-4),
    ],
)
def test_linears_equal_those_of_compressed_tensors(name: str, preset: str, tolerance: float) -> None:
    """Weights and activations rounded by its functions give the same product.

    Integers may differ in ties, see `test_formats`, and those of activations by 127 / 127.5 in their scale.
    """
    call = linear()
    arguments = preset_name_to_scheme(preset, ["Linear"])
    assert arguments.weights is not None
    rows, columns = {"channel": (1, 256), "tensor": (96, 256), "group": (1, 128), "block": (128, 128)}[
        str(arguments.weights.strategy)
    ]
    blocks = functional.pad(call.weight, (0, 0, 0, -96 % rows)).unflatten(0, (-1, rows)).unflatten(-1, (-1, columns))  # type: ignore[no-untyped-call]
    scale, zero_point = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), arguments.weights)
    scale, zero_point = (t.view(1) if t.numel() == 1 else t for t in (scale, zero_point))
    weight = fake_quantize(call.weight, scale, zero_point, arguments.weights)
    x, activations = call.x, arguments.input_activations
    if activations is not None:
        if activations.dynamic:
            scale, zero_point = compute_dynamic_scales_and_zp(x, activations, torch.nn.Module())
        else:
            scale, zero_point = calculate_qparams(x.amin(), x.amax(), activations)
        x = fake_quantize(x, scale, zero_point, activations)
    expected = functional.linear(x, weight, call.bias)
    _, simulator, _ = simulator_of(name, call)
    error = float((simulator.output("op", call) - expected).square().sum() / expected.square().sum())
    caused = float((unquantized(call) - expected).square().sum() / expected.square().sum())
    assert error <= tolerance < caused


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", [*FLOAT, *OTHERS])
def test_a_linear_in_all_its_ways(name: str, bias: bool) -> None:
    """Whole, part by part, and for estimates it is the same; rows that are not finite spoil no other."""
    call = linear(bias=bias)
    scheme, simulator, _ = simulator_of(name, call)
    output = simulator.output("op", call)
    weight = simulator._weight("op", call)
    assert not isinstance(weight, QuantizedWeight)
    assert weight.values.element_size() <= 2
    estimated, rounding = simulator.rounded("op", call)
    assert torch.equal(estimated, output)
    assert torch.equal(rounding, simulator.input_error("op", call))
    if not scheme.parts.output:
        offset = None if call.bias is None else call.bias.double()
        product = functional.linear(call.x.double() + rounding, weight.real().double(), offset)
        torch.testing.assert_close(output.double(), product, rtol=1e-5, atol=1e-5)
    assert float((output - unquantized(call)).square().sum() / unquantized(call).square().sum()) < 0.03
    spoiled = call.x.clone()
    spoiled[1, 2] = torch.tensor([torch.nan, torch.inf]).repeat(128)
    for value in (spoiled, spoiled.nan_to_num(torch.inf)):
        with_others = simulator.output("op", Call("linear", value, call.weight, call.bias))
        assert with_others[1, 2].isnan().all()
        finite = torch.ones(3, 5, dtype=torch.bool)
        finite[1, 2] = False
        without = simulator.output("op", Call("linear", call.x[finite], call.weight, call.bias))
        assert torch.equal(with_others[finite], without)
        parts = list(simulator.blocks("op", Call("linear", value, call.weight, call.bias), 64))
        assert [part.shape[-1] for part in parts] == [64, 32]
        assert torch.equal(torch.cat(parts, -1).nan_to_num(), with_others.nan_to_num())


@pytest.mark.parametrize("name", [*FLOAT, *OTHERS])
def test_rows_that_can_go_together(name: str) -> None:
    """Where rows are rounded by themselves, another input beside changes nothing; else it does."""
    call = linear()
    scheme, simulator, _ = simulator_of(name, call)
    assert simulator.is_row_wise("op") == scheme.is_row_wise
    together = Call("linear", torch.stack([call.x, call.x * 3]), call.weight, call.bias)
    assert torch.equal(simulator.output("op", together)[0], simulator.output("op", call)) == scheme.is_row_wise


@pytest.mark.parametrize(
    "name", ["w4a16", "w8a16_tensor", "fp8_static", "fp8_dynamic_tensor_act_tensor", "w8a8_tensor"]
)
@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "conv3d"])
def test_convolutions(name: str, kind: str) -> None:
    """The product is of the rounded input and the rounded kernels, in the layout of the model's own."""
    n = int(kind[4])
    options: dict[str, Any] = {"stride": 2, "padding": 1, "dilation": 1, "groups": 2}
    call = Call(kind, randn(2, 8, *[9] * n), randn(16, 4, *[3] * n, seed=1), randn(16, seed=2), options)
    if kind == "conv2d":
        layout = torch.channels_last
        call = Call(kind, call.x.to(memory_format=layout), call.weight.to(memory_format=layout), call.bias, options)
    scheme, simulator, calibration = simulator_of(name, call)
    output, rounding = simulator.output("op", call), simulator.input_error("op", call)
    assert output.stride() == unquantized(call).stride()
    assert torch.equal(simulator.rounded("op", call)[0], output)
    assert (float(rounding.abs().max()) > 0) == (scheme.parts.activation is not None)
    assert scheme.parts.weight is not None
    weight = round_weight(call.weight.contiguous(), scheme.parts.weight).real().view(call.weight.shape)
    expected = unquantized(Call(kind, call.x + rounding, weight, call.bias, options))
    if scheme.parts.output:
        scale = calibration.output_qparams("op").scale
        assert float((output - expected).abs().gt(scale * 0.51).double().mean()) < 0.01  # past the largest seen
        steps = output / scale
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    else:
        torch.testing.assert_close(output, expected)


def test_scales_from_calibration() -> None:
    """Of floats they are of the largest value seen, of symmetric int8 of the histogram; others are cut off."""
    call, seen = linear(), randn(64, 256, seed=9)
    largest = float(seen.abs().max())
    _, simulator, calibration = simulator_of("fp8_static", call, seen)
    assert calibration.largest_input("op") == largest
    x = torch.cat([call.x[0], torch.full((1, 256), 99.0)])
    assert float((x + simulator.input_error("op", Call("linear", x, call.weight)))[-1].max()) == pytest.approx(largest)
    _, _, symmetric = simulator_of("w8a8_static_act_sym", call, seen)
    scale, zero_point = symmetric.input_qparams("op")
    assert zero_point == 128
    assert 0.5 * largest < scale * 127.5 <= largest * 1.001
    for found in (calibration, symmetric):
        again = Calibration.from_state(found._schemes, found.reached, found.refused, found.state())
        assert torch.equal(
            Simulator(found._schemes, again).output("op", call), Simulator(found._schemes, found).output("op", call)
        )


def test_weights_are_kept_as_others_are() -> None:
    """Within the room for them, by their bytes."""
    call = linear()
    _, simulator, _ = simulator_of("w4a16_g32", call)
    with simulator.passing(96 * 256 - 1):
        assert simulator._weight("op", call) is not simulator._weight("op", call)
    with simulator.passing(96 * 256):
        assert simulator._weight("op", call) is simulator._weight("op", call)
    assert simulator._weight("op", call) is simulator._weight("op", call)


def test_int8_tokens_are_those_of_w8a8_dynamic() -> None:
    """Torch has a primitive for them, whatever the weights are."""
    call = linear()
    dynamic, mixed = (simulator_of(name, call)[1] for name in ("w8a8_dynamic", "w4a8_dynamic_g128"))
    assert torch.equal(dynamic.input_error("op", call), mixed.input_error("op", call))
    asymmetric = scheme_named("w4a8_dynamic_g32_act_asym", "scheme").parts.activation
    assert asymmetric is not None
    assert not torch.equal(round_input(call.x, asymmetric), call.x + mixed.input_error("op", call))
