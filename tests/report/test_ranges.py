"""Ranges of channels and samples of data: what is collected for a report."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import pytest
import torch
from PIL import Image
from torch import nn

from pytest_qsens import ModelSpec
from pytest_qsens.details import joined
from pytest_qsens.exhibits import EDGE, EXCERPT, SHOWN, exhibits
from pytest_qsens.inspection.ranges import channels_of
from pytest_qsens.models.data import Sample
from pytest_qsens.models.resolve import resolve
from pytest_qsens.models.source import ModelRequest
from pytest_qsens.ranges import BINS, channels, details, largest_of_channels, largest_of_rows
from pytest_qsens.report.directory.channel_charts import _channel_chart

if TYPE_CHECKING:
    from pathlib import Path


class Net(nn.Module):
    """Ops of three kinds, one of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.proj = nn.Linear(8, 8)
        self.table = nn.Embedding(5, 8)

    def forward(self, image: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Look at an image and some ids."""
        x = self.conv(image).flatten(2).transpose(1, 2)
        x = torch.relu(self.proj(x))
        return self.proj(x) + self.table(ids)[:, None]


class Source:
    """A model that was made in a test."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec

    def load(self) -> ModelSpec:
        """Return it."""
        return self.spec

    def samples(self) -> None:
        """Return ``None``."""


def made() -> ModelSpec:
    """Seeded model and batches."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net().eval()
    batches = [
        {"image": torch.randn(2, 3, 6, 7, generator=generator), "ids": torch.randint(0, 5, (2,), generator=generator)}
        for _ in range(2)
    ]
    return ModelSpec(net, batches[:1], batches, output=lambda out, _: out)


def test_they_are_those_of_the_model() -> None:
    """Weights by output channel, inputs by input channel over all calls and batches, as hooks of torch see them."""
    spec = made()
    seen: dict[str, torch.Tensor] = {}
    net = spec.model
    assert isinstance(net, Net)

    def note(name: str, dim: tuple[int, ...]):  # noqa: ANN202 - a hook
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            found = args[0].abs().amax(dim)
            seen[name] = torch.maximum(seen.get(name, found), found)

        return hook

    handles = [
        net.conv.register_forward_pre_hook(note("conv", (0, 2, 3))),
        net.proj.register_forward_pre_hook(note("proj", (0, 1))),
    ]
    with torch.no_grad():
        for batch in spec.evaluation:
            net(**batch)
    for handle in handles:
        handle.remove()
    found = details(Source(spec), ["proj", "conv", "table", "not there"])  # type: ignore[arg-type]  # enough of a source
    assert [item.op for item in found.ranges] == ["proj", "conv", "table"]
    assert found.notes == ()
    for item in found.ranges:
        weight = net.get_submodule(item.op).weight
        assert item.weight.largest == pytest.approx(weight.abs().flatten(1).amax(1).tolist(), rel=1e-3)
        if item.op == "table":
            assert item.inputs is None
        else:
            assert item.inputs is not None
            assert item.inputs.largest == pytest.approx(seen[item.op].tolist(), rel=1e-3)


def test_many_channels_are_put_together() -> None:
    """No channel that reaches far is lost, and its number is told."""
    values = torch.rand(5 * BINS + 3)
    values[1001] = 50.0
    found = channels(values)
    assert found.count == len(values)
    assert len(found.largest) <= BINS
    assert found.outliers[0] == (1001, 50.0)
    assert found.largest[1001 // 6] == 50.0
    assert found.median == pytest.approx(float(values.median()), rel=1e-3)
    assert found.ratio == pytest.approx(50 / found.median)


def test_a_report_marks_the_channels_that_inspecting_names() -> None:
    """Channels of zeros move no median, and one at just 5 times the median is no outlier, in either."""
    values = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.9, 1.1, 1.1, 5.6])
    assert channels(values).median == pytest.approx(channels_of(values).median) == pytest.approx(1.1)
    marked = _channel_chart("inputs", "input channel", "max |x|", channels(values)).spec["layer"][2]["data"]["values"]
    assert [int(mark["n"]) for mark in marked] == [channel.index for channel in channels_of(values).worst] == [7]
    exactly = torch.tensor([1.0, 1.0, 1.0, 5.0])
    assert len(_channel_chart("inputs", "input channel", "max |x|", channels(exactly)).spec["layer"]) == 2
    assert channels_of(exactly).worst == ()
    assert channels(torch.zeros(3)).median == 0


def test_what_is_not_finite_is_left_out() -> None:
    """Rows that calibration leaves out say nothing about ranges; parts of a large weight give the same as all of it."""
    x = torch.tensor([[1.0, -2.0], [float("inf"), 9.0], [0.5, 3.0]])
    found = largest_of_channels(x, "linear")
    assert found is not None
    assert found.tolist() == [1.0, 3.0]
    assert largest_of_channels(torch.full((1, 2), float("nan")), "linear") is None
    single = torch.tensor([[[1.0, -4.0]], [[2.0, 0.0]]])
    assert largest_of_channels(single, "conv2d").tolist() == [4.0, 2.0]  # type: ignore[union-attr]  # finite
    weight = torch.randn(3000, 2000)
    assert torch.equal(largest_of_rows(weight), weight.abs().amax(1))
    assert largest_of_rows(weight.bfloat16()).dtype == torch.float32


def test_a_model_that_cannot_be_run() -> None:
    """What went wrong becomes a note, and the data are shown all the same."""
    spec = made()
    broken = ModelSpec(spec.model, spec.calibration, [{"image": torch.zeros(1)}], output=spec.output)
    found = details(Source(broken), ["proj"])  # type: ignore[arg-type]  # as above
    assert found.ranges == ()
    assert found.notes[0].startswith("ranges could not be collected: TypeError")
    assert found.data[1].samples[0].text == "image: float32 1"


def test_batches_are_described() -> None:
    """Where there are only tensors, their names, types and shapes are told, and images are drawn."""
    spec = made()
    found = exhibits(None, spec)
    assert [(item.purpose, item.count, item.unit) for item in found] == [
        ("calibration", 1, "batches"),
        ("evaluation", 2, "batches"),
    ]
    sample = found[1].samples[0]
    assert sample.text == "image: float32 2 x 3 x 6 x 7, ids: int64 2"
    assert sample.size == (7, 6)
    assert sample.picture is not None
    with Image.open(io.BytesIO(base64.b64decode(sample.picture.partition(",")[2]))) as image:
        assert (image.format, image.size) == ("JPEG", (7, 6))


def test_samples_are_cut_and_counted(tmp_path: Path) -> None:
    """A long text is cut, a large picture is made small, and of many samples the first are shown."""
    Image.new("RGB", (800, 400), "red").save(tmp_path / "a.png")
    samples = (Sample("w" * 1000, tmp_path / "a.png"), *[Sample("text")] * 20)
    shown = exhibits((samples, samples[1:]), made())[0]
    assert shown.count == 21
    assert len(shown.samples) == SHOWN
    first = shown.samples[0]
    assert len(first.text) == EXCERPT
    assert first.text.endswith("…")
    assert first.size == (800, 400)
    assert first.picture is not None
    with Image.open(io.BytesIO(base64.b64decode(first.picture.partition(",")[2]))) as image:
        assert image.size == (EDGE, EDGE // 2)
        assert image.getpixel((50, 20))[0] > 240  # type: ignore[index]  # RGB
    assert shown.samples[1].picture is None


def test_pictures_of_a_preset() -> None:
    """The model's own questions and pictures are shown, and its ops are found."""
    source = resolve(ModelRequest("tiny_qwen2_5_vl"))
    op = "model.language_model.layers.0.mlp.down_proj"
    found = details(source, [op])
    assert [item.op for item in found.ranges] == [op]
    assert [(item.count, item.unit) for item in found.data] == [(9, "samples"), (3, "samples")]
    assert found.data[1].samples[0].picture is not None
    assert found.data[1].samples[-1].picture is None
    assert joined([None, found, found]) == found
    assert joined([None]) is None
