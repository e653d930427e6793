"""What inspecting an op finds out. Builtin values only; no torch needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_qsens.inspection.places import Place, Where
    from pytest_qsens.results import Mode, Scores

NAMES = {"q": "queries", "k": "keys", "v": "values"}
"""Type of op → what it is called; others are layers."""

_AGREEMENT = 0.05
"""Relative: engines and machines differ by less. Another version of a model usually does not."""

_SPREAD = 4.0
"""Likewise, in standard deviations of what is noise."""


@dataclass(frozen=True)
class Channel:
    """One channel whose largest magnitude is ``times`` that of the median channel."""

    index: int
    largest: float
    times: float


@dataclass(frozen=True)
class ChannelSummary:
    """Largest magnitudes of the channels of a tensor.

    Attributes:
        count: Channels in all.
        least: Of the channel with the smallest one.
        median: Of the median channel.
        most: Of the channel with the largest one.
        zeros: Channels with nothing but zeros. They are not among those of the median.
        outliers: Channels that are more than `pytest_qsens.details.OUTLIER` times the median, all together.
        worst: The first few of these, the largest first.

    """

    count: int
    least: float
    median: float
    most: float
    zeros: int
    outliers: int
    worst: tuple[Channel, ...]


@dataclass(frozen=True)
class Inputs:
    """The values that go into an op; rows that are not finite are left out.

    Attributes:
        calibration: Least and largest value that the calibration data show.
        evaluation: The same of the evaluation data.
        outside: Share of the evaluation values that are beyond what calibration has seen.
        calibration_channels: Of the calibration data.
        evaluation_channels: Of the evaluation data.
        peak: Where the largest magnitude of the evaluation data is.
        peak_channel: Its channel.
        peak_value: Its value.

    """

    calibration: tuple[float, float]
    evaluation: tuple[float, float]
    outside: float
    calibration_channels: ChannelSummary
    evaluation_channels: ChannelSummary
    peak: Place
    peak_channel: int
    peak_value: float


@dataclass(frozen=True)
class Head:
    """One head of keys, values or queries.

    Attributes:
        index: Its number, from 0.
        largest: Largest magnitude in the evaluation data.
        error: Its share in the squared error that rounding makes in all heads.

    """

    index: int
    largest: float
    error: float


@dataclass(frozen=True)
class Lost:
    """What rounding does to the values of one tensor.

    Attributes:
        part: ``weight``, ``input`` or ``output``; ``keys``, ``values`` or ``queries``.
        values: How many there are.
        clipped: Share of the values that are beyond the largest number of the format by more than half a step;
            ``None`` if that cannot be told.
        rounded_away: Share of the values that are not zero, and become zero.

    """

    part: str
    values: int
    clipped: float | None
    rounded_away: float


@dataclass(frozen=True)
class Flip:
    """The model measured with an op quantized in one way, or one part of that.

    Attributes:
        name: ``weight``, ``input``, ``output``, or the name of a scheme.
        nmse: At the model's output; ``None`` if it cannot be measured.
        added: What of it comes from this flip: all of it in mode ``isolated``; else what it is more than with the op
            unquantized among quantized ones.
        local_nmse: In the op's own output, from one and the same input, padding left out.
        failure: Why it cannot be measured.

    """

    name: str
    nmse: float | None
    added: float | None
    local_nmse: float | None
    failure: str | None = None


@dataclass(frozen=True)
class Alternative:
    """Another scheme for this op.

    Attributes:
        scheme: Its name.
        about: What it is, in words.
        flip: What was measured; ``None`` if it cannot quantize the op.
        factor: By how much its error is smaller than the present one; ``None`` if one of them is none at all.
        bits: Bits of a weight, with its share of the scales of groups; of keys and values, of a value in a cache.
        reason: Why it cannot quantize the op.

    """

    scheme: str
    about: str
    flip: Flip | None
    factor: float | None
    bits: float
    reason: str | None = None


@dataclass(frozen=True)
class Recorded:
    """What the result file says.

    Attributes:
        path: Of the file.
        scheme: That it is of, or its config.
        scheme_of_op: That of the op, where it is known.
        engine: That measured.
        status: Of the op.
        reason: For the status.
        scores: In the mode that is asked about.
        rank: 1 for the most sensitive of ``ranked`` ops with a score in this mode.
        ranked: How many these are.

    """

    path: str
    scheme: str
    scheme_of_op: str | None
    engine: str
    status: str
    reason: str | None
    scores: Scores | None
    rank: int | None
    ranked: int


@dataclass(frozen=True)
class Shape:
    """What an op is.

    Attributes:
        type: As in result files.
        block: Likewise.
        number: Its place among the ops of the model, from 1.
        ops: How many these are.
        weight: Shape: ``(out, in)``, ``(out, in / groups, *kernel)`` or ``(rows, dim)``; ``()`` of keys and values.
        bias: Whether there is one.
        dtype: Of the weight as it is stored.
        inputs: Shapes of the inputs in the evaluation data; of one that is called several times, those of all calls.
        head_dim: Of keys, values and queries, the channels of a head; those of all heads are numbered on.

    """

    type: str
    block: str
    number: int
    ops: int
    weight: tuple[int, ...]
    bias: bool
    dtype: str
    inputs: tuple[tuple[int, ...], ...]
    head_dim: int | None = None


@dataclass(frozen=True)
class Inspection:
    """All that is known of one op under one scheme.

    Attributes:
        op: Its name.
        model: Label of the model.
        scheme: Its scheme.
        about: What that is, in words.
        mode: ``isolated`` or ``fallback``.
        shape: What the op is.
        recorded: What the result file says.
        base: NMSE of the model with this op unquantized: 0 in mode ``isolated``.
        whole: With the op quantized.
        scores: All metrics of that; ``None`` if it cannot be measured.
        parts: With one part of it quantized.
        weight_outputs: Output channels of the weight, or rows of an embedding; ``None`` where there is no weight.
        weight_inputs: Input channels of the weight, likewise.
        inputs: What goes in; ``None`` of an embedding.
        outputs: Channels of what comes out of the evaluation data; ``None`` of an embedding, and of keys and values.
        heads: Of keys, values and queries.
        lost: Part by part.
        at_output: Where the error at the model's output is; ``None`` in mode ``fallback`` or if it is not finite.
        at_op: Where the error in the op's own output is.
        alternatives: Other schemes, the best first, then those that cannot be.
        bits: Bits of a weight, or of a value in a cache, under the present scheme.
        forwards: Forwards of the evaluation data that were run.
        seconds: One of them takes.

    """

    op: str
    model: str
    scheme: str
    about: str
    mode: Mode
    shape: Shape
    recorded: Recorded
    base: float
    whole: Flip
    scores: Scores | None
    parts: tuple[Flip, ...]
    weight_outputs: ChannelSummary | None
    weight_inputs: ChannelSummary | None
    inputs: Inputs | None
    outputs: ChannelSummary | None
    lost: tuple[Lost, ...]
    at_output: Where | None
    at_op: Where | None
    alternatives: tuple[Alternative, ...]
    bits: float
    forwards: int
    seconds: float
    heads: tuple[Head, ...] = ()

    @property
    def now(self) -> float | None:
        """What would be in the result: the NMSE of the mode; of ``fallback`` with the op unquantized."""
        return self.base if self.mode == "fallback" else self.whole.nmse

    @property
    def differs(self) -> bool:
        """Whether the result says something else of the same scheme than is measured now."""
        scores = self.recorded.scores
        if scores is None or self.recorded.scheme_of_op != self.scheme or self.recorded.status != "measured":
            return False
        recorded, now, noise = scores["nmse"] or 0.0, self.now, scores.get("noise") or 0.0
        return now is None or abs(now - recorded) > max(_AGREEMENT * max(now, recorded), _SPREAD * noise)

    @property
    def explained(self) -> float | None:
        """Sum of what the parts add; ``None`` if one of them could not be measured, or there are none."""
        found = [part.added for part in self.parts]
        return None if None in found or not found else sum(value for value in found if value is not None)

    @property
    def interaction(self) -> float | None:
        """What the whole adds more than its parts together, relative to it; ``None`` if that cannot be told."""
        if self.explained is None or not self.whole.added:
            return None
        return (self.whole.added - self.explained) / self.whole.added

    def share(self, part: Flip) -> float | None:
        """Share of a part in what all parts add; ``None`` if one of them adds less than nothing."""
        if self.explained is None or self.explained <= 0 or any((p.added or 0.0) < 0 for p in self.parts):
            return None
        return (part.added or 0.0) / self.explained
