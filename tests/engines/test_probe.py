"""Engine probe: what it estimates, what it measures, and that it says which is which."""

from __future__ import annotations

import math
import pickle
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from pytest_qsens.calibrated import CalibratedModel, calibrate
from pytest_qsens.engines import probe
from pytest_qsens.estimate import MEASURED, MEASURED_FALLBACK
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.graph.probes import fisher_root, signs
from pytest_qsens.models.spec import ModelSpec
from tests.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pytest_qsens.results import Mode, OpResult


ROOT = Path(__file__).resolve().parents[2]


def scores(spec: ModelSpec, engine: str, mode: Mode = "isolated", **options: Any) -> dict[str, OpResult]:  # noqa: ANN401 - of `calibrate`
    """Score every op."""
    assert isinstance(spec.model, nn.Module)
    ops = list_ops(spec.model)
    model = calibrate(spec, ops, "w8a8", engine=engine, **options)
    return {op.name: model.score(op, [mode]) for op in ops}


class Deep(nn.Module):
    """Ten layers with residuals, and what is between them."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(10))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(*, 24)`` to the same shape."""
        for i, layer in enumerate(self.layers):
            x = x + (self.between(layer(x)) if i == 4 else torch.tanh(layer(x)))
        return x


def deep(between: Callable[[Tensor], Tensor] = torch.tanh) -> ModelSpec:
    """Random weights and data."""
    torch.manual_seed(0)
    model = Deep(between).eval().requires_grad_(requires_grad=False)
    batches = [{"x": torch.randn(8, 6, 24)} for _ in range(2)]
    return ModelSpec(model, batches[:1], batches[1:], lambda out, _: out, logits=True)


def test_estimates_are_near_and_marked() -> None:
    """A few ops are measured, with the very scores of engine replay; the others have an interval."""
    found, exact = scores(deep(), "probe"), scores(deep(), "replay")
    measured = [op for op, result in found.items() if result.status == "measured"]
    assert len(measured) == MEASURED
    for op, result in found.items():
        assert result.isolated is not None
        assert exact[op].isolated is not None
        nmse, expected = result.isolated["nmse"], exact[op].isolated["nmse"]
        if op in measured:
            assert nmse == expected
            assert not result.intervals
        else:
            assert result.status == "estimated"
            low, high = result.intervals["isolated"]
            assert low < nmse < high
            assert nmse == pytest.approx(expected, rel=0.6)
            assert result.isolated["kl"] == pytest.approx(exact[op].isolated["kl"], rel=0.8)


def _told(found: Mapping[str, OpResult]) -> list[tuple[Any, ...]]:
    return [(op, r.status, r.isolated, r.intervals) for op, r in found.items()]


