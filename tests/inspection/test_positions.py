"""Where errors are: every row belongs to one kind of token, and all kinds together are the score."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytest_qsens.inspection.positions import Located, kinds_of, row_energies, row_errors, sites_of
from pytest_qsens.metrics import Score

IMAGE, VIDEO = 5, 6


@st.composite
def batches(draw: st.DrawFn) -> tuple[dict[str, Any], bool]:
    """Draw token ids with padding on either side, and whether the output is of real tokens only."""
    samples, length = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    ids = torch.tensor(
        draw(
            st.lists(st.lists(st.integers(0, 9), min_size=length, max_size=length), min_size=samples, max_size=samples)
        )
    )
    mask = torch.ones_like(ids)
    for row in mask:
        padded = draw(st.integers(0, length - 1))
        row[padded:] = 1
        row[:padded] = 0
        if draw(st.booleans()):
            row.copy_(row.flip(0))
    return {"input_ids": ids, "attention_mask": mask}, draw(st.booleans())


@given(batches(), st.integers(0, 2**31), st.integers(1, 40))
def test_all_kinds_together_are_the_score(drawn: tuple[dict[str, Any], bool], seed: int, width: int) -> None:
    """The errors at text, images, videos and padding add up to the SSE of the score, and so do all rows."""
    batch, masked = drawn
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(*batch["input_ids"].shape, width, generator=generator)
    output = reference + torch.randn(reference.shape, generator=generator)
    if masked:
        reference, output = (values[batch["attention_mask"].bool()] for values in (reference, output))
    score = Score(logits=False)
    located = Located({IMAGE: "image", VIDEO: "video"}, str)
    for number in (1, 2):
        score.add(reference, output)
        sites = sites_of(reference.shape, batch, flat=True)
        errors = row_errors(reference, output, sites.rows)
        located.add(number, sites, errors, row_energies(reference, sites.rows))
    found = located.found
    assert found is not None
    assert found.tokens
    assert found.sse == pytest.approx(score.sse)
    groups = {group.name: group for group in found.groups}
    whole = [group for name, group in groups.items() if name != "first"]
    assert sum(group.sse for group in whole) == pytest.approx(score.sse)
    real = 2 * int(batch["attention_mask"].sum())
    assert found.positions == real == sum(group.positions for group in whole if group.name != "padding")
    kept = batch["input_ids"][batch["attention_mask"].bool()]
    for kind, token in (("image", IMAGE), ("video", VIDEO)):
        assert (groups[kind].positions if kind in groups else 0) == 2 * int((kept == token).sum())
    assert groups["first"].positions == 2 * len(batch["input_ids"])
    for worst in found.worst:
        place = worst.place
        assert place.position is not None
        assert bool(batch["attention_mask"][place.row, place.position])
        assert place.token == int(batch["input_ids"][place.row, place.position])
        assert place.text == str(place.token)
    assert 1 <= found.half <= real


def test_padding_is_left_out_of_an_ops_own_output() -> None:
    """What is rounded at padded positions, nobody sees."""
    batch = {"input_ids": torch.tensor([[1, 2, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    reference = torch.zeros(1, 3, 4)
    output = torch.ones(1, 3, 4)
    output[0, 2] = 100
    located = Located({}, lambda _: None, padding=False)
    sites = sites_of(reference.shape, batch, flat=True)
    located.add(1, sites, row_errors(reference, output, 3), row_energies(reference, 3))
    found = located.found
    assert found is not None
    assert (found.sse, found.positions) == (8, 2)
    assert {group.name for group in found.groups} == {"text", "first"}


@pytest.mark.parametrize(
    ("shape", "flat", "rows", "tokens"),
    [
        ((2, 6, 8), False, 12, True),
        ((12, 8), True, 12, True),
        ((9, 8), True, 9, True),
        ((12, 8), False, 12, False),
        ((2, 8), True, 2, False),
        ((7, 8), True, 7, False),
        ((2, 3, 6, 8), True, 2, False),
        ((), True, 1, False),
    ],
)
def test_rows_are_tokens_only_if_they_fit(shape: tuple[int, ...], flat: bool, rows: int, tokens: bool) -> None:
    """By the dimensions of the ids, by their number, or by that of real ones; anything else is just rows."""
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[0, 3:] = 0
    batch = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": mask}
    sites = sites_of(shape, batch, flat=flat)
    assert (sites.rows, sites.tokens is not None) == (rows, tokens)


def test_nothing_is_said_where_two_kinds_of_tokens_fit() -> None:
    """Encoder and decoder with equally many tokens: an output could be of either."""
    ids = torch.arange(12).view(2, 6)
    assert sites_of((2, 6, 8), {"input_ids": ids, "decoder_input_ids": ids}, flat=True).tokens is None
    assert sites_of((2, 6, 8), {"input_ids": ids, "decoder_input_ids": ids[:, :4]}, flat=True).tokens is not None


def test_an_error_that_is_not_finite_is_nowhere() -> None:
    """It has no shares."""
    located = Located({}, lambda _: None)
    sites = sites_of((2, 4), {}, flat=True)
    located.add(1, sites, torch.tensor([1.0, torch.inf]), torch.ones(2))
    assert located.found is None
    assert Located({}, lambda _: None).found is None


def test_a_model_without_a_config_has_no_images() -> None:
    """Only transformers models say which token stands for an image."""
    assert kinds_of(torch.nn.Linear(1, 1)) == {}
