"""Observers of static activations, against torch's own, ModelOpt, ONNX Runtime, and NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.quantization.calibrate import HistogramCollector
from torch import Tensor
from torch.ao.quantization.observer import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    ObserverBase,
)

from pytest_qsens.graph.calls import Call, unquantized
from pytest_qsens.quant.calibration import Calibration
from pytest_qsens.quant.distribution import BINS, Distribution
from pytest_qsens.quant.observer_names import OBSERVERS
from pytest_qsens.quant.observers import observer_of, observer_of_output
from pytest_qsens.quant.op_scheme import ActivationScheme
from pytest_qsens.quant.range_search import FRACTIONS, least_divergence, least_error, of_entropy, of_percentile
from pytest_qsens.quant.schemes import scheme_named
from pytest_qsens.quant.simulate import Simulator
from tests.quant.questions import coarse, distribution, samples
from tests.quant.test_simulate import kernel_weight, randn

if TYPE_CHECKING:
    from collections.abc import Callable

INT8 = [ActivationScheme("int8", "static", "tensor", symmetric=s, observer=o) for s in (False, True) for o in OBSERVERS]
FLOATS = ("minmax", "moving_average", "percentile", "mse")
FP8 = [ActivationScheme("fp8_e4m3", "static", "tensor", observer=o) for o in FLOATS]
VALUES = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


@given(st.lists(VALUES, min_size=1, max_size=60), st.data())
def test_a_distribution_does_not_depend_on_the_parts(values: list[float], data: st.DataObject) -> None:
    """Values in any order and in any number of calls give the counts of all at once."""
    whole, parts = Distribution(), Distribution()
    whole.add(torch.tensor(values))
    shuffled = data.draw(st.permutations(values))
    cut = data.draw(st.integers(0, len(values)))
    for part in (shuffled[:cut], shuffled[cut:]):
        parts.add(torch.tensor(part))
    for key, value in whole.state().items():
        assert torch.equal(parts.state()[key], value), key
    histogram = whole.signed()
    numbers = np.array([value for value in values if value])
    expected, _ = np.histogram(numbers, histogram.edges.numpy())
    inside = histogram.counts.numpy()
    assert inside.sum() == len(numbers) == len(values) - whole.zeros
    if numbers.size and not np.isin(numbers, histogram.edges.numpy()).any():
        assert (inside == expected).all()
    assert whole.folded().counts.sum() == len(numbers)


def test_memory_does_not_grow() -> None:
    """Whatever comes, and however much of it, the state has its size, and the largest value half of the bins."""
    found = Distribution()
    sizes = set()
    for step in range(12):
        found.add(randn(5000, seed=step) * 2.0**step)
        sizes.add(sum(value.nbytes for value in found.state().values()))
    assert len(sizes) == 1
    assert BINS / 2 < len(found.folded().counts) <= BINS


@pytest.mark.parametrize("activation", [*INT8, *FP8], ids=str)
def test_what_was_seen_is_passed_on(activation: ActivationScheme) -> None:
    """Another process that is given the state goes on from it."""
    one, other = observer_of(activation), observer_of(activation)
    one.observe(randn(7, 40))
    other.restore({key: value.clone() for key, value in one.state().items()})
    for observer in (one, other):
        observer.observe(randn(7, 40, seed=1) * 3)
    if activation.dtype == "int8":
        assert one.qparams() == other.qparams()
    else:
        assert one.largest() == other.largest() > 0


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("minmax", MinMaxObserver),
        ("moving_average", MovingAverageMinMaxObserver),
        ("histogram", HistogramObserver),
    ],
)
def test_torchs_observers_are_torchs(name: str, own: Callable[..., ObserverBase], symmetric: bool) -> None:
    """Scales are those that torch finds with its defaults in the same calls, of inputs and of outputs."""
    activation = ActivationScheme("int8", "static", "tensor", symmetric=symmetric, observer=name)
    for observer, qscheme in (
        (observer_of(activation), torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine),
        (observer_of_output(activation), torch.per_tensor_affine),
    ):
        expected = own(dtype=torch.quint8, qscheme=qscheme)
        for seed in range(4):
            expected(randn(30, 9, seed=seed) * (1 + seed))
            observer.observe(randn(30, 9, seed=seed) * (1 + seed))
        assert observer.qparams() == tuple(float(value) for value in expected.calculate_qparams())


@pytest.mark.parametrize("name", samples())
def test_percentiles_are_numpys_and_onnx_runtimes(name: str) -> None:
    """Within a bin; half of the rest is cut on each side, or all of it by magnitude."""
    values = samples()[name]
    found = distribution(values)
    width = float(found.folded().edges[1])
    low, high = of_percentile(found, 99.0, symmetric=False)
    exact = np.quantile(values.double().numpy(), [0.005, 0.995])
    assert np.abs(exact - [low, high]).max() <= width
    symmetric = of_percentile(found, 99.0, symmetric=True)
    assert symmetric.low == -symmetric.high
    assert abs(symmetric.high - np.quantile(values.double().abs().numpy(), 0.99)) <= width
    collector = HistogramCollector("percentile", False, 2 * BINS, 128, 99.0, "same")
    collector.collect({"x": values.numpy()})
    theirs = collector.compute_collection_result()["x"][:2]
    assert max(abs(float(end) - own) for end, own in zip(theirs, (low, high), strict=True)) <= 2 * width


def test_percentiles_count_zeros() -> None:
    """They are values like others, and never outside of the range."""
    values = torch.cat([torch.zeros(900), torch.linspace(0.001, 1, 100)])
    found = Distribution()
    found.add(values)
    assert of_percentile(found, 80.0, symmetric=True) == (0, 0)
    low, high = of_percentile(found, 98.0, symmetric=False)
    assert low == 0
    assert high == pytest.approx(0.9, abs=0.02)
    found.add(-values)
    low, high = of_percentile(found, 98.0, symmetric=False)
    assert (low, high) == pytest.approx((-0.8, 0.8), abs=0.02)


def brute_force(values: Tensor, low: float, high: float, *, symmetric: bool) -> tuple[float, float, float]:
    """Return the range with the least squared error over the grid of parts of these ends, and that error."""
    largest = max(-low, high)
    ends = [(-f * largest, f * largest) for f in FRACTIONS]
    if not symmetric:
        ends = [(f * low, g * high) for f in (FRACTIONS if low else (1.0,)) for g in (FRACTIONS if high else (1.0,))]
    best = (0.0, 0.0, np.inf)
    for start, end in ends:
        scale = (
            np.float32(end) / np.float32(127.5)
            if symmetric
            else np.float32(np.float32(end) - np.float32(start)) / np.float32(255)
        )
        zero = 128 if symmetric else int(np.clip(-np.round(np.float32(start) / scale), 0, 255))
        rounded = np.clip(np.round(values.numpy() * (np.float32(1) / scale)), -zero, 255 - zero) * scale
        error = float(((rounded - values.numpy()).astype(np.float64) ** 2).sum())
        if error < best[2]:
            best = (start, end, error)
    return best


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", [*samples(), "gelu", "relu"])
def test_the_least_error_is_that_of_all_ranges(name: str, symmetric: bool) -> None:
    """NumPy tries every pair of the grid on the middles of the bins: none is better."""
    values = samples().get(name, samples()["outliers"])
    values = torch.nn.functional.gelu(values) if name == "gelu" else values.relu() if name == "relu" else values
    found = distribution(values)
    observer = observer_of(ActivationScheme("int8", "static", "tensor", symmetric=symmetric, observer="mse"))
    observer.observe(values)
    histogram = found.folded() if symmetric else found.signed()
    used = histogram.counts > 0
    middles = histogram.centers[used].float().repeat_interleave(histogram.counts[used])
    ranges = {}
    for kind, given_values in (("bins", middles), ("values", values)):
        ends = min(found.low, 0.0), max(found.high, 0.0)
        ranges[kind] = brute_force(given_values, *ends, symmetric=symmetric)
    scale, zero_point = observer.qparams()
    rounded = (values / scale).round().clamp(-zero_point, 255 - zero_point) * scale
    own = float((rounded - values).double().square().sum())
    assert own <= ranges["values"][2] * 1.02
    low, high, _ = ranges["bins"]
    reach = high / 127.5 if symmetric else (high - low) / 255
    assert scale == pytest.approx(reach, rel=1e-6)


def test_the_least_error_of_floats() -> None:
    """What is minimized is the error of E4M3, whose steps grow with the values: nothing is cut for it."""
    values = samples()["outliers"]
    observer = observer_of(FP8[-1])
    observer.observe(values)
    largest = float(values.abs().max())
    errors = []
    for fraction in FRACTIONS:
        scale = torch.tensor(fraction * largest) / 448
        rounded = (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        errors.append(float((rounded - values).double().square().sum()))
    own = FRACTIONS.index(min(FRACTIONS, key=lambda fraction: abs(fraction * largest - observer.largest())))
    assert errors[own] <= min(errors) * 1.02


@pytest.mark.parametrize("name", samples())
def test_entropy_cuts_where_modelopt_cuts(name: str, modelopt: dict[str, Any]) -> None:
    """In the same histogram, to the bin."""
    expected = modelopt["kept"][[*samples()].index(name)]
    assert least_divergence(coarse(samples()[name]), 128) == expected


def test_entropy_cuts_outliers() -> None:
    """Not of both sides alike: what is not there is not covered. A coarser search finds what is as good."""
    values = torch.nn.functional.gelu(samples()["outliers"])
    found = distribution(values)
    low, high = of_entropy(found, symmetric=False)
    assert low == pytest.approx(float(values.min()))
    assert 2 < high < 0.6 * float(values.max())
    assert of_entropy(distribution(values.relu()), symmetric=True).high < 0.6 * float(values.max())


@pytest.mark.parametrize("activation", [*INT8, *FP8], ids=str)
@pytest.mark.parametrize(
    "values",
    [torch.zeros(8), torch.full((8,), 1e-38), torch.tensor([1e37, -1e37]), torch.tensor([1.0]), -torch.rand(9)],
)
def test_odd_values(activation: ActivationScheme, values: Tensor) -> None:
    """All zero, tiny, enormous, a single one, none positive: scales are finite, and zero stays zero."""
    observer = observer_of(activation)
    observer.observe(values)
    if activation.dtype == "int8":
        scale, zero_point = observer.qparams()
        assert 0 < scale < np.inf
        assert 0 <= zero_point <= 255
    else:
        assert 0 <= observer.largest() <= float(values.abs().max()) * 1.001


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions")
@pytest.mark.parametrize("name", ["minmax", "moving_average", "percentile", "mse", "entropy"])
def test_products_are_the_kernels_whatever_finds_the_scales(name: str) -> None:
    """An op under ``w8a8_...`` equals torch's int8 kernel with the same scales, to the last bit."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.fail("this torch build has no fbgemm kernels to compare with")
    torch.backends.quantized.engine = "fbgemm"
    call = Call("linear", randn(5, 9, 33, seed=1), randn(16, 33, seed=2), randn(16, seed=3))
    scheme = scheme_named(f"w8a8_{name}", "scheme")
    calibration = Calibration(scheme)
    calibration.observe("op", call, unquantized(call))
    x, y = calibration.input_qparams("op"), calibration.output_qparams("op")
    quantized = torch.quantize_per_tensor(call.x, x.scale, x.zero_point, torch.quint8)
    packed = torch.ops.quantized.linear_prepack(kernel_weight(call.weight), call.bias)
    expected = torch.ops.quantized.linear(quantized, packed, y.scale, y.zero_point).dequantize()
    assert torch.equal(Simulator(scheme, calibration).output("op", call), expected)


@settings(max_examples=30)
@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40), st.booleans())
def test_ranges_are_within_the_extremes(values: list[float], symmetric: bool) -> None:
    """No search covers more than there is, and each covers zero."""
    tensor = torch.tensor(values)
    found = Distribution()
    found.add(tensor)
    low, high = min(0.0, *values), max(0.0, *values)
    low, high = (-max(-low, high), max(-low, high)) if symmetric else (low, high)
    width = float(found.folded().edges[1])
    for of in (
        of_percentile(found, 99.9, symmetric=symmetric),
        of_entropy(found, symmetric=symmetric),
        least_error(found, lambda x, start, end: x.clamp(start, end).expand(len(end), -1).clone(), symmetric=symmetric),
    ):
        assert low - width <= of.low <= 0 <= of.high <= high + width
