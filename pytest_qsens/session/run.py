"""What the reports of one model and scheme have told: results, verdicts, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pytest_qsens.op_results import without_score
from pytest_qsens.ops import TOTAL, Op

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_qsens.profile import Profile
    from pytest_qsens.results import OpResult, Payload
    from pytest_qsens.run_verdicts import RunVerdict
    from pytest_qsens.snapshot import Entry, Snapshot
    from pytest_qsens.thresholds import Verdict


@dataclass
class Run:
    """What the reports of one (model, scheme, granularity) have told so far."""

    model: str
    scheme: str
    path: Path
    ops: tuple[Op, ...] = ()
    """Of the model; groups of them, where these are measured as one."""
    elsewhere: frozenset[str] = frozenset()
    """Ops that other shards measure, and `TOTAL` if one of them does."""
    facts: list[Payload] = field(default_factory=list)
    profiles: dict[str, Payload] = field(default_factory=dict)
    """Process → where its time went so far."""
    results: dict[str, OpResult] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    compared: dict[str, Entry] = field(default_factory=dict)
    """All scores of ops that the snapshot may have as they are: accepted, better, or within their thresholds."""
    mismatch: list[str] = field(default_factory=list)
    """How the environment of the snapshot differs from that of this run."""
    gone: list[str] = field(default_factory=list)
    """Lines of the snapshot that are of no op of the model."""
    lost: set[str] = field(default_factory=set)
    """Ops whose worker died."""
    failing: set[str] = field(default_factory=set)
    """Ops with a failed test."""
    recorded: Snapshot | None = None
    """The snapshot before it was updated, if there is going to be a report."""
    ranks: list[RunVerdict] = field(default_factory=list)
    """What gates of the order of ops found, once all ops are through."""
    joint: list[RunVerdict] = field(default_factory=list)
    """What gates of interactions found, likewise."""
    spent: dict[str, float] = field(default_factory=dict)
    """Op → seconds that this run took for it; those that came from the cache are not there."""
    granularity: str = "op"
    config: Payload | None = None
    """What a config says: see `pytest_qsens.collection.plan.plan`."""
    moved: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Op → its scheme in the snapshot and now, where they differ."""
    pruned: bool = False
    """Whether lines are removed of ops that have no score any more."""

    @property
    def engines(self) -> list[str]:
        """Engines in use: one, unless workers or modes differ."""
        return sorted({name for facts in self.facts for name in facts["engine"].split("+")})

    @property
    def engine_reason(self) -> str | None:
        """Why another engine than the usual one was used."""
        return next((facts["engine_reason"] for facts in self.facts if facts["engine_reason"]), None)

    @property
    def environments(self) -> list[dict[str, str]]:
        """Where scores were measured: one place, unless workers differ."""
        return [dict(items) for items in sorted({tuple(sorted(facts["environment"].items())) for facts in self.facts})]

    @property
    def environment(self) -> dict[str, str]:
        """Where scores were measured; of several different places the same one whatever the order of reports."""
        return next(iter(self.environments), {})

    @property
    def contradictory(self) -> bool:
        """Whether the unquantized outputs differ between processes of one machine."""
        found = {(facts["machine"], facts["reference"]) for facts in self.facts}
        return len({place for place, _ in found}) < len(found)

    @property
    def data(self) -> str | None:
        """Short hash of the batches."""
        return next((facts["data"] for facts in self.facts), None)

    @property
    def reference(self) -> str | None:
        """Hash of the unquantized outputs' bits; of machines that round differently, all of them."""
        return "+".join(sorted({facts["reference"] for facts in self.facts})) or None

    @property
    def checkpoint(self) -> str | None:
        """Short hash of the weights' files, if there are any."""
        return next((facts["weights"] for facts in self.facts), None)

    @property
    def mode(self) -> str:
        """``isolated``, ``fallback`` or ``both``."""
        modes = {facts["mode"] for facts in self.facts}
        return modes.pop() if len(modes) == 1 else "both"

    @property
    def profile(self) -> Profile | None:
        """Where the time of all processes went, if that was asked for."""
        from pytest_qsens.profile import total
        from pytest_qsens.result_files import read_profile

        found = [read_profile(payload, f"profile of {process}") for process, payload in self.profiles.items()]
        return total(found) if found else None

    @property
    def functional(self) -> list[OpResult]:
        """Functional ops, which have no tests."""
        from pytest_qsens.result_payloads import from_payload

        return [from_payload(payload) for facts in self.facts[:1] for payload in facts["functional"]]

    @property
    def total(self) -> OpResult | None:
        """Result of the whole model."""
        return self.results.get(TOTAL)

    @property
    def measured(self) -> list[OpResult]:
        """Measured ops, in the order in which they came in."""
        return [result for op, result in self.results.items() if op != TOTAL and result.status == "measured"]

    @property
    def estimated(self) -> list[OpResult]:
        """Ops of which there are estimates, in the order in which they came in."""
        return [result for op, result in self.results.items() if op != TOTAL and result.status == "estimated"]

    @property
    def reference_seconds(self) -> float | None:
        """Seconds of one unquantized forward, the fastest of all workers; of an earlier run, if this one made none."""
        fresh = [facts for facts in self.facts if facts["loaded"]]
        return min((facts["reference_seconds"] for facts in fresh or self.facts), default=None)

    @property
    def forwards_per_op(self) -> float | None:
        """Mean time of an op that this run has measured or estimated, in units of a reference forward."""
        spent = [self.spent[result.op] for result in (*self.measured, *self.estimated) if result.op in self.spent]
        if not spent or not self.reference_seconds:
            return None
        return sum(spent) / len(spent) / self.reference_seconds

    @property
    def forwards(self) -> float | None:
        """Time of all ops that this run has measured or estimated, in units of a reference forward."""
        spent = [seconds for op, seconds in self.spent.items() if op != TOTAL]
        return sum(spent) / self.reference_seconds if spent and self.reference_seconds else None

    @property
    def cached(self) -> list[OpResult]:
        """Ops whose scores came from the cache alone."""
        return [
            result
            for op, result in self.results.items()
            if op != TOTAL and op not in self.spent and op not in self.lost
        ]

    def add(self, payload: Payload, *, passed: bool) -> None:
        """Take one result; the same op may be reported by several tests."""
        from pytest_qsens.result_payloads import from_payload
        from pytest_qsens.snapshot import Entry, union
        from pytest_qsens.thresholds import Comparison, Verdict, combine

        result = from_payload(payload["result"])
        if result.op in self.lost:
            return
        self.results[result.op] = _joined(self.results.get(result.op), result)
        if payload["spent"] is not None:
            self.spent[result.op] = self.spent.get(result.op, 0.0) + payload["spent"]
        if payload["verdict"]:
            compared = tuple(Comparison(*comparison) for comparison in payload["compared"])
            verdict = Verdict(payload["verdict"], tuple(payload["lines"]), tuple(payload["within_noise"]), compared)
            known = self.verdicts.get(result.op)
            self.verdicts[result.op] = combine([known, verdict]) if known else verdict
        if payload["entry"] and passed:
            self.entries = union(self.entries, {result.op: Entry.from_payload(payload["entry"])})
        if passed and result.status == "measured" and (payload["entry"] or payload["verdict"] in ("ok", "improved")):
            self.compared = union(self.compared, {result.op: Entry.of(result)})

    def crashed(self, name: str, reason: str) -> None:
        """Note an op whose worker died during its test. Nothing counts that was, or will be, reported of it.

        xdist fails the test even if the worker died in its teardown, when the score had come in as passed.
        """
        op = next((op for op in self.ops if op.name == name), Op(TOTAL, TOTAL) if name == TOTAL else None)
        if op is not None:
            self.lost.add(name)
            self.failing.add(name)
            self.results[name] = without_score(op, "failed", reason=reason)
            self.verdicts.pop(name, None)
            self.entries.pop(name, None)
            self.compared.pop(name, None)

    def listed(self, reason: Callable[[Op], str]) -> tuple[OpResult, ...]:
        """One result for every op of the model, in model order, then the functional ones."""
        named = ((op, self.results.get(op.name) or self._not_run(op, reason)) for op in self.ops)
        return (*(replace(result, weights=op.weights) for op, result in named), *self.functional)

    def _not_run(self, op: Op, reason: Callable[[Op], str]) -> OpResult:
        if op.name in self.unquantized:
            from pytest_qsens.configs.gate import UNQUANTIZED

            found = without_score(op, "unquantized", reason=UNQUANTIZED)
        else:
            found = without_score(op, "unrun", reason=reason(op))
        return replace(found, scheme=self.schemes.get(op.name))

    @property
    def schemes(self) -> dict[str, str]:
        """Op, group or `TOTAL` → name of its scheme, where a config is measured."""
        return self.config["schemes"] if self.config else {}

    @property
    def unquantized(self) -> frozenset[str]:
        """Ops or groups that the config leaves as they are: they have no tests."""
        return frozenset(self.config["unquantized"] if self.config else ())


def _joined(old: OpResult | None, new: OpResult) -> OpResult:
    """Join two reports of one op: a measurement counts more than none, and modes add up."""
    if old is None or old.status != "measured" or new.status == "estimated":
        return new
    modes = {mode: getattr(old, mode) or getattr(new, mode) for mode in ("isolated", "fallback", "added")}
    return replace(old, **modes, sketch=old.sketch or new.sketch)
