"""What engine delta costs, in forwards: python benchmarks/delta.py [LAYERS].

A language model of the sizes of Qwen2.5-0.5B with random bf16 weights, one batch of 64 tokens, W8A8, mode isolated, all
linears. One unit is one fp32 forward of the same model. For replay, and for a full forward per op with one quantizer
switched on (eager), a few ops stand for all.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import TYPE_CHECKING

import torch
from scipy.stats import spearmanr
from transformers import Qwen2Config, Qwen2ForCausalLM

from pytest_qsens.calibrated import CalibratedModel, calibrate
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.models.spec import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_qsens.ops import Op

TOKENS = 64
FEW = 6


def language_model(layers: int) -> ModelSpec:
    """Return the model, with different random tokens for calibration and evaluation."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=896,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        vocab_size=151936,
        tie_word_embeddings=True,
    )
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen2ForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    calibration, evaluation = (
        {"input_ids": torch.randint(0, config.vocab_size, (1, TOKENS)), "use_cache": False} for _ in range(2)
    )
    return ModelSpec(model.float(), [calibration], [evaluation], lambda out, _: out.logits, logits=True)


def forward_seconds(spec: ModelSpec) -> float:
    """Median of a few forwards after a first one."""
    found = []
    with torch.no_grad():
        for _ in range(6):
            start = time.perf_counter()
            spec.model(**spec.evaluation[0])  # type: ignore[operator]  # a loaded model
            found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def timed(model: CalibratedModel, ops: Sequence[Op]) -> tuple[float, list[float]]:
    """Seconds per op, and the errors."""
    start = time.perf_counter()
    found = [model.score(op, ["isolated"]) for op in ops]
    seconds = (time.perf_counter() - start) / len(ops)
    return seconds, [result.isolated["nmse"] or 0.0 for result in found if result.isolated]


def main() -> None:
    """Print a table."""
    spec = language_model(int(sys.argv[1]) if len(sys.argv) > 1 else 24)
    listed = list_ops(spec.model)  # type: ignore[arg-type]  # a loaded model
    ops = [op for op in listed if op.type == "linear"]
    few = ops[:: max(1, len(ops) // FEW)]
    print(f"{len(ops)} linears, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    errors: dict[str, list[float]] = {}
    for engine, chosen in (("delta", ops), ("replay", few), ("eager", few)):
        forward = forward_seconds(spec)
        start = time.perf_counter()
        model = calibrate(spec, listed, "w8a8", engine=engine, divergence=False)
        setup = time.perf_counter() - start
        seconds, errors[engine] = timed(model, chosen)
        whole = (setup / len(ops) + seconds) / forward
        print(
            f"{engine:7} forward {forward * 1e3:.0f} ms; per op {seconds / forward:.3f} forwards, "
            f"{whole:.3f} with the set-up of {setup / forward:.0f}",
            flush=True,
        )
        del model
    fast = [error for op, error in zip(ops, errors["delta"], strict=True) if op in few]
    apart = max(abs(a - b) / b for a, b in zip(fast, errors["replay"], strict=True))
    print(
        f"delta against replay: {apart:.1e} apart at most, Spearman {spearmanr(fast, errors['replay']).statistic:.6f}"
    )


if __name__ == "__main__":
    main()
