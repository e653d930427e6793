"""Mode fallback checks itself before it is trusted: ops side by side get what replays give them, or are replayed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from pytest_qsens.calibrated import calibrate
from pytest_qsens.engines import delta
from pytest_qsens.engines.delta import DeltaEngine
from pytest_qsens.engines.replay import ReplayEngine
from pytest_qsens.graph.joint import JointRun
from pytest_qsens.samples import Sums
from tests.engines.test_delta import stack
from tests.plugin.harness import MODEL, write_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from pytest_qsens.graph.replay import Change
    from pytest_qsens.graph.schedule import Step
    from pytest_qsens.graph.together import Head
    from pytest_qsens.results import OpResult


def scored(engine: str, *, divergence: bool, scheme: str = "w8a8") -> tuple[dict[str, OpResult], Any]:
    """Score all ops of a small model in both modes; returns the model as well."""
    spec, ops = stack()
    model = calibrate(spec, ops, scheme, engine=engine, divergence=divergence)
    return {op.name: model.score(op, ["isolated", "fallback"]) for op in ops}, model


def neighbours(run: JointRun, step: Step, stacked: Tensor) -> Iterator[Tensor]:
    """Give each change what the last one beside it should have."""
    return own_products(run, step, stacked[-1:].expand_as(stacked))


def one_channel(run: JointRun, rows: Sequence[Tensor], head: Head) -> list[Sums]:
    """Leave out one channel of the output, which is a hundredth of the error."""
    whole, reference = own_compared(run, rows, head), run.reference
    (output,) = run.outputs([{}])
    channel = float((output - reference)[..., 0].double().square().sum()) / 100
    return [error._replace(whole=error.whole - channel) for error in whole]


def refuse(*_: object) -> Any:  # noqa: ANN401 - never returns
    """Stand in for a kernel that there is not."""
    raise RuntimeError("no such kernel")


own_products, own_compared = JointRun._products, JointRun._compared


@pytest.mark.parametrize(
    ("name", "broken", "divergence", "why"),
    [
        ("_products", neighbours, False, "with everything but blocks.0.0 quantized the SSE comes out as"),
        ("_products", neighbours, True, "with everything but blocks.0.0 quantized the SSE comes out as"),
        ("_compared", one_channel, False, "with everything but blocks.0.0 quantized the SSE comes out as"),
        ("_products", refuse, False, "ops cannot be followed side by side (RuntimeError: no such kernel)"),
        ("_products", refuse, True, "ops cannot be followed side by side (RuntimeError: no such kernel)"),
    ],
)
def test_what_gives_other_scores_is_found_out(
    name: str, broken: Callable[..., Any], *, divergence: bool, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That mode is replayed then, bit for bit and with its noise, and the reason is told; the other mode is not."""
    monkeypatch.setattr(JointRun, name, broken)
    found, model = scored("delta", divergence=divergence)
    monkeypatch.undo()
    exact, _ = scored("replay", divergence=divergence)
    right, _ = scored("delta", divergence=divergence)
    assert {op: result.fallback for op, result in found.items()} == {op: r.fallback for op, r in exact.items()}
    assert {op: result.isolated for op, result in found.items()} == {op: r.isolated for op, r in right.items()}
    assert model.engine == "delta+replay"
    assert (model.engine_reason or "").startswith(f"mode fallback is replayed: {why}")
    _, ops = stack()
    assert [op.name for op in model.measured_with(ops[2], "isolated", ops)] == ["blocks.1.1"]
    assert not model.measured_with(ops[2], "fallback", ops)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8_static", "w8a8_dynamic"])
@pytest.mark.parametrize("divergence", [False, True])
def test_two_ops_are_replayed_once(*, scheme: str, divergence: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those at the ends of the model, whatever is scored and however often; nothing else is."""
    replayed: list[str] = []
    own = ReplayEngine.fallback

    def logged(engine: ReplayEngine, *ops: str, seed: int | None = None) -> Iterator[Tensor]:
        replayed.extend(ops)
        return own(engine, *ops, seed=seed)

    monkeypatch.setattr(ReplayEngine, "fallback", logged)
    spec, ops = stack()
    model = calibrate(spec, ops, scheme, engine="delta", divergence=divergence, expected=ops[2:4])
    for op in ops[2:4]:
        assert model.score(op, ["isolated"]).status == "measured"
    assert not replayed
    for op in ops[2:4]:
        assert model.score(op, ["fallback"]).status == "measured"
    assert replayed == ["blocks.0.0", "blocks.2.1"]
    assert (model.engine, model.engine_reason) == ("delta", None)


@pytest.mark.parametrize(("memory", "most"), [(10**9, 3), (10**5, 1)])
def test_the_check_keeps_to_the_memory(memory: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ops meet in it, or one after the other where there is no room for more."""
    met: list[int] = []
    own = JointRun.errors

    def logged(run: JointRun, changes: Sequence[Change]) -> Any:  # noqa: ANN401 - what it returns
        met.append(len(changes))
        return own(run, changes)

    monkeypatch.setattr(JointRun, "errors", logged)
    spec, ops = stack()
    model = calibrate(spec, ops, "w8a8", engine="delta", divergence=False, memory=memory)
    engine: Any = model._engine
    engine.check_others()
    assert (sum(met), max(met)) == (3, most)
    assert engine.trusts("fallback")


def test_both_modes_can_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is asked for first, all is replayed in the end, and both reasons are told if both were found."""
    monkeypatch.setattr(JointRun, "_products", neighbours)
    monkeypatch.setattr(delta, "TOLERANCE", -1.0)
    spec, ops = stack()
    model = calibrate(spec, ops, "w8a8", engine="delta", divergence=False)
    assert model.score(ops[0], ["fallback"]).status == "measured"
    assert model.engine == "delta+replay"
    assert model.score(ops[0], ["isolated"]).status == "measured"
    assert model.engine == "replay"
    assert "fallback" in (model.engine_reason or "")
    assert "the NMSE of blocks.0.0" in (model.engine_reason or "")
    other = calibrate(*stack(), "w8a8", engine="delta", divergence=False)
    monkeypatch.setattr(DeltaEngine, "_find_fault", refuse)  # what is known is not found out again
    assert [other.score(ops[0], [mode]).status for mode in ("isolated", "fallback")] == ["measured"] * 2
    assert "fallback" not in (other.engine_reason or "")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_finite_where_a_replay_is_not_is_no_agreement(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A score that is no number agrees with none."""
    monkeypatch.setattr(JointRun, "errors", lambda _, changes: [Sums(value, ())] * len(changes))
    spec, ops = stack()
    model = calibrate(spec, ops, "w8a8", engine="delta", divergence=False)
    assert model.score(ops[0], ["fallback"]).status == "measured"
    assert model.engine == "delta+replay"
    assert "the SSE comes out as" in (model.engine_reason or "")


def test_the_summary_tells(pytester: pytest.Pytester) -> None:
    """In every process of a real run: the engines in use once each, and why."""
    write_model(pytester)
    pytester.makeconftest(
        """
        from pytest_qsens.graph import joint

        own = joint.JointRun._products
        joint.JointRun._products = lambda run, step, stacked: own(run, step, stacked[-1:].expand_as(stacked))
        """
    )
    result = pytester.runpytest_subprocess(
        "--qsens-model", MODEL, "--qsens-mode", "both", "--snapshot-update", "-n", "2"
    )
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        [
            "*qsens: model net.spec, scheme w8a8, engine delta+replay*",
            "slower engine delta+replay: mode fallback is replayed: with everything but * quantized the SSE comes out*",
        ]
    )
