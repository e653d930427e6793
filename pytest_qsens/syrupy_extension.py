"""``assert score == snapshot`` with syrupy's own fixture: our file, our judgement, its options and its summary.

The file is read here, in whichever process runs the test, and written by the controller alone, after the run. So
this extension stores nothing, discovers nothing and deletes nothing: syrupy's unused-snapshot cleanup never sees the
file, and its snapshots beside ours are handled as ever.
"""

from __future__ import annotations

from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from syrupy.assertion import SnapshotAssertion
from syrupy.data import SnapshotCollection, SnapshotCollections
from syrupy.extensions.amber import AmberDataSerializer, AmberDataSerializerPlugin
from syrupy.extensions.base import AbstractSyrupyExtension

from pytest_qsens.errors import QsensError
from pytest_qsens.limits import judge_limits
from pytest_qsens.snapshot import Entry, accepted, load, on_other_data
from pytest_qsens.thresholds import Verdict, applied, combine, judge
from pytest_qsens.wording import score_text

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from pytest_qsens.limits import Limit
    from pytest_qsens.results import Mode, OpResult, Scores
    from pytest_qsens.thresholds import Threshold

WRONG_WAY_ROUND = (
    "write `assert score == snapshot`, with the score on the left; "
    "the other way round syrupy would keep it in a file of its own"
)


