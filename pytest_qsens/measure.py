"""The calibrated model of this process, and what it has measured."""

from __future__ import annotations

import gc
import traceback
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING

import pytest

from pytest_qsens import profile
from pytest_qsens.collection.plan import expected
from pytest_qsens.environment import environment
from pytest_qsens.errors import QsensError
from pytest_qsens.given_options import base_options
from pytest_qsens.known_scores import KnownScores, Measured
from pytest_qsens.memory import parse_memory
from pytest_qsens.model_caches import artifact_of, identity_of, look, open_cache
from pytest_qsens.ops import TOTAL, Op
from pytest_qsens.profile import Profiler
from pytest_qsens.refinement import owners
from pytest_qsens.refining import Refined, TooShort, Work, forwards, refine
from pytest_qsens.result_payloads import to_payload
from pytest_qsens.results import LEFT_OUT, OpResult, joined
from pytest_qsens.snapshot import EVALUATION
from pytest_qsens.time_budget import LATE, left
from pytest_qsens.workers import SHARE, limit_threads, workers_here

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from pytest_qsens.artifact import Artifact
    from pytest_qsens.calibrated import CalibratedModel
    from pytest_qsens.collection.model import Model
    from pytest_qsens.options import Options, RunSpec
    from pytest_qsens.result_cache import Part
    from pytest_qsens.results import Mode, Payload

_BENCH = pytest.StashKey["Bench"]()

_DIED = f"{LEFT_OUT}its worker died"


class RunAborted(Exception):  # noqa: N818  # not an error of the test that meets it: the whole run cannot go on
    """The model cannot be measured at all; carries the message of the `QsensError` behind it."""


class BudgetTooShort(RunAborted):
    """The time budget ends before there is an estimate of all ops."""


