"""Schemes of keys and values: their names, what of them can be simulated, and the numbers of compressed-tensors."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp
from hypothesis import given
from hypothesis import strategies as st
from llmcompressor.observers import Observer
from torch import Tensor

from pytest_qsens import QsensError
from pytest_qsens.configs.simulated import simulated_as
from pytest_qsens.graph.calls import of_state
from pytest_qsens.ops import CACHED, Op
from pytest_qsens.quant.calibration import Calibration
from pytest_qsens.quant.obstacles import obstacles
from pytest_qsens.quant.op_scheme import FLOATS, INTEGERS, ActivationScheme, OpScheme, named, parse
from pytest_qsens.quant.schemes import CACHE_SCHEMES, SCHEMES, scheme_named
from pytest_qsens.quant.simulate import Simulator
from pytest_qsens.quant.state_range import StateRange

HEADS, DIM = 3, 32
ARGS = {"num_bits": 8, "symmetric": True}


@st.composite
def states(draw: st.DrawFn) -> Tensor:
    """Return ``(2, 3 heads, 5 tokens, 32)``: seeded values, heads and features some powers of ten apart, some zero."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    values = torch.randn(2, HEADS, 5, DIM, generator=generator)
    values *= 10.0 ** torch.randint(-3, 4, (HEADS, 1, DIM), generator=generator)
    values[:, draw(st.integers(0, HEADS - 1)), : draw(st.integers(0, 5))] = 0
    return values


@st.composite
def cache_schemes(draw: st.DrawFn) -> OpScheme:
    """Return any scheme of keys and values that there are words for."""
    granularity = draw(st.sampled_from(["tensor", "head", "channel", "token", "group"]))
    size = (draw(st.sampled_from([8, 16, 32, 64])),) if granularity == "group" else ()
    dtype, kind = draw(st.sampled_from([*INTEGERS, *FLOATS])), draw(st.sampled_from(["static", "dynamic", "local"]))
    observer = "moving_average" if kind != "dynamic" and draw(st.booleans()) else ""
    cache = ActivationScheme(dtype, kind, granularity, size, draw(st.booleans()), observer)
    return OpScheme(None, cache=cache, queries=draw(st.booleans()))


def rounded(seen: Tensor, x: Tensor, name: str) -> Tensor:
    """Round keys, after calibration has seen some."""
    scheme = scheme_named(name, "test")
    calibration = Calibration(scheme)
    half = seen.shape[0] // 2
    for part in (seen[:half], seen[half:]):  # in two batches
        calibration.observe("op", of_state("k", part), part)
    again = Calibration.from_state(scheme, calibration.reached, calibration.refused, calibration.state())
    found = Simulator(scheme, again).output("op", of_state("k", x))
    same = Simulator(scheme, calibration).output("op", of_state("k", x))
    assert torch.allclose(found, same, rtol=0, atol=0, equal_nan=True)
    return found


@given(scheme=cache_schemes())
def test_one_name_for_each_scheme(scheme: OpScheme) -> None:
    """A name means its scheme and no other; whether it can be simulated is said of every one."""
    assert parse(scheme.name) == scheme
    reasons = obstacles(scheme)
    name, reason = simulated_as(scheme, Op("a:k", "k"))
    assert (simulated_as(scheme, Op("a:q", "q"))[0] == name) == (scheme.queries or bool(reasons))
    assert (name, reason) == ((scheme.name, "") if not reasons else (None, "; ".join(reasons)))
    for op_type in ("linear", "embedding", "conv2d"):
        assert simulated_as(scheme, Op("a", op_type))[0] is None


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("kv_fp8", ActivationScheme("fp8_e4m3", "static", "tensor")),
        ("kv_fp8_head", ActivationScheme("fp8_e4m3", "static", "head")),
        ("kv_int8_channel", ActivationScheme("int8", "static", "channel")),
        ("kv_int8_dynamic", ActivationScheme("int8", "dynamic", "token")),
        ("kv_int4_dynamic_g32_asym", ActivationScheme("int4", "dynamic", "group", (32,), symmetric=False)),
        ("kv_int8_moving_average", ActivationScheme("int8", "static", "tensor", observer="moving_average")),
        ("kv_nvfp4_local", ActivationScheme("nvfp4", "local", "group", (16,))),
    ],
)
def test_names(name: str, cache: ActivationScheme) -> None:
    """The usual ones are written as documented."""
    assert named(name, "test") == OpScheme(None, cache=cache)


def test_layers_and_caches_are_apart() -> None:
    """Every usual scheme means either; the other kind of op is left as it is, and that is said."""
    for name, scheme in {**SCHEMES, **CACHE_SCHEMES}.items():
        assert scheme.name == name
        assert {scheme.means(kind) for kind in CACHED} == {name in CACHE_SCHEMES}
        assert scheme.means("q") == name.startswith("attn_")
        assert scheme.means("linear") == scheme.means("embedding") == (name in SCHEMES)
        other = "linear" if name in CACHE_SCHEMES else "k"
        assert f"{name} leaves" in str(scheme.refusal(other))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("kv_nvfp4", "static keys and values are nvfp4 (simulated for nvfp4: dynamic or local)"),
        ("kv_fp8_local", "scales of two kinds"),
        ("kv_fp8_asym", "zero points"),
        ("kv_nvfp4_local_moving_average", "are found by moving_average (simulated: by minmax)"),
        ("kv_int16", "keys and values are int16"),
        ("kv_int8_dynamic_head", "dynamic keys and values have a scale per head"),
        ("kv_int8_token", "static keys and values have a scale per token (simulated for int8: per tensor, head or"),
    ],
)
def test_what_cannot_be_simulated_says_why(name: str, reason: str) -> None:
    """An error names the property."""
    with pytest.raises(QsensError, match="cannot be simulated") as error:
        scheme_named(name, "scheme")
    assert reason in str(error.value)


