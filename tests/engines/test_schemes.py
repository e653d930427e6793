"""Engines agree under schemes whose products are in fp32, and say which ops a scheme leaves as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from pytest_qsens.artifact import Artifact
from pytest_qsens.calibrated import calibrate
from pytest_qsens.engines.delta import tolerance
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.models.spec import ModelSpec
from pytest_qsens.results import MODES, OpResult
from tests.architectures import ARCHITECTURES
from tests.engines.test_delta import assert_alike, stack
from tests.engines.test_odd_models import ChannelsLast

if TYPE_CHECKING:
    from pathlib import Path

SCHEMES = ["w4a16_g32_asym", "fp8_static", "fp8_dynamic_tensor_act_tensor", "mxfp4_dynamic", "nvfp4_local"]


def measured(
    spec: ModelSpec, scheme: str, engine: str, artifact: Artifact | None = None, every: int = 1
) -> dict[str, OpResult]:
    """Score ops in both modes, and the whole model."""
    assert isinstance(spec.model, nn.Module)
    ops = list_ops(spec.model)
    model = calibrate(spec, ops, scheme, engine=engine, divergence=False, artifact=artifact)
    found = {op.name: model.score(op, MODES) for op in ops[::every]} | {"total": model.total()}
    assert model.engine == engine, model.engine_reason
    return found


def scores(results: dict[str, OpResult]) -> list[object]:
    """All that does not depend on the clock."""
    return [(result.op, result.status, result.reason, result.modes) for result in results.values()]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_differences_are_those_of_replays(scheme: str) -> None:
    """Isolated within the tolerance of differences; with all others quantized, the head part by part, the same."""
    fast, exact = (measured(stack()[0], scheme, engine) for engine in ("delta", "replay"))
    assert_alike(fast, exact)
    for op, result in fast.items():
        assert result.status == "measured"
        expected, found = ((results[op].isolated or {})["nmse"] for results in (exact, fast))
        assert found is not None
        assert expected is not None
        assert expected > 0
        assert abs(found - expected) <= tolerance(expected)


@pytest.mark.parametrize("scheme", SCHEMES[2:])
def test_replays_are_the_model_itself(scheme: str) -> None:
    """On a language model, bit for bit."""
    exact, own = (measured(ARCHITECTURES["llama"].spec(), scheme, engine, every=5) for engine in ("replay", "eager"))
    assert scores(exact) == scores(own)
    statuses = {op: (result.status, result.reason) for op, result in exact.items()}
    reason = f"{scheme} leaves embeddings as they are: they are int8, or not quantized"
    assert statuses.pop("model.embed_tokens") == ("unquantizable", reason)
    assert {status for status, _ in statuses.values()} == {"measured"}


CALIBRATED = ["w8a8_mse", "w8a8_smoothquant", "w8a8_dynamic_smoothquant0.8_unshared", "fp8_static_percentile99.9"]


@pytest.mark.parametrize("scheme", CALIBRATED)
def test_what_calibration_finds_is_the_same_for_all_engines(scheme: str, tmp_path: Path) -> None:
    """Replays equal the model, and differences equal replays, in all modes; also with what another has found."""
    place = Artifact(tmp_path / "artifacts" / "one", "k", "tiny")
    exact, own = (measured(ARCHITECTURES["llama"].spec(), scheme, engine, every=3) for engine in ("replay", "eager"))
    assert scores(exact) == scores(own)
    fast = [measured(ARCHITECTURES["llama"].spec(), scheme, "delta", place, every=3) for _ in range(2)]
    assert place.path.exists()
    assert scores(fast[0]) == scores(fast[1])
    assert_alike(fast[1], exact)
    assert {result.status for op, result in exact.items() if op != "model.embed_tokens"} == {"measured"}


@pytest.mark.parametrize("scheme", ["w4a16", "fp8_dynamic_tensor_act_tensor"])
def test_convolutions_with_layouts_of_their_own(scheme: str) -> None:
    """What depends on the layout of a convolution's output goes on as in the model."""

    def spec() -> ModelSpec:
        torch.manual_seed(0)
        data = [torch.randn(2, 3, 6, 6) for _ in range(2)]
        return ModelSpec(ChannelsLast().eval(), [{"x": data[0]}], [{"x": data[1]}], lambda out, _: out)

    fast, exact = (measured(spec(), scheme, engine) for engine in ("delta", "eager"))
    assert {result.status for result in exact.values()} == {"measured"}
    assert_alike(fast, exact)


@pytest.mark.parametrize("engine", ["replay", "eager"])
def test_features_that_no_group_divides(engine: str, tmp_path: Path) -> None:
    """Their op is left alone, with the reason, and all others are measured, whoever has calibrated."""

    def spec() -> ModelSpec:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 64), nn.Linear(64, 8)).eval()
        return ModelSpec(model, [{"input": torch.randn(8, 64)}], [{"input": torch.randn(8, 64)}], lambda out, _: out)

    place = Artifact(tmp_path / "artifacts" / "one", "k", "tiny")
    first, second = (measured(spec(), "w4a8_dynamic_g32", engine, place) for _ in range(2))
    assert scores(first) == scores(second)
    assert {op: result.status for op, result in first.items()} == {
        "0": "measured",
        "2": "unquantizable",
        "3": "measured",
        "total": "measured",
    }
    assert first["2"].reason == (
        "w4a8_dynamic_g32 gives weights a scale per 32 input features, and 40 of them cannot be divided by 32"
    )


def test_estimates_are_near() -> None:
    """Backward passes see what rounding weights, and inputs, does."""
    for scheme in ("w4a16_g32", "mxfp4_dynamic", "w8a8_smoothquant0.7", "w8a8_entropy"):
        spec, ops = stack()
        exact = measured(spec, scheme, "replay")
        model = calibrate(stack()[0], ops, scheme, engine="probe", divergence=False)
        found = {op.name: model.score(op, ["isolated"]) for op in ops}
        assert "estimated" in {result.status for result in found.values()}
        for op, result in found.items():
            ratio = ((result.isolated or {})["nmse"] or 0) / ((exact[op].isolated or {})["nmse"] or 1)
            assert 1 / 3 < ratio < 3, (scheme, op)
