"""Measure, op by op, how much quantization hurts a PyTorch model."""

from __future__ import annotations

from pytest_qsens.errors import QsensError
from pytest_qsens.models.spec import Batch, ModelSpec

__all__ = ["Batch", "ModelSpec", "QsensError"]
