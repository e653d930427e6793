"""Profiles: who gets the time, and what adds up."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytest_qsens import ModelSpec, profile
from pytest_qsens.calibrated import calibrate
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.profile import PHASES, Profile, Profiler, kind_of, total
from pytest_qsens.report.profile import LARGEST, table
from pytest_qsens.result_files import read_profile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.fx import Node

aten = torch.ops.aten


class Clock:
    """Goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """Tell the time."""
        return self.now

    def work(self, seconds: float, result: object = None) -> object:
        """Take so long."""
        self.now += seconds
        return result


def node(target: object, op: str = "call_function") -> Node:
    """Make a node of a graph."""
    return torch.fx.Graph().create_node(op, target)  # type: ignore[arg-type]


def test_time_counts_where_it_was_entered_last() -> None:
    """A phase has its own time only, what is between the outermost ones is waiting, and before and after is nothing."""
    clock = Clock()
    profiler = Profiler(clock)
    clock.work(1000)
    with profile.running(profiler):
        with profile.phase("capture"):
            clock.work(1)
            with profile.phase("replay"):
                clock.work(2)
                with profile.phase("local quantization"):
                    clock.work(4)
                clock.work(8)
            with profile.phase("capture"):
                clock.work(16)
        clock.work(32)
        with profile.phase("replay"):
            clock.work(64)
    clock.work(1000)
    found = profiler.profile()
    assert found.seconds == {"capture": 17, "local quantization": 4, "replay": 74, "waiting": 32}
    assert list(found.seconds) == sorted(found.seconds, key=PHASES.index)
    assert sum(found.seconds.values()) == 127


def test_a_decorated_function_and_one_that_raises() -> None:
    """However a phase is left, time counts for the one around it again."""
    clock = Clock()
    profiler = Profiler(clock)

    @profile.phase("scoring")
    def fails() -> None:
        clock.work(2)
        raise ZeroDivisionError

    with profile.running(profiler), profile.phase("replay"):
        with pytest.raises(ZeroDivisionError):
            fails()
        with pytest.raises(ZeroDivisionError):
            profiler.call(node(aten.mm.default), divmod, (1, 0), {})
        clock.work(1)
    assert profiler.profile().seconds == {"replay": 1, "scoring": 2, "waiting": 0}


def test_calls_of_a_replay_by_kind() -> None:
    """Names without overload; the time of something nested is not a kind's; the longest comes first."""
    clock = Clock()
    profiler = Profiler(clock)

    def quantized() -> object:
        with profile.phase("local quantization"):
            clock.work(3)
        return clock.work(0.5)

    with profile.running(profiler):
        with profile.phase("capture"):
            profiler.call(node(aten.add.Tensor), clock.work, (7,), {})
        with profile.phase("replay"):
            clock.work(0.25)
            assert profiler.call(node(aten.add.Tensor), clock.work, (1,), {"result": "sum"}) == "sum"
            profiler.call(node(aten.add.Scalar), clock.work, (1,), {})
            profiler.call(node(aten.linear.default), quantized, (), {})
            profiler.call(node("ids", "placeholder"), clock.work, (4,), {})
            profiler.within("differences", profiler.call, node(aten.linear.default), quantized, (), {})
            profiler.within("differences", clock.work, 8)
    found = profiler.profile()
    assert list(found.replay.items()) == [("differences", 8), ("clone", 4), ("add", 2), ("linear", 1)]
    assert found.seconds == {"capture": 7, "local quantization": 6, "replay": 15.25, "waiting": 0}
    assert found.gemm_seconds == 0


def test_what_counts_as_a_product() -> None:
    """The operators themselves and what is linear in their place, in replays; blocks that say so; nothing else."""
    clock = Clock()
    profiler = Profiler(clock)
    linear = node(clock.work)
    linear.target = type("Linear", (), {"__name__": "linear.default", "__call__": lambda _, s: clock.work(s)})()
    attention = node(aten.scaled_dot_product_attention.default)
    with profile.running(profiler):
        with profile.phase("replay"):
            profiler.call(linear, linear.target, (1,), {})
            profiler.call(linear, clock.work, (2,), {})  # quantized in its place
            profiler.call(linear, clock.work, (4,), {}, linear=True)
            profiler.call(attention, clock.work, (8,), {}, linear=True)
            profiler.call(node(aten.mul.Tensor), clock.work, (16,), {}, linear=True)
            with profile.phase("local quantization", product=True):
                clock.work(32)
            with profile.phase("scoring"):
                clock.work(64)
        with profile.phase("capture"):
            profiler.call(linear, linear.target, (128,), {})
            with profile.phase("scoring", product=True):
                clock.work(256)
    assert profiler.profile().gemm_seconds == 1 + 4 + 8 + 32 + 256
    with profile.running(profiler), profile.phase("forward"):
        clock.work(1)
    assert profiler.profile().gemm_seconds is None  # the model ran itself: who knows


def test_nothing_is_timed_unless_a_profiler_runs() -> None:
    """Without one, phases do nothing; after one, the one before is back."""
    clock = Clock()
    outer, inner = Profiler(clock), Profiler(clock)
    with profile.phase("replay"):
        clock.work(1)
    with profile.running(outer), profile.phase("load"):
        with profile.running(inner), profile.phase("replay"):
            clock.work(2)
        with profile.running(None), profile.phase("scoring"):
            clock.work(4)
        assert profile.current is outer
    assert profile.current is None
    assert outer.profile().seconds == {"load": 6, "waiting": 0}
    assert inner.profile().seconds == {"replay": 2, "waiting": 0}


