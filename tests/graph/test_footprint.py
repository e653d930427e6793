"""What changes that go side by side are said to take is what the allocator gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from pytest_qsens.calibrated import calibrate
from pytest_qsens.engines.delta import DeltaEngine
from pytest_qsens.graph import joint
from pytest_qsens.graph.capture import capture
from pytest_qsens.graph.delta import DeltaRun, Weights
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.graph.replay import Run
from pytest_qsens.quant import integers, simulate
from tests.allocations import peak_bytes
from tests.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_qsens.graph.replay import Change
    from pytest_qsens.graph.together import Together


def test_peaks_are_counted() -> None:
    """What is there at once counts, what is freed before does not."""

    def allocate() -> None:
        for _ in range(3):
            one = torch.ones(1000)
            del one
        two, three = torch.ones(500), torch.ones(700)
        del two, three

    assert peak_bytes(allocate) == 4 * 1200


def bytes_of_one_more(together: Together, change: Change, what: str) -> float:
    """Bytes that every change after the fourth adds to the peak."""

    def measure(changes: Sequence[Change]) -> None:
        for _ in getattr(together, what)(changes):
            pass

    def peak(count: int) -> int:
        return peak_bytes(lambda: measure([dict(change) for _ in range(count)]))

    peak(2)  # what is kept from then on
    return (peak(12) - peak(4)) / 8


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8_dynamic"])
@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl", "mixtral", "t5", "mamba", "gpt2"])
def test_bytes_of_a_change(name: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of either kind, to their errors and to their outputs; at most twice as much, and no less.

    Masks and positions that the run has are not what a change frees, and what is read through a view is not free.
    """
    # what is worked on at a time is as large for many changes as for one, but small models are all of it
    for module in (integers, simulate):
        monkeypatch.setattr(module, "CHUNK", 256)
    monkeypatch.setattr(joint, "_BLOCK", 1)
    spec = ARCHITECTURES[name].spec()
    assert isinstance(spec.model, nn.Module)
    ops = list_ops(spec.model)
    engine: Any = calibrate(spec, ops, scheme, engine="delta")._engine
    assert isinstance(engine, DeltaEngine)
    measurable = set(engine._quantizable) & engine.exercised
    first = next(op.name for op in ops if op.name in measurable and op.type == "linear")
    graph = engine._clean[0].graph
    runs: list[tuple[Together, Change]] = [(engine._deltas[0], engine._quantize(graph, [first]))]
    with torch.no_grad():
        runs += [(engine._joint_together(seed)[0], engine._flip(graph, [first], seed)) for seed in (None, 1)]
        for together, change in runs:
            measured = max(bytes_of_one_more(together, change, what) for what in ("errors", "outputs"))
            assert 0.99 * measured <= together.bytes_per_change() <= 2.1 * measured, type(together)


class Halves(nn.Module):
    """Keeps one half of a value through two layers by a view, and reads a mask that no op reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 64), nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Run all."""
        mask = torch.ones(1000, x.shape[0], 1).cumsum(0)
        left, right = self.first(x).chunk(2, -1)
        out: Tensor = self.last(self.second(left * mask[0]).tanh() * right * mask[1])
        return out


def test_views_and_masks() -> None:
    """By hand: at the last wait, the 64 columns that are viewed, 32 of the second layer, and 32 that go on."""
    torch.manual_seed(0)
    graph = capture(Halves().eval().requires_grad_(requires_grad=False), {"x": torch.randn(10, 8)}, lambda out, _: out)
    with torch.no_grad():
        delta = DeltaRun(Run(graph), Weights(fast_bf16=False))
    # beside them what is stacked for the second layer, and what the second layer takes
    assert delta.bytes_per_change() == 4 * 10 * (64 + 32 + 32 + 32)
    assert delta._head is None


def test_waves_go_by_the_bytes_of_their_mode() -> None:
    """Quantized layers take more than differences do: so fewer ops go side by side with everything else quantized."""
    spec = ARCHITECTURES["llama"].spec()
    assert isinstance(spec.model, nn.Module)
    ops = list_ops(spec.model)

    def widths(memory: int) -> tuple[int, int]:
        engine = calibrate(spec, ops, "w8a8", engine="delta", memory=memory)._engine
        assert isinstance(engine, DeltaEngine)
        alone, others = engine._deltas[0].bytes_per_change(), engine._joint_together(None)[0].bytes_per_change()
        assert alone < others
        waves, joint_waves = engine._waves, engine._joint_waves()
        assert sorted(op for wave in waves for op in wave) == sorted(op for wave in joint_waves for op in wave)
        found = max(map(len, waves)), max(map(len, joint_waves))
        assert found == tuple(min(7, max(1, memory // 4 // size)) for size in (alone, others))
        return found

    assert widths(10**9) == (7, 7)
    one = calibrate(spec, ops, "w8a8", engine="delta")._engine
    assert isinstance(one, DeltaEngine)
    assert widths(4 * 4 * one._deltas[0].bytes_per_change()) == (4, 2)
    assert widths(1) == (1, 1)
