"""SmoothQuant's scales are those of Intel Neural Compressor."""

from __future__ import annotations

import pytest
import torch
from neural_compressor.adaptor.torch_utils.waq.utils import cal_scale

from pytest_qsens.quant.smoothing import smoothing_scale


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_scales_of_layers_that_share_an_input(alpha: float) -> None:
    """The largest weight of all counts; a channel that never fires has 1, and one without weights a limit."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(64, generator=generator) * 30
    weights = [torch.randn(16, 64, generator=generator), torch.randn(48, 64, generator=generator) * 3]
    inputs[5] = 0
    for weight in weights:
        weight[:, 9] = 0
    expected = cal_scale(inputs, weights, alpha)
    largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    found = smoothing_scale(inputs, largest, alpha)
    fires = inputs > 0
    assert int(fires.sum()) == 63
    torch.testing.assert_close(found[fires], expected[fires], rtol=1e-5, atol=0)
    assert float(found[5]) == 1
    assert alpha == 0 or float(expected[5]) == 1  # 0 to the power of 0 is 1, and no longer told from others
