"""The work of ``qsens inspect``: everything about one op, in a few runs of the model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from pytest_qsens.errors import QsensError
from pytest_qsens.inspection.flips import part_flips
from pytest_qsens.inspection.found import Alternative, Inspection, Shape
from pytest_qsens.inspection.measure import Meter, Switch
from pytest_qsens.inspection.observed import Evaluated, Together
from pytest_qsens.inspection.positions import Located, kinds_of
from pytest_qsens.inspection.ranges import lost_in_weight, weight_channels
from pytest_qsens.inspection.request import check_model
from pytest_qsens.inspection.schemes import bits_of, scheme_for
from pytest_qsens.inspection.tokens import tokens_of
from pytest_qsens.inspection.words import described
from pytest_qsens.manifest import load_manifest
from pytest_qsens.models.arguments import check_same
from pytest_qsens.models.spec import ready
from pytest_qsens.ops import STATES
from pytest_qsens.preparation import placed, prepare
from pytest_qsens.quant.calibration import Calibration
from pytest_qsens.quant.op_scheme import named
from pytest_qsens.quant.simulate import Simulator
from pytest_qsens.threads import reproducible_sums

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from pytest_qsens.graph.calls import Call
    from pytest_qsens.inspection.found import Flip
    from pytest_qsens.inspection.positions import Tokens
    from pytest_qsens.inspection.request import Request
    from pytest_qsens.models.source import ModelSource
    from pytest_qsens.models.spec import ModelSpec
    from pytest_qsens.ops import Op
    from pytest_qsens.quant.schemes import Scheme

_SLOW = 2.0
"""Seconds of a forward from which on it is told what is being measured."""


def inspect_op(request: Request, source: ModelSource, tell: Callable[[str], None] = lambda _: None) -> Inspection:
    """Find out why an op is sensitive.

    Args:
        request: What is asked.
        source: The model of the result and its data.
        tell: Gets a line before each step, if they take long.

    Raises:
        QsensError: If the model is not the one of the result, cannot be loaded or run, or nothing can be measured of
            the op: the data never reach it, or it cannot be quantized in this way.

    """
    check_same(request.path, request.run, source)
    source.check()
    ops = load_manifest(source, None)
    op = check_model(request, ops)
    scheme, reason = scheme_for(request.scheme, op, "scheme", by_config=request.by_config)
    if scheme is None:
        raise QsensError(f"{op.name} cannot be quantized: {reason}. Ask about another scheme with --scheme.")
    reproducible_sums()
    spec = source.load()
    model = ready(spec)
    with torch.no_grad():
        inspector = _Inspector(request, replace(spec, model=model), model, ops, op, scheme, tokens_of(source), tell)
        return inspector.found()


class _Inspector:
    """One question, its model and its data."""

    def __init__(
        self,
        request: Request,
        spec: ModelSpec,
        model: nn.Module,
        ops: Sequence[Op],
        op: Op,
        scheme: Scheme,
        text_of: Tokens,
        tell: Callable[[str], None],
    ) -> None:
        self._tell = tell
        self._request = request
        self._spec = spec
        self._model = model
        self._ops = ops
        self._op = op
        self._scheme = scheme
        self._text_of = text_of
        self._batches = [placed(batch, "cpu") for batch in spec.evaluation]
        everything = request.mode == "fallback"
        self._schemes = {o.name: scheme for o in ops if everything or o is op}
        self._states = [o.name for o in ops if o.name in self._schemes and o.type in STATES and scheme.means(o.type)]
        self._head_dim: int | None = None
        names = [name for name in request.against if name != request.scheme]
        self._others = {name: self._other(name) for name in names}
        self._calibrations = {
            name: Calibration({op.name: other}) for name, (other, _) in self._others.items() if other is not None
        }
        self._calibration = Calibration(self._schemes, states=self._states)

    def found(self) -> Inspection:
        """Run the model and put together what that shows."""
        op, scheme, request = self._op, self._scheme, self._request
        calibrating = [placed(batch, "cpu") for batch in self._spec.calibration]
        together = Together(op.name, [self._calibration, *self._calibrations.values()], self._states)
        prepared = prepare(self._model, self._spec, self._batches, calibrating, together, None)
        switch = Switch(op.name, self._schemes, self._calibration, self._batches)
        meter = Meter(
            self._model, self._spec, self._batches, op.name, switch, request.mode, self._quantizable(), self._states
        )
        self._check_reached(meter)
        simulator = Simulator({op.name: scheme}, self._calibration)
        evaluated = Evaluated(op.name, scheme, simulator, self._calibration, together.inputs, self._text_of)
        evaluated.run(self._model, self._batches, self._spec)
        call = evaluated.call
        assert call is not None  # noqa: S101 - it was reached
        self._head_dim = call.x.shape[-1] if op.type in STATES else None
        kinds = kinds_of(self._model)
        at_output, at_op = Located(kinds, self._text_of), Located(kinds, self._text_of, padding=False)
        failure = meter.measure_base()
        if failure is not None:
            raise QsensError(f"mode fallback cannot be measured: {failure} when everything but {op.name} is quantized.")
        whole, scores = meter.measure(
            request.scheme, lambda call: simulator.output(op.name, call), logits=True, at_output=at_output, at_op=at_op
        )
        if prepared.reference_seconds < _SLOW:
            self._tell = lambda _: None
        flips = {} if op.type in STATES else part_flips(op.name, op.type, scheme, simulator, self._calibration)
        parts: list[Flip] = []
        for name, flipped in flips.items():
            self._tell(f"the {name} alone, {len(parts) + 1} of {len(flips)} parts")
            parts.append(meter.measure(name, flipped)[0])
        alternatives = self._alternatives(meter, whole)
        weight_outputs, weight_inputs = (None, None) if op.type in STATES else weight_channels(call.weight)
        lost = [*evaluated.lost]
        if op.type not in STATES:
            lost = [lost_in_weight(op.name, call, scheme, simulator, self._calibration), *lost]
        return Inspection(
            op=op.name,
            model=request.run.model,
            scheme=request.scheme,
            about=described(named(request.scheme, "scheme"), op.type),
            mode=request.mode,
            shape=self._shape(call, evaluated.shapes),
            recorded=request.recorded,
            base=meter.base,
            whole=whole,
            scores=scores,
            parts=tuple(parts),
            weight_outputs=weight_outputs,
            weight_inputs=weight_inputs,
            inputs=evaluated.inputs,
            outputs=evaluated.outputs,
            lost=tuple(lost),
            at_output=at_output.found if request.mode == "isolated" else None,
            at_op=at_op.found,
            alternatives=tuple(alternatives),
            bits=bits_of(request.scheme, op.type, self._head_dim),
            forwards=meter.forwards + 2,
            seconds=prepared.reference_seconds,
            heads=evaluated.heads,
        )

    def _quantizable(self) -> list[str]:
        able = self._calibration.reached - self._calibration.refused.keys()
        return [o.name for o in self._ops if o.name in able and self._scheme.refusal(o.type, o.features) is None]

    def _check_reached(self, meter: Meter) -> None:
        """Check that the op can be measured.

        Raises:
            QsensError: If it cannot.

        """
        name = self._op.name
        why = self._calibration.refused.get(name) or meter.out_of_reach.get(name)
        if why is not None:
            raise QsensError(f"{name} cannot be quantized: {why}.")
        for what, reached in (("evaluation", meter.exercised), ("calibration", self._calibration.reached)):
            if name not in reached:
                raise QsensError(
                    f"the {what} data never reach {name}, so there is nothing to explain. Give other data "
                    "(--calib, --eval)."
                )

    def _other(self, name: str) -> tuple[Scheme | None, str]:
        """Find another scheme; ``None`` and why, if it cannot quantize the op, or does what the present one does."""
        scheme, reason = scheme_for(name, self._op, "--against", by_config=self._request.by_config)
        if scheme is not None and self._op.type == "embedding" and not (scheme.rows or self._scheme.rows):
            return None, "int8 with a scale per row, as now"
        return scheme, reason

    def _alternatives(self, meter: Meter, whole: Flip) -> list[Alternative]:
        """Measure the other schemes: the best first, then those that fail, then those that cannot be."""
        found = []
        for number, name in enumerate(self._others, 1):
            if name in self._calibrations:
                self._tell(f"{name}, {number} of {len(self._others)} other schemes")
            found.append(self._alternative(name, meter, whole))
        return sorted(found, key=lambda a: (a.flip is None, a.flip is not None and a.flip.added is None, _added(a)))

    def _alternative(self, name: str, meter: Meter, whole: Flip) -> Alternative:
        about, (scheme, reason) = described(named(name, "--against"), self._op.type), self._others[name]
        if scheme is None and (self._op.type in STATES) != (named(name, "--against").cache is not None):
            return Alternative(name, about, None, None, 0.0, reason)  # of another kind of op
        bits = bits_of(name, self._op.type, self._head_dim)
        if scheme is None:
            return Alternative(name, about, None, None, bits, reason)
        calibration = self._calibrations[name]
        if self._op.name in calibration.refused:
            return Alternative(name, about, None, None, bits, calibration.refused[self._op.name])
        simulator = Simulator({self._op.name: scheme}, calibration)
        flip, _ = meter.measure(name, lambda call: simulator.output(self._op.name, call))
        both = whole.added is not None and flip.added is not None and whole.added > 0 and flip.added > 0
        factor = whole.added / flip.added if both and whole.added and flip.added else None
        return Alternative(name, about, flip, factor, bits)

    def _shape(self, call: Call, shapes: Sequence[tuple[int, ...]]) -> Shape:
        alike = [op for op in self._ops if self._scheme.means(op.type)]
        return Shape(
            self._op.type,
            self._op.block,
            alike.index(self._op) + 1,
            len(alike),
            () if self._op.type in STATES else tuple(call.weight.shape),
            call.bias is not None,
            str(call.weight.dtype).removeprefix("torch."),
            tuple(dict.fromkeys(shapes)),
            self._head_dim,
        )


def _added(alternative: Alternative) -> float:
    flip = alternative.flip
    return 0.0 if flip is None or flip.added is None else flip.added
