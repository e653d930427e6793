"""Schemes of products of two activations: their names, and what a factor becomes."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pytest_qsens import QsensError
from pytest_qsens.configs.simulated import simulated_as
from pytest_qsens.graph.calls import Call, of_attention, of_state
from pytest_qsens.graph.marks import FACTORS
from pytest_qsens.ops import PRODUCTS, STATES, Op
from pytest_qsens.quant.calibration import Calibration
from pytest_qsens.quant.obstacles import obstacles
from pytest_qsens.quant.op_scheme import FLOATS, INTEGERS, ActivationScheme, OpScheme, named, parse
from pytest_qsens.quant.schemes import PRODUCT_SCHEMES, USUAL, noun, scheme_named
from pytest_qsens.quant.simulate import Simulator


@st.composite
def product_schemes(draw: st.DrawFn) -> OpScheme:
    """Return any scheme of products that there are words for."""
    granularity = draw(st.sampled_from(["tensor", "head", "channel", "token", "group"]))
    size = (draw(st.sampled_from([8, 16, 32])),) if granularity == "group" else ()
    dtype, kind = draw(st.sampled_from([*INTEGERS, *FLOATS])), draw(st.sampled_from(["static", "dynamic", "local"]))
    observer = "moving_average" if kind != "dynamic" and draw(st.booleans()) else ""
    return OpScheme(None, products=ActivationScheme(dtype, kind, granularity, size, draw(st.booleans()), observer))


@st.composite
def factors(draw: st.DrawFn) -> Tensor:
    """Return a factor ``(2, 3, 4, 5)`` of values of many sizes, some rows and columns of zeros."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn(2, 3, 4, 5, generator=generator)
    values *= 10.0 ** torch.randint(-3, 4, (3, 4, 1), generator=generator)
    values[:, :, draw(st.integers(0, 3))] = 0
    values[0, :, :, draw(st.integers(0, 4))] = 0
    return values


def rounded(x: Tensor, kind: str, name: str, seen: Tensor | None = None) -> Tensor:
    """Round a factor, after calibration has seen some."""
    scheme = scheme_named(name, "test")
    calibration = Calibration(scheme)
    calibration.observe("op", of_state(kind, x if seen is None else seen), x)
    again = Calibration.from_state(scheme, calibration.reached, calibration.refused, calibration.state())
    found = Simulator(scheme, again).output("op", of_state(kind, x))
    assert torch.equal(
        found.nan_to_num(9), Simulator(scheme, calibration).output("op", of_state(kind, x)).nan_to_num(9)
    )
    return found


@given(scheme=product_schemes())
def test_one_name_for_each_scheme(scheme: OpScheme) -> None:
    """A name means its scheme and no other; whether it can be simulated is said of every one, and of products alone."""
    assert parse(scheme.name) == scheme
    assert noun(scheme.name) == "scheme"
    reasons = obstacles(scheme)
    for kind in PRODUCTS:
        name, reason = simulated_as(scheme, Op(f"a:{kind}", kind))
        assert (name, reason) == ((scheme.name, "") if not reasons else (None, "; ".join(reasons)))
    for op_type in ("linear", "embedding", "conv2d", *STATES):
        assert simulated_as(scheme, Op("a", op_type))[0] is None


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("bmm_fp8", ActivationScheme("fp8_e4m3", "static", "tensor")),
        ("bmm_int8", ActivationScheme("int8", "static", "tensor")),
        ("bmm_int8_dynamic", ActivationScheme("int8", "dynamic", "token")),
        ("bmm_fp8_dynamic_tensor", ActivationScheme("fp8_e4m3", "dynamic", "tensor")),
        ("bmm_int4_dynamic_asym", ActivationScheme("int4", "dynamic", "token", symmetric=False)),
        ("bmm_int8_moving_average", ActivationScheme("int8", "static", "tensor", observer="moving_average")),
    ],
)
def test_names(name: str, factor: ActivationScheme) -> None:
    """The usual ones are written as documented, and a longer way to say the same is none."""
    assert named(name, "test") == OpScheme(None, products=factor)
    assert parse("bmm_int8_tensor") is parse("bmm_int8_dynamic_token") is None
    assert parse(name.replace("bmm_", "kv_")) == OpScheme(None, cache=factor)


