"""Errors found at the last linear layer, without its output as a whole, are those of outputs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from pytest_qsens.calibrated import calibrate
from pytest_qsens.engines.delta import DeltaEngine
from pytest_qsens.graph import joint
from pytest_qsens.graph.capture import Graph, capture
from pytest_qsens.graph.delta import DeltaRun, Weights
from pytest_qsens.graph.joint import JointRun
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.graph.replay import Run
from pytest_qsens.metrics import squared_distance
from pytest_qsens.models.spec import ModelSpec
from pytest_qsens.noise import factors
from tests.schemes import INTEGER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pytest_qsens.graph.replay import Change
    from pytest_qsens.graph.together import Together

aten = torch.ops.aten


def wholes(together: Together, changes: Sequence[Change]) -> list[float]:
    """Errors of changes, over all samples."""
    return [error.whole for error in together.errors(changes)]


class Headed(nn.Module):
    """Two embedded layers and a head, with what is to be tried."""

    def __init__(
        self, *, width: int = 16, classes: int = 70, bias: bool = True, tied: bool = False, again: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body = nn.Embedding(classes, width), nn.Linear(width, width)
        self.head = nn.Linear(width, classes, bias=bias)
        if bias:
            nn.init.normal_(self.head.bias)
        if tied:
            self.head.weight = self.embed.weight
        self.again = again
        if width > 100:
            self.bfloat16().float()  # wide enough to stay narrow

    def forward(self, ids: Tensor) -> Tensor:
        """Map ``(N, L)`` to logits."""
        x = self.body(self.embed(ids)).tanh()
        if self.again:
            x = x + self.head(x)[..., : x.shape[-1]].tanh()
        return self.head(x)


MASK = torch.tensor([[True] * 3 + [False] * 2] * 4)

CASES: dict[str, tuple[dict[str, Any], Callable[[Tensor, object], Tensor], bool]] = {
    "bias": ({}, lambda out, _: out, True),
    "no bias": ({"bias": False}, lambda out, _: out, True),
    "tied": ({"tied": True}, lambda out, _: out, True),
    "tied, no bias": ({"tied": True, "bias": False}, lambda out, _: out, True),
    "narrow": ({"width": 256, "classes": 1100}, lambda out, _: out, True),
    "one class more": ({"classes": 17}, lambda out, _: out, True),
    "no more classes than inputs": ({"classes": 16}, lambda out, _: out, False),
    "called twice": ({"again": True}, lambda out, _: out, True),
    "rows": ({}, lambda out, _: out[:, 1:4], True),
    "rows of rows": ({}, lambda out, _: out[1:][:, -1], True),
    "masked rows": ({}, lambda out, _: out[MASK], True),
    "one row": ({}, lambda out, _: out[2, 3], True),
    "rows twice": ({}, lambda out, _: out[torch.tensor([0, 0, 3])], True),
    "classes": ({}, lambda out, _: out[..., :50], False),
    "every other class": ({}, lambda out, _: out[..., ::2], False),
    "one class": ({}, lambda out, _: out[..., 1], False),
    "no rows left alone": ({}, lambda out, _: out.log_softmax(-1), False),
}
"""Case → how the model is made, what is scored, and whether errors are found at the head."""


def engine_of(scheme: str = "w8a8", **made: Any) -> DeltaEngine:  # noqa: ANN401 - of `Headed` and `ModelSpec`
    """Calibrate a model on seeded ids."""
    output = made.pop("output", lambda out, _: out)
    model = Headed(**made).eval()
    ids = torch.randint(0, 16, (2, 4, 5), generator=torch.Generator().manual_seed(1))
    spec = ModelSpec(model, [{"ids": ids[0]}], [{"ids": ids[1]}], output)
    engine = calibrate(spec, list_ops(model), scheme, engine="delta", divergence=False)._engine
    assert isinstance(engine, DeltaEngine)
    return engine


def kinds(engine: DeltaEngine) -> Iterator[tuple[Together, Callable[[str], Change], float]]:
    """Each kind of run with a head, how an op is changed in it, and how near its errors are to those of replays."""
    graph = engine._clean[0].graph
    yield engine._deltas[0], lambda op: engine._quantize(graph, [op]), 2e-3
    for seed in (None, 1):
        joined = engine._joint_together(seed)[0]
        yield joined, partial(lambda op, seed: engine._flip(graph, [op], seed), seed=seed), 1e-9


@pytest.mark.parametrize("parts", [1, 2**17])
@pytest.mark.parametrize("name", CASES)
def test_errors_are_those_of_replays(name: str, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every op, the head and an op with the same weight among them; alone and side by side, and of no change."""
    made, output, at_head = CASES[name]
    monkeypatch.setattr(joint, "_BLOCK", parts)
    engine = engine_of(output=output, **made)
    ops = ("embed", "body", "head")
    with torch.no_grad():
        for together, change, near in kinds(engine):
            assert (together._head is not None) is at_head
            changes: list[Change] = [*map(change, ops), {}]
            exact = [squared_distance(together.reference, together.run.replay(change)) for change in changes]
            assert all(exact[:3])
            # what is zero comes out as zero, but by the Gram matrix
            assert wholes(together, changes) == pytest.approx(exact, rel=near, abs=1e-12 * max(exact))
            for one, error in zip(changes, exact, strict=True):
                assert wholes(together, [one]) == pytest.approx([error], rel=near, abs=1e-12 * max(exact))


