"""What each sample adds to an error, and the standard error that follows: the same on every way to a score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pytest_qsens import metrics
from pytest_qsens.calibrated import calibrate
from pytest_qsens.engines.delta import TOLERANCE
from pytest_qsens.errors import QsensError
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.metrics import energies, energy, squared_distance, squared_distances
from pytest_qsens.models.resolve import resolve
from pytest_qsens.models.source import ModelRequest
from pytest_qsens.models.spec import ModelSpec
from pytest_qsens.samples import rows_of, standard_error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_qsens.ops import Op
    from pytest_qsens.results import Mode, Scores


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 5), st.integers(1, 40))
def test_samples_add_up_wherever_chunks_are_cut(rows: list[int], width: int, chunk: int) -> None:
    """Each sample has the sum of its own rows; the whole has the bits of a sum that knows no samples."""
    drawn = torch.Generator().manual_seed(sum(rows) + chunk)
    one, other = (torch.randn(sum(rows), width, generator=drawn) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_CHUNK", chunk)
        distances, squares = squared_distances(one, other, rows), energies(one, rows)
        assert (distances.whole, squares.whole) == (squared_distance(one, other), energy(one))
    parts = list(zip(one.double().split(rows), other.double().split(rows), strict=True))
    assert distances.samples == pytest.approx([float((a - b).square().sum()) for a, b in parts], rel=1e-12)
    assert squares.samples == pytest.approx([float(a.square().sum()) for a, _ in parts], rel=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.integers(30, 80), st.floats(0.1, 1.0), st.integers(0, 2**32 - 1))
def test_the_standard_error_is_that_of_a_bootstrap(count: int, spread: float, seed: int) -> None:
    """Drawing samples again with replacement moves the ratio by as much, for errors that grow with the reference."""
    draw = np.random.default_rng(seed)
    sizes = draw.lognormal(0, 0.4, count)
    errors = sizes * draw.lognormal(0, spread, count)
    found = standard_error(list(errors), list(sizes))
    chosen = draw.integers(0, count, (4000, count))
    assert found == pytest.approx((errors[chosen].sum(1) / sizes[chosen].sum(1)).std(ddof=1), rel=0.25)


def test_no_standard_error_of_one_sample() -> None:
    """One sample says nothing of others; two equal ones have an error of zero."""
    assert standard_error([1.0], [2.0]) is None
    assert standard_error([1.0, 1.0], [2.0, 2.0]) == 0
    assert standard_error([1.0, 3.0], [2.0, 2.0]) == pytest.approx(0.5)  # the mean's: 1 / 2 and 3 / 2, by √2


class Net(nn.Module):
    """Residual blocks, and a head that is wider than they are, so that errors come from its Gram matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 16)) for _ in range(2))
        self.head = nn.Linear(16, 56)

    def forward(self, ids: Tensor) -> Tensor:
        """Score every position."""
        x: Tensor = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.head(x)
        return out


def batches(seed: int, *sizes: int) -> list[dict[str, Tensor]]:
    """Texts whose first tokens are real, ids other than 0."""
    drawn = torch.Generator().manual_seed(seed)
    found = []
    for size in sizes:
        ids = torch.randint(1, 40, (size, 7), generator=drawn)
        lengths = torch.randint(1, 8, (size, 1), generator=drawn)
        found.append({"ids": ids.masked_fill(torch.arange(7) >= lengths, 0)})
    return found


def real(out: Tensor, batch: Any) -> Tensor:  # noqa: ANN401 - a batch
    """Positions of real tokens, of all samples."""
    return out[batch["ids"] > 0]


OUTPUTS: dict[str, tuple[Callable[[Tensor, Any], Tensor], Callable[[Any], Tensor] | None]] = {
    "all": (lambda out, _: out, None),
    "last": (lambda out, _: out[:, -1], None),
    "real": (real, lambda batch: (batch["ids"] > 0).sum(1)),
    "softmax": (lambda out, _: out.softmax(-1), None),
}


def net(output: str = "all", *sizes: int) -> tuple[ModelSpec, tuple[Op, ...]]:
    """Return the seeded model with evaluation batches of these sizes."""
    torch.manual_seed(3)
    model = Net().eval().requires_grad_(False)
    chosen, rows = OUTPUTS[output]
    spec = ModelSpec(model, batches(1, 4), batches(2, *(sizes or (6, 3))), chosen, logits=True, rows=rows)
    return spec, list_ops(model)


def scores(output: str, mode: Mode, engine: str, *, divergence: bool = False) -> dict[str, Scores]:
    """Score every op, and everything quantized."""
    spec, ops = net(output)
    model = calibrate(spec, ops, "w8a8", engine=engine, divergence=divergence)
    assert model.engine == engine
    found = {op.name: model.score(op, [mode]).modes[mode] for op in ops}
    return found | {"total": model.total().modes["isolated"]}


