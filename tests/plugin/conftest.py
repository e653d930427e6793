"""Have everything imported that a run inside of this process needs: pytester forgets what is imported during one."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from pytest_qsens import ModelSpec
from pytest_qsens.calibrated import calibrate
from pytest_qsens.graph.modules import list_ops


@pytest.fixture(scope="session", autouse=True)
def _warm() -> None:
    """Torch imports parts of itself when they are first used, and breaks when they are imported twice."""
    for name in (
        "pytest_qsens.models.resolve",
        "pytest_qsens.syrupy_extension",
        "hypothesis.internal.observability",  # its plugin imports all of it at the end of every run
    ):
        import_module(name)
    model = torch.nn.Sequential(torch.nn.Embedding(4, 4), torch.nn.Linear(4, 4))
    batches = [{"input": torch.tensor([[1, 2]])}]
    spec = ModelSpec(model, batches, batches, output=lambda out, _: out)
    for engine in ("replay", "eager"):
        calibrate(spec, list_ops(model), "w8a8", engine=engine).total()
