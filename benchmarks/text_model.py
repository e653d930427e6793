"""A small causal language model with grouped-query attention, trained: its attention is not that of random weights."""

from __future__ import annotations

from functools import cache
from pydoc_data.topics import topics

import torch
import transformers

from pytest_qsens.models.spec import ModelSpec

_TOKENS = 64
_STEPS = 300


@cache
def text_model(seed: int = 0, layers: int = 4) -> ModelSpec:
    """Train on the bytes of Python's own help for ten seconds or so; calibration and evaluation are other parts of it.

    Args:
        seed: Of its weights and data.
        layers: How many.

    """
    text = "".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    torch.manual_seed(seed)

    def batch(size: int) -> torch.Tensor:
        starts = torch.randint(0, len(data) - _TOKENS, (size,)).tolist()
        return torch.stack([data[start : start + _TOKENS] for start in starts])

    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=128,
            vocab_size=128,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(_STEPS):
        ids = batch(16)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval().requires_grad_(requires_grad=False)
    calibration, evaluation = ({"input_ids": batch(2), "use_cache": False} for _ in range(2))
    return ModelSpec(model, [calibration], [evaluation], lambda out, _: out.logits, logits=True)
