"""The quantizable modules of a model, from its module tree alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.pytorch_utils import Conv1D

from pytest_qsens.ops import Op

if TYPE_CHECKING:
    from torch import nn

OP_TYPES: dict[type[nn.Module], str] = {
    torch.nn.Linear: "linear",
    Conv1D: "linear",  # GPT-2's linear with a transposed weight
    torch.nn.Conv1d: "conv1d",
    torch.nn.Conv2d: "conv2d",
    torch.nn.Conv3d: "conv3d",
    torch.nn.Embedding: "embedding",
}


def op_type(module: nn.Module) -> str | None:
    """Op type of a module, or ``None`` if it is none of ours."""
    kind = next((name for cls, name in OP_TYPES.items() if isinstance(module, cls)), None)
    return kind if isinstance(getattr(module, "weight", None), torch.Tensor) else None


def list_ops(model: nn.Module) -> tuple[Op, ...]:
    """Ops of a model in registration order; works on the meta device.

    A module reachable under several names is one op under its first name. Tied weights are still two ops.
    """
    return tuple(
        Op(name, kind, elements=module.weight.numel())
        for name, module in model.named_modules()
        if (kind := op_type(module)) is not None
    )
