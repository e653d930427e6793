"""How far scores move in their last digits: the laws, and what every engine makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pytest_qsens.calibrated import CalibratedModel, calibrate
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.models.spec import ModelSpec
from pytest_qsens.noise import RELATIVE, SEEDS, distinguishable, perturbed, spread
from pytest_qsens.uncertainty import STUDENT_T
from tests.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from pytest_qsens.results import OpResult

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
draws = st.lists(st.integers(-1000, 1000).map(lambda n: n / 8), min_size=4, max_size=4)


@given(shapes, st.sampled_from([torch.float32, torch.float64]), st.integers(0, 2**31))
def test_shape_and_dtype_stay(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    """Moved values can stand in for the ones they come from, and those are not written to."""
    value = torch.ones(shape, dtype=dtype)
    moved = perturbed(value, seed)
    assert (moved.shape, moved.dtype) == (value.shape, value.dtype)
    assert torch.equal(value, torch.ones(shape, dtype=dtype))


@given(st.integers(0, 2**31))
def test_seed_decides(seed: int) -> None:
    """The same seed moves alike, whatever random numbers were drawn before, and takes none of the caller's."""
    value = torch.linspace(-2, 2, 64)
    state = torch.get_rng_state()
    first = perturbed(value, seed)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, perturbed(value, seed))
    assert not torch.equal(first, perturbed(value, seed + 1))


@given(st.integers(0, 2**31))
def test_only_last_digits_move(seed: int) -> None:
    """Every element moves by a few millionths of itself; zero stays."""
    value = torch.tensor([0.0, 1e-30, -1.0, 1e30])
    moved = perturbed(value, seed)
    assert moved[0] == 0
    assert bool(((moved - value).abs() <= 8 * RELATIVE * value.abs()).all())


@given(draws, st.integers(-20, 20))
def test_unit_does_not_matter(values: list[float], exponent: int) -> None:
    """Whether differences can be told apart does not depend on the unit, and the spread scales with it."""
    scaled = [value * 2.0**exponent for value in values]
    assert distinguishable(scaled) == distinguishable(values)
    assert spread(scaled) == pytest.approx(spread(values) * 2.0**exponent)


@given(draws)
def test_sign_does_not_matter(values: list[float]) -> None:
    """The test is two-sided."""
    assert distinguishable([-value for value in values]) == distinguishable(values)


@given(st.floats(-1e6, 1e6))
def test_equal_draws(value: float) -> None:
    """Where nothing moves, any difference from zero is real, and zero is none."""
    same = [value] * (1 + len(SEEDS))
    assert spread(same) == 0
    assert distinguishable(same) == (value != 0)


def test_quantile_belongs_to_the_number_of_seeds() -> None:
    """Student's t has as many degrees of freedom as there are draws less one."""
    stats = pytest.importorskip("scipy.stats")
    assert pytest.approx(stats.t.ppf(0.975, len(SEEDS)), abs=5e-4) == STUDENT_T


def scored(spec: ModelSpec, engine: str) -> tuple[CalibratedModel, list[OpResult]]:
    """Score every op in both modes."""
    assert isinstance(spec.model, nn.Module)
    ops = list_ops(spec.model)
    model = calibrate(spec, ops, "w8a8", engine=engine)
    return model, [model.score(op, ["isolated", "fallback"]) for op in ops]


def test_engines_agree_on_noise() -> None:
    """Replaying, running eagerly and torch's own kernels move the same values alike: noise is equal bit for bit."""
    found: dict[str, Any] = {}
    for engine in ("replay", "eager", "fx"):
        _, results = scored(ARCHITECTURES["llama"].spec(), engine)
        found[engine] = [(r.op, r.isolated, r.fallback) for r in results]
        for result in results:
            assert result.isolated is not None
            assert result.fallback is not None
            assert not {"noise", "distinguishable", "gain"} & result.isolated.keys()
            assert (result.fallback["noise"] or 0) > 0
            assert result.fallback["distinguishable"] in (True, False)
    assert found["replay"] == found["eager"] == found["fx"]


def test_some_gains_are_noise_and_some_are_not() -> None:
    """On a model with images both are found."""
    _, results = scored(ARCHITECTURES["qwen2_5_vl"].spec(), "fx")
    assert {result.fallback["distinguishable"] for result in results if result.fallback} == {False, True}


def test_noise_alone_is_rarely_taken_for_a_gain() -> None:
    """Of draws around zero one in twenty is, as the level says; of draws around five deviations nearly all are."""
    generator = torch.Generator().manual_seed(0)
    trials = torch.randn(20000, 1 + len(SEEDS), generator=generator, dtype=torch.float64)
    false_alarms = sum(map(distinguishable, trials.tolist())) / len(trials)
    assert false_alarms == pytest.approx(0.05, abs=0.005)
    found = sum(map(distinguishable, (trials + 5).tolist())) / len(trials)
    assert found > 0.99


class Steps(nn.Module):
    """An output that its last digits do not change."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Round the output to whole numbers."""
        out: Tensor = (16 * self.second(self.first(x))).round()
        return out


@pytest.mark.parametrize("engine", ["replay", "eager"])
def test_no_noise(engine: str) -> None:
    """Where every draw is the same, noise is zero, and a gain is told apart if there is one."""
    torch.manual_seed(0)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    spec = ModelSpec(Steps().eval(), [{"x": x}], [{"x": x}], lambda out, _: out)
    _, results = scored(spec, engine)
    assert len(results) == 2
    for result in results:
        assert result.fallback is not None
        assert result.fallback["noise"] == 0
        assert result.fallback["distinguishable"] == (result.fallback["gain"] != 0)


def test_failing_draw_gives_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a moved run has no score, the score stays and nothing is said about its noise."""
    spec = ARCHITECTURES["llama"].spec()
    assert isinstance(spec.model, nn.Module)
    ops = list_ops(spec.model)
    model = calibrate(spec, ops, "w8a8", engine="fx")
    joint = model._engine.joint

    def broken(seed: int | None = None) -> Any:  # noqa: ANN401 - an iterator of tensors
        if seed == SEEDS[-1]:
            raise RuntimeError("no")
        return joint(seed)

    def raising(seed: int | None = None) -> Any:  # noqa: ANN401 - an iterator of tensors
        yield from broken(seed)

    monkeypatch.setattr(model._engine, "joint", raising)
    result = model.score(ops[0], ["fallback"])
    assert result.status == "measured"
    assert result.fallback is not None
    assert not {"noise", "distinguishable"} & result.fallback.keys()
