"""Errors by differences are those of an exact replay, but for rounding; where they are not, replays take over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from pytest_qsens.calibrated import CalibratedModel, calibrate
from pytest_qsens.engines.delta import DeltaEngine, tolerance
from pytest_qsens.engines.replay import ReplayEngine
from pytest_qsens.graph import joint
from pytest_qsens.graph.delta import RULES, DeltaRun, Weights
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.graph.schedule import reader_of
from pytest_qsens.metrics import Score, squared_distance
from pytest_qsens.models.spec import ModelSpec
from pytest_qsens.samples import Sums
from tests.architectures import ARCHITECTURES
from tests.schemes import INTEGER

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_qsens.engines import Unit
    from pytest_qsens.graph.schedule import Step
    from pytest_qsens.ops import Op
    from pytest_qsens.results import OpResult


def engine_of(model: CalibratedModel) -> DeltaEngine:
    """Return the engine, which is the fast one."""
    engine = model._engine
    assert isinstance(engine, DeltaEngine)
    assert engine.name == "delta"
    return engine


def measured(spec: ModelSpec, engine: str, *, divergence: bool = True) -> dict[str, OpResult]:
    """Score every op alone."""
    assert isinstance(spec.model, nn.Module)
    ops = list_ops(spec.model)
    model = calibrate(spec, ops, "w8a8", engine=engine, divergence=divergence)
    assert model.engine == engine
    return {op.name: model.score(op, ["isolated"]) for op in ops}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_errors_are_those_of_a_replay(name: str) -> None:
    """With outputs and without them, every op's error is that of a replay, up to what rounding explains."""
    exact = measured(ARCHITECTURES[name].spec(), "replay")
    for divergence in (False, True):
        fast = measured(ARCHITECTURES[name].spec(), "delta", divergence=divergence)
        assert fast.keys() == exact.keys()
        assert sum(result.status == "measured" for result in fast.values()) > len(fast) / 2
        for op, result in fast.items():
            assert result.status == exact[op].status, op
            expected = exact[op].isolated
            if expected is None:
                assert result.isolated is None, op
                continue
            nmse = expected["nmse"]
            assert nmse is not None
            assert result.isolated is not None, op
            assert result.isolated["nmse"] == pytest.approx(nmse, rel=0, abs=tolerance(nmse)), op
            if not divergence:
                assert "kl" not in result.isolated


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_differences_are_what_is_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above is not one of replays with replays: most linear layers multiply differences."""
    multiplied: list[int] = []
    own = DeltaRun._take_shared

    def count(delta: DeltaRun, steps: Sequence[Step], followers: Sequence[Any]) -> None:
        multiplied.extend(step.position for step in steps)
        own(delta, steps, followers)

    spec = ARCHITECTURES[name].spec()
    assert isinstance(spec.model, nn.Module)
    model = calibrate(spec, list_ops(spec.model), "w8a8", engine="delta")
    engine = engine_of(model)
    monkeypatch.setattr(DeltaRun, "_take_shared", count)
    for op in list_ops(spec.model):
        model.score(op, ["isolated"])
    nodes = [node for call in engine._clean[0].graph.calls.values() for node in call]
    assert len(set(multiplied)) > sum(node.target in RULES for node in nodes) / 2


class Stack(nn.Module):
    """Residual blocks of two linears, bf16 weights, and a head that is wider than they are."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.nn.functional.silu, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        inner = 4 * width
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, inner), nn.Linear(inner, width)) for _ in range(3))
        self.head = nn.Linear(width, 3 * width, bias=False)
        self.between = between
        self.bfloat16().float()

    def forward(self, x: Tensor) -> Tensor:
        """Add to the stream block by block."""
        for block in self.blocks:
            x = x + block[1](self.between(block[0](x)))
        return self.head(x)


def stack(
    between: Callable[[Tensor], Tensor] = torch.nn.functional.silu,
    output: Callable[[Tensor, object], Tensor] = lambda out, _: out,
    width: int = 32,
) -> tuple[ModelSpec, tuple[Op, ...]]:
    """Return the blocks with seeded data, as logits."""
    model = Stack(between, width)
    data = torch.randn(2, 4, 6, width, generator=torch.Generator().manual_seed(1))
    spec = ModelSpec(model, [{"x": data[0]}], [{"x": data[1]}], output, logits=True)
    return spec, list_ops(model)


