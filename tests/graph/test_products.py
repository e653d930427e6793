"""Products of two activations are found without running a model, and caught where they are made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pytest_qsens.graph.calls import of_attention
from pytest_qsens.graph.capture import capture, run_model
from pytest_qsens.graph.decomposed import probabilities, repeated
from pytest_qsens.graph.intercept import OpInterceptor
from pytest_qsens.graph.marks import FACTORS
from pytest_qsens.graph.products import list_products
from pytest_qsens.graph.replay import Run
from pytest_qsens.graph.serialize import from_builtin, to_builtin
from tests.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_qsens.graph.calls import Call


def names(model: nn.Module) -> list[str]:
    """Names of the products of a model."""
    return [op.name for op in list_products(model)]


def products_of(name: str) -> list[str]:
    """Names of the products of an architecture."""
    return names(ARCHITECTURES[name].build())


def similarity(x: Tensor, y: Tensor) -> Tensor:
    """Multiply, in a function beside the modules."""
    return torch.bmm(x, y.transpose(1, 2))


class Products(nn.Module):
    """A module with products of many kinds; ``steps`` of one of them in a loop."""

    def __init__(self, steps: int = 2) -> None:
        super().__init__()
        self.wide = nn.Linear(8, 8)
        self.mixing = nn.Parameter(torch.randn(5, 5))
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        """Take ``(N, 5, 8)`` to ``(N, 5, 5)``."""
        y = self.wide(x)
        mixed = self.mixing @ y  # with a weight
        near = similarity(mixed, y)
        for _ in range(self.steps):
            near = near @ near.softmax(-1)
        return self.biased(near, torch.matmul(y, other=x.mT))

    def biased(self, near: Tensor, far: Tensor) -> Tensor:
        """Multiply and add."""
        return torch.baddbmm(near, near, batch2=far) if self.steps < 5 else near


class Never(Products):
    """A module that could multiply."""

    def forward(self, x: Tensor) -> Tensor:
        """Take ``(N, 5, 8)``; no method of the base is called."""
        return self.wide(x) if x.dim() == 3 else x @ x


OP = ":matmul"
MADE = (OP, f"{OP}_1", f"{OP}_2", f"{OP}_3")


def test_listed_are_modules_that_attend_or_name_a_product() -> None:
    """Attention has two, with a cache or without; code has one for each place; torch's own modules have none."""
    assert products_of("llama") == [f"model.layers.{i}.self_attn:{kind}" for i in range(2) for kind in ("qk", "pv")]
    assert len([name for name in products_of("qwen2_5_vl") if "visual" in name]) == 4
    assert ":matmul" in products_of("clip")
    assert products_of("resnet") == []
    assert names(nn.MultiheadAttention(8, 2)) == names(nn.TransformerEncoderLayer(8, 2)) == []
    assert names(Products()) == [*MADE, f"{OP}_4"]  # and one for that with a weight
    assert [op.type for op in list_products(Products())] == ["matmul"] * 5
    assert names(nn.ModuleDict({"a": Never()})) == ["a:matmul"]


def test_listing_needs_no_weights() -> None:
    """Collection lists them from a model on the meta device."""
    with torch.device("meta"):
        assert names(Products()) == names(Products())


