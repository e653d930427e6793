"""Have everything imported that a run inside of this process needs: pytester forgets what is imported during one."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

import pytest
import torch

from pytest_qsens import ModelSpec
from pytest_qsens.calibrated import calibrate
from pytest_qsens.graph.modules import list_ops

if TYPE_CHECKING:
    from tests.plugin.faults import Undisturbed


@pytest.fixture(scope="session", autouse=True)
def _warm() -> None:
    """Torch imports parts of itself when they are first used, and breaks when they are imported twice."""
    for name in (
        "pytest_qsens.models.resolve",
        "transformers.pytorch_utils",
        "pytest_qsens.syrupy_extension",
        "hypothesis.internal.observability",  # its plugin imports all of it at the end of every run
    ):
        import_module(name)
    model = torch.nn.Sequential(torch.nn.Embedding(4, 4), torch.nn.Linear(4, 4))
    batches = [{"input": torch.tensor([[1, 2]])}]
    spec = ModelSpec(model, batches, batches, output=lambda out, _: out)
    for engine in ("replay", "eager"):
        calibrate(spec, list_ops(model), "w8a8", engine=engine).total()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """See what a run comes to when nothing happens to it."""
    from tests.plugin.faults import Undisturbed

    return Undisturbed.made(tmp_path_factory.mktemp("undisturbed"))
