"""Groups of ops measured as one: every engine flips the same ops, and a group is neither their sum nor their mean."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pytest_qsens import QsensError
from pytest_qsens.calibrated import CalibratedModel, calibrate
from pytest_qsens.engines.delta import DeltaEngine, tolerance
from pytest_qsens.graph import delta as delta_module
from pytest_qsens.graph.capture import capture
from pytest_qsens.graph.delta import DeltaRun, Weights
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.graph.replay import Run
from pytest_qsens.groups import grouped
from pytest_qsens.metrics import squared_distance
from pytest_qsens.models.spec import ModelSpec
from pytest_qsens.ops import Op
from pytest_qsens.quant import integers, simulate
from tests.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_qsens.results import Mode, OpResult

GROUPS = ("fused", "block", "type")
MODELS = ("bert", "qwen2_5_vl", "qwen3_moe", "t5")
"""Encoder; two towers with windows; routed experts; writes in place, cross-attention and embeddings in blocks."""


def everything(ops: Sequence[Op]) -> Op:
    """All ops as one group."""
    return Op("everything", "any", tuple(ops))


def measured_as(
    spec: ModelSpec,
    units: Sequence[Op],
    engine: str,
    modes: Sequence[Mode],
    **options: Any,  # noqa: ANN401 - of `calibrate`
) -> dict[str, OpResult]:
    """Score groups with an engine that is told of them."""
    assert isinstance(spec.model, nn.Module)
    model = calibrate(spec, list_ops(spec.model), "w8a8", engine=engine, expected=units, **options)
    found = {unit.name: model.score(unit, modes) for unit in units}
    assert model.engine == engine
    assert model.engine_reason is None
    return found


@cache
def exact(name: str, granularity: str) -> dict[str, OpResult]:
    """Scores of replays, in both modes."""
    units = grouped(list_ops(ARCHITECTURES[name].build()), granularity)
    return measured_as(ARCHITECTURES[name].spec(), units, "replay", ["isolated", "fallback"])


@pytest.mark.parametrize("granularity", GROUPS)
@pytest.mark.parametrize("name", MODELS)
def test_the_whole_model_gives_the_same(name: str, granularity: str) -> None:
    """A replay of a group, whose ops are downstream of each other, has the bits of a run of the model."""
    expected = exact(name, granularity)
    units = [unit for unit in grouped(list_ops(ARCHITECTURES[name].build()), granularity) if unit.members]
    assert units
    found = measured_as(ARCHITECTURES[name].spec(), units, "eager", ["isolated", "fallback"])
    for unit in units:
        assert found[unit.name].isolated == expected[unit.name].isolated, unit
        assert found[unit.name].fallback == expected[unit.name].fallback, unit
        assert found[unit.name].ops == tuple(op.name for op in unit.members)


@pytest.mark.parametrize("granularity", GROUPS)
@pytest.mark.parametrize("name", MODELS)
def test_differences_give_the_same(name: str, granularity: str) -> None:
    """Within the tolerance of single ops when alone, and to the last digits with everything else quantized."""
    expected = exact(name, granularity)
    units = grouped(list_ops(ARCHITECTURES[name].build()), granularity)
    for memory in (None, 2**20):  # all values kept, and few
        found = measured_as(
            ARCHITECTURES[name].spec(), units, "delta", ["isolated", "fallback"], divergence=False, memory=memory
        )
        assert sum(result.status == "measured" for result in expected.values()) > len(expected) / 2
        for unit, result in expected.items():
            assert (found[unit].status, found[unit].reason, found[unit].ops) == (
                result.status,
                result.reason,
                result.ops,
            ), unit
            if result.isolated is None or result.fallback is None:
                assert found[unit].modes.keys() == result.modes.keys(), unit
                continue
            nmse = result.isolated["nmse"]
            assert nmse is not None
            assert (found[unit].isolated or {})["nmse"] == pytest.approx(nmse, rel=0, abs=tolerance(nmse)), unit
            for metric in ("nmse", "noise"):
                value = result.fallback[metric]
                assert value is not None
                assert (found[unit].fallback or {})[metric] == pytest.approx(value, rel=1e-9, abs=1e-15), unit


@pytest.mark.parametrize("engine", ["replay", "eager", "delta"])
@pytest.mark.parametrize("name", ["bert", "qwen2_5_vl"])
def test_the_group_of_all_ops_is_the_whole_model(name: str, engine: str) -> None:
    """Quantized alone it gives the total; all but it quantized, nothing is."""
    spec = ARCHITECTURES[name].spec()
    assert isinstance(spec.model, nn.Module)
    unit = everything(list_ops(spec.model))
    model = calibrate(spec, unit.members, "w8a8", engine=engine, expected=[unit])
    result, total = model.score(unit, ["isolated", "fallback"]), model.total()
    assert result.isolated is not None
    assert total.isolated is not None
    if engine == "delta":
        nmse = total.isolated["nmse"] or 0.0
        assert result.isolated["nmse"] == pytest.approx(nmse, rel=0, abs=tolerance(nmse))
    else:
        assert result.isolated == total.isolated
    assert result.fallback is not None
    assert result.fallback["sse"] == 0
    assert result.fallback["gain"] == total.isolated["nmse"]


def test_a_group_is_not_the_sum_of_its_ops() -> None:
    """Errors of its members meet; the number is one of its own."""
    spec = ARCHITECTURES["bert"].spec()
    assert isinstance(spec.model, nn.Module)
    ops = list_ops(spec.model)
    (unit,) = (unit for unit in grouped(ops, "block") if unit.name == "encoder.layer.0")
    model = calibrate(spec, ops, "w8a8", engine="replay")

    def nmse(op: Op) -> float:
        return (model.score(op, ["isolated"]).isolated or {})["nmse"] or 0.0

    assert nmse(unit) != pytest.approx(sum(map(nmse, unit.members)), rel=1e-3)
    assert nmse(unit) > max(map(nmse, unit.members)) / 2


def test_engine_fx_flips_all_of_a_group() -> None:
    """The kernels of torch are switched together, and agree with the simulation on a transformer."""
    expected = exact("bert", "fused")
    units = [unit for unit in grouped(list_ops(ARCHITECTURES["bert"].build()), "fused") if unit.members]
    assert units
    found = measured_as(ARCHITECTURES["bert"].spec(), units, "fx", ["isolated", "fallback"])
    for unit in units:
        assert found[unit.name].isolated == expected[unit.name].isolated
        assert (found[unit.name].fallback or {})["nmse"] == (expected[unit.name].fallback or {})["nmse"]


class Tangle(nn.Module):
    """Layers that are called twice, read what others wrote in place, and route rows; and a wide head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(8, 8), nn.Linear(8, 8)
        self.left, self.right, self.gate = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.head = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        """Pass rows on."""
        x = x + self.twice(torch.tanh(self.first(x)))
        route = self.gate(x).argmax(-1)
        y = torch.where((route == 0)[:, None], self.left(x), self.right(x))
        y[1:] += x[:-1]
        out: Tensor = self.head(y + self.twice(y).relu_())
        return out


