"""Attention is found however a module comes to it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pytest_qsens.graph.attention import list_states
from pytest_qsens.graph.capture import capture
from pytest_qsens.graph.references import refers
from tests.graph.attending import CAUGHT, ByHand, Flexible, Gated, attend_later


@pytest.mark.parametrize("name", CAUGHT)
def test_attention_is_listed_and_caught(name: str) -> None:
    """By helpers, closures, other names, or what it was given: collection lists it, and its keys can be replaced."""
    with torch.device("meta"):
        assert [op.name for op in list_states(nn.Sequential(CAUGHT[name]()))] == ["0:q", "0:k", "0:v"]
    model = nn.Sequential(CAUGHT[name](), nn.Linear(8, 3)).eval().requires_grad_(requires_grad=False)
    states = [op.name for op in list_states(model)]
    graph = capture(model, {"input": torch.randn(2, 5, 8)}, lambda out, _: out, states)
    assert set(states) <= graph.calls.keys()
    assert not graph.out_of_reach


def test_what_does_not_attend_is_not_listed() -> None:
    """Neither are modules around attention, and what no name tells."""
    assert [op.name for op in list_states(nn.Sequential(nn.Sequential(Flexible())))] == ["0.0:q", "0.0:k", "0.0:v"]
    assert list_states(nn.Sequential(Gated(), ByHand(), nn.MultiheadAttention(8, 2), nn.Softmax(-1))) == ()


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
