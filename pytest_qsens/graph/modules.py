"""The quantizable modules of a model, from its module tree alone."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from pytest_qsens.ops import Op

if TYPE_CHECKING:
    from torch import nn

_TYPES: dict[type[nn.Module], str] = {
    torch.nn.Linear: "linear",
    torch.nn.Conv1d: "conv1d",
    torch.nn.Conv2d: "conv2d",
    torch.nn.Conv3d: "conv3d",
    torch.nn.Embedding: "embedding",
}


def op_type(module: nn.Module) -> str | None:
    """Op type of a module, or ``None`` if it is none of ours."""
    kind = "linear" if _is_transposed_linear(module) else None
    kind = next((name for cls, name in _TYPES.items() if isinstance(module, cls)), kind)
    return kind if isinstance(getattr(module, "weight", None), torch.Tensor) else None


def _is_transposed_linear(module: nn.Module) -> bool:
    """Whether this is GPT-2's linear, with its weight as ``(in, out)``; who has one has imported where it is from."""
    origin = sys.modules.get("transformers.pytorch_utils")
    return origin is not None and isinstance(module, origin.Conv1D)


def list_ops(model: nn.Module) -> tuple[Op, ...]:
    """Ops of a model in registration order; works on the meta device.

    A module reachable under several names is one op under its first name. Tied weights are still two ops.
    """
    return tuple(
        Op(name, kind, elements=module.weight.numel(), features=_features(module, kind))
        for name, module in model.named_modules()
        if (kind := op_type(module)) is not None
    )


def _features(module: nn.Module, kind: str) -> int | None:
    if kind != "linear":
        return None
    assert isinstance(module.weight, torch.Tensor)  # noqa: S101 - as in `op_type`
    return module.weight.shape[0 if _is_transposed_linear(module) else -1]
