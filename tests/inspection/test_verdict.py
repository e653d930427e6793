"""The sentences that sum it up say what the numbers say, and nothing beyond."""

from __future__ import annotations

import pytest

from pytest_qsens.inspection.found import Alternative, Channel, ChannelSummary, Flip, Inspection, Lost, Recorded, Shape
from pytest_qsens.inspection.places import Group, Where
from pytest_qsens.inspection.verdict import verdict

EVEN = ChannelSummary(8, 1.0, 2.0, 3.0, 0, 0, ())
ODD = ChannelSummary(8, 1.0, 2.0, 80.0, 0, 1, (Channel(7, 80.0, 40.0),))


def other(
    scheme: str, nmse: float | None, factor: float | None, bits: float = 8, failure: str | None = None
) -> Alternative:
    """Make what was measured of another scheme."""
    return Alternative(scheme, "", Flip(scheme, nmse, nmse, None, failure), factor, bits)


def found(**fields: object) -> Inspection:
    """Make an inspection of a linear layer under w8a8."""
    parts = {"weight": 0.05, "input": 0.9, "output": 0.05}
    values: dict[str, object] = {
        "op": "fc",
        "model": "m",
        "scheme": "w8a8",
        "about": "",
        "mode": "isolated",
        "shape": Shape("linear", "", 1, 1, (8, 8), False, "float32", ((2, 8),)),
        "recorded": Recorded("r.json", "w8a8", "w8a8", "delta", "measured", None, None, None, 0),
        "base": 0.0,
        "whole": Flip("w8a8", 1.0, 1.0, 0.1),
        "scores": None,
        "parts": tuple(Flip(name, nmse, nmse, None) for name, nmse in parts.items()),
        "weight_outputs": EVEN,
        "weight_inputs": EVEN,
        "inputs": None,
        "outputs": EVEN,
        "lost": (Lost("weight", 64, 0.0, 0.0), Lost("input", 16, 0.0, 0.0), Lost("output", 16, 0.0, 0.0)),
        "at_output": None,
        "at_op": None,
        "alternatives": (),
        "bits": 8,
        "forwards": 1,
        "seconds": 1.0,
    }
    return Inspection(**(values | fields))  # type: ignore[arg-type] # checked by what the tests make


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "90 % of the error comes from the input."),
        (
            {"lost": (Lost("input", 16, 0.02, 0.3),)},
            (
                "90 % of the error comes from the input: 30 % of its values that are not zero become zero, "
                "2 % of its values are clipped."
            ),
        ),
        ({"lost": (Lost("input", 16, None, 0.01),)}, "90 % of the error comes from the input."),
        (
            {"parts": (Flip("weight", 0.5, 0.5, None), Flip("input", 0.45, 0.45, None)), "weight_inputs": ODD},
            (
                "The error comes from the weight (52.6 %; its input channel 7 reaches 40 times the "
                "median one) and the input "
                "(47.4 %)."
            ),
        ),
        (
            {"parts": (Flip("weight", 0.1, 0.1, None), Flip("output", 0.4, 0.4, None)), "outputs": ODD},
            (
                "80 % of the error comes from the output, which is requantized: its channel 7 "
                "reaches 40 times the median "
                "one; the parts alone add up to 50 % of it."
            ),
        ),
        ({"parts": (Flip("weight", 1.0, 1.0, None),)}, "Nothing but the weight is quantized."),
        ({"whole": Flip("w8a8", 0.0, 0.0, 0.1)}, "Quantizing it changes no bit of the model's output."),
        (
            {"mode": "fallback", "whole": Flip("w8a8", 0.9, -0.1, 0.1)},
            "With everything else quantized, it adds no error. Ask with --mode isolated what it does alone.",
        ),
        (
            {"mode": "fallback", "parts": (Flip("weight", 0.5, 0.5, None), Flip("input", 0.4, -0.1, None))},
            (
                "What the error comes from cannot be told: a part of it, quantized alone, lowers "
                "the error. Ask with --mode "
                "isolated."
            ),
        ),
        (
            {"parts": (Flip("weight", 0.5, 0.5, None), Flip("input", None, None, None, "it fails"))},
            "What the error comes from cannot be told: a part of it cannot be measured.",
        ),
        (
            {
                "whole": Flip("w8a8", None, None, None, "the output holds NaN"),
                "alternatives": (other("w8a16", 0.1, None),),
            },
            (
                "the output holds NaN when the op is quantized as w8a8 says. No part alone does so. "
                "w8a16 lowers the error to a "
                "finite one at 8 bits a weight, with the input as it is (measured)."
            ),
        ),
    ],
)
def test_causes(fields: dict[str, object], text: str) -> None:
    """One part, several, none; what stands out in it; what cannot be told."""
    assert verdict(found(**fields)) == text


@pytest.mark.parametrize(
    ("others", "text"),
    [
        (
            [other("w8a8_dynamic", 0.1, 10.0)],
            "w8a8_dynamic, in the same number formats, lowers the error 10 times (measured).",
        ),
        (
            [other("fp8_static", 0.01, 100.0), other("w8a8_dynamic", 0.1, 10.0)],
            (
                "w8a8_dynamic, in the same number formats, lowers the error 10 times; fp8_static "
                "100 times at 8 bits a weight "
                "(measured)."
            ),
        ),
        (
            [other("w4a8_dynamic_g128", 0.5, 2.0, 4.125)],
            "w4a8_dynamic_g128 lowers the error 2 times at 4.125 bits a weight (measured).",
        ),
        (
            [other("mxfp8_dynamic", 0.5, 2.0, 8.25)],
            "mxfp8_dynamic lowers the error 2 times at 8.25 bits a weight (measured).",
        ),
        (
            [other("w8a16", 0.5, 2.0)],
            "w8a16 lowers the error 2 times at 8 bits a weight, with the input as it is (measured).",
        ),
        (
            [other("w8a8_dynamic", -0.1, None)],
            "w8a8_dynamic, in the same number formats, lowers the error to none (measured).",
        ),
        ([other("w8a8_dynamic", 0.95, 1.05)], "No scheme that was measured beside it is better."),
        ([other("w8a8_dynamic", None, None, failure="it fails")], "No scheme that was measured beside it is better."),
        ([Alternative("w4a16_g128", "", None, None, 4.125, "8 of them cannot")], ""),
    ],
)
def test_remedies(others: list[Alternative], text: str) -> None:
    """The best of the same formats, and the best of as few bits if that is better; never one that is no better."""
    told = verdict(found(alternatives=tuple(others)))
    assert told == f"90 % of the error comes from the input. {text}".rstrip()


@pytest.mark.parametrize(("sse", "named"), [(0.8, True), (0.6, False), (0.45, False)])
def test_kinds_of_tokens(sse: float, named: bool) -> None:
    """A kind is named that has most of the error, and much more than its part of the tokens."""
    groups = (Group("text", 5, 1 - sse, None), Group("image", 5, sse, None), Group("first", 1, 0.1, None))
    text = verdict(found(at_output=Where(1.0, 10, True, groups, (), 3)))
    assert (" 80 % of the error is at the image tokens, 50 % of all." in text) == named