class Bench:
    """What this process measures; what an earlier run has measured, and kept in the cache, is taken from there.

    Unless all that the collected tests need is there, the model is loaded before the first score is given, so that
    what the cache says is known to be of that very model. The most recently used calibrated model is kept alive, and
    no other: one may fill the memory. A model that failed to load or calibrate is not tried again.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._spec: RunSpec | None = None
        self._calibrated: CalibratedModel | None = None
        self._artifact: Path | None = None
        self._loaded: str | None = None
        """What the checkpoint of the calibrated model looked like."""
        self._facts: Payload = {}
        self._scores: dict[RunSpec, KnownScores] = {}
        self._aborted: dict[RunSpec, str] = {}
        self._described: set[tuple[RunSpec, str, str, str, str, bool]] = set()
        self._refined: dict[RunSpec, Refined] = {}
        self._profilers: dict[tuple[str, str], Profiler] = {}
        self._told: dict[Profiler, float | None] = {}
        self._warnings: list[str] = []

    def calibrated(self, spec: RunSpec, model: Model) -> CalibratedModel:
        """Load and calibrate, or return what is there.

        Raises:
            RunAborted: If the model cannot be loaded, calibrated or run.

        """
        if spec in self._aborted:
            raise RunAborted(self._aborted[spec])
        if self._calibrated is None or spec != self._spec:
            scores = self._known(spec, model)
            self._spec, self._calibrated = spec, None
            gc.collect()  # the old model holds reference cycles (hooks, graphs); two models may not fit
            try:
                with profile.running(self._profiler(spec, model)), profile.phase("load"):
                    limit_threads(self._config)
                    artifact = artifact_of(base_options(self._config), spec, model, scores.seen)
                    self._artifact = None if artifact is None else artifact.entry
                    calibrated = _calibrate(spec, model, scores.missing(), workers_here(self._config), artifact)
                    self._facts = _facts(spec, calibrated)
            except Exception as error:  # whatever it is, the next op would meet it again
                self._aborted[spec] = _described(error)
                raise RunAborted(self._aborted[spec]) from error
            self._calibrated = calibrated
            self._loaded = identity_of(model)
            told = scores.loaded(calibrated.reference_digest)
            self._warnings += [] if told is None else [f"{model.label}: {told}"]
        return self._calibrated

    def release(self) -> None:
        """Let go of the calibrated model; it is loaded again if it is needed."""
        self._spec, self._calibrated = None, None
        gc.collect()

    def score(self, spec: RunSpec, model: Model, op: Op, modes: Sequence[Mode]) -> Measured:
        """Tell what is known of one op, measured once however many tests ask for it.

        Of an op that is added to a config, the score of mode ``fallback`` is that of mode ``added``.
        """
        assignment = model.assigned.assignment
        found = [self._part(spec, model, op, mode) for mode in assignment.modes_of(op, modes)]
        spent = [part.spent for part in found if part.spent is not None]
        result = joined([part.result for part in found])
        if spec.config is not None:
            result = replace(result, scheme=assignment.name_of(op))
        return Measured(result, sum(spent) if spent else None)

    def total(self, spec: RunSpec, model: Model) -> Measured:
        """Tell what is known of the whole model, everything quantized at once."""
        found = self._part(spec, model, Op(TOTAL, TOTAL), "total")
        if spec.config is None:
            return found
        return replace(found, result=replace(found.result, scheme=model.assigned.assignment.name))

    def _part(self, spec: RunSpec, model: Model, op: Op, part: Part) -> Measured:
        scores = self._known(spec, model)
        if not scores.sure:
            self.calibrated(spec, model)
        if base_options(self._config).refined:
            return self._refined_part(spec, model, op, part)
        found = scores.get(op, part)
        if found is None:
            calibrated = self.calibrated(spec, model)
            result = calibrated.total() if part == "total" else calibrated.score(op, (part,))
            self._check_unchanged(spec, model)
            found = scores.add(op, part, result, self._facts_of(calibrated), spec.scheme)
            if part != "total":
                self._keep_others(spec, model, op, part)
        return found

    def _refined_part(self, spec: RunSpec, model: Model, op: Op, part: Part) -> Measured:
        """Tell what is known once there is no time or need to measure more: an exact score, or an estimate."""
        scores = self._known(spec, model)
        if scores.missing() and spec not in self._refined:
            self._refined[spec] = self._refine(spec, model)
        refined = self._refined.get(spec)
        known = scores.get(op, part)
        if refined is None:
            assert known is not None  # noqa: S101 - nothing is missing
            return known
        found = refined.fresh.pop((op, part), known)
        if found is None:
            estimate = None
            if refined.estimates and part != "total":
                estimate = self.calibrated(spec, model).estimated(op, part)
            without = OpResult(op.name, op.type, op.block, "unrun")
            result = estimate or without
            if result.status in ("estimated", "unrun"):
                result = replace(result, reason=refined.why if op.name in refined.own else _DIED)
            else:
                scores.add(op, part, result, self._facts_of(self.calibrated(spec, model)), spec.scheme)
            found = Measured(result, 0.0)
        return refined.charge(found)

    def _refine(self, spec: RunSpec, model: Model) -> Refined:
        """Estimate all ops, then measure those that matter most, of those that are this process's."""
        calibrated, scores = self.calibrated(spec, model), self._known(spec, model)
        options = base_options(self._config)

        def measure(op: Op, part: Part) -> OpResult:
            result = calibrated.total() if part == "total" else calibrated.score(op, (part,))
            self._check_unchanged(spec, model)
            fresh[op, part] = scores.add(op, part, result, self._facts_of(calibrated), spec.scheme)
            return result

        fresh: dict[tuple[Op, Part], Measured] = {}
        wanted = expected(self._config, model.label, spec.scheme).parts
        index, count = getattr(self._config, "workerinput", {}).get(SHARE, (0, 1))
        work = Work(
            parts=wanted,
            own={op for op, turn in owners((op.name for op in wanted), count).items() if turn == index},
            known=scores.get,
            costs=forwards(
                model.ops, spec.engine, {part for parts in wanted.values() for part in parts if part != "total"}
            ),
            left=partial(left, self._config, options),
            processes=count,
        )
        late = getattr(self._config, "workerinput", {}).get(LATE)
        if late:  # what killed the other one may be among what it would measure
            work = work._replace(own=())
        try:
            why, seconds = refine(calibrated, work, measure, options)
        except TooShort as error:
            if not late and not self._refined:
                raise BudgetTooShort(str(error)) from error
            why, seconds = f"{LEFT_OUT}the time budget of {options.time_budget} ended", 0.0
            return Refined(_DIED if late else why, seconds, frozenset(), fresh, estimates=False)
        return Refined(why, seconds, work.own, fresh)

    def _check_unchanged(self, spec: RunSpec, model: Model) -> None:
        """See that the checkpoint is the one that was loaded: its weights may lie in mapped files.

        Raises:
            RunAborted: If it has been written to, or is gone.

        """
        if identity_of(model) != self._loaded:
            self._calibrated = None
            self._aborted[spec] = (
                f"the files of model {model.label} have changed while it was measured: scores may be of a mixture. "
                "Measure again when they are complete."
            )
            raise RunAborted(self._aborted[spec])

    def _keep_others(self, spec: RunSpec, model: Model, measured: Op, mode: Mode) -> None:
        """Keep what was measured together with an op at once: this process may not live to be asked for it."""
        scores, calibrated = self._known(spec, model), self.calibrated(spec, model)
        wanted = expected(self._config, model.label, spec.scheme).parts
        others = (op for op in dict.fromkeys((*model.ops, *wanted)) if op.name != TOTAL)
        assignment = model.assigned.assignment
        for op in calibrated.measured_with(measured, mode, others):
            (its_mode,) = assignment.modes_of(op, ["isolated" if mode == "isolated" else "fallback"])
            if scores.get(op, its_mode) is None:
                result = calibrated.score(op, (its_mode,))
                scores.add(op, its_mode, result, self._facts_of(calibrated), spec.scheme)

    def _known(self, spec: RunSpec, model: Model) -> KnownScores:
        if spec not in self._scores:
            options = base_options(self._config)
            self._scores[spec] = KnownScores(
                expected(self._config, model.label, spec.scheme),
                partial(look, options, model),
                partial(open_cache, options, spec, model),
            )
        return self._scores[spec]

    def _facts_of(self, calibrated: CalibratedModel) -> Payload:
        return self._facts | {"engine": calibrated.engine, "engine_reason": calibrated.engine_reason}

    def warnings(self) -> list[str]:
        """Return what has to be told about the cache, since this was asked last."""
        found, self._warnings = self._warnings, []
        for scores in self._scores.values():
            if scores.cache is not None and scores.cache.problem is not None:
                found.append(f"scores could not be cached: {scores.cache.problem}")
                scores.cache.problem = None
        return found

    def profiles(self) -> list[Payload]:
        """Where the time of this process went so far, for each model that was measured since this was asked last."""
        found: list[Payload] = []
        for (model, scheme), profiler in self._profilers.items():
            if profiler.last != self._told.get(profiler):
                self._told[profiler] = profiler.last
                process = getattr(self._config, "workerinput", {}).get("workerid", "")
                found.append(
                    {"model": model, "scheme": scheme, "process": process, "profile": asdict(profiler.profile())}
                )
        return found

    def _profiler(self, spec: RunSpec, model: Model) -> Profiler | None:
        if not base_options(self._config).profile:
            return None
        return self._profilers.setdefault((model.label, spec.scheme), Profiler())

    def describe(self, options: Options, model: Model) -> Payload | None:
        """Facts about the model of these options, builtin values only; once for each process.

        Again when it is loaded after scores that were cached, and where it comes out different when loaded again.
        """
        spec = options.run_spec
        scores = self._scores[spec]
        loaded = self._calibrated is not None and spec == self._spec
        facts = self._facts_of(self._calibrated) if self._calibrated is not None and loaded else scores.facts
        if facts is None:
            return None
        key = spec, options.granularity, options.mode, facts["reference"], facts["engine"], loaded
        if key in self._described:
            return None
        self._described.add(key)
        data = model.source.data_fingerprint()
        known = (("data", data), (EVALUATION, model.evaluation))
        return facts | {
            "model": model.label,
            "scheme": options.label,
            "granularity": options.granularity,
            "mode": options.mode,
            "machine": getattr(self._config, "workerinput", {}).get("qsens_machine", ""),
            "data": data,
            "weights": model.source.weights_digest(),
            "environment": facts["environment"] | {name: value for name, value in known if value},
            "loaded": loaded,
            "used": [str(path) for path in (scores.cache and scores.cache.path, loaded and self._artifact) if path],
        }


