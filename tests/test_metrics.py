"""Distances between outputs, on values that another tool publishes."""

from __future__ import annotations

import math

import pytest
import torch

from pytest_qsens.metrics import Score, energy, same


@pytest.mark.parametrize(
    ("reference", "quantized", "nmse"),
    [
        ([2.0, 1.0, -1.0], [-2.0, 4.0, 1.0], 4.833333),
        ([-2.0, 4.0, 1.0], [2.0, 1.0, -1.0], 1.380952),
        ([2.0, 1.0, -1.0], [2.0, 1.0, -1.0], 0.0),
    ],
)
def test_nmse_is_nncfs_normalised_mse(reference: list[float], quantized: list[float], nmse: float) -> None:
    """``nmse`` divides by the reference's energy, not by the other's: NNCF's tests of its normalised MSE hold."""
    score = Score(logits=False)
    score.add(torch.tensor(reference), torch.tensor(quantized))
    found = score.related(energy(torch.tensor(reference)), len(reference))
    assert found is not None
    assert found["nmse"] == pytest.approx(nmse, abs=1e-6)


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        ([1.0, math.nan], [1.0, math.nan], True),
        ([1.0, math.nan], [math.nan, 1.0], False),
        ([1.0, math.inf], [1.0, torch.finfo(torch.float32).max], False),
        ([1.0, 2.0], [1.0, 2.0 + 2**-22], False),
    ],
)
def test_same_means_every_bit(left: list[float], right: list[float], *, equal: bool) -> None:
    """NaN equals NaN in the same place, and infinity nothing but itself."""
    assert same(torch.tensor(left), torch.tensor(right)) is equal