OPS = [op.name for op in list_ops(Tangle())]


@settings(max_examples=40, deadline=None)
@given(
    chosen=st.lists(st.sets(st.sampled_from(OPS), min_size=1), min_size=1, max_size=4),
    size=st.floats(1e-3, 0.5),
    seed=st.integers(0, 2**16),
    memory=st.sampled_from([None, 0]),
)
def test_any_changes_side_by_side_are_those_of_replays(
    chosen: list[set[str]], size: float, seed: int, memory: int | None
) -> None:
    """Ops upstream and downstream of each other, the head among them or not, with values kept or dropped."""
    torch.manual_seed(seed)
    model = Tangle().eval().requires_grad_(requires_grad=False)
    graph = capture(model, {"x": torch.randn(6, 8)}, lambda out, _: out)

    def moved(target: Any) -> Any:  # noqa: ANN401 - a call
        return lambda *args: target(*args).roll(1, 0) * size + target(*args)

    changes = [{node: moved(node.target) for op in ops for node in graph.calls[op]} for ops in chosen]
    with torch.no_grad():
        run = Run(graph, memory=memory)
        delta = DeltaRun(run, Weights(fast_bf16=False))
        outputs, errors = list(delta.outputs(changes)), delta.errors(changes)
        for change, output, error in zip(changes, outputs, errors, strict=True):
            replayed = run.replay(change)
            assert torch.allclose(output, replayed, rtol=1e-4, atol=1e-4 * float(replayed.abs().max()))
            assert error.whole == pytest.approx(squared_distance(run.output, replayed), rel=1e-2, abs=1e-9)


