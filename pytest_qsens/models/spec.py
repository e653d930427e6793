"""What a model factory returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Batch = Mapping[str, Any]
"""Keyword arguments of one forward call. Tensors are moved to the device; other values are passed as they are."""


@dataclass(frozen=True)
class ModelSpec:
    """A model together with the data it is calibrated and evaluated on.

    Attributes:
        model: The module, or a callable that builds it. With a callable, collecting the ops calls it under
            ``torch.device("meta")``, so no weights are loaded before the first op is measured.
        calibration: Batches the observers see, each the keyword arguments of one forward call.
        evaluation: Batches the scores are measured on; not the calibration batches, unless that is wanted.
        output: Picks the tensor to score from the model's return value and the batch, for example
            ``lambda out, batch: out.logits[batch["attention_mask"].bool()]``. Any shape, floating point. If
            ``logits``, the last dimension holds the classes.
        logits: Whether the output holds unnormalized log-probabilities; only then KL divergence and top-1
            agreement are measured.
        rows: Tells how many rows of what ``output`` picks (entries of its first dimension) each sample of a batch has,
            in order, for the standard error: for the example above, ``lambda batch: batch["attention_mask"].sum(1)``.
            ``None`` for a batch is as without it: every row is a sample if there are as many as the first dimension of
            all the batch's tensors has; else the whole batch is one.

    """

    model: torch.nn.Module | Callable[[], torch.nn.Module]
    calibration: Sequence[Batch]
    evaluation: Sequence[Batch]
    output: Callable[[Any, Batch], torch.Tensor]
    logits: bool = False
    rows: Callable[[Batch], Iterable[int] | None] | None = None


def built(spec: ModelSpec) -> torch.nn.Module:
    """Return the module of a spec, which its callable builds anew in every call."""
    from torch import nn  # specs are imported where no model is loaded yet

    return spec.model if isinstance(spec.model, nn.Module) else spec.model()


def ready(spec: ModelSpec, device: str = "cpu", *, wide: bool = False) -> torch.nn.Module:
    """Return the module of a spec as it is measured: on a device, in evaluation mode, without gradients, in fp32.

    A module that the spec holds is itself changed.

    Args:
        spec: The model.
        device: A torch device.
        wide: Whether weights stored in bf16 or fp16 become fp32, which kernels need; else they are widened as they
            are used (`pytest_qsens.graph.narrow`).

    """
    from pytest_qsens.graph.narrow import keep_narrow, make_wide

    model = built(spec).to(device).eval().requires_grad_(requires_grad=False)
    if wide:
        make_wide(model)
    else:
        keep_narrow(model)
    return model
