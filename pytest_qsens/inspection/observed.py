"""What the data show of one op: ranges of its input, and what rounding loses."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from pytest_qsens.graph.calls import channel_rows, token_major
from pytest_qsens.graph.capture import run_model
from pytest_qsens.graph.intercept import OpInterceptor, unchanged_state
from pytest_qsens.inspection.found import NAMES, Inputs
from pytest_qsens.inspection.positions import has_pixels, place, sites_of, whole_shape
from pytest_qsens.inspection.ranges import Losses, Seen, add_lost_input, add_lost_output
from pytest_qsens.inspection.states import Heads, add_lost_state
from pytest_qsens.ops import STATES
from pytest_qsens.quant.calibration import Calibration

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from torch import Tensor, nn

    from pytest_qsens.graph.calls import Call
    from pytest_qsens.inspection.found import ChannelSummary, Head, Lost
    from pytest_qsens.inspection.places import Place
    from pytest_qsens.inspection.positions import Tokens
    from pytest_qsens.models.spec import Batch, ModelSpec
    from pytest_qsens.quant.schemes import Scheme
    from pytest_qsens.quant.simulate import Simulator


class Together(Calibration):
    """Several calibrations that see the same runs of the model, and the ranges of what goes into one op.

    Args:
        op: Name of the op.
        calibrations: Each sees every call.
        states: As of `Calibration`.

    Attributes:
        inputs: Ranges of the op's input.

    """

    def __init__(self, op: str, calibrations: Collection[Calibration], states: Collection[str]) -> None:
        super().__init__({}, states=states)
        self.ranges = True  # on one thread, as scores are measured, whatever the schemes
        self.inputs = Seen()
        self._op = op
        self._calibrations = self._asking = list(calibrations)

    def passes(self) -> Iterator[None]:
        """Ask for the calibration data as often as one of them does; one that has seen enough sees no more."""
        asked = [(calibration, calibration.passes()) for calibration in self._calibrations]
        while True:
            self._asking = [calibration for calibration, more in asked if next(more, _NO_MORE) is not _NO_MORE]
            if not self._asking:
                return
            yield

    def observe(self, op: str, call: Call, output: Tensor) -> None:
        """Record one call; see `pytest_qsens.quant.calibration.Calibration.observe`."""
        for calibration in self._asking:
            calibration.observe(op, call, output)
        if op == self._op and output.numel() and call.kind != "embedding":
            self.inputs.add(channel_rows(call.x, call.kind))


_NO_MORE = object()


class Evaluated:
    """What one clean run of the evaluation data shows of an op.

    Args:
        op: Its name.
        scheme: Its scheme.
        simulator: Of that.
        calibration: Of that, too.
        before: Ranges of what the calibration data put in.
        text_of: What tokens stand for.

    """

    def __init__(
        self,
        op: str,
        scheme: Scheme,
        simulator: Simulator,
        calibration: Calibration,
        before: Seen,
        text_of: Tokens,
    ) -> None:
        self._op = op
        self._scheme = scheme
        self._simulator = simulator
        self._calibration = calibration
        self._before = before
        self._text_of = text_of
        self._seen, self._given = Seen(), Seen()
        self._input, self._output = Losses("input"), Losses("output")
        self._state, self._heads = Losses(""), Heads()
        self._outside = self._values = 0
        self._peak: tuple[float, int, Place] | None = None
        self.call: Call | None = None
        self.shapes: list[tuple[int, ...]] = []

    def run(self, model: nn.Module, batches: Sequence[Batch], spec: ModelSpec) -> None:
        """Run the model once on every batch."""
        for number, batch in enumerate(batches, 1):

            def handler(op: str, call: Call, run: Callable[[], Tensor], number: int = number) -> Tensor:
                output = run()
                if op == self._op and output.numel():
                    self._add(call, output, number, batches[number - 1])
                return output

            states = self._calibration.states
            with unchanged_state(model), OpInterceptor(model, handler, states):
                run_model(model, batch, spec.output)

    def _add(self, call: Call, output: Tensor, number: int, batch: Batch) -> None:
        self.call = call if self.call is None else self.call
        self.shapes.append(tuple(call.x.shape))
        if call.kind == "embedding":
            return
        rows = channel_rows(call.x, call.kind)
        self._seen.add(rows)
        low, high = self._before.span
        self._values += rows.numel()
        self._outside += int(((rows < low) | (rows > high)).sum())
        self._find_peak(call, number, batch)
        if call.kind in STATES:
            add_lost_state(self._state, self._heads, self._op, call, self._scheme, self._simulator, self._calibration)
            return
        self._given.add(channel_rows(output, call.kind))
        add_lost_input(self._input, self._op, call, self._scheme, self._simulator, self._calibration)
        if self._scheme.parts.output:
            add_lost_output(self._output, self._op, output, self._calibration)

    def _find_peak(self, call: Call, number: int, batch: Batch) -> None:
        x = token_major(call.x.nan_to_num(0.0, 0.0, 0.0), call.kind)
        index = int(x.abs().argmax())
        where = [int(i) for i in torch.unravel_index(torch.tensor(index), x.shape)]
        value = float(x.reshape(-1)[index])
        if self._peak is not None and abs(value) <= abs(self._peak[0]):
            return
        sites = sites_of(whole_shape(call.kind, x.shape), batch, flat=call.kind == "linear" and not has_pixels(batch))
        channel = _channel(where, x, call.kind)
        self._peak = value, channel, place(number, sites, index * sites.rows // x.numel(), self._text_of)

    @property
    def inputs(self) -> Inputs | None:
        """Ranges of the input; ``None`` of an embedding."""
        if self._peak is None:
            return None
        seen, (value, channel, where) = self._before, self._peak
        return Inputs(
            seen.span,
            self._seen.span,
            self._outside / max(1, self._values),
            seen.channels,
            self._seen.channels,
            where,
            channel,
            value,
        )

    @property
    def outputs(self) -> ChannelSummary | None:
        """Channels of the output; ``None`` of an embedding."""
        return None if self._given.low is None else self._given.channels

    @property
    def heads(self) -> tuple[Head, ...]:
        """Those of keys, values or queries."""
        return self._heads.found

    @property
    def lost(self) -> Iterator[Lost]:
        """What rounding loses of the input and the output, as far as they are rounded."""
        if self.call is None or self.call.kind == "embedding":
            return
        if self.call.kind in STATES:
            yield replace(self._state.found, part=NAMES[self.call.kind])
        if self._scheme.parts.activation is not None:
            yield self._input.found
        if self._scheme.parts.output:
            yield self._output.found


def _channel(where: Sequence[int], x: Tensor, kind: str) -> int:
    """Find the number of a channel from a place in an input, of keys and values in the order of tokens."""
    if kind in STATES:
        return where[-1] + (where[-2] * x.shape[-1] if x.dim() > 3 else 0)
    return where[-1] if kind == "linear" else where[x.dim() - 1 - int(kind[4])]
