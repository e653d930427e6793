"""Attention in its steps, so that something can be done to the probabilities: what torch's fused product computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

DROPS = "attention drops probabilities at random, and cannot be taken apart"


def probabilities(given: Mapping[str, Any]) -> Tensor:
    """Return what values are multiplied by, ``(*, heads, queries, keys)``, of the queries' dtype, and at least fp32.

    A row in which every key is masked is zero, as torch's kernels have it. They add up scores in fp32, too.

    Args:
        given: Arguments of torch's ``scaled_dot_product_attention`` by name.

    Raises:
        NotImplementedError: If some are dropped at random.

    """
    if given["dropout_p"]:
        raise NotImplementedError(DROPS)
    query, key, mask = given["query"], repeated(given["key"], given), given["attn_mask"]
    wide = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(wide), key.to(wide)
    scale = given.get("scale")
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if given["is_causal"]:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    masked = (scores == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(scores, -1).masked_fill(masked, 0)


def repeated(state: Tensor, given: Mapping[str, Any]) -> Tensor:
    """Repeat the heads of keys or values where several heads of queries share one (``enable_gqa``)."""
    if not given.get("enable_gqa"):
        return state
    return state.repeat_interleave(given["query"].shape[-3] // state.shape[-3], -3)
