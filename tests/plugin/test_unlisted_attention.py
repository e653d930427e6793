"""Under a scheme of keys and values, attention that cannot be quantized is named, and never passed over."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

_SOURCE = """
import torch
from torch import nn
from torch.nn import functional

from pytest_qsens import ModelSpec


def attend(q, k, v):
    return functional.scaled_dot_product_attention(q, k, v)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)


class Helped(Block):
    def forward(self, x):
        return x + attend(*self.qkv(x).chunk(3, -1))


class ByHand(Block):
    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + (q @ k.mT).softmax(-1) @ v


def spec(*blocks):
    torch.manual_seed(0)
    net = nn.Sequential(*(block() for block in blocks)).eval()
    batches = [{"input": torch.randn(2, 5, 16)} for _ in range(2)]
    return ModelSpec(net, batches[:1], batches[1:], lambda out, _: out, logits=False)


def both():
    return spec(Helped, ByHand)


def by_hand():
    return spec(ByHand, ByHand)
"""
_TOLD = "*a softmax of a product multiplies values by hand in 1, whose keys and values are not among the ops*"


def run(pytester: pytest.Pytester, factory: str, *args: str) -> pytest.RunResult:
    """Run the built-in suite."""
    (pytester.path / "by_hand.py").write_text(_SOURCE)
    pytester.syspathinsert()
    return pytester.runpytest_inprocess("--qsens-model", f"by_hand:{factory}", *args)


def test_what_is_missing_is_named(pytester: pytest.Pytester) -> None:
    """Whether the model runs or all scores come from the cache; not where layers are measured."""
    scheme = ("--qsens-scheme", "kv_fp8", "--qsens-cache", "cache", "--snapshot-update")
    for _ in range(2):
        result = run(pytester, "both", *scheme)
        result.assert_outcomes(passed=3)
        result.stdout.fnmatch_lines(_TOLD)
    result = run(pytester, "both", "--qsens-scheme", "w8a8_dynamic", "--qsens-no-cache", "--snapshot-update")
    assert "by hand" not in result.stdout.str()


def test_nothing_to_measure_is_an_error(pytester: pytest.Pytester) -> None:
    """It says what to do."""
    result = run(pytester, "by_hand", "--qsens-scheme", "kv_fp8")
    assert result.ret == 4
    result.stderr.fnmatch_lines("*call torch.nn.functional.scaled_dot_product_attention instead*choose another scheme*")
    assert not list(pytester.path.rglob("kv_fp8.json"))
