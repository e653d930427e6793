"""Mode fallback of engine delta where memory is short, batches differ, and quantized outputs are not finite."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from pytest_qsens.calibrated import calibrate
from pytest_qsens.engines.delta import DeltaEngine
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.models.spec import ModelSpec
from tests.architectures import ARCHITECTURES
from tests.engines.test_delta import assert_alike, others
from tests.engines.test_odd_models import ChannelsLast, Picked, WrittenLater, WrittenThroughAView
from tests.graph.test_delta import Router
from tests.schemes import INTEGER

if TYPE_CHECKING:
    from pytest_qsens.models.spec import Batch
    from pytest_qsens.results import OpResult


def lengths(name: str) -> ModelSpec:
    """Evaluate on batches of three lengths, with graphs of their own."""
    spec = ARCHITECTURES[name].spec()
    (batch,) = spec.evaluation

    def cut(length: int) -> Batch:
        return {key: value[:, :length] if isinstance(value, Tensor) else value for key, value in batch.items()}

    return replace(spec, evaluation=[cut(16), cut(5), cut(11)])


@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("name", ["llama", "mixtral", "mamba"])
def test_without_memory_on_several_batches(name: str, *, side_by_side: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all that can be is dropped, of every batch and every run, scores and noise are those of replays."""
    if side_by_side:
        monkeypatch.setattr(DeltaEngine, "_find_waves", lambda engine, _: [[(op,) for op in engine._quantizable]])
    fast, exact = (others(lengths(name), "w8a8_static", engine, memory=1) for engine in ("delta", "replay"))
    assert_alike(fast, exact)
    assert sum(result.status == "measured" for result in fast.values()) > len(fast) / 2


def test_memory_is_short_there() -> None:
    """The comparison above is one of runs that dropped values: of all batches, clean and quantized."""
    spec = lengths("llama")
    assert isinstance(spec.model, nn.Module)
    engine = calibrate(spec, list_ops(spec.model), "w8a8_static", engine="delta", memory=1)._engine
    assert isinstance(engine, DeltaEngine)
    assert {len(wave) for wave in engine._waves} == {1}
    with torch.no_grad():
        runs = [*engine._clean, *engine._joint_runs(None), *engine._joint_runs(1)]
    assert len(runs) == 9
    assert all(run._dropped for run in runs)
    assert len({run.output.shape for run in runs}) == 3


class Spoiled(nn.Module):
    """Residual blocks, in some of which what quantization changes turns into something that is not finite."""

    def __init__(self, value: float, blocks: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 48), nn.Linear(48, 16)) for _ in range(3))
        self.head = nn.Linear(16, 40)
        self.value = value
        self.spoiled = blocks
        self.register_buffer("limit", torch.full((48,), torch.inf))

    def forward(self, x: Tensor) -> Tensor:
        """Add to the stream block by block."""
        for i, block in enumerate(self.blocks):
            y = block[0](x)
            if i in self.spoiled:  # a rounded value is zero, somewhere; and others are larger than any was
                y = torch.where((y == 0) | (y > self.limit), self.value, y)
            x = x + block[1](nn.functional.silu(y))
        return self.head(x)


def spoiled(value: float, *blocks: int, limited: bool = False) -> ModelSpec:
    """Return the model with two batches; the limits are the largest values of the first block."""
    data = torch.randn(3, 4, 6, 16, generator=torch.Generator().manual_seed(1))
    model = Spoiled(value, blocks).eval()
    if limited:
        with torch.no_grad():
            model.limit = model.blocks[0][0](data).flatten(0, -2).amax(0)  # type: ignore[index, operator] # a linear
    batches: list[Batch] = [{"x": x} for x in data]
    return ModelSpec(model, batches[:1], batches[1:], lambda out, _: out, logits=True)


NOT_FINITE = [torch.nan, torch.inf, -torch.inf]


