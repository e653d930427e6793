"""Results of small nets, and what `qsens inspect` finds in them."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_qsens.calibrated import calibrate
from pytest_qsens.cli import main
from pytest_qsens.commands import inspect
from pytest_qsens.inspection.command import inspect_op
from pytest_qsens.inspection.request import read_request
from pytest_qsens.manifest import load_manifest
from pytest_qsens.models.arguments import find_model
from pytest_qsens.result_files import write
from pytest_qsens.results import Cost, OpResult, RunInfo, RunResult

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_qsens.inspection.found import Inspection
    from pytest_qsens.models.source import ModelSource
    from pytest_qsens.results import Mode

NETS = '''
import torch
from torch import nn

from pytest_qsens import ModelSpec


def values(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def net(*layers):
    for seed, layer in enumerate(layers):
        if hasattr(layer, "weight"):
            layer.weight.data = values(seed, *layer.weight.shape) / layer.weight[0].numel() ** 0.5
            if getattr(layer, "bias", None) is not None:
                layer.bias.data = values(seed + 100, *layer.bias.shape) / 10
    return nn.Sequential(*layers).eval()


def spec(model, batches, evaluation=None):
    evaluation = batches[1:] if evaluation is None else evaluation
    wrap = lambda listed: [{"input": batch} for batch in listed]
    return ModelSpec(model, wrap(batches[:1]), wrap(evaluation), output=lambda out, batch: out)


def plain():
    return spec(net(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), [values(n, 24, 16) for n in (7, 8, 9)])


def input_outlier():
    """Channel 5 of the input is 60 times as large as the others, and means no more to the output."""
    found = plain()
    found.model[0].weight.data[:, 5] /= 60
    for batch in [*found.calibration, *found.evaluation]:
        batch["input"][:, 5] *= 60
    return found


def weight_outlier():
    """Input channel 3 of the weight is 60 times as large as the others; nothing goes in there."""
    found = plain()
    found.model[0].weight.data[:, 3] *= 60
    for batch in [*found.calibration, *found.evaluation]:
        batch["input"][:, 3] = 0
    return found


def wider():
    """The evaluation data go beyond what calibration sees."""
    found = plain()
    for batch in found.evaluation:
        batch["input"] *= 3
    return found


def breaking():
    """The logarithm of what the output of the first op is rounded to is infinite where that is zero."""
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = net(nn.Linear(16, 16), nn.Linear(16, 8))
            self.first.weight.data[0] *= 1e4
        def forward(self, input):
            return self.second(self.first(input).abs().log())
    return spec(Net().eval(), [values(n, 24, 16) for n in (7, 8)])


def holes():
    """Rows of NaN, as attention makes them at padded positions; the output has zeros there."""
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = net(nn.Linear(16, 16), nn.Linear(16, 8))
        def forward(self, input):
            return self.second(torch.tanh(self.first(input))).nan_to_num()
    batches = [values(n, 24, 16) for n in (7, 8, 9)]
    for batch in batches:
        batch[::4] = torch.nan
    return spec(Net().eval(), batches)


def mixed():
    """A convolution, an op that is called twice, an embedding and one that nothing reaches."""
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.twice = nn.Linear(8, 8)
            self.table = nn.Embedding(20, 8)
            self.never = nn.Linear(8, 8)
            for seed, weight in enumerate(self.parameters()):
                weight.data = values(seed, *weight.shape) / 3
        def forward(self, input):
            x = self.conv(input).mean((2, 3))
            x = self.twice(torch.relu(self.twice(x)))
            return x * self.table((input[:, 0, 0, 0].abs() * 6).long().clamp(max=19))
    return spec(Net().eval(), [values(n, 6, 3, 5, 5) for n in (7, 8, 9)])
'''


def write_result(
    source: ModelSource,
    path: Path,
    *,
    scheme: str = "w8a8",
    modes: tuple[Mode, ...] = ("isolated",),
    only: str | None = None,
    **facts: Any,  # noqa: ANN401 - fields of `RunInfo`
) -> RunResult:
    """Measure a model, or only one of its ops, and write the result file."""
    ops = load_manifest(source, None)
    calibrated = calibrate(source.load(), ops, scheme, engine="replay", divergence=False)
    found = [
        replace(calibrated.score(op, modes), weights=op.elements)
        if only in (None, op.name)
        else OpResult(op.name, op.type, op.block, "unrun", "not selected", weights=op.elements)
        for op in ops
    ]
    mode = "both" if len(modes) == 2 else modes[0]
    run = RunInfo(source.label, scheme, "replay", mode, {}, Cost(1.0), data=source.data_fingerprint())
    result = RunResult(replace(run, **facts), tuple(found))
    write(path, result)
    return result


def inspected(path: Path, op: str, *arguments: str) -> Inspection:
    """Inspect an op of a result."""
    parser = argparse.ArgumentParser()
    inspect.register(parser.add_subparsers())
    given = parser.parse_args(["inspect", str(path), op, *arguments])
    request = read_request(given)
    return inspect_op(request, find_model(given, request.run, given.result))


def printed(path: Path, op: str, *arguments: str) -> Any:  # noqa: ANN401 - JSON
    """Run the command line; returns what it writes as JSON."""
    out = path.with_name("inspection.json")
    assert main(["inspect", str(path), op, *arguments, "--json", str(out)]) == 0
    return json.loads(out.read_text())["inspection"]
