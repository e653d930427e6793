"""Distances between outputs, on values that another tool publishes."""

from __future__ import annotations

import pytest
import torch

from pytest_qsens.metrics import scores


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
    found = scores([(torch.tensor(reference), torch.tensor(quantized))], logits=False)
    assert found is not None
    assert found["nmse"] == pytest.approx(nmse, abs=1e-6)
