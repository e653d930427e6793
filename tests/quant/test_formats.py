"""Codes and scales are those of torchao and compressed-tensors, and numbers those of the OCP tables."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, f32_to_f4_unpacked
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
from torchao.quantization import PerBlock, PerGroup, PerRow, PerTensor
from torchao.quantization.quant_primitives import MappingType
from torchao.quantization.quantize_.workflows.float8.float8_tensor import Float8Tensor
from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor
from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import IntxUnpackedToInt8Tensor

from pytest_qsens.configs.compressed_tensors_arguments import MODES
from pytest_qsens.quant.formats import round_input, round_weight
from pytest_qsens.quant.op_scheme import ActivationScheme, Granularity, WeightScheme
from pytest_qsens.quant.powers_of_two import powers_of_two

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
"""OCP Microscaling Formats v1.0, table 6, the positive half."""


@st.composite
def matrices(draw: st.DrawFn, low: int = -30, high: int = 30) -> Tensor:
    """Return 6 rows of 128 seeded values whose magnitudes are powers of ten apart, some rows and values being zero."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    exponents = draw(st.lists(st.integers(low, high), min_size=6, max_size=6))
    values = torch.randn(6, 128, generator=generator) * torch.tensor([10.0**e for e in exponents])[:, None]
    if draw(st.booleans()):
        values = values * 2.0 ** torch.randint(-9, 1, values.shape, generator=generator)
    values[draw(st.integers(0, 5)), : draw(st.sampled_from([0, 1, 40, 128]))] = 0
    return values


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape and values."""
    return torch.equal(one, other.to(one.dtype))


def activation_of(weight: WeightScheme) -> ActivationScheme:
    """Return the activation scheme that rounds rows as a weight's rows are rounded."""
    granularity = "token" if weight.granularity == "channel" else weight.granularity
    return ActivationScheme(
        weight.dtype, "dynamic", granularity, weight.size, weight.symmetric, scaling_mode=weight.scaling_mode
    )


def rounded(values: Tensor, scheme: WeightScheme) -> Tensor:
    """Round a weight; an input in the same scheme comes out alike."""
    found = round_weight(values, scheme).real()
    if scheme.granularity != "block":
        assert torch.equal(round_input(values, activation_of(scheme)), found)
        assert torch.equal(round_input(values.view(2, 3, 128), activation_of(scheme)), found.view(2, 3, 128))
    return found


@settings(max_examples=60, deadline=None)
@given(matrices(), st.integers(2, 8), st.sampled_from([16, 32, 64, 128]), st.booleans())
def test_integers_equal_torchaos(values: Tensor, bits: int, size: int, symmetric: bool) -> None:
    """Integers, scales and zero points of groups, of any width."""
    scheme = WeightScheme(f"int{bits}", "group", (size,), symmetric)
    mapping = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
    expected: Any = IntxUnpackedToInt8Tensor.from_hp(
        values, (1, size), getattr(torch, f"int{bits}"), mapping_type=mapping
    )
    if bits == 8:  # has the least scale of Int8Tensor, below
        expected = Int8Tensor.from_hp(values, PerGroup(size), mapping)
    found = round_weight(values, scheme)
    assert equal(found.values, expected.qdata)
    assert equal(found.scale, expected.scale)
    if symmetric:
        assert found.zero_point is None
    else:
        assert found.zero_point is not None
        assert equal(found.zero_point, expected.zero_point)
    assert equal(rounded(values, scheme), expected.dequantize())


@settings(max_examples=30, deadline=None)
@given(matrices(), st.sampled_from(["tensor", "channel"]), st.booleans())
def test_int8_channels_equal_torchaos(values: Tensor, granularity: Granularity, symmetric: bool) -> None:
    """Also what is not a group."""
    shared = PerTensor() if granularity == "tensor" else PerRow()
    mapping = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
    expected: Any = Int8Tensor.from_hp(values, shared, mapping)
    scheme = WeightScheme("int8", granularity, (), symmetric)
    assert equal(round_weight(values, scheme).values, expected.qdata)
    assert equal(rounded(values, scheme), expected.dequantize())


