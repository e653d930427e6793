"""Each proxy equals what a plain computation on stored activations gives."""

from __future__ import annotations

import math
from collections import defaultdict
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pytest_qsens.graph.calls import Call
from pytest_qsens.preparation import observe_all
from pytest_qsens.proxies.functions import PROXIES
from pytest_qsens.proxies.observe import Clock, Observer, rounding_errors
from pytest_qsens.proxies.statistics import FORWARD, Statistics
from pytest_qsens.quant.calibration import Calibration
from pytest_qsens.quant.formats import round_weight
from pytest_qsens.quant.schemes import SCHEMES, scheme_named
from pytest_qsens.quant.simulate import Simulator
from tests.proxies.nets import mixed

if TYPE_CHECKING:
    from pytest_qsens.models.spec import ModelSpec

GROUPS = frozenset({"weight", "weight_uint8"}) | FORWARD
OPS = ("embed", "conv", "up", "twice", "aside")


def collected(spec: ModelSpec) -> tuple[dict[str, Statistics], Simulator]:
    """Collect what the proxies are made from."""
    assert isinstance(spec.model, nn.Module)
    calibration = Calibration(SCHEMES["w8a8"])
    with torch.no_grad():
        observe_all(spec.model, spec.calibration[:1], spec, calibration)
    simulator = Simulator(SCHEMES["w8a8"], calibration)
    observer = Observer(OPS, GROUPS, simulator, Clock())
    observer.run(spec.model, spec.evaluation, spec)
    return observer.found, simulator


@cache
def values() -> dict[str, dict[str, float]]:
    """Proxy → op → value."""
    found, _ = collected(mixed())
    return {
        name: {op: proxy.function(statistics) for op, statistics in found.items()}
        for name, proxy in PROXIES.items()
        if proxy.needs <= GROUPS
    }