class Score:
    """The result of one op, to be compared with its snapshot: ``assert score == snapshot``.

    Afterwards ``verdict`` says what the comparison found, and ``accepted`` whether ``--snapshot-update`` or
    ``--snapshot-update-new-only`` allowed to record it; `entry` is what to record then.

    Args:
        result: The op's result.
        thresholds: What gates it.
        limits: What it has to be within, whatever the snapshot says.
        needs_snapshot: Whether the test fails if there is nothing to compare with.
        path: The snapshot file.
        model: Label the file must have.
        scheme: Scheme the file must have.
        granularity: Granularity the file must have.
        accept: The command that records the present scores, for messages.
        evaluation: Hash of the evaluation data, if it is known.
        estimated: Modes in which the result holds the least that an estimate allows for. That can only be worse than
            the snapshot, and is never recorded.

    """

    def __init__(
        self,
        result: OpResult,
        *,
        thresholds: Sequence[Threshold],
        limits: Sequence[Limit] = (),
        needs_snapshot: bool = True,
        path: Path,
        model: str,
        scheme: str,
        granularity: str = "op",
        accept: str,
        evaluation: str | None = None,
        estimated: Collection[Mode] = (),
    ) -> None:
        self.result = result
        self.thresholds = tuple(thresholds)
        self.limits = tuple(limits)
        self.needs_snapshot = needs_snapshot
        self.path = path
        self.model = model
        self.scheme = scheme
        self.granularity = granularity
        self.accept = accept
        self.evaluation = evaluation
        self.estimated = estimated
        self.verdict: Verdict | None = None
        self.accepted = False
        self._recorded: Entry | None = None
        self._verdicts: dict[Mode, Verdict] = {}
        _refuse_amber()

    def __repr__(self) -> str:
        numbers = ", ".join(_lines(self.result.metrics)) or self.result.status
        return f"<Score of {self.result.op}: {numbers}>"

    def __eq__(self, other: object) -> bool:
        """Compare with the snapshot, if ``other`` is syrupy's fixture, or with another score by value.

        Raises:
            QsensError: If the op has no score, the snapshot file cannot be used, or none of the gated metrics was
                measured.

        """
        if isinstance(other, SnapshotAssertion):
            return self._matches(other)
        if isinstance(other, Score):
            return self.result == other.result
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]  # the typing of a class that is unhashable on purpose

    def judge(self) -> Verdict:
        """Compare with the snapshot file as it is now; keeps the verdict.

        Raises:
            QsensError: If the op has no score, the file cannot be used, or none of the gated metrics was measured.

        """
        if self.result.status != "measured":
            reason = f" ({self.result.reason})" if self.result.reason else ""
            raise QsensError(f"{self.result.op} has no score to compare: it is {self.result.status}{reason}.")
        known = {metric for scores in self.result.metrics.values() for metric in scores}
        gated = list(dict.fromkeys(t.metric for mode in self.result.modes for t in applied(self.thresholds, mode)))
        if gated and not known.intersection(gated):
            raise QsensError(
                f"{self.result.op}: none of the gated metrics ({', '.join(gated)}) was measured. "
                f"Gate on some of {', '.join(sorted(known))}."
            )
        snapshot = load(self.path, model=self.model, scheme=self.scheme, granularity=self.granularity)
        recorded = snapshot.ops.get(self.result.op)
        # What is recorded under this name of another type of op says nothing about this one.
        self._recorded = recorded if recorded is not None and recorded.type == self.result.type else None
        other_data = on_other_data(snapshot.environment, self.evaluation)
        self._verdicts = {
            mode: self._bounded(mode, scores, other_data=other_data)
            if mode in self.estimated
            else judge(self._old.get(mode), scores, self.thresholds, mode, other_data=other_data)
            for mode, scores in self.result.modes.items()
        }
        limited = judge_limits(self.result, self.limits, estimated=self.estimated)
        self.verdict = combine([limited, *self._verdicts.values()])
        if recorded is not None and self._recorded is None:
            line = f"recorded as {recorded.type}, but it is {self.result.type}"
            self.verdict = replace(self.verdict, lines=(line, *self.verdict.lines))
        elif self.verdict.lines and recorded is not None and recorded.scheme != self.result.scheme:
            line = f"scheme {recorded.scheme} → {self.result.scheme}"
            self.verdict = replace(self.verdict, lines=(line, *self.verdict.lines))
        return self.verdict

    @property
    def _old(self) -> Mapping[Mode, Scores]:
        return {} if self._recorded is None else self._recorded.modes

    def _bounded(self, mode: Mode, scores: Scores, *, other_data: bool) -> Verdict:
        thresholds = [threshold for threshold in self.thresholds if threshold.metric in scores]
        label = f"{mode}, estimated to be at least:"
        found = judge(self._old.get(mode), scores, thresholds, label, other_data=other_data)
        compared = tuple(comparison._replace(mode=mode) for comparison in found.compared)
        return replace(found if found.kind == "regressed" else Verdict("ok"), compared=compared)

    def _matches(self, snapshot: SnapshotAssertion) -> bool:
        verdict = self.judge()
        updating = snapshot.update_snapshots, snapshot.update_new_snapshots_only
        if verdict.kind == "new" and not self.needs_snapshot and not any(updating):
            verdict = self.verdict = Verdict("ok")

        class Extension(ScoreExtension):
            score = self
            # An improvement passes as it is, and is recorded if updating is asked for.
            equal = verdict.kind == "ok" or (verdict.kind == "improved" and not snapshot.update_snapshots)
            recorded = None if verdict.kind == "new" else "\n".join(_lines(self._old))

        execution = snapshot.num_executions
        # On the fixture itself: a copy from `use_extension` would leave it without the execution that syrupy's
        # `pytest_assertrepr_compare` looks up. Extension and name hold for this comparison only.
        try:
            if verdict.kind == "exceeded":  # nothing accepts that
                snapshot.update_snapshots = snapshot.update_new_snapshots_only = False
            passed = _stock_eq(snapshot(extension_class=Extension, name=self.result.op), self)
        finally:
            snapshot.update_snapshots, snapshot.update_new_snapshots_only = updating
        outcome = snapshot.executions[execution]
        if outcome.exception is not None:
            raise outcome.exception
        self.accepted = self.accepted or outcome.created or outcome.updated
        return passed

    @property
    def entry(self) -> Entry | None:
        """What the snapshot file gets if the test passes; ``None`` if nothing was accepted."""
        if not self.accepted or self.estimated:
            return None
        return accepted(Entry.of(self.result), self._recorded, self._verdicts)

    def explain(self) -> list[str]:
        """Why the comparison failed, and the command that accepts the present scores."""
        verdict = self.verdict or self.judge()
        if verdict.kind == "exceeded":
            past = [f"{self.result.op} is past its limits", *(f"  {line}" for line in verdict.lines)]
            return [*past, "no update of the snapshot accepts that: quantize less, or give another limit"]
        headline = "no snapshot yet for" if verdict.kind == "new" else "worse than the snapshot of"
        lines = (f"  {line}" for line in verdict.lines)
        return [f"{headline} {self.result.op} in {self.path}", *lines, f"accept with: {self.accept}"]


