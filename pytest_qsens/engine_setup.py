"""The way from a model to an engine: what is found out once, by this process or another, and what is made of it."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from pytest_qsens import profile
from pytest_qsens.engines.availability import KERNEL_ENGINES
from pytest_qsens.engines.delta import DeltaEngine
from pytest_qsens.engines.eager import EagerEngine
from pytest_qsens.engines.probe import ProbeEngine
from pytest_qsens.engines.replay import ReplayEngine, clean_share
from pytest_qsens.errors import QsensError
from pytest_qsens.ops import WEIGHTLESS, Op
from pytest_qsens.preparation import placed, prepare, put_together, taken_apart
from pytest_qsens.quant.calibration import Calibration
from pytest_qsens.quant.simulate import Simulator
from pytest_qsens.samples import Rows, rows_of
from pytest_qsens.sketches import Sketcher, make_sketchers
from pytest_qsens.threads import threads_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from torch import Tensor, nn

    from pytest_qsens.artifact import Artifact
    from pytest_qsens.engines import Engine, Unit
    from pytest_qsens.engines.fx import FxEngine
    from pytest_qsens.engines.inc import IncEngine
    from pytest_qsens.engines.replay import Captured
    from pytest_qsens.models.spec import ModelSpec
    from pytest_qsens.preparation import Prepared
    from pytest_qsens.quant.assignment import Assignment


class Built(NamedTuple):
    """An engine, and what its scores are put together with."""

    engine: Engine
    simulator: Simulator
    rows: Sequence[Rows]
    sketchers: Sequence[Sketcher | None]


class Setup:
    """Arguments are as for `pytest_qsens.calibrated.calibrate`; the model is on the device and in evaluation mode."""

    def __init__(
        self,
        model: nn.Module,
        spec: ModelSpec,
        ops: Sequence[Op],
        assignment: Assignment,
        engine: str,
        device: str,
        memory: int,
        expected: Collection[Op] | None,
        *,
        logits: bool,
        strata: int | None,
        interactions: bool,
    ) -> None:
        self._assignment = assignment
        self._strata = strata
        self._interactions = interactions
        self.logits = logits
        self._engine = engine
        self.captures = engine not in (*KERNEL_ENGINES, "eager")
        self._model = model
        self._spec = spec
        self._ops = ops
        self._states = [op.name for op in ops if op.type in WEIGHTLESS]
        self._expected = expected
        self._batches = [placed(batch, device) for batch in spec.evaluation]
        self._calibrating = [placed(batch, device) for batch in spec.calibration]
        self._memory = memory
        self._share = clean_share(memory, len(self._batches))

    def find_out(self) -> Prepared:
        """Run calibration, reference and capture."""
        return prepare(
            self._model,
            self._spec,
            self._batches,
            self._calibrating,
            Calibration(self._assignment.schemes, ranges=self._engine not in KERNEL_ENGINES, states=self._states),
            self._share if self.captures else None,
        )

    def shared(self, artifact: Artifact, workers: int) -> tuple[Prepared, Built]:
        """Take what another process found out, or find it out and leave it to others."""
        prepared = self._restored(artifact)
        if prepared is not None:
            return prepared, self.build(prepared)
        with ExitStack() as held:
            try:
                with profile.phase("waiting"):
                    held.enter_context(artifact.locked())
            except QsensError:  # a cache that cannot be written costs time only
                prepared = self.find_out()
                return prepared, self.build(prepared)
            prepared = self._restored(artifact)  # the process that had the lock may have made it
            if prepared is not None:
                return prepared, self.build(prepared)
            with threads_of(workers):
                prepared = self.find_out()
                built = self.build(prepared)
                if isinstance(built.engine, DeltaEngine) and not isinstance(built.engine, ProbeEngine):
                    built.engine.check()  # estimates can do without
            verdict = built.engine.verdict if isinstance(built.engine, DeltaEngine) else None
            content = taken_apart(prepared, self._model, self._calibrating, verdict)
            if content is not None:
                with suppress(OSError, QsensError):  # a full disk costs the others time
                    artifact.write(content)
            return prepared, built

    def _restored(self, artifact: Artifact) -> Prepared | None:
        content = artifact.read()
        if content is None:
            return None
        with profile.phase("capture"):
            schemes = self._assignment.schemes
            return put_together(content, self._model, self._batches, self._calibrating, schemes, self._share)

    def build(self, prepared: Prepared) -> Built:
        """Make the engine.

        Raises:
            QsensError: If one is asked for that cannot be.

        """
        able = prepared.calibration.reached - prepared.calibration.refused.keys()
        quantizable = [op.name for op in self._ops if op.name in able and self._assignment.refusal(op) is None]
        simulator = Simulator(self._assignment.schemes, prepared.calibration)
        if prepared.captured is None:
            engine = self._forward_engine(prepared, quantizable, simulator)
            return Built(
                engine, simulator, self._rows(engine.references), self._sketchers(r.shape for r in engine.references)
            )
        rows = self._rows(run.output for run, _ in prepared.captured)
        found = self._sketchers(run.output.shape for run, _ in prepared.captured)
        engine = self._replaying(prepared, prepared.captured, quantizable, simulator, rows, found)
        return Built(engine, simulator, rows, found)

    def _sketchers(self, shapes: Iterable[Sequence[int]]) -> Sequence[Sketcher | None]:
        listed = [*shapes]
        return [*make_sketchers(listed)] if self._interactions else [None] * len(listed)

    def _rows(self, references: Iterable[Tensor]) -> list[Rows]:
        pairs = zip(self._batches, references, strict=True)
        return [rows_of(batch, reference, self._spec.rows) for batch, reference in pairs]

    def _forward_engine(self, prepared: Prepared, quantizable: list[str], simulator: Simulator) -> Engine:
        if self._engine in KERNEL_ENGINES:
            with profile.phase("calibration"):
                made = _kernel_engine(self._engine)
                return made(self._model, self._batches, self._spec.output, quantizable, self._calibrating)
        if self._engine in ("delta", "probe", "replay"):
            raise QsensError(
                f"engine {self._engine} cannot be used, {prepared.refusal}. Use the eager engine, or auto."
            )
        with profile.phase("capture"):
            batches, output = self._batches, self._spec.output
            added = self._assignment.added
            return EagerEngine(self._model, batches, output, simulator, quantizable, added, self._states)

    def _replaying(
        self,
        prepared: Prepared,
        captured: Sequence[Captured],
        quantizable: list[str],
        simulator: Simulator,
        rows: Sequence[Rows],
        sketchers: Sequence[Sketcher | None],
    ) -> Engine:
        with profile.phase("capture"):
            if self._engine == "replay":
                return ReplayEngine(captured, simulator, quantizable, self._memory, self._assignment.added)
            probe, delta = partial(ProbeEngine, strata=self._strata), partial(DeltaEngine, added=self._assignment.added)
            made = probe if self._engine == "probe" else delta
            return made(
                captured,
                simulator,
                quantizable,
                self._memory,
                self._units(quantizable) or [(op,) for op in quantizable],
                prepared.verdict,
                logits=self.logits,
                rows=rows,
                sketchers=sketchers,
            )

    def _units(self, quantizable: Sequence[str]) -> list[Unit]:
        """List what is going to be scored, in the order of the model; what spans several blocks comes last."""
        places = {name: place for place, name in enumerate(quantizable)}
        units = []
        for op in self._ops if self._expected is None else self._expected:
            able = (member for member in op.ops if member.name in places)  # not the whole model, which is no op
            unit = tuple(member.name for member in able if self._assignment.refusal(member, op) is None)
            units += [(op.spans_blocks, places[unit[0]], unit)] if unit else []
        return [unit for *_, unit in sorted(units)]


def _kernel_engine(name: str) -> type[FxEngine | IncEngine]:
    if name == "inc":
        from pytest_qsens.engines.inc import IncEngine

        return IncEngine
    from pytest_qsens.engines.fx import FxEngine

    return FxEngine