@cache
def stored() -> dict[str, list[tuple[Any, Any]]]:
    """Op → inputs and outputs of all of its calls, kept by module hooks, as float64 arrays with the channels last."""
    spec = mixed()
    assert isinstance(spec.model, nn.Module)
    calls: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def keep(name: str) -> Any:  # noqa: ANN401 - a hook
        def hook(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            x, y = args[0], output
            if name == "conv":
                x, y = x.transpose(1, 2), y.transpose(1, 2)
            calls[name].append((x.double().numpy(), y.double().numpy()))

        return hook

    for name in OPS:
        spec.model.get_submodule(name).register_forward_hook(keep(name))
    with torch.no_grad():
        for batch in spec.evaluation:
            spec.model(**batch)
    return dict(calls)


def weight(op: str) -> Any:  # noqa: ANN401 - an array
    """Weight of an op, ``(out, n)``, float64."""
    module = mixed().model
    assert isinstance(module, nn.Module)
    found = module.get_submodule(op).weight
    assert isinstance(found, Tensor)
    return found.double().flatten(1).numpy()


def uint8_error(op: str) -> Any:  # noqa: ANN401 - an array
    """Round to uint8 by the range of each row, in NumPy."""
    w = weight(op)
    low, high = np.minimum(w.min(1), 0)[:, None], np.maximum(w.max(1), 0)[:, None]
    scale = (high - low) / 255
    zero = np.round(-low / scale)
    return (np.clip(np.round(w / scale) + zero, 0, 255) - zero) * scale - w


LINEARS = ("conv", "up", "twice", "aside")


@pytest.mark.parametrize("op", LINEARS)
def test_weight_mse(op: str) -> None:
    """int8, symmetric, by each output channel's largest magnitude; torch scales by half of 255."""
    w = weight(op)
    scale = np.abs(w).max(1, keepdims=True) / 127.5
    error = np.clip(np.round(w / scale), -128, 127) * scale - w
    assert values()["weight_mse"][op] == pytest.approx((error**2).mean(), rel=1e-3)


def test_weight_mse_of_an_embedding() -> None:
    """Rows of a table have a range each, and 8 bits."""
    w = weight("embed")
    scale = (w.max(1, keepdims=True) - w.min(1, keepdims=True)) / 255
    expected = (((np.round((w - w.min(1, keepdims=True)) / scale)) * scale + w.min(1, keepdims=True) - w) ** 2).mean()
    assert values()["weight_mse"]["embed"] == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [("linear", "w8a8"), ("embedding", "w8a8"), ("linear", "fp8_static_tensor"), ("conv1d", "w4a16")],
)
def test_long_weights_are_rounded_in_parts(kind: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts are those of the whole, as the scheme rounds it."""
    table = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    table = table[..., None] if kind == "conv1d" else table
    chosen = scheme_named(scheme, "scheme")
    simulator, call = Simulator(chosen, Calibration(chosen)), Call(kind, table, table)
    ((_, whole),) = rounding_errors(simulator, "op", call)
    if scheme != "w8a8":
        assert chosen.parts.weight is not None
        assert torch.equal(whole, round_weight(table, chosen.parts.weight).real().view(table.shape) - table)
    monkeypatch.setattr("pytest_qsens.proxies.observe._PART", 10)
    parts = list(rounding_errors(simulator, "op", call))
    assert [start for start, _ in parts] == [0, 2, 4, 6]
    assert torch.equal(torch.cat([part for _, part in parts]), whole)


def test_local_output_errors() -> None:
    """The op alone is quantized, on its unquantized input; calls and batches add up."""
    spec = mixed()
    found, simulator = collected(spec)
    del found
    squares: dict[str, float] = defaultdict(float)
    energy: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    from pytest_qsens.graph.capture import run_model
    from pytest_qsens.graph.intercept import OpInterceptor

    def handle(op: str, call: Any, run: Any) -> Tensor:  # noqa: ANN401 - as of a handler
        output: Tensor = run()
        squares[op] += float((simulator.output(op, call) - output).double().square().sum())
        energy[op] += float(output.double().square().sum())
        count[op] += output.numel()
        return output

    assert isinstance(spec.model, nn.Module)
    for batch in spec.evaluation:
        with OpInterceptor(spec.model, handle), torch.no_grad():
            run_model(spec.model, batch, spec.output)
    for op in OPS:
        assert squares[op] > 0
        assert values()["local_output_mse"][op] == pytest.approx(squares[op] / count[op])
        assert values()["local_output_nmse"][op] == pytest.approx(squares[op] / energy[op])


@pytest.mark.parametrize("op", LINEARS)
def test_activation_proxies(op: str) -> None:
    """Norms of rows, and the largest value over the root mean square, of all inputs together."""
    rows = np.concatenate([x.reshape(-1, x.shape[-1]) for x, _ in stored()[op]])
    assert values()["activation_norm"][op] == pytest.approx(np.linalg.norm(rows, axis=1).mean())
    assert values()["activation_outlier_ratio"][op] == pytest.approx(np.abs(rows).max() / np.sqrt((rows**2).mean()))


@pytest.mark.parametrize("op", LINEARS)
def test_criteria_of_nncf(op: str) -> None:
    """Statistics of each call's input over its second last dimension, mean over calls, with the uint8 error."""
    inputs = [x for x, _ in stored()[op]]
    error = uint8_error(op)
    inverse = 1 / ((error**2).mean(1).max() + np.finfo(np.float32).eps)
    expected = {
        "nncf_weight_quantization_error": inverse,
        "nncf_hessian_input_activation": 2 * np.mean([(x**2).mean() for x in inputs]) * np.linalg.norm(error),
        "nncf_mean_activation_variance": np.mean([x.var(-2).mean() for x in inputs]) * inverse,
        "nncf_max_activation_variance": np.mean([x.var(-2).max() for x in inputs]) * inverse,
        "nncf_mean_activation_magnitude": np.mean([np.abs(x).max(-2).mean() for x in inputs]) * inverse,
    }
    for name, value in expected.items():
        assert values()[name][op] == pytest.approx(float(value), rel=1e-3), name


def test_an_embedding_has_no_activations() -> None:
    """Its inputs are indices: no norm, no outliers; in NNCF's criteria with data it is the least sensitive op."""
    for name, of_op in values().items():
        if name in ("activation_norm", "activation_outlier_ratio"):
            assert math.isnan(of_op["embed"])
        elif "activation" in name:
            assert of_op["embed"] == 0
        else:
            assert of_op["embed"] > 0


def test_every_proxy_says_where_it_is_from() -> None:
    """A proxy without a source is somebody's guess."""
    for proxy in PROXIES.values():
        text = proxy.function.__doc__ or ""
        assert any(word in text for word in ("arXiv", "NNCF", "torch.ao")), proxy.name