@settings(max_examples=30, deadline=None)
@given(matrices(-3, 3), st.sampled_from([32, 128]), st.booleans())
def test_int4_differs_from_compressed_tensors_in_ties_alone(values: Tensor, size: int, symmetric: bool) -> None:
    """It divides where torchao multiplies: no more than the last digit of the quotient can differ."""
    arguments = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=size, symmetric=symmetric)
    groups = values.view(6, -1, size)
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    expected = fake_quantize(values, scale, zero_point, arguments)
    found = round_weight(values, WeightScheme("int4", "group", (size,), symmetric))
    quotient = groups / scale[..., None]
    tied = ((quotient - quotient.floor()) - 0.5).abs() < 1e-5
    differ = (found.real() != expected).view_as(tied)
    assert not bool((differ & ~tied).any())


def test_numbers_of_e2m1() -> None:
    """The numbers of the table stand for themselves; between them it is the nearest, half way the even mantissa."""
    middles = [(one + other) / 2 for one, other in pairwise(E2M1)]
    near = torch.tensor([*E2M1, *middles])
    near = torch.cat([near, near.nextafter(torch.tensor(torch.inf)), near.nextafter(torch.tensor(-torch.inf))])
    blocks = torch.stack([torch.cat([torch.tensor([6.0]), value.repeat(31)]) for value in (*near, *-near)])  # scale 1
    found = round_weight(blocks, WeightScheme("mxfp4", "group", (32,))).real()
    assert found[: len(E2M1), 1].tolist() == E2M1
    assert found[len(E2M1) : len(E2M1) + len(middles), 1].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert torch.equal(found, f4_unpacked_to_f32(f32_to_f4_unpacked(blocks)))


def test_numbers_of_e4m3() -> None:
    """All 254 finite codes stand for what the table says: sign, 4 bits of exponent with bias 7, 3 of mantissa."""
    numbers = []
    for code in range(256):
        exponent, mantissa = code >> 3 & 15, code & 7
        if (exponent, mantissa) != (15, 7):  # NaN
            size = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
            numbers.append(-size if code >> 7 else size)
    values = torch.tensor(numbers)[None]
    assert values.max() == 448
    assert torch.equal(round_weight(values, WeightScheme("fp8_e4m3")).real(), values)
    sorted_numbers = values.unique()
    middles = (sorted_numbers[1:] + sorted_numbers[:-1]) / 2
    found = round_weight(torch.cat([middles, torch.tensor([448.0])])[None], WeightScheme("fp8_e4m3")).real()[0, :-1]
    lower, upper = sorted_numbers[:-1], sorted_numbers[1:]
    assert bool(((found == lower) | (found == upper)).all())
    even = found.to(torch.float8_e4m3fn).view(torch.uint8) & 1
    assert not bool(even.any())


FP8 = {
    "tensor": (PerTensor(), QuantizationArgs(num_bits=8, type="float", strategy="tensor")),
    "channel": (PerRow(), QuantizationArgs(num_bits=8, type="float", strategy="channel")),
    "group": (PerBlock([1, 32]), QuantizationArgs(num_bits=8, type="float", strategy="group", group_size=32)),
    "block": (PerBlock([2, 64]), QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[2, 64])),
}


@settings(max_examples=30, deadline=None)
@given(matrices())
@pytest.mark.parametrize("granularity", FP8)
def test_fp8_equals_torchaos_and_compressed_tensors(granularity: Granularity, values: Tensor) -> None:
    """Whatever shares a scale; the tools agree where it is not of zeros alone, which torchao makes NaN."""
    shared, arguments = FP8[granularity]
    size = {"group": (32,), "block": (2, 64)}.get(granularity, ())
    found = rounded(values, WeightScheme("fp8_e4m3", granularity, size))
    expected: Any = Float8Tensor.from_hp(values, granularity=shared)
    assert equal(found, expected.dequantize().nan_to_num(0))
    rows, columns = {"tensor": (6, 128), "channel": (1, 128), "group": (1, 32), "block": (2, 64)}[granularity]
    blocks = values.view(6 // rows, rows, 128 // columns, columns)
    scale, zero_point = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), arguments)
    scale, zero_point = (t.view(1) if granularity == "tensor" else t for t in (scale, zero_point))
    assert equal(found, fake_quantize(values, scale, zero_point, arguments))