def _in_a_process_of_its_own(threads: int) -> list[tuple[Any, ...]]:
    """Estimate in a fresh interpreter, with other random numbers drawn before."""
    script = (
        "import pickle, sys, torch; from tests.engines.test_probe import _told, llama, scores;"
        f"torch.set_num_threads({threads}); torch.randn(7);"
        "sys.stdout.buffer.write(pickle.dumps(_told(scores(llama(), 'probe'))))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, cwd=ROOT)
    found: list[tuple[Any, ...]] = pickle.loads(done.stdout)
    return found


def llama() -> ModelSpec:
    """Two layers with attention, of random weights."""
    return ARCHITECTURES["llama"].spec()


@pytest.mark.filterwarnings("ignore")  # of transformers, about this configuration
def test_the_same_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process draws the same probes and chooses the same ops, to the last bit; other seeds tell otherwise."""
    torch.manual_seed(99)
    one = _told(scores(llama(), "probe"))
    assert _in_a_process_of_its_own(torch.get_num_threads()) == one
    monkeypatch.setattr(probe, "SEED", 1)
    other = _told(scores(llama(), "probe"))
    assert [op for op, *_ in other] == [op for op, *_ in one]
    assert other != one


@pytest.mark.parametrize("name", ["llama", "gemma3", "vit", "whisper"])
@pytest.mark.filterwarnings("ignore")  # of transformers, about these configurations
def test_divergence_of_true_architectures(name: str) -> None:
    """The divergence is estimated, too: ops come in about its order, and half are within a factor of 1.5."""
    found, exact = scores(ARCHITECTURES[name].spec(), "probe"), scores(ARCHITECTURES[name].spec(), "replay")
    pairs = [
        (result.isolated["kl"], expected)
        for op, result in found.items()
        if result.status == "estimated" and result.isolated and (expected := (exact[op].isolated or {}).get("kl"))
    ]
    assert len(pairs) >= len(found) - MEASURED - 2
    assert statistics.median(abs(math.log(one / other)) for one, other in pairs) < math.log(1.5)
    assert spearmanr([one for one, _ in pairs], [other for _, other in pairs]).statistic > 0.8


@pytest.mark.parametrize("name", ["llama", "gemma3", "bert", "t5"])
@pytest.mark.filterwarnings("ignore")  # of transformers, about these configurations
def test_fallback_of_true_architectures(name: str) -> None:
    """With everything else quantized, intervals hold most exact values, and are narrower than the range of them."""
    found, exact = (
        scores(ARCHITECTURES[name].spec(), engine, "fallback", divergence=False) for engine in ("probe", "replay")
    )
    values = {op: float((result.fallback or {})["nmse"] or 0) for op, result in exact.items() if result.fallback}
    intervals = {op: result.intervals["fallback"] for op, result in found.items() if result.intervals}
    assert len(intervals) >= len(values) - MEASURED_FALLBACK - 2
    inside = [low <= values[op] <= high for op, (low, high) in intervals.items()]
    assert sum(inside) >= 0.7 * len(inside)
    widths = [high - low for low, high in intervals.values()]
    assert statistics.median(widths) < max(values.values()) - min(values.values())


def test_estimates_are_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over seeds, what is not corrected has the exact value as its mean, within what rounding errors vary by."""
    exact = scores(deep(), "delta")
    total: dict[str, float] = {}
    seeds = 12
    for seed in range(seeds):
        monkeypatch.setattr(probe, "SEED", 1000 * seed)
        engine: Any = calibrate(deep(), list_ops(Deep()), "w8a8", engine="probe")._engine
        with torch.no_grad():
            sums = engine._sum(engine._clean, None, engine._rounding)
        for op, evidence in sums.squares.items():
            total[op] = total.get(op, 0.0) + evidence.free / seeds
    ratios = {op: mean / ((exact[op].isolated or {})["sse"] or 0.0) for op, mean in total.items()}
    assert ratios.keys() == exact.keys()
    assert ratios == pytest.approx(dict.fromkeys(ratios, 1.0), abs=0.3)
    assert statistics.fmean(ratios.values()) == pytest.approx(1, abs=0.1)


def test_probes() -> None:
    """Signs are ±1 and seeded; a Fisher root has a zero sum, and the Fisher information as its mean square."""
    output = torch.randn(3, 5)
    assert set(signs(output, 1).flatten().tolist()) == {-1.0, 1.0}
    assert torch.equal(signs(output, 1), signs(output, 1))
    assert not torch.equal(signs(output, 1), signs(output, 2))
    logits = torch.tensor([[0.5, -1.0, 2.0, 0.0]])
    draws = torch.cat([fisher_root(logits, seed) for seed in range(4000)])
    p = logits.softmax(-1)[0]
    torch.testing.assert_close(draws.sum(-1), torch.zeros(4000), atol=1e-6, rtol=0)
    torch.testing.assert_close(draws.T @ draws / 4000, p.diag() - p.outer(p), atol=0.02, rtol=0)


def test_what_cannot_be_differentiated_is_measured() -> None:
    """Ops before a rounding have the scores of engine delta, and the reason why."""
    found, exact = scores(deep(torch.round), "probe"), scores(deep(torch.round), "delta")
    for i in range(5):
        result = found[f"layers.{i}"]
        assert result.status == "measured"
        assert result.isolated is not None
        assert exact[f"layers.{i}"].isolated is not None
        assert result.isolated["nmse"] == pytest.approx(exact[f"layers.{i}"].isolated["nmse"])
        assert result.reason is not None
        assert "cannot be estimated: the derivative of aten.round" in result.reason


def test_fallback_is_estimated_from_the_quantized_model() -> None:
    """Estimates with everything else quantized have gains, whose sum of signs is no accident."""
    found, exact = scores(deep(), "probe", "fallback"), scores(deep(), "delta", "fallback")
    assert {result.status for result in found.values()} == {"measured", "estimated"}
    inside = [
        low <= (exact[op].fallback or {})["nmse"] <= high  # type: ignore[operator] # a number
        for op, result in found.items()
        for low, high in result.intervals.values()
    ]
    assert len(inside) == len(found) - MEASURED_FALLBACK
    assert sum(inside) >= len(inside) - 1
    assert all("gain" in (result.fallback or {}) for result in found.values())


@pytest.mark.parametrize("name", ["qwen2_5_vl", "whisper", "t5", "gpt2", "resnet"])
@pytest.mark.filterwarnings("ignore")  # of transformers, about these configurations
def test_architectures(name: str) -> None:
    """Every op that can be scored has a score or an estimate near it."""
    found, exact = scores(ARCHITECTURES[name].spec(), "probe"), scores(ARCHITECTURES[name].spec(), "delta")
    ratios, inside = [], []
    for op, result in exact.items():
        if result.isolated is None:
            assert found[op].status == result.status
        elif found[op].status == "estimated":
            values = found[op].isolated
            assert values is not None
            low, high = found[op].intervals["isolated"]
            inside.append(low <= result.isolated["nmse"] <= high)  # type: ignore[operator] # a number
            ratios.append(values["nmse"] / result.isolated["nmse"])  # type: ignore[operator] # numbers
    assert len(ratios) >= len([r for r in exact.values() if r.isolated]) - MEASURED - 2
    assert sorted(ratios)[len(ratios) // 2] == pytest.approx(1, abs=0.3)
    assert sum(inside) >= 0.65 * len(inside)


def test_the_total_is_measured() -> None:
    """The model with everything quantized has no estimate."""
    model: CalibratedModel = calibrate(deep(), list_ops(Deep()), "w8a8", engine="probe")
    assert model.total().status == "measured"
