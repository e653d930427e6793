"""Thresholds: reading them, and judging new scores against recorded ones."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pytest_qsens.errors import QsensError
from pytest_qsens.gates import Gates, Overrides
from pytest_qsens.thresholds import METRICS, SEVERITY, Threshold, Verdict, combine, judge, parse_fail

METRIC = st.sampled_from(sorted(METRICS))
AMOUNT = st.floats(0, 1e12, allow_nan=False)
VALUE = st.floats(-1e6, 1e12, allow_nan=False)


def thresholds() -> st.SearchStrategy[Threshold]:
    """Any threshold, relative or absolute."""
    return st.one_of(st.builds(Threshold, METRIC, rtol=AMOUNT), st.builds(Threshold, METRIC, atol=AMOUNT))


def worse(metric: str, one: float, other: float) -> bool:
    """Whether ``other`` is at least as bad as ``one``."""
    return other >= one if METRICS[metric].higher_is_worse else other <= one


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nmse:5%", (Threshold("nmse", rtol=0.05),)),
        ("nmse:7%", (Threshold("nmse", rtol=0.07),)),
        ("sqnr_db:0.5", (Threshold("sqnr_db", atol=0.5),)),
        ("nmse:1e-4", (Threshold("nmse", atol=1e-4),)),
        (" nmse : 5 % , kl:1e-3", (Threshold("nmse", rtol=0.05), Threshold("kl", atol=1e-3))),
        ("top1:.01,gain:0", (Threshold("top1", atol=0.01), Threshold("gain"))),
    ],
)
def test_thresholds_are_read(text: str, expected: tuple[Threshold, ...]) -> None:
    """A percentage is relative, a plain number absolute, a comma separates several."""
    assert parse_fail(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nsme:5%", r"no metric 'nsme' \(did you mean nmse\?\)"),
        ("", "no metric ''"),
        ("nmse:5%,", "no metric ''"),
        ("5%", "no metric '5%'"),
        ("nmse", "'' is not an amount for nmse"),
        ("nmse:", "'' is not an amount for nmse"),
        ("nmse:-5%", "'-5%' is not an amount"),
        ("nmse:nan", "'nan' is not an amount"),
        ("nmse:inf%", "'inf%' is not an amount"),
        ("nmse:1e999", "'1e999' is not an amount"),
        ("nmse:1e9999999999999999999%", "is not an amount"),
        ("nmse:5%%", "'5%%' is not an amount"),
        ("nmse:five", "'five' is not an amount"),
        ("nmse:5%,kl:1,nmse:3", "nmse is there twice"),
    ],
)
def test_unreadable_thresholds_are_refused(text: str, message: str) -> None:
    """What cannot be read says where it stood, quotes it and shows how to write it."""
    with pytest.raises(QsensError, match=message) as caught:
        parse_fail(text, "qsens_fail")
    assert str(caught.value).startswith(f"qsens_fail {text!r}: ")


@given(st.lists(thresholds(), min_size=1, unique_by=lambda threshold: threshold.metric))
def test_thresholds_read_back_as_printed(given_thresholds: list[Threshold]) -> None:
    """Printing a threshold and reading it gives the same threshold, to the last bit."""
    assert parse_fail(",".join(map(str, given_thresholds))) == tuple(given_thresholds)


@given(METRIC, VALUE, VALUE, st.tuples(AMOUNT, AMOUNT).map(sorted), st.booleans())
def test_a_looser_threshold_fails_nothing_more(
    metric: str, old: float, new: float, amounts: list[float], relative: bool
) -> None:
    """What passes a threshold passes every looser one; what a looser one calls better, a tighter one does too."""
    kind = "rtol" if relative else "atol"
    tight, loose = (Threshold(metric, **{kind: amount}) for amount in amounts)
    if tight.compare(old, new) != "regressed":
        assert loose.compare(old, new) != "regressed"
    if loose.compare(old, new) == "improved":
        assert tight.compare(old, new) == "improved"


@given(thresholds(), VALUE, VALUE, VALUE)
def test_a_worse_value_never_passes_where_a_better_one_fails(
    threshold: Threshold, old: float, one: float, other: float
) -> None:
    """Verdicts follow the values: getting worse goes from improved over ok to regressed and never back."""
    assume(worse(threshold.metric, one, other))
    order = ["improved", "ok", "regressed"]
    assert order.index(threshold.compare(old, one)) <= order.index(threshold.compare(old, other))


@given(thresholds(), VALUE)
def test_the_same_value_is_ok(threshold: Threshold, value: float) -> None:
    """A score compared with itself neither regresses nor improves, even with a threshold of zero."""
    assert threshold.compare(value, value) == "ok"


@given(thresholds(), VALUE)
def test_precision_of_the_file_decides(threshold: Threshold, value: float) -> None:
    """A score compared with what the file keeps of it is ok: rounding to 6 digits is no regression."""
    assert threshold.compare(float(f"{value:.6g}"), value) == "ok"


@pytest.mark.parametrize(
    ("fail", "old", "new", "kind"),
    [
        ("nmse:5%", 0.02, 0.021, "ok"),
        ("nmse:10%", 0.07, 0.077, "ok"),
        ("nmse:5%", 0.02, 0.0210001, "regressed"),
        ("nmse:5%", 0.02, 0.019, "ok"),
        ("nmse:5%", 0.02, 0.0189999, "improved"),
        ("nmse:1e-4", 0.02, 0.0201, "ok"),
        ("nmse:1e-4", 0.02, 0.02011, "regressed"),
        ("nmse:0", 0.02, 0.0200001, "regressed"),
        ("nmse:0", 0.0, 1e-12, "ok"),
        ("nmse:5%", 1e-12, 8e-11, "ok"),
        ("nmse:5%", 1e-12, 2e-10, "regressed"),
        ("sqnr_db:0.5", 30.0, 29.5, "ok"),
        ("sqnr_db:0.5", 30.0, 29.4, "regressed"),
        ("sqnr_db:0.5", 30.0, 30.6, "improved"),
        ("sqnr_db:0.5", None, 120.0, "ok"),
        ("sqnr_db:0.5", 120.0, None, "ok"),
        ("sqnr_db:0.5", 130.0, 110.0, "ok"),
        ("sqnr_db:0.5", None, 60.0, "regressed"),
        ("sqnr_db:0.5", 60.0, None, "improved"),
        ("sqnr_db:0.5", None, None, "ok"),
        ("top1:0.01", 0.99, 0.97, "regressed"),
        ("gain:10%", -0.01, -0.0095, "ok"),
        ("gain:10%", -0.01, -0.0089, "regressed"),
        ("gain:10%", -0.01, -0.012, "improved"),
    ],
)
def test_limits(fail: str, old: float | None, new: float | None, kind: str) -> None:
    """Limits are inclusive, one-sided by the metric's direction, and blind below fp32 rounding."""
    (threshold,) = parse_fail(fail)
    assert threshold.compare(old, new) == kind