SECONDS = st.floats(0, 1e6)
PROFILE = st.builds(
    Profile,
    st.integers(1, 99),
    st.dictionaries(st.sampled_from(PHASES), SECONDS),
    st.dictionaries(st.sampled_from(["linear", "add", "mul", "_softmax", "clone", "relu", "view", "mm"]), SECONDS),
    st.none() | SECONDS,
)


@given(st.lists(PROFILE, min_size=1, max_size=4))
def test_processes_add_up(profiles: list[Profile]) -> None:
    """Nothing is lost or counted twice, whatever the processes did; an unknown part makes the sum unknown."""
    found = total(profiles)
    assert found.processes == sum(one.processes for one in profiles)
    for name in ("seconds", "replay"):
        sums = sum(sum(getattr(one, name).values()) for one in profiles)
        assert sum(getattr(found, name).values()) == pytest.approx(sums)
    assert list(found.replay.values()) == sorted(found.replay.values(), reverse=True)
    products = [one.gemm_seconds for one in profiles]
    assert found.gemm_seconds == (None if None in products else pytest.approx(sum(map(float, products))))  # type: ignore[arg-type]
    assert total([found]) == found


@given(PROFILE)
def test_a_profile_travels(found: Profile) -> None:
    """It is rebuilt from builtin values, also through JSON, as between processes and in files."""
    assert read_profile(json.loads(json.dumps(asdict(found))), "profile") == found


@given(PROFILE)
def test_the_table(found: Profile) -> None:
    """Every phase has a line, and few kinds do."""
    lines = list(table(found))
    assert ("processes" in lines[0]) == (found.processes > 1)
    for phase in found.seconds:
        assert any(line.strip().startswith(phase) for line in lines[1:])
    assert len(lines) <= 1 + len(PHASES) + LARGEST + 2 + 2


def test_the_table_of_an_example() -> None:
    """What a user sees: the kinds under the replay, the rest of them together, and the part in products."""
    kinds = {f"op{n}": 5.0 - n / 2 for n in range(8)}
    lines = list(table(Profile(2, {"load": 10, "replay": 30.0, "waiting": 0.0}, kinds, 20.0)))
    assert lines == [
        "where the time went from the first measurement to the last, in seconds of 2 processes together",
        "  load                    10.000   25.0%",
        "  replay                  30.000   75.0%",
        "    op0                    5.000   12.5%",
        "    op1                    4.500   11.2%",
        "    op2                    4.000   10.0%",
        "    op3                    3.500    8.8%",
        "    op4                    3.000    7.5%",
        "    other (3 kinds)        6.000   15.0%",
        "    between the calls      4.000   10.0%",
        "  waiting                  0.000    0.0%",
        "  all                     40.000  100.0%",
        "  in matrix products      20.000   50.0%",
    ]


def test_kinds_are_named_without_namespace_and_overload() -> None:
    """As users know them."""
    targets = (aten.add_.Tensor, aten._softmax.default, aten.scaled_dot_product_attention.default, getattr)
    assert [kind_of(node(t)) for t in targets] == ["add_", "_softmax", "scaled_dot_product_attention", "getattr"]


class Attention(torch.nn.Module):
    """Has two linears around an attention, and more classes than its width."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(8, 8), torch.nn.Linear(8, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the logits."""
        x = self.first(x)
        logits: torch.Tensor = self.last(torch.nn.functional.scaled_dot_product_attention(x, x, x) * 2)
        return logits


@pytest.mark.parametrize(
    ("engine", "modes", "kinds"),
    [
        ("delta", ("isolated",), {"scaled_dot_product_attention", "mul", "linear", "differences"}),
        ("replay", ("isolated", "fallback"), {"scaled_dot_product_attention", "mul", "linear"}),
        ("eager", ("isolated", "fallback"), set()),
    ],
)
def test_engines(engine: str, modes: Sequence[str], kinds: set[str]) -> None:
    """Every engine fills its phases, kinds are those of the model, and no part is more than the whole."""
    torch.manual_seed(0)
    model = Attention()
    batches = [{"x": torch.randn(2, 3, 8)}]
    spec = ModelSpec(model, batches, batches, output=lambda out, _: out)
    ops = list_ops(model)
    profiler = Profiler()
    with profile.running(profiler):
        calibrated = calibrate(spec, ops, "w8a8", engine=engine)
    plain = calibrate(spec, ops, "w8a8", engine=engine)
    for op in ops:
        scored, expected = calibrated.score(op, modes), plain.score(op, modes)  # type: ignore[arg-type]
        assert (scored.isolated, scored.fallback) == (expected.isolated, expected.fallback)
    assert profile.current is None
    found = profiler.profile()
    common = {"calibration", "reference", "local quantization", "scoring", "capture", "waiting"}
    assert found.seconds.keys() == common | {"replay" if kinds else "forward"}
    assert set(found.replay) >= kinds
    assert all(spent >= 0 for spent in (*found.seconds.values(), *found.replay.values()))
    if kinds:
        assert sum(found.replay.values()) <= found.seconds["replay"]
        assert found.gemm_seconds is not None
        products = {"linear", "scaled_dot_product_attention"}
        assert found.gemm_seconds >= found.replay["scaled_dot_product_attention"]
        assert found.gemm_seconds <= sum(found.replay[kind] for kind in products) + sum(
            found.seconds[phase] for phase in ("local quantization", "scoring")
        )
    else:
        assert found.gemm_seconds is None