class Stack(nn.Module):
    """Blocks of two layers, one of which no data reaches, between others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(16, 32), "down": nn.Linear(32, 16), "spare": nn.Linear(16, 16)})
            for _ in range(4)
        )
        self.head = nn.Linear(16, 64)

    def forward(self, x: Tensor) -> Tensor:
        """Add to the stream."""
        for layer in self.layers:
            x = x + layer["down"](torch.relu(layer["up"](x)))  # type: ignore[index] # a dictionary
        out: Tensor = self.head(x)
        return out


def stack() -> tuple[ModelSpec, tuple[Op, ...]]:
    """Return the blocks with seeded data."""
    model = Stack()
    data = torch.randn(4, 4, 16, generator=torch.Generator().manual_seed(1))
    spec = ModelSpec(model, [{"x": data[0]}], [{"x": data[1]}, {"x": data[2]}], lambda out, _: out, logits=True)
    return spec, list_ops(model)


@pytest.mark.parametrize("engine", ["delta", "eager"])
def test_members_that_are_not_measured(engine: str) -> None:
    """The rest of a group is, and it is said which were not; a group of nothing else has their status."""
    spec, ops = stack()
    blocks, types = ({unit.name: unit for unit in grouped(ops, kind)} for kind in ("block", "type"))
    units = [blocks["layers.1"], types["layers.*.spare"]]
    found = measured_as(spec, units, engine, ["isolated"])
    block, spare = found.values()
    assert block.status == "measured"
    assert block.reason == "without layers.1.spare (unexercised: the evaluation data never reached it)"
    assert block.ops == ("layers.1.up", "layers.1.down", "layers.1.spare")
    used = Op("used", "linear", blocks["layers.1"].members[:2])
    assert block.isolated == measured_as(stack()[0], [used], engine, ["isolated"])["used"].isolated
    assert (spare.status, spare.isolated) == ("unexercised", None)
    assert spare.reason == (
        "layers.0.spare, layers.1.spare, layers.2.spare and 1 more (unexercised: the evaluation data never reached it)"
    )


def test_groups_of_a_block_are_measured_together_and_those_that_span_blocks_alone() -> None:
    """As they are handed out to workers: no worker measures what another one is asked for."""
    spec, ops = stack()
    fused = (*grouped(ops, "type"), *(op for op in ops if op.name.endswith(("up", "down"))))
    model = calibrate(spec, ops, "w8a8", engine="delta", divergence=False, expected=fused)
    engine = model._engine
    assert isinstance(engine, DeltaEngine)
    alone = [[tuple(f"layers.{i}.{leaf}" for i in range(4))] for leaf in ("up", "down")]
    blocks = [[(f"layers.{i}.up",), (f"layers.{i}.down",)] for i in range(4)]
    assert engine._waves == [*blocks, [("head",)], *alone]
    (unit,) = (unit for unit in fused if unit.name == "layers.*.up")
    model.score(unit, ["isolated"])
    assert model.measured_with(unit, "isolated", fused) == []
    first = next(op for op in fused if op.name == "layers.2.up")
    model.score(first, ["isolated"])
    assert [op.name for op in model.measured_with(first, "isolated", fused)] == ["layers.2.down"]


def test_groups_that_come_down_to_the_same_ops() -> None:
    """They are one change, and each has its score."""
    spec, ops = stack()
    block = next(unit for unit in grouped(ops, "block") if unit.name == "layers.1")
    twin = Op("twin", "linear", block.members[:2])  # the block without the layer that is not reached
    model = calibrate(spec, ops, "w8a8", engine="delta", expected=[block, twin])
    engine = model._engine
    assert isinstance(engine, DeltaEngine)
    assert engine._waves == [[("layers.1.up", "layers.1.down")]]
    assert model.score(block, ["isolated"]).isolated == model.score(twin, ["isolated"]).isolated
    assert model.measured_with(block, "isolated", [twin]) == []


def kept_weights(model: CalibratedModel) -> int:
    """How many quantized weights are held."""
    return len(model._simulator._weights)


@pytest.mark.parametrize("engine", ["delta", "replay"])
def test_the_weights_of_all_blocks_are_never_held_together(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that spans the model holds one quantized weight at a time, also while the engine checks itself."""
    spec, ops = stack()
    units = [unit for unit in grouped(ops, "type") if unit.name in ("layers.*.up", "layers.*.down")]
    model = calibrate(spec, ops, "w8a8", engine=engine, expected=units, divergence=False)
    held: list[int] = []
    own = integers.quantize_weight

    def counted(weight: Tensor) -> integers.QuantizedWeight:
        held.append(kept_weights(model))
        return own(weight)

    monkeypatch.setattr(simulate, "quantize_weight", counted)
    for unit in units:
        assert model.score(unit, ["isolated"]).status == "measured"
    assert len(held) >= 16  # both groups, both batches
    assert max(held) <= 2  # those of the ops that the engine checks itself with
    assert kept_weights(model) <= 2