@pytest.mark.parametrize(
    ("fail", "old", "new", "lines"),
    [
        (
            "nmse:5%",
            {"nmse": 0.0312},
            {"nmse": 0.0401},
            "isolated nmse 0.0312 → 0.0401 (+28.5 %, limit 0.03276 = +5 %)",
        ),
        ("nmse:1e-4", {"nmse": 0.03}, {"nmse": 0.04}, "isolated nmse 0.03 → 0.04 (+33.3 %, limit 0.0301 = +0.0001)"),
        ("nmse:0", {"nmse": 1.0}, {"nmse": 1.00001}, "isolated nmse 1 → 1.00001 (+0.001 %, limit 1 = +0.0)"),
        ("nmse:5%", {"nmse": 0.0}, {"nmse": 0.5}, "isolated nmse 0 → 0.5 (limit 1e-10 = +5 %)"),
        ("nmse:5%", {"nmse": 0.04}, {"nmse": 0.03}, "isolated nmse 0.04 → 0.03 (-25.0 %)"),
        (
            "sqnr_db:0.5",
            {"sqnr_db": 15.06},
            {"sqnr_db": 13.97},
            "isolated sqnr_db 15.06 → 13.97 (-1.09 dB, limit 14.56 = -0.5)",
        ),
        ("sqnr_db:0.5", {"sqnr_db": None}, {"sqnr_db": 9.0}, "isolated sqnr_db infinite → 9 (limit 99.5 = -0.5)"),
        ("sqnr_db:0.5", {"sqnr_db": 9.0}, {"sqnr_db": None}, "isolated sqnr_db 9 → infinite"),
        ("kl:1", {"kl": 0.5}, {"nmse": 0.1}, "isolated kl 0.5 → not measured"),
        ("kl:1", {"nmse": 0.1}, {"kl": 0.5}, "isolated kl 0.5"),
        ("kl:1", None, {"nmse": 0.1}, "isolated (none of its metrics is gated)"),
    ],
)
def test_lines(fail: str, old: dict[str, float | None] | None, new: dict[str, float | None], lines: str) -> None:
    """A line has the metric, old and new value, the change, and for a failure the limit and how it came about."""
    assert judge(old, new, parse_fail(fail), "isolated").lines == (lines,)


