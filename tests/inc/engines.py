"""Both engines on one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pytest_qsens.calibrated import calibrate
from pytest_qsens.engines.fx import FxEngine
from pytest_qsens.engines.inc import IncEngine
from pytest_qsens.engines.replay import ReplayEngine
from pytest_qsens.graph.modules import list_ops

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_qsens.models.spec import ModelSpec


@dataclass
class Both:
    """Engines on the same model and data."""

    spec: ModelSpec
    inc: IncEngine
    fx: FxEngine
    replay: ReplayEngine
    ops: list[str]
    """Ops that Intel Neural Compressor can run quantized, in the model's order."""


def network(spec: ModelSpec) -> nn.Module:
    """Return the module of a spec that has it built."""
    assert isinstance(spec.model, nn.Module)
    return spec.model


def build(spec: ModelSpec) -> Both:
    """Build the engines; fx and replay can quantize what inc can, and nothing else."""
    names = list_ops(network(spec))
    inc = calibrate(spec, names, "w8a8", engine="inc")._engine
    assert isinstance(inc, IncEngine)
    with torch.no_grad():
        broken = inc._without_kernels()
    ops = [op for op in names if op.name in inc._quantizable and op.name not in broken]
    fx = calibrate(spec, ops, "w8a8", engine="fx")._engine
    replay = calibrate(spec, ops, "w8a8", engine="replay")._engine
    assert isinstance(fx, FxEngine)
    assert isinstance(replay, ReplayEngine)
    return Both(spec, inc, fx, replay, [op.name for op in ops])


def equal(left: Iterable[Tensor], right: Iterable[Tensor]) -> bool:
    """Whether the outputs of all batches are equal to the last bit."""
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def inc_number(references: Iterable[Tensor], outputs: Iterable[Tensor]) -> float:
    """Sum the squared differences as Intel Neural Compressor does, in float32."""
    reference, output = (torch.cat([t.flatten() for t in tensors]) for tensors in (references, outputs))
    return float((reference - output).pow(2).sum())
