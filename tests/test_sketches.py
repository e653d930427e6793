"""Sketches of changes: exact where they are as long as the output, and of the error that they are said to have."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pytest_qsens.sketches import Sketcher, make_sketchers

MASK = 2**64 - 1


def split_mix(number: int, seed: int) -> int:
    """Compute SplitMix64 of one number, in whole numbers without an end."""
    bits = ((number + seed * 0xD1342543DE82EF95 & MASK) + 1) * 0x9E3779B97F4A7C15 & MASK
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & MASK
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & MASK
    return bits ^ bits >> 31


def by_hand(values: list[float], seed: int, dimensions: int) -> list[float]:
    """Sketch values one by one."""
    found = [0.0] * dimensions
    for number, value in enumerate(values):
        bits = split_mix(number, seed)
        found[(bits >> 11) % dimensions] += -value if bits & 1 else value
    return found


def whole(sketchers: list[Sketcher], changes: list[Tensor]) -> Tensor:
    """Sketch the changes of all batches."""
    return torch.stack([sketch(change) for sketch, change in zip(sketchers, changes, strict=True)]).sum(0)


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Draw the changes of all batches."""
    return [torch.randn(shape) for shape in shapes]


def test_a_sketch_is_the_same_everywhere() -> None:
    """Files of different runs, versions and machines are multiplied: places and signs never change."""
    torch.manual_seed(0)
    shapes = [(3, 50), (2, 2, 50)]
    changes = draw(*shapes)
    found = whole(make_sketchers(shapes, 64), changes)
    expected = [by_hand(change.flatten().tolist(), 1 + number, 64) for number, change in enumerate(changes)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64).sum(0))


def test_wide_outputs_are_sketched_by_columns_first() -> None:
    """One hash of the columns serves all rows, of all batches; then the rows' sums are sketched."""
    torch.manual_seed(0)
    [change] = draw((3, 500))
    [sketch] = make_sketchers([change.shape], 64)
    rows = [value for row in change.tolist() for value in by_hand(row, 0, 64)]
    torch.testing.assert_close(
        sketch(change), torch.tensor(by_hand(rows, 1, 64), dtype=torch.float64), atol=1e-5, rtol=0
    )


def test_small_outputs_are_kept() -> None:
    """All values of all batches, one after the other: products of these are exact."""
    torch.manual_seed(0)
    shapes = [(2, 3, 4), (5,), ()]
    one, other = draw(*shapes), draw(*shapes)
    sketchers = make_sketchers(shapes, 30)
    found = whole(sketchers, one) @ whole(sketchers, other)
    expected = sum(float((a.double() * b.double()).sum()) for a, b in zip(one, other, strict=True))
    assert float(found) == pytest.approx(expected, rel=1e-12)
    assert len(whole(sketchers, one)) == 30
    assert len(whole(make_sketchers(shapes, 31), one)) == 30
    assert len(whole(make_sketchers(shapes, 29), one)) == 29


@pytest.mark.parametrize("columns", [40, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_through_a_layer(columns: int, dtype: torch.dtype) -> None:
    """The sketch of W·δ from δ, with W's columns sketched, is that of the product: ops at and before the head meet."""
    torch.manual_seed(0)
    weight, inputs = torch.randn(columns, 16).to(dtype), torch.randn(2, 9, 16)
    [sketch] = make_sketchers([(2, 9, columns)], 128)
    expected = sketch(inputs @ weight.float().t())
    torch.testing.assert_close(sketch.through(inputs, weight), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("columns", [32, 2000])
def test_the_error_is_as_told(columns: int) -> None:
    """Products are unbiased; the error of a squared length is √(2/k), and up to √2 times that for wide outputs."""
    torch.manual_seed(0)
    dimensions, draws, shape = 256, 400, (4096 // columns + 1, columns)
    [sketch] = make_sketchers([shape], dimensions)
    lengths, products = [], []
    for _ in range(draws):
        one, other = draw(shape, shape)
        other = one + other  # a cosine of 0.7
        s, t = sketch(one), sketch(other)
        size = float(one.norm() * other.norm())
        lengths.append(float(s @ s) / float(one.norm() ** 2) - 1)
        products.append((float(s @ t) - float((one * other).sum())) / size)
    told = math.sqrt(2 / dimensions)
    spread = math.sqrt(sum(error**2 for error in lengths) / draws)
    assert 0.85 * told < spread < 1.15 * math.sqrt(2) * told
    for errors in (lengths, products):
        assert abs(sum(errors)) / draws < 4 * math.sqrt(2) * told / math.sqrt(draws)
