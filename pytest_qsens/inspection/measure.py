"""An op's score under several ways to quantize it, by runs of the whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.engines.eager import EagerEngine
from pytest_qsens.errors import first_line
from pytest_qsens.graph.calls import filled, finite_rows, token_major, unquantized
from pytest_qsens.inspection.found import Flip
from pytest_qsens.inspection.positions import has_pixels, real_rows, row_energies, row_errors, sites_of, whole_shape
from pytest_qsens.metrics import Score, energies
from pytest_qsens.quant.simulate import Simulator
from pytest_qsens.reference import NOT_FINITE
from pytest_qsens.samples import rows_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from torch import Tensor, nn

    from pytest_qsens.graph.calls import Call
    from pytest_qsens.inspection.positions import Located
    from pytest_qsens.models.spec import Batch, ModelSpec
    from pytest_qsens.quant.calibration import Calibration
    from pytest_qsens.quant.schemes import Schemes
    from pytest_qsens.results import Mode, Scores

    Flipped = Callable[[Call], Tensor]
    """What an op gives for a call when it is quantized in some way: fp32, of the unquantized output's shape."""


class Switch(Simulator):
    """Quantizes every op as its scheme says, but one of them as it is told to, and sums up that one's own error.

    Attributes:
        batch: Number of the evaluation batch that runs, from 1.
        located: Gets the error of the op's own output by place, if that is wanted.

    """

    def __init__(self, op: str, schemes: Schemes, calibration: Calibration, batches: Sequence[Batch]) -> None:
        super().__init__(schemes, calibration)
        self._op = op
        self._batches = batches
        self.batch = 0
        self.located: Located | None = None
        self.flip(unquantized)

    def flip(self, flipped: Flipped, located: Located | None = None) -> None:
        """Quantize the op in this way from now on."""
        self._flipped = flipped
        self.located = located
        self._sse = self._energy = 0.0

    @property
    def nmse(self) -> float | None:
        """Error of the op's own output so far, relative to it; padding and rows that are not finite are left out."""
        return self._sse / self._energy if self._energy else None

    def output(self, op: str, call: Call) -> Tensor:
        """Return what an op gives; see `pytest_qsens.quant.simulate.Simulator.output`."""
        if op != self._op:
            return super().output(op, call)
        exact, found = unquantized(call), self._flipped(call)
        if not exact.numel():
            return found
        finite = None if call.kind == "embedding" else finite_rows(exact, call.kind)
        left, right = (token_major(filled(values, finite, 0), call.kind) for values in (exact, found))
        batch = self._batches[self.batch - 1]
        sites = sites_of(whole_shape(call.kind, left.shape), batch, flat=not has_pixels(batch))
        errors, sizes = row_errors(left, right, sites.rows), row_energies(left, sites.rows)
        real = real_rows(sites)
        self._sse += float(errors[real].sum())
        self._energy += float(sizes[real].sum())
        if self.located is not None:
            self.located.add(self.batch, sites, errors, sizes)
        return found


class Meter:
    """Measures one op's flips at the model's output.

    Args:
        model: On the CPU, in evaluation mode.
        spec: What else is known of it.
        batches: For evaluation, placed.
        op: Name of the op.
        switch: Quantizes the ops.
        mode: ``isolated``: the other ops are unquantized; else they are quantized.
        quantizable: Ops that are quantized in mode ``fallback``.
        states: Keys and values, and queries, that a scheme is of.

    Attributes:
        forwards: Runs of all evaluation batches so far.
        base: NMSE with the op unquantized.

    Raises:
        QsensError: If two runs of the unquantized model differ.

    """

    def __init__(
        self,
        model: nn.Module,
        spec: ModelSpec,
        batches: Sequence[Batch],
        op: str,
        switch: Switch,
        mode: Mode,
        quantizable: Collection[str],
        states: Collection[str],
    ) -> None:
        self._spec = spec
        self._batches = batches
        self._op = op
        self._switch = switch
        self._isolated = mode == "isolated"
        self._engine = EagerEngine(model, batches, spec.output, switch, quantizable, states=states)
        self.exercised = self._engine.exercised
        self.out_of_reach = self._engine.out_of_reach
        self._rows = [rows_of(b, r, spec.rows) for b, r in zip(batches, self._engine.references, strict=True)]
        sizes = [energies(r, rows) for r, rows in zip(self._engine.references, self._rows, strict=True)]
        self._energy = sum(size.whole for size in sizes)
        self._energies = [value for size in sizes for value in size.samples]
        self._count = sum(reference.numel() for reference in self._engine.references)
        self.forwards = 2
        self.base = 0.0

    @property
    def references(self) -> Sequence[Tensor]:
        """Outputs of the unquantized model."""
        return self._engine.references

    def measure_base(self) -> str | None:
        """Measure the model with the op unquantized, if that is not the reference; returns why that cannot be done."""
        if self._isolated:
            return None
        self._switch.flip(unquantized)
        scores, failure = self._scores(logits=False)
        self.base = 0.0 if scores is None else scores["nmse"] or 0.0
        return failure

    def measure(
        self,
        name: str,
        flipped: Flipped,
        *,
        logits: bool = False,
        at_output: Located | None = None,
        at_op: Located | None = None,
    ) -> tuple[Flip, Scores | None]:
        """Measure the model with the op quantized in this way.

        Args:
            name: Of the flip.
            flipped: What the op gives.
            logits: Whether outputs are compared as distributions, too, if they are logits.
            at_output: Gets the error at the model's output by place.
            at_op: Likewise in the op's own output.

        """
        self._switch.flip(flipped, at_op)
        scores, failure = self._scores(logits=logits, located=at_output)
        nmse = None if scores is None else scores["nmse"]
        added = None if nmse is None else nmse - self.base
        return Flip(name, nmse, added, self._switch.nmse if failure is None else None, failure), scores

    def _outputs(self) -> Iterator[Tensor]:
        self.forwards += 1
        # with the op's own base quantized: `joint` quantizes all, and the switch says what that means of this op
        outputs = self._engine.isolated(self._op) if self._isolated else self._engine.joint()
        self._switch.batch = 1
        for output in outputs:
            yield output
            self._switch.batch += 1

    def _scores(self, *, logits: bool, located: Located | None = None) -> tuple[Scores | None, str | None]:
        score = Score(logits=logits and self._spec.logits)
        try:
            given = zip(self._batches, self._engine.references, self._outputs(), self._rows, strict=True)
            for number, (batch, reference, output, rows) in enumerate(given, 1):
                score.add(reference, output, rows)
                if located is not None:
                    sites = sites_of(reference.shape, batch, flat=True)
                    errors = row_errors(reference, output, sites.rows)
                    located.add(number, sites, errors, row_energies(reference, sites.rows))
        except Exception as error:  # noqa: BLE001 - quantized values can make a model raise anything
            return None, f"the model fails ({first_line(error)})"
        found = score.related(self._energy, self._count, self._energies)
        return (None, NOT_FINITE) if found is None else (found, None)
