"""When a score is worse than its snapshot: thresholds, and the judgement of one op."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from decimal import Decimal
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

from pytest_qsens.errors import QsensError
from pytest_qsens.rank_gates import is_rank
from pytest_qsens.results import round_score
from pytest_qsens.uncertainty import allowance
from pytest_qsens.wording import did_you_mean, score_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pytest_qsens.results import Scores

Kind = Literal["exceeded", "regressed", "new", "improved", "ok"]
"""What was found, the gravest first; ``exceeded``: past a limit (`pytest_qsens.limits`), which no update accepts."""

SEVERITY: tuple[Kind, ...] = ("exceeded", "regressed", "new", "improved", "ok")


@dataclass(frozen=True)
class Metric:
    """How values of one metric compare.

    ``floor`` is an absolute slack below which differences are rounding, not quantization. fp32 inference carries a
    relative error of up to about 1e-5 in its outputs, which is an NMSE of 1e-10; KL divergence grows with the
    square of the logits' error likewise. ``sse`` and ``mse`` are in the output's own unit and ``top1`` in steps of
    one sample, so no floor fits them. ``ceiling`` is the same for decibels: 100 dB is an NMSE of 1e-10.
    """

    higher_is_worse: bool
    floor: float = 0.0
    ceiling: float = math.inf


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "nmse": Metric(higher_is_worse=True, floor=1e-10),
        "mse": Metric(higher_is_worse=True),
        "sse": Metric(higher_is_worse=True),
        "kl": Metric(higher_is_worse=True, floor=1e-10),
        "gain": Metric(higher_is_worse=True, floor=1e-10),
        "loss": Metric(higher_is_worse=True, floor=1e-10),
        "sqnr_db": Metric(higher_is_worse=False, ceiling=100.0),
        "top1": Metric(higher_is_worse=False),
    }
)


@dataclass(frozen=True)
class Threshold:
    """How much worse a metric may get: by ``rtol`` of its old value, or by ``atol``. One of the two is zero.

    Unless it is ``strict``, it may also get as much worse as by chance alone, see `pytest_qsens.uncertainty`.
    """

    metric: str
    rtol: float = 0.0
    atol: float = 0.0
    strict: bool = False

    def __str__(self) -> str:
        """Give the text that `parse_fail` reads as this threshold."""
        return f"{self.metric}:{self.amount}{' strict' * self.strict}"

    @property
    def amount(self) -> str:
        """The part after the colon, ``5%`` or ``0.0001``."""
        if self.rtol:
            return percentage(self.rtol)
        return repr(self.atol)

    def limit(self, old: float, slack_sign: int = 1, chance: float = 0.0) -> float:
        """Tell the worst value that passes after ``old``; with ``slack_sign`` -1, the best that is no improvement.

        ``chance`` is how far the value can move by chance alone.
        """
        metric = METRICS[self.metric]
        slack = max(abs(old) * self.rtol + self.atol, chance) + metric.floor
        worse = slack if metric.higher_is_worse else -slack
        # At the precision of the values themselves, so that 0.021 is within 5 % of 0.02 whatever the binary
        # fractions say, and so that the printed limit is the one applied.
        return round_score(old + slack_sign * worse)

    def compare(self, old: float | None, new: float | None, chance: float = 0.0) -> Kind:
        """Judge one pair of values of this metric; ``None`` is an infinite SQNR, ``chance`` as in `limit`."""
        metric = METRICS[self.metric]
        before, now = _comparable(metric, old), _comparable(metric, new)
        worst, best = self.limit(before, 1, chance), self.limit(before, -1, chance)
        if not metric.higher_is_worse:
            now, worst, best = -now, -worst, -best
        if now > worst:
            return "regressed"
        return "improved" if now < best else "ok"


def _comparable(metric: Metric, value: float | None) -> float:
    return metric.ceiling if value is None else min(round_score(value), metric.ceiling)


DEFAULT_FAIL = "nmse:5%"

NUMBER = r"(?P<number>(\d+\.?\d*|\.\d+)(e[+-]?\d+)?)"
"""A number from 0 on: an expression for ASCII, with letters of any case."""

_AMOUNT = re.compile(rf"{NUMBER}\s*(?P<percent>%?)(?P<strict>\s+strict)?", re.ASCII | re.IGNORECASE)


def parse_fail(text: str, where: str = "--qsens-fail") -> tuple[Threshold, ...]:
    """Read thresholds such as ``nmse:5%`` (relative), ``sqnr_db:0.5`` (absolute) or ``nmse:5%,kl:1e-3``.

    Raises:
        QsensError: For an unknown or repeated metric, an amount that is no number of at least 0, or another gate.

    """
    return parse_thresholds(text.split(","), text, where)


def parse_thresholds(parts: Iterable[str], text: str, where: str) -> tuple[Threshold, ...]:
    """Read those parts of a rule that are thresholds; as `parse_fail`."""
    thresholds: dict[str, Threshold] = {}
    for part in parts:
        name, colon, amount = (piece.strip() for piece in part.partition(":"))
        if is_rank(name):
            raise QsensError(f"{where} {text!r}: {of_all_ops(name)}")
        if "<" in part or ">" in part:
            raise QsensError(
                f"{where} {text!r}: {part.strip()!r} limits a score, and says nothing about a change. Write nmse:5%."
            )
        if name not in METRICS:
            raise QsensError(
                f"{where} {text!r}: no metric {name!r}{did_you_mean(name, METRICS)}. Known: {', '.join(METRICS)}; for "
                "the order of all ops, topN and kendall."
            )
        if name in thresholds:
            raise QsensError(f"{where} {text!r}: {name} is there twice. Give one threshold for each metric.")
        match = _AMOUNT.fullmatch(amount)
        value = value_of(match["number"], percent=bool(match["percent"])) if match else math.inf
        if not colon or match is None or not math.isfinite(value):
            raise QsensError(
                f"{where} {text!r}: {amount!r} is not an amount for {name}. "
                f"Write {name}:5% (relative to the snapshot) or {name}:0.001 (absolute), 0 or more; {name}:5% strict "
                "is not widened by noise."
            )
        kind = "rtol" if match["percent"] and value else "atol"
        thresholds[name] = Threshold(name, **{kind: value}, strict=match["strict"] is not None)
    return tuple(thresholds.values())


def of_all_ops(name: str) -> str:
    """Say where a gate of ranks belongs."""
    return (
        f"{name} compares the order of all ops of a run, so it gates no single op or test. Give it to --qsens-fail, or "
        "to qsens_fail in the ini file."
    )


def value_of(number: str, *, percent: bool) -> float:
    """Value of a number as it is written, infinite if it is too large."""
    try:
        # In decimal, so that 7% is 0.07 and printing it gives 7% again.
        return float(Decimal(number).scaleb(-2 if percent else 0))
    except ArithmeticError:
        return math.inf


def percentage(share: float) -> str:
    """Text that is read as this share, such as ``5%``."""
    return f"{Decimal(repr(share)).scaleb(2).normalize():f}%"


class Comparison(NamedTuple):
    """What a gate looked at: a metric in a mode, in the snapshot and now, and the worst value that passes.

    Of a metric that the snapshot does not have, ``kind`` is ``new``, without ``old`` and ``limit``; one that was not
    measured has neither ``new`` nor ``limit``. Where there is a limit, a value of ``None`` is an infinite SQNR, but for
    what is past a limit of its own (``exceeded``), which knows nothing of the snapshot and has no ``old``.
    """

    mode: str
    metric: str
    old: float | None
    new: float | None
    limit: float | None
    kind: Kind


@dataclass(frozen=True)
class Verdict:
    """What comparing new scores with old ones gave.

    ``lines`` explain the kind, one for each metric that decided it; there are none for ``ok``. ``within_noise`` has a
    line for each metric that is past its threshold, and counts as equal all the same: chance alone does as much.
    ``compared`` has all that was compared, whatever came of it.
    """

    kind: Kind
    lines: tuple[str, ...] = ()
    within_noise: tuple[str, ...] = ()
    compared: tuple[Comparison, ...] = field(default=(), compare=False)


def applied(thresholds: Sequence[Threshold], mode: str) -> Sequence[Threshold]:
    """Thresholds as they gate a mode: that of ``gain`` is the one of ``loss`` of an op that is added to a config."""
    if mode != "added" or any(threshold.metric == "loss" for threshold in thresholds):
        return thresholds
    return [replace(threshold, metric="loss") if threshold.metric == "gain" else threshold for threshold in thresholds]


def judge(
    old: Scores | None, new: Scores, thresholds: Sequence[Threshold], mode: str, *, other_data: bool = False
) -> Verdict:
    """Compare the scores of one op in one mode with its snapshot.

    The comparison is one-sided, at the 6 significant digits the snapshot has: worse by more than the threshold is
    ``regressed``, better by more than it is ``improved``. A gated metric that the snapshot lacks is ``new``, like a
    missing op: it passes once it is accepted, so that gating a metric never silently compares nothing. A gated
    metric that the snapshot has and that was not measured now is ``regressed``. A metric in neither (``gain`` in
    isolated mode) is no part of the comparison.

    Args:
        old: Recorded scores.
        new: Scores, with what is said about them beside metrics.
        thresholds: What gates them.
        mode: Of the scores.
        other_data: Whether they were measured on other evaluation data than the recorded ones.

    """
    found: list[Verdict] = []
    for threshold in applied(thresholds, mode):
        name = threshold.metric
        if old is None or name not in old:
            if name in new:
                seen = Comparison(mode, name, None, new[name], None, "new")
                found.append(Verdict("new", (f"{mode} {name} {score_text(new[name], 6)}",), compared=(seen,)))
        elif name not in new:
            line = f"{mode} {name} {score_text(old[name], 6)} → not measured"
            lost = Comparison(mode, name, old[name], None, None, "regressed")
            found.append(Verdict("regressed", (line,), compared=(lost,)))
        else:
            chance = 0.0 if threshold.strict else allowance(name, old[name], new, other_data=other_data)
            found.append(_compared(threshold, old[name], new[name], mode, chance))
    if old is None and not found:
        found.append(Verdict("new", (f"{mode} (none of its metrics is gated)",)))
    return _gravest(found)


def _compared(threshold: Threshold, old: float | None, new: float | None, mode: str, chance: float) -> Verdict:
    asked, kind = threshold.compare(old, new), threshold.compare(old, new, chance)
    limit = threshold.limit(_comparable(METRICS[threshold.metric], old), 1, chance)
    compared = (Comparison(mode, threshold.metric, old, new, limit, kind),)
    if kind == "ok":
        line = f"{mode} {_change(threshold, asked, old, new, chance)}"
        return Verdict("ok", within_noise=() if asked == "ok" else (line,), compared=compared)
    return Verdict(kind, (f"{mode} {_change(threshold, kind, old, new, chance)}",), compared=compared)


def combine(verdicts: Iterable[Verdict]) -> Verdict:
    """One verdict for several modes: the gravest kind, with the lines of every mode it was found in."""
    return _gravest(list(verdicts))


def _gravest(verdicts: list[Verdict]) -> Verdict:
    kind = min((verdict.kind for verdict in verdicts), key=SEVERITY.index, default=SEVERITY[-1])
    told = (kind, "regressed") if kind == "exceeded" else (kind,)
    return Verdict(
        kind,
        tuple(line for verdict in verdicts if verdict.kind in told for line in verdict.lines),
        tuple(line for verdict in verdicts for line in verdict.within_noise),
        tuple(comparison for verdict in verdicts for comparison in verdict.compared),
    )


def _change(threshold: Threshold, kind: Kind, old: float | None, new: float | None, chance: float) -> str:
    metric = METRICS[threshold.metric]
    before, now = _comparable(metric, old), _comparable(metric, new)
    parts = []
    if threshold.metric == "sqnr_db":
        if old is not None and new is not None:
            parts.append(f"{new - old:+.3g} dB")
    elif before:
        percent = (now - before) / abs(before) * 100
        parts.append(f"{percent:+.1f} %" if abs(percent) >= 0.1 else f"{percent:+.2g} %")
    way = -1 if kind == "improved" else 1
    limit, reach = threshold.limit(before, way), threshold.limit(before, way, chance)
    amount = f"{'+' if metric.higher_is_worse == (way > 0) else '-'}{threshold.amount.replace('%', ' %')}"
    if reach != limit:
        parts.append(f"{amount} is {score_text(limit, 6)}, noise reaches {score_text(reach, 6)}")
    elif kind == "regressed":
        parts.append(f"limit {score_text(limit, 6)} = {amount}")
    details = f" ({', '.join(parts)})" if parts else ""
    return f"{threshold.metric} {score_text(old, 6)} → {score_text(new, 6)}{details}"