def _facts(spec: RunSpec, calibrated: CalibratedModel) -> Payload:
    """Tell about a calibrated model what is told beside its scores, in builtin values."""
    return {
        "engine": calibrated.engine,
        "engine_reason": calibrated.engine_reason,
        "reference_seconds": float(calibrated.reference_seconds),
        "reference": calibrated.reference_digest,
        "environment": environment(spec.device, spec.engine),
        "functional": [to_payload(result) for result in calibrated.functional_ops],
        "warnings": calibrated.unlisted_attention,
    }


def _described(error: Exception) -> str:
    if isinstance(error, QsensError):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"the model cannot be measured: {type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"


def bench(config: pytest.Config) -> Bench:
    """Return the bench of this process."""
    if _BENCH not in config.stash:
        config.stash[_BENCH] = Bench(config)
    return config.stash[_BENCH]


def _calibrate(
    spec: RunSpec, model: Model, ops: Collection[Op], workers: int, artifact: Artifact | None
) -> CalibratedModel:
    import torch

    from pytest_qsens.calibrated import calibrate
    from pytest_qsens.threads import reproducible_sums

    reproducible_sums()  # before what the model computes while it is made
    try:
        torch.empty(0, device=spec.device)
    except (RuntimeError, AssertionError) as error:  # torch asserts for a backend it was built without
        raise QsensError(f"device {spec.device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return calibrate(
        model.source.load(),
        model.ops,
        model.assigned.assignment,
        engine=spec.engine,
        device=spec.device,
        divergence=spec.divergence,
        expected=ops,
        memory=None if spec.memory is None else parse_memory(spec.memory, "memory"),
        workers=max(1, workers),
        artifact=artifact,
        representatives=spec.representatives,
        interactions=spec.interactions,
    )
