"""Real pytest runs on a small real model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

MODEL = "net:spec"
"""Factory in the file that `write_model` makes; its label is `LABEL`."""

LABEL = "net.spec"

OPS = ("embed", "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "blocks.2.up", "blocks.2.down", "head")
"""Ops of the model; ``spare`` comes on top if `write_model` is told so."""

_SOURCE = """
import os
from pathlib import Path

import torch
from torch import nn

from pytest_qsens import ModelSpec

SPARE = {spare}
HERE = Path(__file__).parent


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        if SPARE:
            self.spare = nn.Linear(16, 16)
        self.head = nn.Linear(16, 8)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        if SPARE == "used":
            x = x + self.spare(x)
        return self.head(x)


def model():
    with (HERE / "built.log").open("a") as log:
        log.write(torch.empty(0).device.type + "\\n")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net()
    if (HERE / "worse").exists() and net.head.weight.device.type != "meta":
        with torch.no_grad():  # one large weight stretches the step of its whole row
            net.blocks[1].down.weight[:, 0] *= float((HERE / "worse").read_text())
    return net.eval()


def batches(seed):
    generator = torch.Generator().manual_seed(seed)
    return [{{"ids": torch.randint(0, 50, (2, 6), generator=generator)}} for _ in range(2)]


def spec():
    return ModelSpec(
        model=model,
        calibration=batches(1),
        evaluation=batches(2),
        output=lambda out, batch: out,
        logits=True,
    )
"""


def write_model(pytester: pytest.Pytester, *, spare: str = "") -> None:
    """Write ``net.py``.

    Args:
        pytester: Where.
        spare: ``unused`` or ``used`` for one more op that the data does not reach, or does.

    """
    pytester.makepyfile(net=_SOURCE.format(spare=repr(spare)))


def op_id(op: str, scheme: str = "w8a8") -> str:
    """Node id of an op of `MODEL` in the built-in suite."""
    return f"qsens::test_op[{LABEL}-{scheme}-{op}]"


TOTAL_ID = f"qsens::test_total[{LABEL}-w8a8]"


def snapshot_file(pytester: pytest.Pytester, scheme: str = "w8a8") -> Path:
    """Where the snapshot of `MODEL` goes."""
    return pytester.path / "qsens_snapshots" / LABEL / f"{scheme}.json"


def snapshot_ops(pytester: pytest.Pytester, scheme: str = "w8a8") -> dict[str, Any]:
    """Entries of the snapshot of `MODEL`."""
    content: dict[str, Any] = json.loads(snapshot_file(pytester, scheme).read_text())
    entries: dict[str, Any] = content["ops"]
    return entries


def listing(pytester: pytest.Pytester) -> dict[str, bytes]:
    """Every file and its content, but for what Python, pytest, `Pytester` and the model log by themselves."""
    unwatched = {"__pycache__", ".pytest_cache", "built.log", "stdout", "stderr"}
    return {
        str(path.relative_to(pytester.path)): path.read_bytes()
        for path in sorted(pytester.path.rglob("*"))
        if path.is_file() and not unwatched.intersection(path.relative_to(pytester.path).parts)
    }


def collected(result: pytest.RunResult) -> list[str]:
    """Node ids that ``--collect-only -q`` printed."""
    return [line for line in result.outlines if "::" in line and not line.startswith(("ERROR", "FAILED"))]