@settings(max_examples=60, deadline=None)
@given(matrices(-33, 36), st.sampled_from(["mxfp8", "mxfp4"]), st.sampled_from(ScaleCalculationMode))
def test_mx_equals_torchaos(values: Tensor, dtype: str, mode: ScaleCalculationMode) -> None:
    """Shared exponents in each mode, the standard's among them, and elements, from small scales to the largest."""
    element = torch.float8_e4m3fn if dtype == "mxfp8" else torch.float4_e2m1fn_x2
    expected: Any = MXTensor.to_mx(values, element, 32, mode)
    scheme = WeightScheme(dtype, "group", (32,), scaling_mode=mode.value)
    found = round_weight(values, scheme)
    exponents = expected.scale.view(torch.uint8).double() - 127
    stored = 2.0 if dtype == "mxfp4" else 1.0
    assert torch.equal(found.scale.double() * stored, 2.0**exponents)
    assert equal(rounded(values, scheme), expected.dequantize())


@settings(max_examples=30, deadline=None)
@given(matrices(-20, 20), st.sampled_from(["mxfp8", "mxfp4"]))
def test_modes_of_compressed_tensors(values: Tensor, dtype: str) -> None:
    """It is EVEN for E2M1, and RCEIL for E4M3, but for magnitudes that are 448 times a power of two."""
    arguments: Any = preset_name_to_scheme(dtype.upper(), ["Linear"]).weights
    groups = values.view(6, -1, 32)
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    expected = fake_quantize(values, scale, zero_point, arguments)
    found = rounded(values, WeightScheme(dtype, "group", (32,), scaling_mode=MODES[dtype]))
    fraction = groups.abs().amax(-1).frexp().mantissa
    alike = (fraction * 2 != 448 / 256) if dtype == "mxfp8" else torch.ones_like(fraction, dtype=torch.bool)
    assert torch.equal(found.view_as(groups)[alike], expected.view_as(groups)[alike])
    edge = torch.full((1, 32), 448.0)
    scale, _ = calculate_qparams(-edge.amax(-1, keepdim=True), edge.amax(-1, keepdim=True), arguments)
    own = float(powers_of_two(torch.tensor(448.0), dtype, MODES[dtype]))
    assert float(scale) == (2 * own if dtype == "mxfp8" else own)


@pytest.mark.parametrize("dtype", ["mxfp8", "mxfp4"])
@given(value=st.floats(2.0**-100, 2.0**100, width=32))
def test_rceil_is_the_least_scale_that_clips_nothing(dtype: str, value: float) -> None:
    """Whatever the magnitude; also next to powers of two, where logarithms in fp32 are too coarse."""
    most = 448.0 if dtype == "mxfp8" else 6.0
    scale = float(powers_of_two(torch.tensor(value), dtype, "rceil"))
    assert most * scale / 2 < value <= most * scale
    power = torch.tensor(most * 2.0 ** math.floor(math.log2(value)))
    above = power.nextafter(torch.tensor(torch.inf))
    assert float(powers_of_two(above, dtype, "rceil")) == 2 * float(powers_of_two(power, dtype, "rceil"))
    assert float(powers_of_two(power, dtype, "rceil")) == float(power) / most


def test_modes_of_scales_by_hand() -> None:
    """Largest magnitudes 1.75, 1.9 and 1 in each mode: the exponents are reckoned from the formulas."""
    largest = torch.tensor([1.75, 1.9, 1.0])
    expected = {  # E4M3: 448 = 1.75 * 2^8
        ("mxfp8", ""): [-8, -8, -8],
        ("mxfp8", "rceil"): [-8, -7, -8],
        ("mxfp8", "ceil"): [-7, -7, -8],
        ("mxfp8", "even"): [-8, -8, -8],  # 1.9 is nearer to 1.875 than to 2
        ("mxfp4", ""): [-2, -2, -2],  # E2M1: 6 = 1.5 * 2^2
        ("mxfp4", "rceil"): [-1, -1, -2],
        ("mxfp4", "ceil"): [-1, -1, -2],
        ("mxfp4", "even"): [-1, -1, -2],
    }
    for (dtype, mode), exponents in expected.items():
        assert powers_of_two(largest, dtype, mode).log2().tolist() == exponents, (dtype, mode)


