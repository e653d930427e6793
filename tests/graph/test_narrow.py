"""Weights that stay narrow: the numbers of fp32, without an fp32 copy."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.nn import functional

from pytest_qsens.calibrated import calibrate
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.graph.narrow import LINEAR, NarrowWeight, keep_narrow, make_wide, stored
from pytest_qsens.models.spec import ModelSpec
from pytest_qsens.threads import reproducible_sums

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

reproducible_sums()


def weight(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a seeded weight."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "channels"), [((7, 64), 48), ((2, 5, 96), 33), ((1, 300), 9000), ((4, 3, 2048), 1100), ((0, 16), 8)]
)
def test_a_linear_layer_has_the_bits_of_fp32(
    shape: tuple[int, ...], channels: int, dtype: torch.dtype, *, bias: bool
) -> None:
    """Whether its weight is taken at once or, where it is large, in parts."""
    narrow = weight(channels, shape[-1], dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    offset = torch.randn(channels) if bias else None
    expected = functional.linear(x, narrow.float(), offset)
    assert torch.equal(functional.linear(x, NarrowWeight(narrow), offset), expected)
    assert torch.equal(LINEAR(x, narrow, offset), expected)


def test_an_embedding_has_the_bits_of_fp32() -> None:
    """Rows of any shape; with ``max_norm``, which changes a weight, the stored one is left alone."""
    narrow, indices = weight(50, 16), torch.tensor([[3, 49], [0, 3]])
    before = narrow.clone()
    assert torch.equal(functional.embedding(indices, NarrowWeight(narrow)), narrow.float()[indices])
    limited = functional.embedding(indices, NarrowWeight(narrow), max_norm=1.0)
    assert torch.equal(limited, functional.embedding(indices, narrow.float(), max_norm=1.0))
    assert torch.equal(narrow, before)


USES: list[Callable[[Tensor], Tensor]] = [
    lambda w: torch.ones(2, 16) @ w.t(),
    lambda w: w[3],
    lambda w: w.T.sum(0),
    lambda w: w * 2,
    lambda w: torch.cat([w, w]),
    lambda w: w.to(torch.float64),
    lambda w: w.data.square(),
    lambda w: torch.einsum("oi,i->o", w, torch.ones(16)),
]


@pytest.mark.parametrize("use", USES)
def test_any_other_use_gets_fp32(use: Callable[[Tensor], Tensor]) -> None:
    """It costs a wide copy for as long as it takes, and is right."""
    narrow = weight(50, 16)
    assert torch.equal(use(NarrowWeight(narrow)), use(narrow.float()))


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.zero_(),
        lambda w: w.data.mul_(2),
        lambda w: w.__setitem__(0, 0.0),
        lambda w: torch.add(w, 1, out=w),
        nn.init.normal_,
    ],
)
def test_a_write_is_refused(write: Callable[[Tensor], Tensor]) -> None:
    """It would reach a copy, and be lost."""
    narrow = NarrowWeight(weight(50, 16))
    before = narrow.stored.clone()
    with torch.no_grad(), pytest.raises(RuntimeError, match="writes into a weight"):
        write(narrow)
    assert torch.equal(narrow.stored, before)


def test_functions_take_their_arguments_by_name() -> None:
    """As torch's own."""
    narrow, x = weight(50, 16), torch.ones(2, 16)
    found = functional.linear(input=x, weight=NarrowWeight(narrow), bias=None)
    assert torch.equal(found, functional.linear(x, narrow.float()))


def test_it_looks_like_fp32() -> None:
    """Models ask a weight for its dtype, and cast what they compute to that."""
    narrow = NarrowWeight(weight(50, 16))
    assert (narrow.dtype, narrow.shape, narrow.device, narrow.requires_grad) == (
        *(torch.float32, (50, 16), torch.device("cpu"), False),
    )
    assert narrow.is_floating_point()
    assert narrow.to("cpu", torch.float32) is narrow
    assert isinstance(nn.Parameter(narrow, requires_grad=False), NarrowWeight)


def test_moving_a_model_to_where_it_is_widens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would read all of a mapped checkpoint, and take the memory of its largest weight in fp32."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Embedding(4, 8)).bfloat16()
    keep_narrow(model)

    def widened(value: object) -> object:
        assert not isinstance(value, NarrowWeight)
        return value

    monkeypatch.setattr("pytest_qsens.graph.narrow._widened", widened)
    model.to("cpu").eval().requires_grad_(False).to(torch.float32)
    monkeypatch.undo()
    assert all(isinstance(layer.weight, NarrowWeight) for layer in model)


class Net(nn.Module):
    """An embedding tied to the head, a norm, a convolution, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(40, 8)
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Conv1d(8, 8, 1)
        self.layer = nn.Linear(8, 8)
        self.head = nn.Linear(8, 40, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("factor", torch.tensor(0.3))

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits."""
        x = self.norm(self.embedding(ids)) * self.factor
        x = x + self.layer(self.mix(x.transpose(1, 2)).transpose(1, 2))
        return self.head(x)


def test_what_is_kept_narrow() -> None:
    """Weights of linear layers and embeddings, tied ones still tied; everything else is fp32."""
    model = Net().bfloat16()
    pointer = model.embedding.weight.data_ptr()
    keep_narrow(model)
    assert model.head.weight is model.embedding.weight
    assert stored(model.head.weight).data_ptr() == pointer
    kept = {name for name, value in model.named_parameters() if isinstance(value, NarrowWeight)}
    assert kept == {"embedding.weight", "layer.weight"}
    assert {value.dtype for value in (*model.parameters(), *model.buffers())} == {torch.float32}


def test_a_model_is_made_wide_and_narrow_again() -> None:
    """As when one engine after the other takes it; nothing is copied that stays as it is."""
    model = Net().bfloat16()
    keep_narrow(model)
    kept = model.layer.weight
    keep_narrow(model)
    assert model.layer.weight is kept
    make_wide(model)
    assert type(model.layer.weight) is nn.Parameter
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.layer.weight, stored(kept).float())


def test_a_widened_checkpoint_is_narrowed_if_nothing_is_lost() -> None:
    """One value that bf16 does not hold, and the weight stays in fp32."""
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)).bfloat16().float()
    with torch.no_grad():
        model[1].weight[511, 511] = 1 + 2**-10
    keep_narrow(model)
    assert isinstance(model[0].weight, NarrowWeight)
    assert not isinstance(model[1].weight, NarrowWeight)


@pytest.mark.parametrize("engine", ["replay", "eager"])
def test_scores_are_those_of_fp32(engine: str) -> None:
    """To the last bit: where they are widened must not show in any number."""
    narrow = Net().bfloat16()
    wide = copy.deepcopy(narrow).float()
    batches = [{"ids": torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(i))} for i in range(2)]
    scores = []
    for model in (narrow, wide):
        ops = list_ops(model)
        spec = ModelSpec(model, batches[:1], batches[1:], lambda out, _: out, logits=True)
        calibrated = calibrate(spec, ops, "w8a8_static", engine=engine)
        scores.append([calibrated.score(op, ("isolated", "fallback")).metrics for op in ops])
        assert isinstance(model.layer.weight, NarrowWeight) is (model is narrow)
    assert scores[0] == scores[1]
    assert all(score["isolated"]["nmse"] for score in scores[0])


def test_autocast_is_left_to_torch() -> None:
    """A region that asks for bf16 products gets them."""
    narrow, x = weight(8, 16), torch.randn(3, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(functional.linear(x, NarrowWeight(narrow)), functional.linear(x, narrow.float()))
