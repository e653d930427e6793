"""Which part of a model's output is scored: positions of real tokens, never padding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from transformers.utils.generic import ModelOutput

    from pytest_qsens.models.spec import Batch


def _real(values: torch.Tensor, batch: Batch, mask: str) -> torch.Tensor:
    """Keep the positions ``mask`` marks, as (positions, channels); all of them if the batch has no such mask."""
    return values[batch[mask].bool()] if mask in batch else values


def token_logits(out: ModelOutput, batch: Batch) -> torch.Tensor:
    """Logits of every real token: (tokens, vocabulary)."""
    return _real(out["logits"], batch, "attention_mask")


def token_states(out: ModelOutput, batch: Batch) -> torch.Tensor:
    """Last hidden state of every real token: (tokens, hidden size)."""
    return _real(out["last_hidden_state"], batch, "attention_mask")


def decoder_logits(out: ModelOutput, batch: Batch) -> torch.Tensor:
    """Logits of every real decoder token: (tokens, vocabulary)."""
    return _real(out["logits"], batch, "decoder_attention_mask")


def logits(out: ModelOutput, batch: Batch) -> torch.Tensor:  # noqa: ARG001 - the signature ModelSpec.output has
    """All logits: (samples, classes), or (samples, frames, vocabulary)."""
    scored: torch.Tensor = out["logits"]
    return scored


def states(out: ModelOutput, batch: Batch) -> torch.Tensor:  # noqa: ARG001 - the signature ModelSpec.output has
    """Whole last hidden state, of any shape."""
    scored: torch.Tensor = out["last_hidden_state"]
    return scored


def image_logits(out: ModelOutput, batch: Batch) -> torch.Tensor:  # noqa: ARG001 - the signature ModelSpec.output has
    """Similarity of every image to every text: (images, texts)."""
    scored: torch.Tensor = out["logits_per_image"]
    return scored


def _tokens(mask: str) -> Callable[[Batch], list[int] | None]:
    def rows(batch: Batch) -> list[int] | None:
        return batch[mask].bool().sum(1).tolist() if mask in batch else None

    return rows


ROWS: dict[Callable[[Any, Batch], torch.Tensor], Callable[[Batch], list[int] | None]] = {
    token_logits: _tokens("attention_mask"),
    token_states: _tokens("attention_mask"),
    decoder_logits: _tokens("decoder_attention_mask"),
}
"""Outputs of real tokens → ``ModelSpec.rows``: the tokens of every sample follow each other."""