def test_a_metric_without_a_record_is_new() -> None:
    """Gating a metric that the file lacks asks for an update; it neither passes unseen nor counts as worse."""
    verdict = judge({"nmse": 0.1}, {"nmse": 0.1, "kl": 0.5}, parse_fail("nmse:5%,kl:1e-3"), "isolated")
    assert verdict == Verdict("new", ("isolated kl 0.5",))


def test_a_metric_no_longer_measured_fails() -> None:
    """A gate whose metric vanished must not pass."""
    assert judge({"kl": 0.5}, {"nmse": 0.1}, parse_fail("kl:1e-3"), "isolated").kind == "regressed"


def test_a_metric_of_another_mode_does_not_matter() -> None:
    """``gain`` exists in fallback mode only: gating it leaves isolated scores alone."""
    assert judge({"nmse": 0.1}, {"nmse": 0.1}, parse_fail("nmse:5%,gain:5%"), "isolated") == Verdict("ok")


def test_one_worse_metric_outweighs_better_ones() -> None:
    """A regression is reported as one, with its own line only, whatever else improved."""
    verdict = judge(
        {"nmse": 0.1, "sqnr_db": 10.0}, {"nmse": 0.01, "sqnr_db": 5.0}, parse_fail("nmse:5%,sqnr_db:1"), "isolated"
    )
    assert verdict.kind == "regressed"
    assert len(verdict.lines) == 1
    assert "sqnr_db" in verdict.lines[0]


@given(st.lists(st.builds(Verdict, st.sampled_from(SEVERITY), st.tuples(st.text()))))
def test_several_modes_give_the_gravest_verdict(verdicts: list[Verdict]) -> None:
    """The verdict over modes is the gravest kind found, with all lines of that kind; nothing at all is ok.

    Beside what is past a limit, what got worse is told as well.
    """
    together = combine(verdicts)
    kinds = [verdict.kind for verdict in verdicts]
    assert together.kind == next((kind for kind in SEVERITY if kind in kinds), "ok")
    told = {together.kind} | ({"regressed"} if together.kind == "exceeded" else set())
    assert together.lines == tuple(line for verdict in verdicts if verdict.kind in told for line in verdict.lines)


def test_overrides_choose_by_first_match() -> None:
    """The first matching rule replaces the defaults; an op without a rule keeps them."""
    default = Gates(parse_fail("nmse:5%,kl:1e-3"))
    overrides = Overrides.parse(["*.0.output.dense = nmse:10%", "*.output.dense=nmse:20%"])
    assert overrides.gates_for("encoder.layer.0.output.dense", default).thresholds == parse_fail("nmse:10%")
    assert overrides.gates_for("encoder.layer.1.output.dense", default).thresholds == parse_fail("nmse:20%")
    assert overrides.gates_for("pooler.dense", default).thresholds == default.thresholds


def test_an_override_by_name() -> None:
    """A name means itself, with characters in it that mean something in a glob."""
    overrides = Overrides.parse(["a[x]-b = nmse:10%"])
    assert overrides.gates_for("a[x]-b", Gates(())).thresholds == parse_fail("nmse:10%")


@pytest.mark.parametrize("line", ["*.dense nmse:10%", "= nmse:10%", "*.dense"])
def test_an_override_without_a_glob_or_thresholds_is_refused(line: str) -> None:
    """A malformed rule is quoted with the right form beside it."""
    with pytest.raises(QsensError, match=r"qsens_fail_overrides: .* is not 'GLOB = THRESHOLDS'"):
        Overrides.parse([line])


def test_an_override_with_bad_thresholds_names_its_rule() -> None:
    """An unreadable amount says in which rule it stands."""
    with pytest.raises(QsensError, match=r"qsens_fail_overrides, \*\.dense: 'nmse:x'"):
        Overrides.parse(["*.dense = nmse:x"])


def test_an_infinite_limit_passes_everything_finite() -> None:
    """Overflowing slack means no limit, not an error."""
    assert Threshold("nmse", rtol=1e308).compare(1e10, math.nextafter(math.inf, 0)) == "ok"