def test_a_wrong_rule_is_found_out_by_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors that single ops do not show, as they go through nothing, are seen where members are downstream."""
    spec, ops = stack()
    units = [unit for unit in grouped(ops, "type") if unit.members]
    own = DeltaRun._take_shared

    def wrong(delta: DeltaRun, steps: Any, followers: Any) -> None:  # noqa: ANN401 - as they are
        own(delta, steps, followers)
        for follower in followers:
            for step in steps:
                if len(follower.change) > 1 and step.node in follower.change:
                    follower.values[step.position] = delta.run.clean[step.position]

    monkeypatch.setattr(delta_module.DeltaRun, "_take_shared", wrong)
    single = calibrate(spec, ops, "w8a8", engine="delta", divergence=False)
    single.score(ops[0], ["isolated"])
    assert single.engine == "delta"
    model = calibrate(stack()[0], ops, "w8a8", engine="delta", divergence=False, expected=units)
    found = model.score(units[0], ["isolated"])
    assert model.engine == "replay"
    assert "layers.0.up to layers.3.up (4 ops) comes out as" in (model.engine_reason or "")
    replayed = measured_as(stack()[0], units[:1], "replay", ["isolated"], divergence=False)
    assert found.isolated == replayed[units[0].name].isolated


@pytest.mark.parametrize("engine", ["probe", "inc"])
def test_engines_of_single_ops_refuse_groups(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would give a number that is something else."""
    monkeypatch.setattr("pytest_qsens.calibrated.check_engine", lambda *_: None)  # whether it is installed
    spec, ops = stack()
    with pytest.raises(QsensError, match=rf"^engine {engine} .*layers\.0 is a group of 3\. .*--qsens-granularity op"):
        calibrate(spec, ops, "w8a8", engine=engine, expected=grouped(ops, "block"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_fused_reads_the_same_values(name: str) -> None:
    """The names that the package knows mean what they say: in the graph, all members take one and the same value."""
    spec = ARCHITECTURES[name].spec()
    assert isinstance(spec.model, nn.Module)
    graph = capture(spec.model, spec.evaluation[0], spec.output)
    units = [unit for unit in grouped(list_ops(spec.model), "fused") if unit.members]
    assert bool(units) is (name not in ("resnet", "mamba", "gpt2"))  # convolutions, one layer for all three
    for unit in units:
        calls = [[node.args[0] for node in graph.calls[op.name]] for op in unit.ops]
        assert calls[0]
        assert all(call == calls[0] for call in calls), unit
