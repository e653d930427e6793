"""What ModelOpt finds in the same histograms, and of the same model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pytest_qsens.quant.distribution import Distribution

ALPHAS = (0.5, 0.8, 1.0)


def samples() -> dict[str, Tensor]:
    """Return values as activations have them, by name; none is zero, which ModelOpt counts like all others."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(40_000, generator=generator)
    outliers = normal.clone()
    outliers[:40] *= 12
    return {
        "normal": normal,
        "outliers": outliers,
        "heavy": normal / torch.rand(40_000, generator=generator).clamp_(min=0.02),
        "flat": torch.rand(40_000, generator=generator) - 0.5,
    }


def distribution(values: Tensor) -> Distribution:
    """Observe values in three parts, of growing size."""
    found = Distribution()
    for part in values.split([1000, 9000, len(values) - 10_000]):
        found.add(part)
    return found


def coarse(values: Tensor) -> Tensor:
    """Count magnitudes in a few hundred bins: ModelOpt goes through them one by one."""
    counts = distribution(values).folded().counts
    return nn.functional.pad(counts, (0, -len(counts) % 8)).view(-1, 8).sum(1)


def mlp() -> tuple[nn.Sequential, Tensor]:
    """Return a model with an input that has an outlier channel, and one that never fires."""
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    x[:, 3] *= 30
    x[:, 7] = 0
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)).eval(), x


def ask(directory: Path) -> dict[str, Any]:
    """Ask all questions in one process: importing it takes seconds."""
    model, x = mlp()
    histograms = [coarse(values).tolist() for values in samples().values()]
    torch.save({"histograms": histograms, "model": model, "x": x, "alphas": ALPHAS}, directory / "questions.pt")
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("answers_of_modelopt.py"))]
    subprocess.run(
        [*command, "questions.pt", "answers.pt"], cwd=directory, check=True, capture_output=True, timeout=300
    )
    answers: dict[str, Any] = torch.load(directory / "answers.pt", weights_only=False)
    return answers