def test_the_head_itself_goes_by_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its weight says, by its Gram matrix or quantized, does not hold where it is the op in question."""

    def refuse(*_: object) -> Any:  # noqa: ANN401 - never returns
        raise AssertionError("compared at the head")

    engine = engine_of(again=True, tied=True)
    monkeypatch.setattr(Weights, "gram", refuse)
    monkeypatch.setattr(JointRun, "_compared", refuse)
    with torch.no_grad():
        for together, change, _ in kinds(engine):
            assert wholes(together, [change("head")])[0] > 0
            with pytest.raises(AssertionError, match="at the head"):
                together.errors([change("embed")])


def test_the_gram_matrix_is_made_once() -> None:
    """For all batches, and for all ops."""
    weights = Weights(fast_bf16=False)
    weight = torch.randn(50, 8)
    assert weights.gram(weight) is weights.gram(weight)
    assert torch.allclose(weights.gram(weight), weight.double().t() @ weight.double(), atol=1e-5)


def test_moved_outputs_of_the_head() -> None:
    """With a seed, every part of the head's output is moved by its own factors: those of the rows that are scored."""
    engine = engine_of(output=lambda out, _: out[:, 1:4])
    with torch.no_grad():
        (run,) = engine._joint_together(1)
        head = run._head
        assert head is not None
        found = torch.cat(list(run._head_factors(head, 32) or ()), -1)
        output = run.run.values(head.node)
        assert torch.equal(found.reshape(4, 3, 70), factors(output, 1)[:, 1:4])
        (still,) = engine._joint_together(None)
        assert still._head is not None
        assert still._head_factors(still._head, 32) is None


def graph_without_rows() -> Graph:
    """Capture the model on no ids at all."""
    model = Headed().eval().requires_grad_(requires_grad=False)
    return capture(model, {"ids": torch.zeros((0, 5), dtype=torch.int64)}, lambda out, _: out)


@pytest.mark.parametrize("scheme", INTEGER)
def test_no_rows(scheme: str) -> None:
    """Where nothing is scored nothing is wrong, whichever op is changed."""
    engine, graph = engine_of(scheme), graph_without_rows()
    with torch.no_grad():
        clean = Run(graph)
        changes = [engine._quantize(graph, [op]) for op in ("embed", "body", "head")]
        delta = DeltaRun(clean, Weights(fast_bf16=False))
        assert delta._head is not None
        assert wholes(delta, changes) == [0.0] * 3
        for seed in (None, 1):
            quantized = Run(graph, engine._everything(graph, seed))
            moved = None if seed is None else partial(factors, seed=seed)
            run = JointRun(quantized, clean.output, engine._row_wise(graph), moved)
            assert run._head is not None
            assert wholes(run, [engine._flip(graph, [op], seed) for op in ("embed", "body", "head")]) == [0.0] * 3
            assert run.bytes_per_change() == 0
