"""What the calibration batches show: the ranges of activations, and before that the scales that smooth them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.errors import QsensError
from pytest_qsens.graph.calls import finite_rows
from pytest_qsens.graph.decomposed import DROPS, probabilities
from pytest_qsens.graph.marks import FACTORS
from pytest_qsens.ops import CACHED, STATES
from pytest_qsens.quant.factors import finite_only, inner_dim, side_of
from pytest_qsens.quant.observers import observer_of, observer_of_output
from pytest_qsens.quant.schemes import all_of, scheme_of
from pytest_qsens.quant.smoothing import Smoothing
from pytest_qsens.quant.state_range import StateRange

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from torch import Tensor

    from pytest_qsens.graph.calls import Call
    from pytest_qsens.quant.factors import Side
    from pytest_qsens.quant.observers import Observer, QParams
    from pytest_qsens.quant.op_scheme import ActivationScheme
    from pytest_qsens.quant.schemes import Scheme, Schemes


def _finite(values: Tensor, kind: str, what: str) -> Tensor:
    rows = finite_rows(values, kind)
    if rows is None:
        return values
    if not bool(rows.any()):
        raise QsensError(
            f"calibration: the {what} holds NaN or infinite values, so no scale can be found. "
            "Check the weights and the calibration data."
        )
    return values[rows]


class Calibration:
    """What the calibration batches showed at the inputs, and where the scheme needs it at the outputs, of every op.

    They are run once in each of its `passes`.

    Args:
        schemes: What needs ranges, of every op or of each; an op without a scheme needs none.
        ranges: Whether to observe those it needs; otherwise only what is reached is noted.
        states: Names of the ops without weights to be observed.

    Attributes:
        states: As given.
        ranges: Whether any are observed.
        reached: Ops that computed something.
        refused: Ops that the scheme cannot quantize for the shape of their weights → why.
        attending: Modules that attend to keys and values that are no ops → how; see `AttentionWatch`.
        per_token: Keys and values → how many values, in how many heads, a cache stores of a token; of several calls,
            those of the largest.

    """

    def __init__(self, schemes: Schemes, *, ranges: bool = True, states: Collection[str] = ()) -> None:
        self._schemes = schemes
        self.states = states
        self.ranges = ranges and any(scheme.needs_ranges for scheme in all_of(schemes))
        self._smoothing = Smoothing(schemes)
        self._settled = not self._smoothing.wanted
        self._inputs: dict[str, Observer] = {}
        self._outputs: dict[str, Observer] = {}
        self._states: dict[str, StateRange] = {}
        self._factors: dict[Side, dict[str, StateRange]] = {"left": {}, "right": {}}
        self.reached: set[str] = set()
        self.refused: dict[str, str] = {}
        self.attending: dict[str, str] = {}
        self.per_token: dict[str, tuple[int, int]] = {}

    def passes(self) -> Iterator[None]:
        """Ask for the calibration data: ranges are those of smoothed inputs, whose scales have to be known before."""
        if not self._settled:
            yield
            self._smoothing.settle()
            self._settled = True
            if not self.ranges:
                return
        yield

    def observe(self, op: str, call: Call, output: Tensor) -> None:
        """Record one call, unless it computes nothing.

        Rows with NaN or infinite values, which attention makes at padded positions, are left out.

        Raises:
            QsensError: If there is no other row.

        """
        if not output.numel():
            return
        self.reached.add(op)
        if call.kind in CACHED:
            self.per_token[op] = max(self.per_token.get(op, (0, 0)), _per_token(call.x.shape))
        scheme = scheme_of(self._schemes, op)
        if not self._settled and call.kind == "linear":
            self._smoothing.observe(op, call)
        if scheme is None:
            return
        refusal = _refusal(scheme, call)
        if refusal is not None:
            self.refused[op] = refusal
            return
        if call.kind == "embedding" or not self.ranges or not scheme.needs_ranges or not self._settled:
            return
        if call.kind in STATES:
            self._observe_state(op, scheme, call)
        elif scheme.parts.products is not None:
            self._observe_product(op, scheme, call)
        elif scheme.refusal(call.kind) is None:
            self._observe_layer(op, scheme, call, output)

    def _observe_state(self, op: str, scheme: Scheme, call: Call) -> None:
        finite = finite_rows(call.x, call.kind)
        values = call.x if finite is None else call.x.masked_fill(~finite[..., None], 0)  # no scale is of less
        range_of = self._state(op, scheme)
        if range_of.fits(values):
            range_of.observe(values)
        else:
            self.refused[op] = f"{scheme.name} has {range_of.about}, and its calls differ in how many they have"

    def _observe_product(self, op: str, scheme: Scheme, call: Call) -> None:
        if call.attention is None:
            self._observe_factor(op, scheme, call.kind, call.x)
        else:
            self._observe_factor(op, scheme, "left", probabilities(call.attention))
            self._observe_factor(op, scheme, "right", call.x)

    def _observe_factor(self, op: str, scheme: Scheme, kind: str, factor: Tensor) -> None:
        values, _ = finite_only(factor, inner_dim(kind, factor))  # no scale is of less than zero
        self._factor(op, scheme, side_of(kind)).observe(values)

    def _observe_layer(self, op: str, scheme: Scheme, call: Call, output: Tensor) -> None:
        x, smoothed_by = _finite(call.x, call.kind, f"input of {op}"), self.smoothing(op)
        self._input(op, scheme).observe(x if smoothed_by is None else x / smoothed_by)
        if scheme.parts.output:
            self._output(op, scheme).observe(_finite(output, call.kind, f"output of {op}"))

    def _input(self, op: str, scheme: Scheme) -> Observer:
        if op not in self._inputs:
            self._inputs[op] = observer_of(_activation(scheme))
        return self._inputs[op]

    def _state(self, op: str, scheme: Scheme) -> StateRange:
        assert scheme.parts.cache is not None  # noqa: S101 - no other is given to keys and values
        return self._states.setdefault(op, StateRange(scheme.parts.cache))

    def _factor(self, op: str, scheme: Scheme, side: Side) -> StateRange:
        assert scheme.parts.products is not None  # noqa: S101 - no other is given to products
        return self._factors[side].setdefault(op, StateRange(scheme.parts.products))

    def _output(self, op: str, scheme: Scheme) -> Observer:
        if op not in self._outputs:
            self._outputs[op] = observer_of_output(_activation(scheme))
        return self._outputs[op]

    def smoothing(self, op: str) -> Tensor | None:
        """Scale of each input channel, ``(in,)``, that inputs are divided by and weights multiplied; ``None`` if not.

        On the device of what was observed, or the CPU.
        """
        return self._smoothing.scale(op)

    def state(self) -> dict[str, Tensor]:
        """All that was observed, beside `reached` and `refused`; see `from_state`."""
        kinds: dict[str, Mapping[str, Observer | StateRange]]
        kinds = {"input": self._inputs, "output": self._outputs, "state": self._states}
        kinds |= {"left": self._factors["left"], "right": self._factors["right"]}
        found = {
            f"{kind}/{op}/{name}": value
            for kind, ranges in kinds.items()
            for op, observed in ranges.items()
            for name, value in observed.state().items()
        }
        return found | {f"smoothing/{op}/scale": value for op, value in self._smoothing.state().items()}

    @classmethod
    def from_state(
        cls,
        schemes: Schemes,
        reached: Collection[str],
        refused: Mapping[str, str],
        state: Mapping[str, Tensor],
        per_token: Mapping[str, Sequence[int]] | None = None,
    ) -> Calibration:
        """Make one of what another observed.

        Args:
            schemes: What needed ranges.
            reached: Ops that were reached.
            refused: Those that cannot be quantized.
            state: From `state`; other tensors may be among them.
            per_token: As of `Calibration`.

        """
        found = cls(schemes)
        found.reached.update(reached)
        found.refused.update(refused)
        found.per_token.update({op: (values, heads) for op, (values, heads) in (per_token or {}).items()})
        observed: dict[tuple[str, str], dict[str, Tensor]] = {}
        for key, value in state.items():
            kind, _, rest = key.partition("/")
            op, _, name = rest.rpartition("/")
            observed.setdefault((kind, op), {})[name] = value
        for (kind, op), buffers in observed.items():
            scheme = scheme_of(schemes, op)
            if scheme is not None and kind == "state":
                found._state(op, scheme).restore(buffers)
            elif scheme is not None and kind in ("left", "right"):
                found._factor(op, scheme, side_of(kind)).restore(buffers)
            elif scheme is not None and kind in ("input", "output"):
                (found._input(op, scheme) if kind == "input" else found._output(op, scheme)).restore(buffers)
        found._smoothing.restore({op: of["scale"] for (kind, op), of in observed.items() if kind == "smoothing"})
        found._settled = True
        return found

    def input_qparams(self, op: str) -> QParams:
        """Scale and zero point of an op's input, uint8; 128 is that of symmetric ones."""
        return self._inputs[op].qparams()

    def largest_input(self, op: str) -> float:
        """Largest magnitude in an op's input, for scales of floats."""
        return self._inputs[op].largest()

    def extremes(self, op: str, dim: int) -> tuple[Tensor, Tensor]:
        """Least and largest of what shares a scale in keys or values of so many features."""
        return self._states[op].extremes(dim)

    def extremes_of_factor(self, op: str, side: Side) -> tuple[Tensor, Tensor]:
        """Least and largest value of a factor."""
        return self._factors[side][op].extremes(0)

    def output_qparams(self, op: str) -> QParams:
        """Scale and zero point of an op's output, uint8."""
        return self._outputs[op].qparams()


def _per_token(shape: Sequence[int]) -> tuple[int, int]:
    """Count the values and heads of a token in keys or values, ``(N, heads, tokens, dim)`` or without heads."""
    heads = shape[-3] if len(shape) > 3 else 1
    return heads * shape[-1], heads


def _refusal(scheme: Scheme, call: Call) -> str | None:
    """Why a call cannot be quantized, of what its shapes tell."""
    if call.kind in FACTORS or call.attention is not None:
        if call.attention is not None and call.attention["dropout_p"]:
            return DROPS
        return None if scheme.parts.products is not None else scheme.refusal("qk")
    if not scheme.means(call.kind):
        return scheme.refusal(call.kind)
    if call.kind in STATES:
        return scheme.refusal_of_state(call.x.shape)
    in_groups = call.kind == "linear" or scheme.rows
    return scheme.refusal_of_features(call.weight.shape[-1]) if in_groups else None


def _activation(scheme: Scheme) -> ActivationScheme:
    activation = scheme.parts.activation
    assert activation is not None  # noqa: S101 - one without needs no ranges
    return activation