def per_sample(
    output: str, mode: Mode, engine: str = "eager"
) -> dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Errors and squares of the reference of every sample, from the outputs of whole forwards, in plain numpy."""
    spec, ops = net(output)
    used = calibrate(spec, ops, "w8a8", engine=engine)._engine
    references = [reference.double().numpy() for reference in used.references]
    counts = [
        (batch["ids"] > 0).sum(1).tolist() if output == "real" else [1] * len(batch["ids"]) for batch in spec.evaluation
    ]

    def apart(values: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        parts = [np.split(value, np.cumsum(rows)[:-1]) for value, rows in zip(values, counts, strict=True)]
        return np.array([float((part**2).sum()) for value in parts for part in value])

    found = {}
    for name in (*(op.name for op in ops), "total"):
        outputs = used.joint() if name == "total" else getattr(used, mode)(name)
        errors = apart([out.double().numpy() - ref for out, ref in zip(outputs, references, strict=True)])
        found[name] = errors, apart(references)
    return found


@pytest.mark.parametrize("mode", ["isolated", "fallback"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_every_engine_has_the_error_of_a_jackknife(output: str, mode: Mode) -> None:
    """Of real errors of nine samples in two batches; engines agree, whichever way they come to their sums."""
    real_errors = per_sample(output, mode)
    every = {engine: scores(output, mode, engine) for engine in ("delta", "replay", "eager")}
    every["delta, with logits"] = scores(output, mode, "delta", divergence=True)
    for op, (errors, squares) in real_errors.items():
        left_out = (errors.sum() - errors) / (squares.sum() - squares)
        jackknife = float(np.sqrt((len(errors) - 1) / len(errors) * ((left_out - left_out.mean()) ** 2).sum()))
        exact = every["eager"][op]
        assert exact["samples"] == len(errors) == 9
        assert exact["stderr"] == pytest.approx(jackknife, rel=0.35), op
        assert exact["stderr"] == pytest.approx(standard_error(list(errors), list(squares)), rel=1e-9), op
        for engine, found in every.items():
            assert found[op]["samples"] == 9
            rel = TOLERANCE if mode == "isolated" and op != "total" else 1e-8
            assert found[op]["stderr"] == pytest.approx(exact["stderr"], rel=rel), (engine, op)
        assert every["replay"][op] == exact


@pytest.mark.parametrize("mode", ["isolated", "fallback"])
def test_torchs_kernels_have_one_too(mode: Mode) -> None:
    """Engine ``fx`` goes the way of every whole forward."""
    found = scores("last", mode, "fx")
    for op, (errors, squares) in per_sample("last", mode, "fx").items():
        assert found[op]["samples"] == 9
        assert found[op]["stderr"] == pytest.approx(standard_error(list(errors), list(squares)), rel=1e-9), op


def test_samples_that_are_not_known_are_batches() -> None:
    """Rows without a known owner: each batch is one sample; with one batch there is no error at all."""
    spec, ops = net("real", 6, 3, 2)
    unknown = ModelSpec(spec.model, spec.calibration, spec.evaluation, spec.output, logits=True)
    for engine in ("delta", "replay"):
        found = calibrate(unknown, ops, "w8a8", engine=engine).score(ops[1], ["isolated"]).isolated
        assert found is not None
        assert found["samples"] == 3
    alone = ModelSpec(spec.model, spec.calibration, spec.evaluation[:1], spec.output, logits=True)
    found = calibrate(alone, ops, "w8a8").score(ops[1], ["isolated"]).isolated
    assert found is not None
    assert not {"stderr", "samples"} & found.keys()


def test_rows() -> None:
    """The first dimension is the samples where all tensors of the batch say so; a sample without rows is none."""
    batch = {"ids": torch.zeros(4, 3), "mask": torch.ones(4, 3), "flag": True}
    assert rows_of(batch, torch.zeros(4, 2), None) == [1] * 4
    assert rows_of(batch, torch.zeros(12, 2), None) == [12]
    assert rows_of(batch, torch.tensor(1.0), None) == [1]
    assert rows_of({**batch, "image": torch.zeros(9, 5)}, torch.zeros(4, 2), None) == [4]
    assert rows_of(batch, torch.zeros(6, 2), lambda _: torch.tensor([3, 0, 2, 1])) == [3, 2, 1]
    assert rows_of(batch, torch.zeros(4, 2), lambda _: None) == [1] * 4
    for wrong in ([3, 3], [], [7, -1, 0, 0]):
        with pytest.raises(QsensError, match=r"`rows` gives \[.*\] for a batch whose scored output has 4 rows"):
            rows_of(batch, torch.zeros(4, 2), lambda _, wrong=wrong: wrong)  # type: ignore[misc] # a default


def test_sentences_of_a_padded_batch_are_samples() -> None:
    """MiniLM's evaluation texts are one batch, of whose real tokens alone states are scored: eight samples."""
    spec = resolve(ModelRequest("minilm")).load()
    assert isinstance(spec.model, nn.Module)
    ops = list_ops(spec.model)
    model = calibrate(spec, ops, "w8a8")
    found = model.score(ops[0], ["isolated"]).isolated
    assert found is not None
    assert found["samples"] == 8
    assert 0 < (found["stderr"] or 0) < (found["nmse"] or 0)
