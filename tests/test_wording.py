"""What messages are made of."""

from __future__ import annotations

import pytest

from pytest_qsens.wording import count, did_you_mean, first_of, score_text


@pytest.mark.parametrize(("number", "text"), [(0, "0 ops"), (1, "1 op"), (2, "2 ops")])
def test_counts(number: int, text: str) -> None:
    """One is singular."""
    assert count(number, "op") == text


@pytest.mark.parametrize(
    ("names", "text"), [([], ""), (["a"], "a"), (["a", "b"], "a, b"), (["a", "b", "c", "d"], "a, b and 2 more")]
)
def test_what_is_left_out_of_a_list_is_counted(names: list[str], text: str) -> None:
    """As many are named as was asked for, and the others are not lost."""
    assert first_of(names, 2) == text


def test_suggestions() -> None:
    """A name that is like a known one gets it suggested, another one nothing."""
    assert did_you_mean("nsme", ["kl", "nmse"]) == " (did you mean nmse?)"
    assert did_you_mean("zzz", ["kl", "nmse"]) == ""


def test_scores() -> None:
    """Significant digits; no error at all is an infinite SQNR."""
    assert [score_text(None), score_text(0.0123456789), score_text(0.0123456789, 6)] == [
        "infinite",
        "0.01235",
        "0.0123457",
    ]
