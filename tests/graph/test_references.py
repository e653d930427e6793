"""Attention is found however a module comes to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pytest_qsens.graph import attention
from pytest_qsens.graph.attention import list_states
from pytest_qsens.graph.capture import capture
from pytest_qsens.graph.products import list_products
from pytest_qsens.graph.references import refers
from tests.graph.attending import CAUGHT, Base, ByHand, Flexible, Gated, attend_later


@pytest.mark.parametrize("name", CAUGHT)
def test_attention_is_listed_and_caught(name: str) -> None:
    """By helpers, closures, other names, or what it was given: it is listed, and keys and factors can be replaced."""
    with torch.device("meta"):
        listed = nn.Sequential(CAUGHT[name]())
        assert [op.name for op in list_states(listed)] == ["0:q", "0:k", "0:v"]
        assert [op.name for op in list_products(listed)] == ["0:qk", "0:pv"]
    model = nn.Sequential(CAUGHT[name](), nn.Linear(8, 3)).eval().requires_grad_(requires_grad=False)
    states = [op.name for op in (*list_states(model), *list_products(model))]
    graph = capture(model, {"input": torch.randn(2, 5, 8)}, lambda out, _: out, states)
    assert set(states) <= graph.calls.keys()
    assert not graph.out_of_reach


def test_what_does_not_attend_is_not_listed() -> None:
    """Neither are modules around attention, and what no name tells."""
    assert [op.name for op in list_states(nn.Sequential(nn.Sequential(Flexible())))] == ["0.0:q", "0.0:k", "0.0:v"]
    assert list_states(nn.Sequential(Gated(), ByHand(), nn.MultiheadAttention(8, 2), nn.Softmax(-1))) == ()


def test_what_modules_hold_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may hold the model's config: the class, with all that it refers to, is the same."""

    class Config:
        def save(self) -> None:
            """Refer to something."""

    read: list[object] = []

    def reading(value: object, *about: Any) -> bool:  # noqa: ANN401 - passed on
        read.append(value)
        return refers(value, *about)

    modules = nn.Sequential(*(Base() for _ in range(5)))
    for module in modules:
        module.config = Config()
    monkeypatch.setattr(attention, "refers", reading)
    assert list_states(modules) == ()
    assert list_products(modules) == ()
    assert read.count(Config) == 1


def test_functions_that_call_each_other_end() -> None:
    """Recursion is followed once, and what is no function refers to nothing."""

    def even(n: int) -> bool:
        return n == 0 or odd(n - 1)

    def odd(n: int) -> bool:
        return n != 0 and even(n - 1)

    assert not refers(even, ["sdpa"], [])
    assert refers(even, ["x"], [odd])
    assert refers(attend_later, ["scaled_dot_product_attention"], [])
    assert not refers(3, ["real"], [])