@settings(max_examples=40, deadline=None)
@given(matrices(-6, 6), st.sampled_from([1.0, 0.25, 3.0]))
def test_nvfp4_equals_torchaos(values: Tensor, calibrated: float) -> None:
    """Scales of blocks in E4M3 under one of the tensor, which is dynamic, or from calibration and maybe too small."""
    largest = values.abs().amax()
    expected: Any = NVFP4Tensor.to_nvfp4(values, per_tensor_scale=per_tensor_amax_to_scale(largest))
    assert equal(rounded(values, WeightScheme("nvfp4", "group", (16,))), expected.dequantize())
    largest = largest * calibrated
    expected = NVFP4Tensor.to_nvfp4(values, per_tensor_scale=per_tensor_amax_to_scale(largest))
    local = ActivationScheme("nvfp4", "local", "group", (16,))
    assert equal(round_input(values, local, float(largest)), expected.dequantize())


def test_nvfp4_is_nearly_that_of_compressed_tensors() -> None:
    """It lets scales of blocks be subnormal, and divides: few values of a usual tensor come out otherwise."""
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    arguments = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
    )
    of_tensor = generate_gparam(values.amin(), values.amax())
    groups = values.view(64, -1, 16)
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments, of_tensor)
    expected = fake_quantize(values, scale, zero_point, arguments, of_tensor)
    found = round_weight(values, WeightScheme("nvfp4", "group", (16,))).real()
    assert float((found - expected).abs().gt(1e-6).double().mean()) < 1e-3


SCHEMES = [
    *(WeightScheme(f"int{bits}", "group", (32,), symmetric) for bits in (2, 4, 8) for symmetric in (True, False)),
    WeightScheme("fp8_e4m3"),
    WeightScheme("fp8_e4m3", "tensor"),
    WeightScheme("fp8_e4m3", "block", (4, 32)),
    WeightScheme("mxfp8", "group", (32,)),
    WeightScheme("mxfp4", "group", (32,)),
    *(WeightScheme("mxfp8", "group", (32,), scaling_mode=mode) for mode in ("rceil", "ceil", "even")),
    WeightScheme("mxfp4", "group", (32,), scaling_mode="rceil"),
    WeightScheme("nvfp4", "group", (16,)),
]


@settings(max_examples=20, deadline=None)
@given(matrices(-44, 37), st.integers(0, 2))
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_anything_finite_stays_so(scheme: WeightScheme, values: Tensor, kind: int) -> None:
    """Zeros are zero, also where all are; neither denormal nor huge values turn into what is no number."""
    values = (values, torch.zeros_like(values), values * 1e-38)[kind]
    found = rounded(values, scheme)
    assert bool(found.isfinite().all())
    assert bool((found[values == 0] == 0).all())
    if scheme.symmetric:
        assert torch.equal(rounded(-values, scheme), -found) or scheme.dtype.startswith("int")


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_weight_in_parts(scheme: WeightScheme, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are rounded at a time, in whatever layout and width a weight is stored; so are its channels."""
    weight = torch.randn(96, 7, generator=torch.Generator().manual_seed(0)).to(dtype).t()  # as GPT-2 keeps it
    whole = round_weight(weight.float().contiguous(), scheme)
    monkeypatch.setattr("pytest_qsens.quant.formats._CHUNK", 200)
    parts = round_weight(weight, scheme)
    assert torch.equal(parts.real(), whole.real())
    assert torch.equal(parts.values, whole.values)
    assert torch.equal(torch.cat([part.real() for part in parts.split(3)]), whole.real())
    assert torch.equal(parts.real(torch.empty(7, 96)), whole.real())
    assert parts.values.element_size() <= 2
