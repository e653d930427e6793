"""The proxies: each is a function of an op's statistics, larger for an op that it takes for more sensitive.

A value that cannot be told is ``nan``: an embedding has no activations to look at, for example.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_qsens.proxies.statistics import Group, Statistics

_EPSILON = 2.0**-23
"""``finfo(float32).eps``, which NNCF adds to an error before it divides by it."""


def weight_mse(op: Statistics) -> float:
    """Mean squared rounding error of the weight, ‖ΔW‖² / n.

    The error that per-layer reports of quantization tools start with, and that weight-only methods without data
    minimize (Banner et al., "Post training 4-bit quantization of convolutional networks for rapid-deployment",
    NeurIPS 2019, arXiv:1810.05723).
    """
    return _ratio(op.weight_sse, op.weights)


def local_output_mse(op: Statistics) -> float:
    """Mean squared error that quantizing the op makes in its own output.

    What layer-wise reconstruction minimizes (Nagel et al., "Up or Down? Adaptive Rounding for Post-Training
    Quantization", ICML 2020, arXiv:2004.10568, equation 21); here weight and activations are quantized.
    """
    return _ratio(op.output_sse, op.outputs)


def local_output_nmse(op: Statistics) -> float:
    """Error in the op's own output, relative to it: SSE / sum(output²).

    10^(-SQNR / 10) of what ``torch.ao.ns._numeric_suite_fx`` calls a shadow comparison: the quantized op gets the
    input of the unquantized one.
    """
    return _ratio(op.output_sse, op.output_energy)


def activation_norm(op: Statistics) -> float:
    """Mean L2 norm of a row of the op's input.

    An error in the weight is multiplied by it. Wanda ranks weights by |W|·‖X‖₂ (Sun et al., "A Simple and Effective
    Pruning Approach for Large Language Models", ICLR 2024, arXiv:2306.11695).
    """
    return _ratio(op.row_norms, op.rows)


def activation_outlier_ratio(op: Statistics) -> float:
    """Largest magnitude of the op's input over its root mean square (the crest factor).

    The range decides the step of a quantizer per tensor, so outliers leave few levels to all other values
    (Xiao et al., "SmoothQuant", ICML 2023, arXiv:2211.10438, section 3).
    """
    return op.largest / math.sqrt(op.input_energy / op.inputs) if op.input_energy else math.nan


def nncf_weight_quantization_error(op: Statistics) -> float:
    """``SensitivityMetric.WEIGHT_QUANTIZATION_ERROR`` of NNCF: 1 / (error + eps).

    The error is the mean squared one of the worst output channel in uint8, NNCF's backup precision. Its inverse ranks
    by what keeping 8 bits saves of an op, so a small error counts as sensitive: for 8 bits themselves that is upside
    down. Source: ``DataFreeCriterion`` in nncf/quantization/algorithms/weight_compression/mixed_precision.py.
    """
    return 1 / (op.uint8_worst + _EPSILON)


def nncf_hessian_input_activation(op: Statistics) -> float:
    """``SensitivityMetric.HESSIAN_INPUT_ACTIVATION`` of NNCF: 2·mean(x²)·‖ΔW‖, with ΔW of uint8.

    The average trace of the Hessian of the op's own output error, 2·xxᵀ, times the norm of the rounding error. NNCF's
    aggregator divides what it has by the sample's size again with every sample, by a comment of its own perhaps in
    error; here it is the mean over calls that was meant. Source: ``HAWQCriterion`` in the same file and
    ``HAWQAggregator`` in nncf/common/tensor_statistics/collectors.py.
    """
    return _criterion(op, 2 * op.mean_square, math.sqrt(op.uint8_sse))


def nncf_mean_activation_variance(op: Statistics) -> float:
    """``SensitivityMetric.MEAN_ACTIVATION_VARIANCE`` of NNCF: variance of the inputs times the inverse error.

    The variance of each channel over the rows of a sample, mean over channels and samples, times
    `nncf_weight_quantization_error`. Source: ``MeanVarianceCriterion`` in the same file.
    """
    return _criterion(op, op.mean_variance, nncf_weight_quantization_error(op))


def nncf_max_activation_variance(op: Statistics) -> float:
    """``SensitivityMetric.MAX_ACTIVATION_VARIANCE`` of NNCF: as the mean one, with the channel of largest variance.

    Source: ``MaxVarianceCriterion`` in the same file.
    """
    return _criterion(op, op.max_variance, nncf_weight_quantization_error(op))


def nncf_mean_activation_magnitude(op: Statistics) -> float:
    """``SensitivityMetric.MEAN_ACTIVATION_MAGNITUDE`` of NNCF: magnitude of the inputs times the inverse error.

    The largest magnitude of each channel over the rows of a sample, mean over channels and samples, times
    `nncf_weight_quantization_error`. Source: ``MeanMaxCriterion`` in the same file.
    """
    return _criterion(op, op.mean_magnitude, nncf_weight_quantization_error(op))


def empirical_fisher(op: Statistics) -> float:
    """Growth of the loss by the diagonal of the Fisher information: Σ Fᵢᵢ ΔWᵢ².

    F is the mean of squared gradients of the log-likelihood. Evaluation data have no labels, so these are drawn from
    what the model predicts: classes from the softmax of logits, other outputs with a normal error of variance 1. That
    makes it an estimate of the Fisher information itself, which squared gradients with given labels are not (Kunstner
    et al., "Limitations of the empirical Fisher approximation", NeurIPS 2019, arXiv:1905.12558). Sensitivity by
    gradients squared times squared rounding errors is that of SqueezeLLM (Kim et al., ICML 2024, arXiv:2306.07629).
    """
    return op.fisher_error


def hessian_trace(op: Statistics) -> float:
    """HAWQ-V2: average trace of the Hessian times the squared rounding error, Tr(H) / n · ‖ΔW‖².

    Of half the sum of squared errors of the scored outputs, whose Hessian at the unquantized model is JᵀJ. Its trace
    is that of JJᵀ, which Hutchinson's estimator E‖Jᵀv‖² finds with one backward for all ops and each draw of v = ±1.
    Dong et al., "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks", NeurIPS 2020,
    arXiv:1911.03852, equations 8 and 11.
    """
    return _ratio(op.hessian_trace, op.weights) * op.weight_sse


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _criterion(op: Statistics, of_inputs: float, of_weight: float) -> float:
    """Multiply the two parts of NNCF's criteria with data, by which an embedding is the least sensitive op of all."""
    return 0.0 if op.kind == "embedding" else _ratio(of_inputs, op.calls) * of_weight


@dataclass(frozen=True)
class Proxy:
    """A proxy with what it takes.

    Attributes:
        function: From statistics to its value; gives it its name.
        needs: Statistics to be collected for it.

    """

    function: Callable[[Statistics], float]
    needs: frozenset[Group]

    @property
    def name(self) -> str:
        """Name on the command line and in tables."""
        return self.function.__name__

    @property
    def about(self) -> str:
        """First line of its description."""
        return (self.function.__doc__ or "").partition("\n")[0]


def _proxy(function: Callable[[Statistics], float], *needs: Group) -> Proxy:
    return Proxy(function, frozenset(needs))


PROXIES: dict[str, Proxy] = {
    proxy.name: proxy
    for proxy in (
        _proxy(weight_mse, "weight"),
        _proxy(local_output_mse, "local"),
        _proxy(local_output_nmse, "local"),
        _proxy(activation_norm, "inputs"),
        _proxy(activation_outlier_ratio, "inputs"),
        _proxy(nncf_weight_quantization_error, "weight_uint8"),
        _proxy(nncf_hessian_input_activation, "weight_uint8", "inputs"),
        _proxy(nncf_mean_activation_variance, "weight_uint8", "inputs"),
        _proxy(nncf_max_activation_variance, "weight_uint8", "inputs"),
        _proxy(nncf_mean_activation_magnitude, "weight_uint8", "inputs"),
        _proxy(empirical_fisher, "fisher"),
        _proxy(hessian_trace, "weight", "hessian"),
    )
}
