"""What proxies are computed from: sums over the evaluation data, one set for each op. No torch needed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Group = Literal["weight", "weight_uint8", "local", "inputs", "hessian", "fisher"]
"""Statistics that are collected together: what a proxy costs is the time of those that it needs."""

FORWARD: frozenset[Group] = frozenset({"local", "inputs"})
"""Groups that need a forward of the evaluation data; those of gradients make their own."""

GRADIENTS: frozenset[Group] = frozenset({"hessian", "fisher"})


@dataclass
class Statistics:
    """Sums of one op, in float64; ``nan`` or a count of zero is what was not collected.

    Attributes:
        kind: ``linear``, ``conv1d``, ``conv2d``, ``conv3d`` or ``embedding``.
        weights: Number of values of the weight W.
        weight_sse: ‖ΔW‖², ΔW being what the scheme's rounding does to the weight.
        uint8_sse: The same for NNCF's backup precision: uint8, asymmetric, per output channel.
        uint8_worst: Mean of the squares of the latter in the channel where it is largest.
        outputs: Number of values of the op's outputs.
        output_sse: Sum of squared differences that quantizing the op makes in its own outputs.
        output_energy: Sum of squares of its outputs.
        inputs: Number of values of the op's inputs.
        rows: Number of rows of its inputs.
        row_norms: Sum of their L2 norms.
        input_energy: Sum of squares of its inputs.
        largest: Largest magnitude in its inputs.
        calls: Number of calls, of which the next four are sums.
        mean_square: Mean of the squares of the inputs.
        mean_variance: Variance of each channel over the rows of a sample, mean over all.
        max_variance: The largest of these.
        mean_magnitude: Largest magnitude of each channel over the rows of a sample, mean over all.
        hessian_trace: Trace of the Hessian of half the sum of squared errors, by the weight.
        fisher_error: Σ Fᵢᵢ ΔWᵢ², F being the Fisher information of the weight.

    """

    kind: str
    weights: int = 0
    weight_sse: float = math.nan
    uint8_sse: float = math.nan
    uint8_worst: float = math.nan
    outputs: int = 0
    output_sse: float = 0.0
    output_energy: float = 0.0
    inputs: int = 0
    rows: int = 0
    row_norms: float = 0.0
    input_energy: float = 0.0
    largest: float = 0.0
    calls: int = 0
    mean_square: float = 0.0
    mean_variance: float = 0.0
    max_variance: float = 0.0
    mean_magnitude: float = 0.0
    hessian_trace: float = math.nan
    fisher_error: float = math.nan
