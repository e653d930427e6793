"""How numbers are written for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_qsens.results import Scores


def short(value: float | None) -> str:
    """Write a value with three digits; nothing where there is none."""
    return "" if value is None else f"{value:.3g}"


def typeset(value: float | None) -> str:
    """Write a value with three digits, as on a page: a dash where there is none."""
    if value is None:
        return "\N{EN DASH}"
    mantissa, _, exponent = short(value).partition("e")
    return _signed(f"{mantissa}e{int(exponent)}" if exponent else mantissa)


def coefficient(value: float | None) -> str:
    """Write a rank correlation."""
    return "undefined" if value is None else f"{value:.3f}"


def decibels(scores: Scores) -> str:
    """Write an SQNR with its unit; nothing where none was measured."""
    if "sqnr_db" not in scores:
        return ""
    value = scores["sqnr_db"]
    return "identical" if value is None else f"{value:.1f} dB"


def typeset_decibels(scores: Scores) -> str:
    """Write an SQNR with its unit, as on a page."""
    return _signed(decibels(scores))


def seconds(value: float) -> str:
    """Write a duration with its unit."""
    if value < 1:
        return f"{1000 * value:.3g} ms"
    return f"{value:.3g} s" if value < 100 else f"{int(value // 60)} min {value % 60:.0f} s"


def _signed(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")