OUTPUTS: list[Callable[[Tensor, object], Tensor]] = [
    lambda out, _: out,
    lambda out, _: out[:, 1:],
    lambda out, _: out[:, -1],
    lambda out, _: out[torch.tensor([[True] * 5 + [False]] * 4)],
    lambda out, _: out[..., :40],
    lambda out, _: out.softmax(-1),
]
"""What is scored of the head's output: all, rows of it, and what is no longer its rows."""


@pytest.mark.parametrize("narrow", [False, True])
def test_bf16_products_stay_within_tolerance_of_float64(*, narrow: bool) -> None:
    """Against a run in float64 with the same quantized values, whichever products are used."""
    spec, ops = stack(width=256)
    engine = engine_of(calibrate(spec, ops, "w8a8", engine="delta"))
    run = engine._clean[0]
    weights = Weights(fast_bf16=narrow)
    delta = DeltaRun(run, weights)
    assert any(weights.dtype(value) == torch.bfloat16 for value in run.graph.constants.values()) is narrow
    precise = Stack(width=256).double()
    with torch.no_grad():
        clean = precise(spec.evaluation[0]["x"].double())
        for op in ops:
            (node,) = run.graph.calls[op.name]
            arguments, _ = reader_of(node, run.order)(run.clean)
            override = engine._quantize(run.graph, [op.name])
            change = (override[node](*arguments) - run.values(node)).double()
            hook = precise.get_submodule(op.name).register_forward_hook(lambda _m, _i, out, c=change: out + c)
            exact = squared_distance(precise(spec.evaluation[0]["x"].double()), clean)
            hook.remove()
            (found,) = delta.errors([override])
            assert found.whole == pytest.approx(exact, rel=2e-3), op
            (output,) = delta.outputs([override])
            assert squared_distance(output, run.output) == pytest.approx(exact, rel=2e-3), op


@pytest.mark.parametrize("output", OUTPUTS)
def test_errors_without_outputs(output: Callable[[Tensor, object], Tensor]) -> None:
    """The Gram matrix of the head gives what outputs give, also where rows of it are scored, not otherwise."""
    spec, ops = stack(output=output)
    engine = engine_of(calibrate(spec, ops, "w8a8", engine="delta"))
    run, (delta,) = engine._clean[0], engine._deltas
    with torch.no_grad():
        for op in ops:
            change = engine._quantize(run.graph, [op.name])
            (error,) = delta.errors([change])
            (outputs,) = delta.outputs([change])
            assert error.whole == pytest.approx(squared_distance(outputs, run.output), rel=2e-3), op


def test_the_ops_of_a_block_are_measured_together_and_no_others() -> None:
    """One pass for a block; ops that nobody asks for are left out of it."""
    spec, ops = stack()
    expected = [op for op in ops if op.name != "blocks.1.0"]
    model = calibrate(spec, ops, "w8a8", engine="delta", divergence=False, expected=expected)
    engine = engine_of(model)
    waves: list[list[str]] = []
    own = engine._measure

    def count(units: Sequence[Unit], *others: Any) -> dict[Unit, Score]:  # noqa: ANN401 - as they are
        waves.append([op for (op,) in units])
        return own(units, *others)

    engine._measure = count  # type: ignore[method-assign] # counted
    for op in ops:
        if op in expected:
            assert model.score(op, ["isolated"]).status == "measured"
    # the first and the last but one are measured to check the engine
    assert waves == [["blocks.0.0", "blocks.0.1"], ["blocks.2.0", "blocks.2.1"], ["blocks.1.1"], ["head"]]
    assert len(model._engine._waves) == len(waves)


def test_a_wrong_rule_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """If differences give other errors than a replay, all ops are replayed, and the reason is told."""
    monkeypatch.setattr(DeltaRun, "errors", lambda _, changes: [Sums(1.0, (1.0,))] * len(changes))
    spec, ops = stack()
    model = calibrate(spec, ops, "w8a8", engine="delta", divergence=False)
    exact = calibrate(*stack(), "w8a8", engine="replay", divergence=False)
    assert [model.score(op, ["isolated"]).isolated for op in ops] == [
        exact.score(op, ["isolated"]).isolated for op in ops
    ]
    assert model.engine == "replay"
    assert "in an exact replay" in (model.engine_reason or "")


