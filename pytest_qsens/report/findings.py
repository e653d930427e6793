"""What a run found that somebody has to look at, the gravest first: for summaries, annotations and CI reports."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from pytest_qsens.ops import TOTAL
from pytest_qsens.report.places import SnapshotLines
from pytest_qsens.wording import count

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pytest_qsens.results import OpResult
    from pytest_qsens.session.run import Run
    from pytest_qsens.thresholds import Comparison

Kind = Literal["exceeded", "regressed", "failed", "lost", "new", "unexercised"]
"""``exceeded``: past a limit; ``lost``: an op of the snapshot that has no score any more, which fails;
``unexercised``: one that never had one."""

FAILING: tuple[Kind, ...] = ("exceeded", "regressed", "failed", "lost", "new")
"""In the order in which they matter; what is left fails nothing."""


class Words(NamedTuple):
    """What a kind of finding is called: of one op, of several, and as a title."""

    one: str
    many: str
    title: str


SAID: dict[Kind, Words] = {
    "exceeded": Words("is past a limit", "are past a limit", "past a limit"),
    "regressed": Words("got worse", "got worse", "worse than the snapshot"),
    "failed": Words("failed", "failed", "failed"),
    "lost": Words("lost its score", "lost their scores", "no score any more"),
    "new": Words("is new", "are new", "not in the snapshot"),
    "unexercised": Words("is not exercised", "are not exercised", "not exercised"),
}

_JUDGED: tuple[Kind, ...] = ("exceeded", "regressed", "new")
"""What a gate found, with an explanation of its own."""


@dataclass(frozen=True)
class Finding:
    """One op, or the whole model, that somebody has to look at.

    Attributes:
        op: Its name.
        kind: What is the matter.
        lines: Explanations, one for each metric, or the reason why there is no score.
        compared: What the gate compared.
        scheme: Name of its scheme, where a config is measured.
        line: Where it is, or would be, in the snapshot file, counted from 1; ``None`` without a file.

    """

    op: str
    kind: Kind
    lines: tuple[str, ...]
    compared: tuple[Comparison, ...]
    scheme: str | None
    line: int | None


def findings(run: Run) -> list[Finding]:
    """List what fails in a run, and what could not be measured; nothing that was accepted."""
    places = SnapshotLines.of(run.path)
    found: list[tuple[tuple[int, float, int], Finding]] = []
    for place, (op, result) in enumerate(run.results.items()):
        kind = _kind(run, op, result, places.known)
        if kind is None:
            continue
        verdict = run.verdicts.get(op)
        lines = verdict.lines if verdict is not None and kind in _JUDGED else (result.reason or "",)
        compared = () if verdict is None else verdict.compared
        finding = Finding(op, kind, lines, compared, run.schemes.get(op), places.at(op))
        weight = -_growth(kind, compared) if kind in ("exceeded", "regressed") else -_error(result)
        found.append(((_rank(kind), weight, place), finding))
    return [finding for _, finding in sorted(found, key=lambda pair: pair[0])]


def _kind(run: Run, op: str, result: OpResult, recorded: Mapping[str, int]) -> Kind | None:
    verdict = run.verdicts.get(op)
    if result.status == "failed":
        return "failed"
    if result.status in ("unexercised", "unquantizable"):
        if op in recorded and not run.pruned:
            return "lost"
        return "unexercised" if result.status == "unexercised" else None
    if verdict is None or (op in run.entries and verdict.kind != "exceeded"):  # no update accepts that
        return None
    return next((kind for kind in _JUDGED if kind == verdict.kind), None)


def _rank(kind: Kind) -> int:
    return FAILING.index(kind) if kind in FAILING else len(FAILING)


def _growth(kind: Kind, compared: tuple[Comparison, ...]) -> float:
    """How many times the error has grown, or is larger than its limit; infinite if it was not measured any more."""
    ratios = [0.0]
    for found in compared:
        if found.kind != kind:
            continue
        before = found.limit if kind == "exceeded" else found.old
        if found.new is None or before is None:
            ratios.append(math.inf)
        elif found.metric == "sqnr_db":
            ratios.append(10 ** ((before - found.new) / 10))
        elif found.metric == "top1":
            ratios.append(1 + before - found.new)
        else:
            ratios.append(found.new / before if before > 0 else math.inf)
    return max(ratios)


def _error(result: OpResult) -> float:
    return max(((scores.get("nmse") or 0.0) for scores in result.modes.values()), default=0.0)


def furthest_first(found: Iterable[Finding]) -> list[Finding]:
    """Order what is past a limit by how far."""
    return sorted(found, key=lambda finding: -_growth(finding.kind, finding.compared))


def said(kind: Kind, number: int, unit: str = "op") -> str:
    """Count what was found of a kind, in words."""
    return f"{count(number, unit)} {SAID[kind].one if number == 1 else SAID[kind].many}"


def counts(run: Run, found: list[Finding]) -> dict[str, int]:
    """Count the ops, without the whole model, by what came of them; zeros are there, too, but for limits."""
    kinds = [finding.kind for finding in found if finding.op != TOTAL]
    verdicts = [verdict.kind for op, verdict in run.verdicts.items() if op != TOTAL]
    statuses = [result.status for op, result in run.results.items() if op != TOTAL]
    exceeded = kinds.count("exceeded")
    return {
        **({"exceeded": exceeded} if exceeded else {}),
        "regressed": kinds.count("regressed"),
        "improved": verdicts.count("improved"),
        "new": kinds.count("new"),
        "unexercised": statuses.count("unexercised"),
        "failed": kinds.count("failed"),
        "estimated": statuses.count("estimated"),
        "measured": statuses.count("measured"),
    }