def watched(model: nn.Module, batch: dict[str, Any], ops: list[str]) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Run a model: every call of its products, and why others were not seen."""
    seen: list[tuple[str, str]] = []

    def handler(op: str, call: Call, run: Callable[[], Tensor]) -> Tensor:
        seen.append((op, call.kind))
        return run()

    with torch.no_grad(), OpInterceptor(model, handler, ops) as interceptor:
        run_model(model, batch, lambda out, _: out)
    return seen, interceptor.out_of_reach()


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_product_is_an_op_of_the_place_that_makes_it(steps: int) -> None:
    """One in a loop is one op, one with a weight is none, and what is left over is told."""
    model = Products(steps).eval()
    products = [
        (op, kind) for op, kind in watched(model, {"x": torch.randn(2, 5, 8)}, names(model))[0] if kind in FACTORS
    ]
    loop = [MADE[1]] * steps
    expected = [MADE[0], *loop, *(MADE[2:] if steps else MADE[1:3])]
    assert products == [(op, kind) for op in expected for kind in ("left", "right")]
    missing = watched(model, {"x": torch.randn(2, 5, 8)}, names(model))[1]
    assert missing.keys() == set(names(model)) - set(expected)
    assert all("did not multiply two activations here" in why for why in missing.values())


def test_what_is_not_asked_for_is_left_aside() -> None:
    """Others go through no handler, and a graph has no marks of them."""
    model = Products().eval()
    assert {op for op, _ in watched(model, {"x": torch.randn(2, 5, 8)}, [MADE[2]])[0]} == {MADE[2], "wide"}
    with torch.no_grad():
        plain = capture(model, {"x": torch.randn(2, 5, 8)}, lambda out, _: out)
    assert not [node for node in plain.nodes if node.target in FACTORS.values()]
    assert [name for name, _ in plain.functional] == [
        ":matmul",
        ":matmul_1",
        ":matmul_2",
        *(f"{OP}_{i}" for i in (3, 4, 5)),
    ]


@pytest.mark.parametrize(
    ("name", "implementation"),
    [("llama", "sdpa"), ("llama", "eager"), ("t5", "sdpa"), ("t5", "eager"), ("qwen2_5_vl", "sdpa")],
)
def test_graphs_have_what_a_run_in_python_has(name: str, implementation: str) -> None:
    """Whatever computes attention: as often, with the same bits, and again from a file; no product is listed twice."""
    spec = ARCHITECTURES[name].spec()
    model: Any = spec.model
    model.set_attn_implementation(implementation)
    ops, batch = names(model), spec.evaluation[0]
    counts: dict[str, int] = {}

    def handler(op: str, call: Call, run: Callable[[], Tensor]) -> Tensor:
        if call.kind in (*FACTORS, "pv"):
            counts[op] = counts.get(op, 0) + 1
        return run()

    with torch.no_grad():
        expected = run_model(model, batch, spec.output)
        with OpInterceptor(model, handler, ops):
            assert torch.equal(run_model(model, batch, spec.output), expected)
        graph = capture(model, batch, spec.output, ops)
        again = from_builtin(*to_builtin(graph, model), model, batch)
        assert torch.equal(Run(again).output, expected)
    assert {op: len(graph.calls[op]) for op in ops} == {op: len(again.calls[op]) for op in ops} == counts
    assert graph.out_of_reach.keys().isdisjoint(ops)
    assert not graph.functional


def test_attention_has_the_same_names_where_nothing_quantizes_it() -> None:
    """A vision tower attends once for each window; its products are one of each, and a part of them is not the rest."""
    spec = ARCHITECTURES["qwen2_5_vl"].spec()
    assert isinstance(spec.model, nn.Module)
    ops = names(spec.model)
    plain, partly = (capture(spec.model, spec.evaluation[0], spec.output, asked) for asked in ([], ops[::2]))
    assert sum("scaled_dot_product" in str(node.target) for node in plain.nodes) > len(ops) / 2
    assert sorted(name for name, _ in plain.functional) == sorted(ops)
    assert {name for name, _ in partly.functional} | set(ops[::2]) == set(ops)


class Sparse(nn.Module):
    """Mixes with a sparse matrix, before it multiplies activations."""

    def forward(self, x: Tensor) -> Tensor:
        """Take ``(5, 8)`` to ``(5, 5)``."""
        return (torch.eye(5).to_sparse() @ x) @ x.T


def test_sparse_factors_are_left_alone() -> None:
    """They are no activations; the product behind is one."""
    model = nn.Sequential(nn.Linear(8, 8), Sparse()).eval()
    seen, missing = watched(model, {"input": torch.randn(5, 8)}, names(model))
    assert seen == [("0", "linear"), ("1:matmul", "left"), ("1:matmul", "right")]
    assert missing.keys() == {"1:matmul_1"}


class Masked(nn.Module):
    """Attends with a mask that leaves one query nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Attend over ``(N, 5, 8)``."""
        mask = torch.ones(5, 5, dtype=torch.bool).tril(-1)
        return functional.scaled_dot_product_attention(x, value=x * 2, key=x + 1, attn_mask=mask)


def test_arguments_by_name() -> None:
    """Attention is caught with arguments in any order."""
    model = nn.Sequential(nn.Linear(8, 8), Masked()).eval()
    seen, missing = watched(model, {"input": torch.randn(2, 5, 8)}, ["1:qk", "1:pv"])
    assert seen == [("0", "linear"), ("1:qk", "left"), ("1:qk", "right_rows"), ("1:pv", "pv")]
    assert missing == {}


_KEEP = torch.rand(2, 1, 6, 9, generator=torch.Generator().manual_seed(1)) > 0.4
_KEEP[:, :, 2] = False
_ADDED = torch.zeros(2, 1, 6, 9).masked_fill(~_KEEP, -torch.inf)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": _KEEP},
        {"attn_mask": _ADDED},
        {"attn_mask": _ADDED.clamp(min=torch.finfo(torch.float32).min)},
        {"attn_mask": torch.randn(6, 9)},
        {"enable_gqa": True, "is_causal": True, "scale": 1.5},
        {"enable_gqa": True, "attn_mask": _KEEP},
    ],
    ids=["plain", "causal", "scale", "bool", "inf", "min", "bias", "gqa", "gqa-bool"],
)
def test_taken_apart_it_is_what_torch_computes(options: dict[str, Any]) -> None:
    """To a few units in the last place, rows included in which everything is masked: these are zero, or a mean."""
    torch.manual_seed(0)
    heads = 2 if options.get("enable_gqa") else 4
    query, key, value = torch.randn(2, 4, 6, 8), torch.randn(2, heads, 9, 8), torch.randn(2, heads, 9, 8)
    given = of_attention(query, key, value, **options).attention
    assert given is not None
    expected = functional.scaled_dot_product_attention(query, key, value, **options)
    found = probabilities(given) @ repeated(value, given)
    assert not expected.isnan().any()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    if options.get("attn_mask") is _KEEP or options.get("attn_mask") is _ADDED:
        assert not found[:, :, 2].any()


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "@": lambda x, y: x @ y,
    "matmul": lambda x, y: torch.matmul(input=x, other=y),
    "method": lambda x, y: x.matmul(y),
    "bmm": lambda x, y: torch.bmm(x, mat2=y),
    "mm": lambda x, y: torch.mm(x[0], y[0]),
    "baddbmm": lambda x, y: torch.baddbmm(torch.zeros(5, 5), batch1=x, batch2=y, beta=0),
    "operator": torch.ops.aten.bmm,
    "overload": lambda x, y: torch.ops.aten.baddbmm.default(torch.zeros(5, 5), x, y),
    "attention": lambda x, y: torch.ops.aten.scaled_dot_product_attention.default(x, y.mT, x, None, 0.0, True, scale=2),
}


class Form(nn.Module):
    """Multiplies in one way; its name is among those that listing reads."""

    def __init__(self, multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.multiply = multiply

    def forward(self, x: Tensor) -> Tensor:
        """Take ``(N, 5, 8)``."""
        return self.multiply(x, x.mT)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_product_is_caught(form: str) -> None:
    """By function, method, operator or overload, with arguments by position or name; the product stays what it was."""
    model, batch = nn.Sequential(nn.Identity(), Form(FORMS[form])), {"input": torch.randn(2, 5, 8)}
    ops = ["1:qk", "1:pv"] if form == "attention" else ["1:matmul"]
    seen, missing = watched(model, batch, ops)
    assert [op for op, _ in seen] == (["1:qk", "1:qk", "1:pv"] if form == "attention" else ["1:matmul"] * 2)
    assert missing == {}
    graph = capture(model, batch, lambda out, _: out, ops)
    assert graph.calls.keys() == set(ops)
    torch.testing.assert_close(Run(graph).output, model(batch["input"]), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mask", ["none", "min", "float"])
def test_taken_apart_it_is_as_exact_as_torch(dtype: torch.dtype, mask: str) -> None:
    """Of whatever dtype: narrow scores would overflow, and a mask of numbers may be wider than queries."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 6, 8).mul(size).to(dtype) for size in (100, 100, 1))
    added = {
        "none": None,
        "min": torch.zeros(6, 6, dtype=dtype).masked_fill(torch.arange(6)[:, None] == 2, torch.finfo(dtype).min),
        "float": torch.randn(6, 6),
    }[mask]
    given = of_attention(query, key, value, added).attention
    assert given is not None
    expected = functional.scaled_dot_product_attention(query, key, value, added)
    found = probabilities(given).double() @ repeated(value, given).double()
    torch.testing.assert_close(found.to(dtype), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_dropout_is_refused() -> None:
    """What is random cannot be measured."""
    given = of_attention(torch.randn(1, 2, 4), torch.randn(1, 2, 4), torch.randn(1, 2, 4), dropout_p=0.5).attention
    assert given is not None
    with pytest.raises(NotImplementedError, match="at random"):
        probabilities(given)