def test_products_and_others_are_apart() -> None:
    """Every usual scheme means products or what is none; the other kind of op is left as it is, and that is said."""
    for name, scheme in USUAL.items():
        assert scheme.name == name
        assert {scheme.means(kind) for kind in PRODUCTS} == {name in PRODUCT_SCHEMES}
        assert not (scheme.means("linear") and scheme.means("k"))
    assert str(scheme_named("bmm_fp8", "test").refusal("linear")) == "bmm_fp8 leaves layers as they are"
    assert "bmm_fp8 leaves queries, keys and values" in str(scheme_named("bmm_fp8", "test").refusal("q"))
    for name in ("w8a8", "kv_fp8", "attn_fp8"):
        assert f"{name} leaves products of two activations" in str(scheme_named(name, "test").refusal("qk"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bmm_mxfp8_dynamic", "factors of products are mxfp8 (simulated: int2 to int8, fp8_e4m3)"),
        ("bmm_nvfp4_local", "factors of products are nvfp4"),
        ("bmm_int16", "factors of products are int16"),
        ("bmm_fp8_asym", "zero points"),
        ("bmm_int8_head", "static factors of products have a scale per head (simulated for int8: per tensor)"),
        ("bmm_int8_dynamic_g32", "have a scale per group of 32 (simulated for int8: per tensor or token)"),
        ("bmm_int8_local", "scales of two kinds"),
    ],
)
def test_what_cannot_be_simulated_says_why(name: str, reason: str) -> None:
    """An error names the property."""
    with pytest.raises(QsensError, match="cannot be simulated") as error:
        scheme_named(name, "scheme")
    assert reason in str(error.value)


@given(x=factors())
@pytest.mark.parametrize(("kind", "dim"), [("left", -1), ("right_rows", -1), ("right", -2)])
def test_dynamic_scales_do_not_change_along_what_is_summed_over(kind: str, dim: int, x: Tensor) -> None:
    """With the bits of compressed-tensors, given a scale for every row, or column; the layout stays."""
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="tensor")
    scale, zero_point = calculate_qparams(x.amin(dim, keepdim=True), x.amax(dim, keepdim=True), args)
    for given_x, its_scale in ((x, scale), (x.mT.contiguous().mT, scale)):
        found = rounded(given_x, kind, "bmm_fp8_dynamic")
        assert torch.equal(found, fake_quantize(x, its_scale, zero_point, args))
        assert found.stride() == given_x.stride()


@given(x=factors(), seen=factors())
@pytest.mark.parametrize("kind", FACTORS)
def test_static_scales_are_of_the_tensor(kind: str, x: Tensor, seen: Tensor) -> None:
    """They are those of the extremes that calibration has seen."""
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="tensor")
    scale, zero_point = calculate_qparams(seen.amin(), seen.amax(), args)
    assert torch.equal(rounded(x, kind, "bmm_fp8", seen), fake_quantize(x, scale, zero_point, args))


@given(x=factors(), bits=st.integers(2, 8))
def test_integers_are_near(x: Tensor, bits: int) -> None:
    """None is further away than half a step, of its row's or column's scale, but the largest, which has no number."""
    for kind, dim in (("left", -1), ("right", -2)):
        step = x.abs().amax(dim, keepdim=True) / ((2**bits - 1) / 2)
        found = rounded(x, kind, f"bmm_int{bits}_dynamic")
        assert bool(((found - x).abs() <= step * 0.5001 + 1e-9).all())
        low, high = x.amin(dim, keepdim=True).clamp(max=0), x.amax(dim, keepdim=True).clamp(min=0)
        found = rounded(x, kind, f"bmm_int{bits}_dynamic_asym")
        assert bool(((found - x).abs() <= (high - low) / (2**bits - 1) * 1.0001 + 1e-9).all())


def test_values_that_are_not_finite() -> None:
    """What is summed up with one gives NaN and moves no scale: rows on the left, columns on the right."""
    seen, x = torch.ones(2, 3, 4), torch.full((1, 2, 3), 0.3)
    seen[0, 0, 0] = torch.inf
    x[0, 1, 2] = torch.nan
    for name in PRODUCT_SCHEMES:
        for kind, lost in (("left", (0, 1)), ("right", (0, slice(None), 2))):
            found = rounded(x, kind, name, seen)
            assert bool(found[lost].isnan().all())
            assert int(found.isnan().sum()) == found[lost].numel()
            assert torch.allclose(found[0, 0, 0], x[0, 0, 0], rtol=0.1)
    vector = torch.tensor([1.0, 0.01, 100.0])
    assert torch.equal(rounded(vector, "right", "bmm_int8_dynamic"), rounded(vector, "left", "bmm_int8_dynamic"))
    assert rounded(torch.empty(0, 3), "left", "bmm_int8_dynamic").shape == (0, 3)


def test_other_schemes_do_not_round_products() -> None:
    """A product that is given such a scheme is refused."""
    calls: list[Call] = [of_state("left", torch.ones(2, 2)), of_attention(*(torch.ones(1, 2, 2) for _ in range(3)))]
    for call in calls:
        calibration = Calibration(scheme_named("w8a8", "test"))
        calibration.observe("op", call, call.x)
        assert calibration.refused == {"op": "w8a8 leaves products of two activations as they are"}
