"""What a report says: results, what became of them, and what to do next. Knows no format of files."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pytest_qsens.configs.rules import CLASS_OF
from pytest_qsens.diff import KINDS, diff, of_result
from pytest_qsens.errors import QsensError
from pytest_qsens.groups import grouped
from pytest_qsens.ops import TOTAL, Op
from pytest_qsens.plans import caches
from pytest_qsens.report.diff import SAID
from pytest_qsens.report.findings import FAILING, said
from pytest_qsens.report.measures import by_score, measure_of
from pytest_qsens.thresholds import DEFAULT_FAIL, parse_fail
from pytest_qsens.wording import count

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from pytest_qsens.diff import Change, Diff, Kind, Side
    from pytest_qsens.limits import Limit
    from pytest_qsens.report.findings import Finding
    from pytest_qsens.report.findings import Kind as FindingKind
    from pytest_qsens.report.measures import Measure
    from pytest_qsens.results import OpResult, RunResult
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


@dataclass(frozen=True)
class Judgement:
    """What became of a run.

    Attributes:
        level: Whether it passed.
        headline: In a few words.
        reasons: What is behind it, a sentence each.
        commands: What to do next → the command for it, empty where there is none that holds for every run.

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
        thresholds: What counts as worse, and fails.
        limits: What no score may be past.
        found: What somebody has to look at, the gravest first, whether or not there is anything to compare with.

    """

    result: RunResult
    judgement: Judgement
    changes: Diff | None
    uncompared: str | None
    thresholds: tuple[Threshold, ...]
    limits: tuple[Limit, ...] = ()
    found: tuple[Finding, ...] = ()

    @property
    def title(self) -> str:
        """Model and scheme, or config."""
        return f"{self.result.run.model}, {self.result.run.scheme}"

    @property
    def measure(self) -> Measure | None:
        """What ops are ranked by."""
        return measure_of(self.result.ops)

    @property
    def exceeded(self) -> list[Finding]:
        """What is past a limit, the furthest first."""
        return [finding for finding in self.found if finding.kind == "exceeded"]

    @property
    def limits_told(self) -> str:
        """What the limits are, and how many scores are past them."""
        given = f"Given: {', '.join(map(str, self.limits))}. " if self.limits else ""
        ops = sum(finding.op != TOTAL for finding in self.exceeded)
        past = [count(ops, unit_of(self.result))] if ops else []
        past += ["the whole model"] if len(self.exceeded) > ops else []
        return f"{given}Past them: {' and '.join(past) or 'nothing'}."

    @property
    def gravest(self) -> list[tuple[str, str]]:
        """What fails, but for what is new, each with its first explanation; the gravest first."""
        told = {found.op: found.lines for found in self.found if found.kind in FAILING and found.kind != "new"}
        for change in self.changed if self.thresholds else ():
            if change.kind in ("worse", "lost"):
                told.setdefault(change.op, change.lines)
        return [(op, next(iter(lines), "")) for op, lines in told.items()]

    @property
    def rules(self) -> str:
        """By what changes are told."""
        if self.thresholds:
            return ", ".join(map(str, self.thresholds))
        return f"{DEFAULT_FAIL}, which fails nothing here: no threshold was given"

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


def unit_of(result: RunResult) -> str:
    """Name what is measured as one."""
    return "op" if result.run.granularity == "op" else "group"


def ranked(result: RunResult) -> list[OpResult]:
    """Ops with a score, the most sensitive first."""
    return by_score(result.ops, measure_of(result.ops))


def compared(
    result: RunResult, old: Side, thresholds: Sequence[Threshold], verdicts: Mapping[str, Verdict] | None = None
) -> tuple[Diff | None, str | None]:
    """Compare with what is recorded; where that cannot be done, say why.

    Args:
        result: What was measured.
        old: What is recorded.
        thresholds: What counts as worse; without any, changes are told by the default one.
        verdicts: Of ops that a gate has judged already, maybe by thresholds of their own.

    """
    try:
        found = diff(old, of_result(result, "this run"), thresholds or parse_fail(DEFAULT_FAIL))
    except QsensError as error:
        return None, str(error)
    # what a gate has not compared with the snapshot, and passed for that, says nothing about a change
    judged = {op: verdict for op, verdict in (verdicts or {}).items() if verdict.kind != "ok" or verdict.compared}
    changes = [
        _judged(change, judged[change.op]) if change.op in judged else change
        for change in found.changes
        # what has no score and never had one: products of activations, ops of another shard
        if change.op in old.ops or found.new.ops[change.op].scores
    ]
    return replace(found, changes=tuple(changes)), None


def _judged(change: Change, verdict: Verdict) -> Change:
    kinds: dict[str, Kind] = {
        "exceeded": "exceeded",
        "regressed": "worse",
        "improved": "better",
        "ok": "same",
        "new": "appeared",
    }
    lines = verdict.lines
    if verdict.kind == "exceeded" and change.kind in ("worse", "better"):
        lines = tuple(dict.fromkeys((*lines, *change.lines)))
    return replace(change, kind=kinds[verdict.kind], lines=lines or change.lines)


def judged_by(report: Report, failed: Sequence[str] = (), path: Path | None = None) -> Judgement:
    """Judge a finished result by limits that scores are past, and by what changed.

    Args:
        report: All but the judgement.
        failed: What gates of all ops together found, a sentence for each that does not hold.
        path: Directory that the report goes to.

    """
    result, changes = report.result, report.changes
    commands, unit = suggestions(result, path), unit_of(result)
    kinds: list[FindingKind] = [finding.kind for finding in report.exceeded if finding.op != TOTAL]
    kinds += [
        _FAILING_CHANGES[change.kind]
        for change in (changes.changes if changes is not None and report.thresholds else ())
        if change.op != TOTAL and change.kind in _FAILING_CHANGES
    ]
    parts = [said(kind, kinds.count(kind), unit) for kind in FAILING if kind in kinds]
    if any(finding.op == TOTAL for finding in report.exceeded):
        parts.append("the whole model is past a limit")
    elif changes is not None and report.thresholds:
        worse = any(change.op == TOTAL and change.kind == "worse" for change in changes.changes)
        parts += ["the whole model got worse"] if worse else []
    against = report.uncompared if changes is None else f"Compared with {changes.old.name}."
    told = (*failed, against or "")
    if parts or failed:
        found = ", ".join(parts) or "the ops together do not pass"
        return Judgement("failed", f"{found[0].upper()}{found[1:]}", told, commands)
    if report.limits and not report.thresholds:
        return Judgement("passed", f"No {unit} is past a limit", told, commands)
    if changes is None:
        headline = "No score is past a limit; not compared with anything" if report.limits else None
        return Judgement("open", headline or "Not compared with anything", told, commands)
    return Judgement("passed", f"No {unit} got worse", told, commands)


_FAILING_CHANGES: dict[Kind, FindingKind] = {"worse": "regressed", "lost": "lost"}
"""What of the changes fails, and what it is as a finding."""


def suggestions(result: RunResult, directory: Path | None) -> tuple[tuple[str, str], ...]:
    """Say what to do next, whether or not anything got worse.

    Args:
        result: What was measured.
        directory: That the report goes to, with the result; ``None`` if it goes nowhere.

    """
    counts, unit = Counter(op.status for op in result.ops), unit_of(result)
    found = []
    if counts["unexercised"]:
        reach = f"Reach the {count(counts['unexercised'], unit)} that the data never reached"
        found.append((f"{reach}: run again with other data (--qsens-eval, or the factory's batches)", ""))
    if counts["estimated"]:
        found.append(("Measure what matters of the estimates: run again with --qsens-top 10", ""))
    share = _share_to_keep(result)
    if directory is not None and share is not None:
        path = shlex.quote(str(directory / "report.json"))
        keep = "Keep the most sensitive tenth in high precision"
        keep += ", beside what has no score" if share > 10 else ""
        found.append((f"{keep} (--verify measures that)", f"qsens plan {path} --keep {share}% --out plan.yaml"))
    return tuple(found)


def _share_to_keep(result: RunResult) -> int | None:
    """Percentage that `qsens plan --keep` takes: a tenth, beside what it cannot quantize; ``None`` if it takes none."""
    if caches.is_of_cache(result.run.scheme):
        listed = [*caches.entries_of(result.ops).values()]
    else:
        listed = [op for op in result.ops if set(op.type.split("+")) <= CLASS_OF.keys()]
    if result.run.shard is not None or result.run.config is not None or not listed:
        return None
    usable = {op.op for op in listed if op.status == "measured" and op.isolated is not None and not op.partial}
    sizes = {op.op: len(op.ops) or 1 for op in listed}
    units = [[op.op] for op in listed]
    if result.run.granularity == "op":  # plans give fused ops one scheme
        fused = (caches.OF_ONE_MODULE,) if caches.quantizes_queries(result.run.scheme) else ()
        ops = [Op(op.op, op.type) for op in listed]
        units = [[*unit.member_names] or [unit.name] for unit in grouped(ops, "fused", fused)]
    without = sum(sizes[op] for unit in units if not usable.issuperset(unit) for op in unit)
    share = math.ceil(100 * without / sum(sizes.values())) + 10
    return share if share < 100 else None
