"""Gates widened by chance: how wide, and what is said where chance decides."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_qsens.noise import SEEDS, spread
from pytest_qsens.samples import standard_error
from pytest_qsens.thresholds import Verdict, judge, parse_fail
from pytest_qsens.uncertainty import allowance

if TYPE_CHECKING:
    from pytest_qsens.results import Scores


def verdict(fail: str, old: Scores, new: Scores, *, other_data: bool = False) -> Verdict:
    """Judge scores of mode ``fallback``."""
    return judge(old, new, parse_fail(fail), "fallback", other_data=other_data)


def test_draws_of_one_op_rarely_differ_by_more() -> None:
    """Two equal ops, of which one is measured four times: 95 % of the differences of single draws are within."""
    draw = np.random.default_rng(0)
    inside = 0
    for _ in range(4000):
        old, *new = draw.normal(10, 1, 2 + len(SEEDS))
        inside += abs(new[0] - old) <= allowance("nmse", old, {"nmse": new[0], "noise": spread(new)}, other_data=False)
    assert 0.93 <= inside / 4000 <= 0.98


def test_samples_of_one_population_rarely_differ_by_more() -> None:
    """Two equal ops on data drawn anew: about 95 % of the differences are within, with as few samples as 12."""
    draw = np.random.default_rng(0)

    def nmse() -> tuple[float, float]:
        energies = draw.lognormal(0, 0.2, 12)
        errors = energies * draw.lognormal(0, 0.4, 12)
        error = standard_error(list(errors), list(energies))
        assert error is not None
        return float(errors.sum() / energies.sum()), error

    inside = 0
    for _ in range(2000):
        (old, _), (new, stderr) = nmse(), nmse()
        scores: Scores = {"nmse": new, "stderr": stderr, "samples": 12}
        inside += abs(new - old) <= allowance("nmse", old, scores, other_data=True)
        assert allowance("nmse", old, scores, other_data=False) == 0
    assert 0.9 <= inside / 2000 <= 0.98


NOISY: Scores = {"nmse": 0.11, "sse": 11.0, "mse": 1.1, "sqnr_db": -10 * math.log10(0.11), "noise": 0.01}
OLD: Scores = {"nmse": 0.1, "sse": 10.0, "mse": 1.0, "sqnr_db": 10.0}


@pytest.mark.parametrize("metric", ["nmse", "sse", "mse", "sqnr_db"])
def test_the_same_error_in_another_unit_is_widened_alike(metric: str) -> None:
    """Ten percent more, with noise that reaches 45 %: equal in every unit; strict, and with less noise, worse."""
    assert verdict(f"{metric}:0", OLD, NOISY).kind == "ok"
    assert len(verdict(f"{metric}:0", OLD, NOISY).within_noise) == 1
    assert verdict(f"{metric}:0 strict", OLD, NOISY).kind == "regressed"
    for noise, kind in ((0.00223, "ok"), (0.00222, "regressed")):  # 0.01 / (3.182 √2) is 0.002222
        assert verdict(f"{metric}:0", OLD, {**NOISY, "noise": noise}).kind == kind


@given(old=st.floats(0, 1), new=st.floats(0, 2), noise=st.floats(0, 0.5), strict=st.booleans())
def test_noise_only_widens(old: float, new: float, noise: float, *, strict: bool) -> None:
    """What passes without it passes with it, better stays no worse than equal, and strict knows none."""
    fail = f"nmse:5%{' strict' * strict}"
    plain, noisy = (
        verdict(fail, {"nmse": old}, {"nmse": new}),
        verdict(fail, {"nmse": old}, {"nmse": new, "noise": noise}),
    )
    assert noisy.kind in (plain.kind, "ok")
    assert bool(noisy.within_noise) == (noisy.kind != plain.kind)
    if strict:
        assert noisy == plain


def test_both_numbers_are_told() -> None:
    """Where chance decides, and where it does not reach far enough: the threshold's limit and noise's."""
    (line,) = verdict("nmse:5%", OLD, NOISY).within_noise
    assert line == "fallback nmse 0.1 → 0.11 (+10.0 %, +5 % is 0.105, noise reaches 0.145)"
    (line,) = verdict("nmse:5%", {"nmse": 0.14}, {**NOISY, "nmse": 0.08}).lines
    assert line == "fallback nmse 0.14 → 0.08 (-42.9 %, -5 % is 0.133, noise reaches 0.0949997)"
    (line,) = verdict("nmse:5%", OLD, {**NOISY, "nmse": 0.2}).lines
    assert line == "fallback nmse 0.1 → 0.2 (+100.0 %, +5 % is 0.105, noise reaches 0.145)"
    (line,) = verdict("nmse:5%", OLD, {**NOISY, "noise": 1e-6}).lines
    assert line == "fallback nmse 0.1 → 0.11 (+10.0 %, limit 0.105 = +5 %)"


def test_gain_has_a_noise_of_its_own() -> None:
    """That of the nmse says nothing of a difference of two; metrics without a known one are not widened."""
    assert verdict("gain:0", {"gain": 1.0}, {"gain": 2.0, "noise": 9.0, "nmse": 1.0}).kind == "regressed"
    assert verdict("gain:0", {"gain": 1.0}, {"gain": 2.0, "gain_noise": 0.3}).kind == "ok"
    assert verdict("kl:0", {"kl": 1.0}, {"kl": 2.0, "nmse": 1.0, "noise": 9.0}).kind == "regressed"


def test_an_error_of_zero() -> None:
    """Nothing recorded and nothing measured: no division, and noise from zero counts as noise."""
    assert verdict(
        "nmse:5%,sqnr_db:1", {"nmse": 0.0, "sqnr_db": None}, {"nmse": 0.0, "sqnr_db": None, "noise": 0.0}
    ) == (Verdict("ok"))
    new: Scores = {"nmse": 1e-6, "sse": 1e-6, "sqnr_db": 60.0, "noise": 1e-6}
    assert verdict("nmse:5%,sse:5%,sqnr_db:1", {"nmse": 0.0, "sse": 0.0, "sqnr_db": None}, new).kind == "ok"


def test_sampling_counts_on_other_data_only() -> None:
    """On the snapshot's own samples the comparison is paired: what differs there is the model."""
    new: Scores = {"nmse": 0.11, "stderr": 0.01, "samples": 100}
    assert verdict("nmse:5%", {"nmse": 0.1}, new).kind == "regressed"
    assert verdict("nmse:5%", {"nmse": 0.1}, new, other_data=True).kind == "ok"
    assert verdict("nmse:5% strict", {"nmse": 0.1}, new, other_data=True).kind == "regressed"
