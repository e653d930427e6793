"""Run ModelOpt on what a file holds and write what it finds: in a process of its own, as it patches what it imports.

Arguments: file with the questions, file for the answers, both of `torch.save`.
"""

from __future__ import annotations

import copy
import sys
import warnings
from typing import Any

import torch

warnings.simplefilter("ignore")

import modelopt.torch.quantization as mtq  # noqa: E402 - after its warnings are silenced
from modelopt.torch.quantization.calib import histogram  # noqa: E402


def bins_kept(counts: list[int]) -> int:
    """Tell where its entropy calibrator cuts a histogram of magnitudes."""
    edges = torch.arange(len(counts) + 1).float().numpy()
    return int(histogram._compute_amax_entropy(torch.tensor(counts).numpy(), edges, 8, unsigned=False))


def smoothed(model: torch.nn.Module, x: torch.Tensor, alpha: float) -> dict[str, Any]:
    """Quantize with SmoothQuant; what inputs are multiplied by, and the output."""
    config = copy.deepcopy(mtq.INT8_SMOOTHQUANT_CFG)
    config["algorithm"] = {"method": "smoothquant", "alpha": alpha}
    found = mtq.quantize(copy.deepcopy(model), config, lambda quantized: quantized(x))
    scales = {
        name: m.input_quantizer.pre_quant_scale for name, m in found.named_modules() if hasattr(m, "weight_quantizer")
    }
    return {"scales": scales, "output": found(x).detach()}


def main() -> None:
    """Answer all questions."""
    questions = torch.load(sys.argv[1], weights_only=False)
    with torch.no_grad():
        answers = {
            "kept": [bins_kept(counts) for counts in questions["histograms"]],
            "smoothed": [smoothed(questions["model"], questions["x"], alpha) for alpha in questions["alphas"]],
        }
    torch.save(answers, sys.argv[2])


if __name__ == "__main__":
    main()
