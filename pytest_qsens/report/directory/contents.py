"""What a report says: results, what became of them, and what to do next. Knows no format of files."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pytest_qsens.compare import count
from pytest_qsens.diff import KINDS, diff, of_result
from pytest_qsens.errors import QsensError
from pytest_qsens.ops import TOTAL

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_qsens.diff import Change, Diff, Kind, Side
    from pytest_qsens.results import Mode, OpResult, RunResult
    from pytest_qsens.thresholds import Threshold, Verdict

Level = Literal["passed", "failed", "open"]
"""``open``: there was nothing to compare with."""

STATUSES = {
    "measured": "The op was quantized, the model run again, and the output compared with the unquantized model's.",
    "estimated": "Told from backward passes, or from ops like it, with an interval that is to hold the exact value of "
    "9 in 10 ops. An estimate gates nothing and goes into no snapshot.",
    "unexercised": "The data never reached the op, so nothing is known about it. It is not insensitive: give data that "
    "reaches it.",
    "unquantizable": "The scheme does not quantize this kind of op, or not one of its shape.",
    "unquantized": "The config leaves the op as it is.",
    "failed": "The op has no score although it should have one; the reason is beside it.",
    "unrun": "An op of the model that this run did not select, or did not come to.",
}
"""Status → what it means."""


SAID: dict[Kind, str] = {
    "worse": "worse",
    "lost": "without a score now",
    "better": "better",
    "appeared": "new",
    "vanished": "gone",
    "unrun": "not run",
    "same": "as before",
}
"""Kind of change → what it is called."""


@dataclass(frozen=True)
class Measure:
    """The number by which ops are ranked: higher is more sensitive in all of them."""

    mode: Mode
    metric: str
    title: str
    meaning: str


MEASURES = (
    Measure("isolated", "nmse", "NMSE, only this op quantized", "Error of the output with only this op quantized."),
    Measure(
        "fallback",
        "gain",
        "gain in NMSE by keeping this op",
        "How much of the whole model's error goes when only this op is kept in full precision.",
    ),
    Measure(
        "added",
        "loss",
        "loss in NMSE by adding this op",
        "How much error it adds to the whole model's when this op is quantized as well.",
    ),
)


@dataclass(frozen=True)
class Judgement:
    """What became of a run.

    Attributes:
        level: Whether it passed.
        headline: In a few words.
        reasons: What is behind it, a sentence each.
        commands: What to do next → the command for it.

    """

    level: Level
    headline: str
    reasons: tuple[str, ...] = ()
    commands: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Report:
    """All that the files are made of.

    Attributes:
        result: As a result file has it.
        judgement: What became of it.
        changes: Against the snapshot, or an older result; ``None`` if there is nothing to compare with.
        uncompared: Why there is not.
        thresholds: What counts as worse.

    """

    result: RunResult
    judgement: Judgement
    changes: Diff | None
    uncompared: str | None
    thresholds: tuple[Threshold, ...]

    @property
    def title(self) -> str:
        """Model and scheme, or config."""
        return f"{self.result.run.model}, {self.result.run.scheme}"

    @property
    def measure(self) -> Measure | None:
        """What ops are ranked by."""
        return measure_of(self.result)

    @property
    def changed(self) -> list[Change]:
        """What is not as before, the gravest first."""
        found = [change for change in (self.changes.changes if self.changes else ()) if change.kind != "same"]
        return sorted(found, key=lambda change: (KINDS.index(change.kind), -_distance(change)))

    @property
    def change_counts(self) -> list[tuple[str, int]]:
        """What became of how many ops, in words."""
        counts = {} if self.changes is None else {kind: self.changes.count(kind) for kind in KINDS}
        return [(SAID[kind], number) for kind, number in counts.items() if number]

    @property
    def counts(self) -> Counter[str]:
        """Status → number of ops."""
        return Counter(op.status for op in self.result.ops)


def _distance(change: Change) -> float:
    ratio = change.ratio or 1.0
    return 1 / ratio if change.kind == "better" else ratio


def measure_of(result: RunResult) -> Measure | None:
    """Choose what ops are ranked by: the first mode that has scores; ``None`` if there are none."""
    return next((measure for measure in MEASURES if any(measure.mode in op.modes for op in result.ops)), None)


def unit_of(result: RunResult) -> str:
    """Name what is measured as one."""
    return "op" if result.run.granularity == "op" else "group"


def name_of(metric: str) -> str:
    """Write a metric as people write it."""
    return metric.upper() if metric in ("nmse", "mse", "sse") else metric


def score(op: OpResult, measure: Measure | None) -> float | None:
    """Value by which an op is ranked; ``None`` if it has none."""
    return None if measure is None else op.modes.get(measure.mode, {}).get(measure.metric)


def ranked(result: RunResult) -> list[OpResult]:
    """Ops with a score, the most sensitive first."""
    measure = measure_of(result)
    scored = [(value, op) for op in result.ops if (value := score(op, measure)) is not None]
    return [op for _, op in sorted(scored, key=lambda pair: (-pair[0], pair[1].op))]


def compared(
    result: RunResult, old: Side, thresholds: Sequence[Threshold], verdicts: Mapping[str, Verdict] | None = None
) -> tuple[Diff | None, str | None]:
    """Compare with what is recorded; where that cannot be done, say why.

    Args:
        result: What was measured.
        old: What is recorded.
        thresholds: What counts as worse.
        verdicts: Of ops that a gate has judged already, maybe by thresholds of their own.

    """
    try:
        found = diff(old, of_result(result, "this run"), thresholds)
    except QsensError as error:
        return None, str(error)
    judged = verdicts or {}
    changes = [
        _judged(change, judged[change.op]) if change.op in judged else change
        for change in found.changes
        # what has no score and never had one: products of activations, ops of another shard
        if change.op in old.ops or found.new.ops[change.op].scores
    ]
    return replace(found, changes=tuple(changes)), None


def _judged(change: Change, verdict: Verdict) -> Change:
    kinds: dict[str, Kind] = {
        "exceeded": "worse",
        "regressed": "worse",
        "improved": "better",
        "ok": "same",
        "new": "appeared",
    }
    return replace(change, kind=kinds[verdict.kind], lines=verdict.lines or change.lines)


def judged_by(result: RunResult, changes: Diff | None, uncompared: str | None) -> Judgement:
    """Judge a finished result by what changed."""
    commands, unit = suggestions(result), unit_of(result)
    if changes is None:
        return Judgement("open", "Not compared with anything", (uncompared or "",), commands)
    parts = [
        count(number, unit) + said
        for kind, said in (("worse", " got worse"), ("lost", " lost the score"))
        if (number := changes.count(kind))  # type: ignore[arg-type]  # two of the kinds
    ]
    if any(change.op == TOTAL and change.kind == "worse" for change in changes.changes):
        parts.append("the whole model got worse")
    told = (f"Compared with {changes.old.name}.",)
    if parts:
        said = ", ".join(parts)
        return Judgement("failed", f"{said[0].upper()}{said[1:]}", told, commands)
    return Judgement("passed", f"No {unit} got worse", told, commands)


def suggestions(result: RunResult) -> tuple[tuple[str, str], ...]:
    """Say what to do next, whether or not anything got worse."""
    counts, unit = Counter(op.status for op in result.ops), unit_of(result)
    found = []
    if counts["unexercised"]:
        found.append((f"Reach the {count(counts['unexercised'], unit)} without a score", "--qsens-eval FILE"))
    if counts["estimated"]:
        found.append(("Measure what matters of the estimates", "--qsens-top 10"))
    if result.run.config is None and any("nmse" in (op.isolated or {}) and not op.intervals for op in result.ops):
        found.append(
            (
                "Keep the most sensitive tenth in high precision, and measure that",
                "qsens plan report.json --keep 10% --verify --out plan.yaml",
            )
        )
    return tuple(found)