@given(seen=states())
@pytest.mark.parametrize("granularity", ["tensor", "head"])
def test_moving_averages_are_those_of_llm_compressor(granularity: Literal["tensor", "head"], seen: Tensor) -> None:
    """Its observer ``minmax``, which it takes where none is named, sees the two batches as ours does."""
    strategy = "attn_head" if granularity == "head" else "tensor"
    args = QuantizationArgs(type="float", strategy=strategy, **ARGS)
    observer = Observer.load_from_registry("minmax", base_name="k", args=args)
    ours = StateRange(ActivationScheme("fp8_e4m3", "static", granularity, observer="moving_average"))
    for part in seen:
        observer(part[None])
        ours.observe(part[None])
    low, high = ours.extremes(DIM)
    torch.testing.assert_close(low.flatten(), observer.min_vals.flatten().clamp(max=0))
    torch.testing.assert_close(high.flatten(), observer.max_vals.flatten().clamp(min=0))


@given(seen=states(), x=states())
@pytest.mark.parametrize(("granularity", "dims"), [("tensor", (0, 1, 2, 3)), ("head", (0, 2, 3)), ("channel", (0, 2))])
def test_static_e4m3_is_that_of_compressed_tensors(
    granularity: str, dims: tuple[int, ...], seen: Tensor, x: Tensor
) -> None:
    """Bit for bit, with its scales; also beyond what calibration has seen."""
    args = QuantizationArgs(type="float", **ARGS)
    scale, zero_point = calculate_qparams(seen.amin(dims, keepdim=True), seen.amax(dims, keepdim=True), args)
    expected = fake_quantize(x, scale, zero_point, args)
    name = "kv_fp8" if granularity == "tensor" else f"kv_fp8_{granularity}"
    assert torch.equal(rounded(seen, x, name), expected)


@given(seen=states(), x=states())
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("granularity", "dims"), [("tensor", (0, 1, 2, 3)), ("head", (0, 2, 3)), ("channel", (0, 2))])
def test_static_integers_are_those_of_compressed_tensors(
    granularity: str,
    dims: tuple[int, ...],
    symmetric: bool,
    seen: Tensor,
    x: Tensor,
) -> None:
    """The same integers, but where a value lies half way between two, as it multiplies by the inverse of the scale."""
    args = QuantizationArgs(type="int", num_bits=8, symmetric=symmetric)
    scale, zero_point = calculate_qparams(seen.amin(dims, keepdim=True), seen.amax(dims, keepdim=True), args)
    expected = fake_quantize(x, scale, zero_point, args)
    name = f"kv_int8{'' if granularity == 'tensor' else f'_{granularity}'}{'' if symmetric else '_asym'}"
    steps = (rounded(seen, x, name) - expected) / scale
    between = (x / scale + zero_point.float()) % 1
    if not symmetric:  # of zeros alone it makes the zero point of 0 / 0; one may lie half way between two, too
        zero = seen.amin(dims, keepdim=True).clamp(max=0) / scale
        told = (seen.abs().amax(dims, keepdim=True) > 0) & (((zero % 1) - 0.5).abs() > 1e-3)
        steps = steps.where(told, 0)
    assert bool((steps.abs() <= 1 + 1e-3).all())
    assert bool((((between - 0.5).abs() < 1e-3) | (steps.abs() < 1e-3)).all())


@given(x=states())
def test_dynamic_e4m3_is_that_of_compressed_tensors(x: Tensor) -> None:
    """Per tensor, bit for bit."""
    args = QuantizationArgs(type="float", strategy="tensor", dynamic=True, **ARGS)
    scale, zero_point = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
    assert torch.equal(rounded(x, x, "kv_fp8_dynamic_tensor"), fake_quantize(x, scale, zero_point, args))


@given(x=states())
def test_dynamic_scales_are_of_one_token_of_one_head(x: Tensor) -> None:
    """Each row of features has a scale of its own: the others change nothing."""
    found = rounded(x, x, "kv_int8_dynamic")
    assert torch.equal(found[1:, 2:, 3:4], rounded(x, x[1:, 2:, 3:4], "kv_int8_dynamic"))
    rows = x.reshape(-1, DIM)
    step = rows.abs().amax(-1, keepdim=True) / 127.5
    assert bool(((found.view_as(rows) - rows).abs() <= step * 0.5001).all())


def test_values_that_are_not_finite() -> None:
    """Rows with some give NaN and move no scale."""
    seen, x = torch.ones(2, HEADS, 5, DIM), torch.full((1, HEADS, 2, DIM), 0.3)
    seen[0, 0, 0, 0] = torch.inf
    x[0, 0, 1, 2] = torch.nan
    for name in ("kv_fp8", "kv_fp8_head", "kv_int8_channel", "kv_int8_dynamic", "kv_nvfp4_local"):
        found = rounded(seen, x, name)
        assert bool(found[0, 0, 1].isnan().all())
        assert int(found.isnan().sum()) == DIM
        assert torch.allclose(found[0, 1], x[0, 1], rtol=0.2)