def test_what_cannot_be_followed_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torch raises when it runs several values together ends in replays, and is told."""

    def refuse(*_: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(DeltaRun, "errors", refuse)
    spec, ops = stack()
    model = calibrate(spec, ops, "w8a8", engine="delta", divergence=False)
    assert all(model.score(op, ["isolated"]).status == "measured" for op in ops)
    assert model.engine == "replay"
    assert "cannot be followed (RuntimeError: no such kernel)" in (model.engine_reason or "")


def test_not_finite_fails_that_op_alone() -> None:
    """An op whose rounding leads to NaN is failed, and leaves the others of its block their numbers."""

    def between(y: Tensor) -> Tensor:
        return torch.where(y == 0, torch.nan, y)  # as a rounded value is, somewhere

    spec, ops = stack(between)
    model = calibrate(spec, ops, "w8a8", engine="delta", divergence=False)
    statuses = {op.name: model.score(op, ["isolated"]).status for op in ops}
    failed = {f"blocks.{i}.0" for i in range(3)}
    assert statuses == {op.name: "failed" if op.name in failed else "measured" for op in ops}


def others(
    spec: ModelSpec, scheme: str, engine: str, *, divergence: bool = False, memory: int | None = None
) -> dict[str, OpResult]:
    """Score every op as the only one that is not quantized."""
    assert isinstance(spec.model, nn.Module)
    ops = list_ops(spec.model)
    model = calibrate(spec, ops, scheme, engine=engine, divergence=divergence, memory=memory)
    found = {op.name: model.score(op, ["fallback"]) for op in ops} | {"total": model.total()}
    assert model.engine == engine
    return found


def assert_alike(fast: dict[str, OpResult], exact: dict[str, OpResult]) -> None:
    """All numbers of mode ``fallback`` are the same but for the order in which squares are summed."""
    assert fast.keys() == exact.keys()
    for op, result in fast.items():
        assert (result.status, result.reason) == (exact[op].status, exact[op].reason), op
        expected, found = exact[op].fallback or {}, result.fallback or {}
        assert found.keys() == expected.keys(), op
        for name, value in expected.items():
            if value is None:  # SQNR of no error
                assert found[name] is None, (op, name)
                continue
            # gain and noise are differences of NMSE
            assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-12 * abs(expected["nmse"] or 0)), (op, name)
    assert fast["total"].isolated == exact["total"].isolated


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_but_one_op_as_in_a_replay(name: str) -> None:
    """Ops side by side in the quantized model have the numbers of replays, with their noise."""
    spec = ARCHITECTURES[name].spec
    assert_alike(*(others(spec(), "w8a8", engine) for engine in ("delta", "replay")))


@pytest.mark.parametrize("scheme", INTEGER)
@pytest.mark.parametrize("output", OUTPUTS)
def test_the_head_part_by_part(
    scheme: str, output: Callable[[Tensor, object], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the head is computed and compared in parts, whatever is scored of it, nothing is lost or counted twice."""
    monkeypatch.setattr(joint, "_BLOCK", 500)  # the last part is a smaller one
    assert_alike(*(others(stack(output=output)[0], scheme, engine) for engine in ("delta", "replay")))


def test_all_but_one_op_with_logits() -> None:
    """With ``kl`` and ``top1``, outputs are made and compared whole."""
    fast, exact = (others(stack()[0], "w8a8", engine, divergence=True) for engine in ("delta", "replay"))
    assert_alike(fast, exact)
    assert all("kl" in (result.fallback or {}) for op, result in fast.items() if op != "total")


def test_the_ops_of_a_block_fall_back_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparisons above are not those of replays with replays."""
    shared: list[int] = []
    own = joint.JointRun._products

    def count(run: joint.JointRun, step: Step, stacked: Tensor) -> Any:  # noqa: ANN401 - what it returns
        shared.append(len(stacked))
        return own(run, step, stacked)

    monkeypatch.setattr(joint.JointRun, "_products", count)
    monkeypatch.setattr(DeltaEngine, "_find_fault", lambda _: None)  # which replays two ops
    monkeypatch.setattr(ReplayEngine, "fallback", None)
    result = others(stack()[0], "w8a8_static", "delta")
    assert {op.status for op in result.values()} == {"measured"}
    assert max(shared) == 2