def explain(op: str, left: object, right: object) -> list[str] | None:
    """Lines for `pytest_assertrepr_compare` when a `Score` is compared with syrupy's fixture; ``None`` otherwise."""
    if isinstance(left, Score) and isinstance(right, SnapshotAssertion) and op == "==":
        return left.explain()
    return None


class ScoreExtension(AbstractSyrupyExtension):
    """What syrupy asks for during one comparison. `Score` derives a class for each, as syrupy passes classes."""

    score: ClassVar[Score]
    equal: ClassVar[bool]
    recorded: ClassVar[str | None]

    def serialize(self, data: Score, **_: Any) -> str:  # noqa: ANN401  # syrupy's filters, which need an object's fields
        """Scores as the text that syrupy shows when nothing better explains a failure."""
        return "\n".join(_lines(data.result.metrics))

    def matches(self, **_: Any) -> bool:  # noqa: ANN401  # the serialized texts; the numbers were judged already
        """Whether the score passes as it is."""
        return self.equal

    @classmethod
    def get_location(cls, **_: Any) -> str:  # noqa: ANN401  # the test's place, which the file does not depend on
        """Path of the snapshot file."""
        return str(cls.score.path)

    @classmethod
    def get_snapshot_name(cls, **_: Any) -> str:  # noqa: ANN401  # the test, which the name does not depend on
        """Name of the op."""
        return cls.score.result.op

    def read_snapshot_data_from_location(self, **_: Any) -> str | None:  # noqa: ANN401  # the place, which is the score's
        """Give the recorded scores as text, or ``None`` if there is something to record that was not there."""
        return self.recorded

    def read_snapshot_collection(self, *, snapshot_location: str) -> SnapshotCollection:
        """Nothing that syrupy could find unused."""
        return SnapshotCollection(location=snapshot_location)

    def discover_snapshots(self, **_: Any) -> SnapshotCollections:  # noqa: ANN401  # the test's place, see above
        """Nothing that syrupy could find unused."""
        return SnapshotCollections()

    def delete_snapshots(self, *, snapshot_location: str, snapshot_names: set[str]) -> None:
        """Nothing: removing lines is explicit (`pytest_qsens.snapshot.prune`)."""

    @classmethod
    def write_snapshot(cls, **_: Any) -> None:  # noqa: ANN401  # what would be written
        """Nothing: the controller records what was accepted, after the run.

        syrupy calls this method final; its own one creates the directory, in every worker.
        """

    @classmethod
    def write_snapshot_collection(cls, **_: Any) -> None:  # noqa: ANN401  # what would be written
        """Nothing, as `write_snapshot`."""


def _lines(modes: Mapping[Mode, Scores]) -> list[str]:
    return [
        f"{mode} {metric} {score_text(value, 6)}"
        for mode, scores in modes.items()
        for metric, value in sorted(scores.items())
    ]


class _RefuseAmber(AmberDataSerializerPlugin):
    """Stops scores inside of other data, which syrupy would write into a file of its own."""

    @classmethod
    def is_data_serializable(cls, data: object) -> bool:
        return isinstance(data, Score)

    @classmethod
    def serialize(cls, data: object, **_: Any) -> NoReturn:  # noqa: ANN401  # syrupy's filters
        raise QsensError(f"{data!r}: {WRONG_WAY_ROUND}")


_stock_eq = SnapshotAssertion.__eq__


@wraps(_stock_eq)
def _eq(snapshot: SnapshotAssertion, other: object) -> bool:
    """Stop ``snapshot == score``, which Python gives to syrupy's fixture, not to `Score`.

    Whatever its extension made of the score, an update would accept it without a gate. There is no hook before the
    serializer, and a user's own serializer takes no plugins.
    """
    if isinstance(other, Score):
        raise QsensError(f"{other!r}: {WRONG_WAY_ROUND}")
    return _stock_eq(snapshot, other)


SnapshotAssertion.__eq__ = _eq  # type: ignore[method-assign]  # see there


def _refuse_amber() -> None:
    plugins = AmberDataSerializer.serializer_plugins or ()
    if _RefuseAmber not in plugins:
        AmberDataSerializer.serializer_plugins = (*plugins, _RefuseAmber)
