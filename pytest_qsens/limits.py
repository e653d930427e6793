"""Limits of scores, which hold whatever a snapshot says: of single ops and of the whole model. Knows nothing of torch.

``nmse<=1e-3`` is a limit of every score that is measured, ``total.nmse<=1e-3`` one of the whole model and
``*.lm_head.sqnr_db>=30`` one of the ops that a glob matches. Limits are not widened by noise, and no update of a
snapshot accepts what is past one.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pytest_qsens.errors import QsensError
from pytest_qsens.ops import TOTAL, matches
from pytest_qsens.results import round_score
from pytest_qsens.thresholds import METRICS, NUMBER, Comparison, Verdict, value_of
from pytest_qsens.wording import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from pytest_qsens.results import Mode, OpResult

_RULE = re.compile(r"(?:(?P<glob>.*)\.)?(?P<name>[^.<>=]*?)\s*(?P<sign>[<>]=?)\s*(?P<amount>.*)", re.DOTALL)
_AMOUNT = re.compile(NUMBER, re.ASCII | re.IGNORECASE)
_OF_MODES = ("gain", "loss")
"""What the whole model has none of, and an op one of, by the mode that it is measured in."""


@dataclass(frozen=True)
class Limit:
    """The worst value of a metric that passes.

    Attributes:
        metric: One of `pytest_qsens.thresholds.METRICS`.
        bound: In the metric's unit; the most, or the least of a metric of which less is worse.
        glob: Names of the ops that it is of, or `TOTAL`; ``None`` for all that a rule applies to.

    """

    metric: str
    bound: float
    glob: str | None = None

    def __str__(self) -> str:
        """Give the text that `parse_limit` reads as this limit."""
        name = self.metric if self.glob is None else f"{self.glob}.{self.metric}"
        return f"{name}{sign_of(self.metric)}{self.bound!r}"

    def is_of(self, op: str, members: Sequence[str] = ()) -> bool:
        """Whether this op is meant; a group by its name, or by a glob that matches all of its members."""
        return self.glob is None or named(self.glob, op, members)

    def holds(self, value: float | None) -> bool:
        """Tell whether a score is within the limit, at the precision of snapshots; ``None`` is an infinite SQNR."""
        if value is None:
            return True
        found = round_score(value)
        return found <= self.bound if METRICS[self.metric].higher_is_worse else found >= self.bound


def named(glob: str, op: str, members: Sequence[str]) -> bool:
    """Whether a glob means an op, or a group by its name or by those of all its members."""
    return matches(op, glob) or (bool(members) and all(matches(member, glob) for member in members))


def sign_of(metric: str) -> str:
    """How the limit of a metric is written."""
    return "<=" if METRICS[metric].higher_is_worse else ">="


def is_limit(text: str) -> bool:
    """Whether a part of a rule is a limit, and no threshold."""
    return "<" in text or ">" in text


def taken_apart(text: str, where: str) -> tuple[str | None, str, str, str]:
    """Take a limit apart: glob, name, sign and amount.

    Raises:
        QsensError: If there is no name.

    """
    match = _RULE.fullmatch(text.strip())
    if match is None or not match["name"].strip():
        raise QsensError(f"{where}: {text.strip()!r} is no limit. Write nmse<=1e-3, or total.nmse<=1e-3 of one op.")
    glob = match["glob"]
    if glob is not None and not glob.strip():
        raise QsensError(f"{where}: {text.strip()!r} names no op. Write nmse<=1e-3 for all, or total.nmse<=1e-3.")
    return glob, match["name"].strip(), match["sign"], match["amount"].strip()


def parse_limit(text: str, where: str) -> Limit:
    """Read ``nmse<=1e-3``, ``total.nmse<=1e-3`` or ``*.lm_head.sqnr_db>=30``.

    Raises:
        QsensError: For an unknown metric, a sign that means the other way, or an amount that is no number from 0 on.

    """
    glob, name, sign, given = taken_apart(text, where)
    if name not in METRICS:
        raise QsensError(
            f"{where}: no metric {name!r}{did_you_mean(name, METRICS)} to limit. Known: {', '.join(METRICS)}; with "
            "--qsens-interactions also additive, quadratic, additive_gap and quadratic_gap of total."
        )
    right = sign_of(name)
    if sign != right:
        worse = "higher" if METRICS[name].higher_is_worse else "lower"
        raise QsensError(f"{where}: {text.strip()!r}: of {name}, {worse} is worse. Write {name}{right}{given}.")
    return Limit(name, number(given, name, right, where), glob)


def number(given: str, name: str, sign: str, where: str) -> float:
    """Read the amount of a limit.

    Raises:
        QsensError: If it is no number from 0 on.

    """
    match = _AMOUNT.fullmatch(given)
    value = value_of(match["number"], percent=False) if match else math.inf
    if not math.isfinite(value):
        relative = f" {name}:{given} is a threshold relative to the snapshot." if given.endswith("%") else ""
        raise QsensError(
            f"{where}: {given!r} is no limit of {name}. Write {name}{sign}0.001, a number from 0 on.{relative}"
        )
    return value


def judge_limits(result: OpResult, limits: Sequence[Limit], *, estimated: Collection[Mode] = ()) -> Verdict:
    """Compare the scores of one op with its limits, in all modes.

    Args:
        result: Its scores.
        limits: Of this op.
        estimated: Modes in which the scores are the least that an estimate allows for: metrics that have no interval
            are not judged there.

    """
    found = list(_past(result, limits, estimated))
    if not found:
        return Verdict("ok")
    return Verdict("exceeded", tuple(line for line, _ in found), compared=tuple(seen for _, seen in found))


def _past(result: OpResult, limits: Sequence[Limit], estimated: Collection[Mode]) -> Iterator[tuple[str, Comparison]]:
    """Explain every limit that the scores are past, or that there is no score for."""
    known = {metric for scores in result.modes.values() for metric in scores}
    for limit in limits:
        found = [each for mode in result.modes for each in [_of_mode(limit, mode)] if each.metric in known]
        if not found and not estimated and not (result.op == TOTAL and limit.metric in _OF_MODES):
            line = f"{limit.metric} was not measured, and has a limit ({limit})"
            yield line, Comparison(next(iter(result.modes), ""), limit.metric, None, None, None, "exceeded")
        for mode, scores in result.modes.items():
            applied = _of_mode(limit, mode)
            if applied.metric in scores and not applied.holds(value := scores[applied.metric]):
                least = ", estimated to be at least:" * (mode in estimated)
                line = f"{mode}{least} {applied.metric} {value:.6g} is past the limit of {limit.bound:.6g} ({limit})"
                yield line, Comparison(mode, applied.metric, None, value, limit.bound, "exceeded")


def _of_mode(limit: Limit, mode: str) -> Limit:
    """Take a limit as it holds in a mode: that of ``gain`` is one of ``loss`` of an op that is added to a config."""
    return replace(limit, metric="loss") if mode == "added" and limit.metric == "gain" else limit