@pytest.mark.parametrize("divergence", [False, True])
@pytest.mark.parametrize("value", NOT_FINITE)
def test_the_one_op_that_spoils_all(value: float, *, divergence: bool) -> None:
    """With it in fp32 there is a score, though those measured beside it have none; and nothing to relate it to."""
    fast, exact = (others(spoiled(value, 1), "w8a8", engine, divergence=divergence) for engine in ("delta", "replay"))
    assert_alike(fast, exact)
    assert [op for op, result in fast.items() if result.status == "measured"] == ["blocks.1.0"]
    assert not {"gain", "noise"} & (fast["blocks.1.0"].fallback or {}).keys()


@pytest.mark.parametrize("divergence", [False, True])
@pytest.mark.parametrize("scheme", INTEGER)
@pytest.mark.parametrize("value", NOT_FINITE)
def test_some_rows_are_not_finite(value: float, scheme: str, *, divergence: bool) -> None:
    """Rows that are not finite in one change, and in the quantized run, leave all others their integers."""
    specs = (spoiled(value, 0, limited=True) for _ in range(2))
    fast, exact = (
        others(spec, scheme, engine, divergence=divergence)
        for spec, engine in zip(specs, ("delta", "replay"), strict=True)
    )
    assert_alike(fast, exact)
    assert fast["total"].status == "failed"
    assert fast["blocks.0.0"].status == "measured"
    assert "NaN" in (fast["blocks.2.0"].reason or "")


def test_nothing_to_compare_with() -> None:
    """Where no op has a score, none is compared, and every op says so as in a replay."""
    fast, exact = (others(spoiled(torch.nan, 0, 1, 2), "w8a8", engine) for engine in ("delta", "replay"))
    assert_alike(fast, exact)
    assert {result.status for result in fast.values()} == {"failed"}


class Marked(nn.Module):
    """Looks some of the ids up in a table of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.marks = nn.Embedding(9, 6), nn.Embedding(9, 6)
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 20)

    def forward(self, ids: Tensor, marked: Tensor) -> Tensor:
        """Map ``(L,)`` to logits."""
        x = self.table(ids)
        x[marked] = x[marked] + self.body(self.marks(ids[marked]))
        return self.head(x.tanh())


def test_ops_without_rows_in_one_batch() -> None:
    """An embedding and a linear that a batch reaches with nothing to look up are measured by the other."""
    ids, marked = torch.arange(8), torch.arange(8) < 3
    batches: list[Batch] = [{"ids": ids, "marked": marked}, {"ids": ids, "marked": marked & False}]

    def scores(engine: str) -> dict[str, OpResult]:
        spec = ModelSpec(Marked().eval(), batches[:1], batches, lambda out, _: out)
        return others(spec, "w8a8", engine)

    fast, exact = scores("delta"), scores("replay")
    assert_alike(fast, exact)
    assert {result.status for result in fast.values()} == {"measured"}
    assert {op: result.fallback for op, result in scores("eager").items()} == {
        op: result.fallback for op, result in exact.items()
    }


@pytest.mark.parametrize("memory", [10**9, 1])
@pytest.mark.parametrize("scheme", INTEGER)
@pytest.mark.parametrize("build", [Router, Picked, WrittenLater, WrittenThroughAView, ChannelsLast])
def test_graphs_that_are_followed_with_care(build: type[nn.Module], scheme: str, memory: int) -> None:
    """Routes and indices that ops decide, and memory written later or through views, side by side as in a replay."""

    def spec() -> ModelSpec:
        torch.manual_seed(0)
        model = build().eval()
        shape = {ChannelsLast: (2, 3, 6, 6), Router: (8, 8)}.get(build, (8, 6))
        data = [torch.randn(shape) for _ in range(3)]
        return ModelSpec(model, [{"x": data[0]}], [{"x": x} for x in data[1:]], lambda out, _: out)

    fast, exact = (others(spec(), scheme, engine, memory=memory) for engine in ("delta", "replay"))
    assert_alike(fast, exact)
    assert "measured" in {result.status for op, result in fast.items() if op != "total"}
