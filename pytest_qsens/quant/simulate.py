"""What a quantized op returns: exact in its integers where torch has kernels for them, else in fp32."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from pytest_qsens import profile
from pytest_qsens.graph.calls import filled, finite_rows, unquantized
from pytest_qsens.graph.decomposed import probabilities, repeated
from pytest_qsens.graph.marks import FACTORS
from pytest_qsens.graph.narrow import memory_for, part_channels
from pytest_qsens.ops import STATES
from pytest_qsens.parts import rows_within
from pytest_qsens.quant.factors import round_factor, side_of
from pytest_qsens.quant.formats import RoundedWeight, round_between, round_input, round_weight
from pytest_qsens.quant.integers import (
    CHUNK,
    INT32_SUM,
    QuantizedWeight,
    Rows,
    convolution_products,
    fake_quantized,
    integer_linear,
    per_token,
    quantize_activation,
    quantize_weight,
    quantized_embedding,
)
from pytest_qsens.quant.schemes import PER_TOKEN, scheme_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from pytest_qsens.graph.calls import Call
    from pytest_qsens.quant.calibration import Calibration
    from pytest_qsens.quant.schemes import Scheme, Schemes


class Simulator:
    """Computes the outputs of quantized ops; every weight is quantized once.

    Args:
        schemes: What quantizes every op, or each; nothing is asked of an op without a scheme.
        calibration: Ranges of their inputs and outputs.

    """

    def __init__(self, schemes: Schemes, calibration: Calibration) -> None:
        self._schemes = schemes
        self._calibration = calibration
        self._weights: dict[str, QuantizedWeight | RoundedWeight] = {}
        self._passing: dict[str, QuantizedWeight | RoundedWeight] = {}
        self._room: float = math.inf
        self._ends: dict[str, Tensor] = {}

    def _scheme_of(self, op: str) -> Scheme:
        scheme = scheme_of(self._schemes, op)
        if scheme is None:
            raise LookupError(f"nothing quantizes {op}")
        return scheme

    def is_row_wise(self, op: str) -> bool:
        """Whether `output` gives rows of several inputs that go together what it gives each of them."""
        return self._scheme_of(op).is_row_wise

    @profile.phase("local quantization")
    def output(self, op: str, call: Call) -> Tensor:
        """Return what ``op`` gives for this call when it is quantized, of the unquantized output's shape.

        In fp32; states, factors and attention, of which a model may have narrower or wider ones, in their own dtype.

        A row (or sample) of the input with NaN or infinite values gives NaN, where a kernel would turn them into some
        integer.
        """
        if call.kind in STATES:
            return self._state(op, call).to(call.x.dtype)
        if call.kind in FACTORS:
            return self._factor(op, call.kind, call.x).to(call.x.dtype)
        if call.attention is not None:
            return self._attended(op, call)
        if call.kind == "embedding":
            return self._rows(op, functional.embedding(call.x, call.weight).float(), call.weight)
        weight, finite = self._weight(op, call), finite_rows(call.x, call.kind)
        if call.kind == "linear":
            output = self._linear(op, self._linear_input(op, call.x, finite), weight, call.bias)
        elif isinstance(weight, RoundedWeight):
            output = self._convolved(op, call, self._rounded_input(op, filled(call.x, finite, 0)), weight)
        else:
            x = self._calibration.input_qparams(op)
            scale = torch.tensor(x.scale, device=call.x.device)
            output = self._real(op, call.kind, convolution_products(call, weight, x), scale, weight.scale, call.bias)
        return filled(output, finite, torch.nan)

    def _state(self, op: str, call: Call) -> Tensor:
        """Round keys or values to what a cache would give back."""
        cache = self._scheme_of(op).parts.cache
        assert cache is not None  # noqa: S101 - no other is given to keys and values
        finite = finite_rows(call.x, call.kind)
        x = filled(call.x.float(), finite, 0)  # the scale of a tensor is that of the rows that are finite
        if cache.kind == "static":
            low, high = (seen.to(x.device) for seen in self._calibration.extremes(op, x.shape[-1]))
            found = round_between(x, cache, low, high)
        elif cache.kind == "local":
            low, high = self._calibration.extremes(op, x.shape[-1])
            found = round_input(x, cache, float(torch.maximum(-low, high)))
        else:
            found = round_input(x, cache)
        return filled(found, finite, torch.nan)

    def _factor(self, op: str, kind: str, x: Tensor) -> Tensor:
        factors = self._scheme_of(op).parts.products
        assert factors is not None  # noqa: S101 - no other is given to products
        if factors.kind != "static":
            return round_factor(x.float(), kind, factors)
        low, high = self._calibration.extremes_of_factor(op, side_of(kind))
        return round_factor(x.float(), kind, factors, (low.to(x.device), high.to(x.device)))

    def _attended(self, op: str, call: Call) -> Tensor:
        """Round probabilities and values before they are multiplied."""
        given = call.attention
        assert given is not None  # noqa: S101 - asked before
        rounded = self._factor(op, "left", probabilities(given))
        values = repeated(self._factor(op, "right", call.x), given)
        # in the layout of what comes out of torch's kernel, which the model may rely on
        return torch.empty_like(unquantized(call)).copy_(rounded @ values)

    def _rows(self, op: str, rows: Tensor, weight: Tensor) -> Tensor:
        """Round looked-up rows of an embedding; of the others the extremes are known, where all have one scale."""
        scheme = self._scheme_of(op)
        if not scheme.rows:
            return quantized_embedding(rows)
        assert scheme.parts.weight is not None  # noqa: S101 - no other is of rows
        matrix = rows.reshape(-1, rows.shape[-1])
        if scheme.parts.weight.granularity == "tensor":
            if op not in self._ends:
                self._ends[op] = torch.stack(torch.aminmax(weight)).float()
            matrix = torch.cat([matrix, self._ends[op][:, None].expand(-1, matrix.shape[-1])])
        found = round_weight(matrix, scheme.parts.weight).real()
        return found[: rows.shape[:-1].numel()].view(rows.shape)

    @profile.phase("local quantization")
    def rounded(self, op: str, call: Call) -> tuple[Tensor, Tensor]:
        """Return what a quantized linear or convolution gives, and its `input_error`: both fp32.

        A convolution multiplies what integers stand for, in fp32. That is several times faster than what `output` does;
        now and then, a value is rounded to the integer beside. Nothing is said of inputs that are not finite.
        """
        weight = self._weight(op, call)
        if call.kind == "linear":
            x = self._linear_input(op, call.x, None)
            return self._linear(op, x, weight, call.bias), self._error(op, x, call.x)
        if isinstance(weight, RoundedWeight):
            real_x = self._rounded_input(op, call.x)
            return self._convolved(op, call, real_x, weight), real_x - call.x
        rounding = self.input_error(op, call)
        real = replace(call, x=call.x + rounding, weight=weight.real())
        with profile.phase("local quantization", product=True):
            output = unquantized(real)
        return self._requantized(op, output), rounding

    @profile.phase("local quantization")
    def input_error(self, op: str, call: Call) -> Tensor:
        """Return what quantizing the input of a linear or a convolution adds to it: fp32, of its shape.

        What is rounded after it was smoothed is multiplied back.
        """
        if call.kind == "linear":
            return self._error(op, self._linear_input(op, call.x, None), call.x)
        if not self._scheme_of(op).is_integer:
            return self._rounded_input(op, call.x) - call.x
        return fake_quantized(call.x, self._calibration.input_qparams(op)).sub_(call.x)

    def _error(self, op: str, rounded: Rows | Tensor, x: Tensor) -> Tensor:
        real = rounded.real() if isinstance(rounded, Rows) else rounded
        smoothed_by = self._smoothed_by(op, x)
        return real - x if smoothed_by is None else (real * smoothed_by).sub_(x)

    def blocks(self, op: str, call: Call, channels: int) -> Iterator[Tensor]:
        """Return the output of a linear, ``channels`` of it at a time: ``(*, channels)``."""
        with profile.phase("local quantization"):
            weight, finite = self._weight(op, call), finite_rows(call.x, call.kind)
            x = self._linear_input(op, call.x, finite)
        parts: list[QuantizedWeight | RoundedWeight] = [*weight.split(channels)]
        biases = call.bias if call.bias is None else torch.split(call.bias.expand(len(weight.values)), channels)
        for part, bias in zip(parts, biases or [None] * len(parts), strict=True):
            with profile.phase("local quantization"):
                output = filled(self._linear(op, x, part, bias), finite, torch.nan)
            yield output

    def _weight(self, op: str, call: Call) -> QuantizedWeight | RoundedWeight:
        found = self._weights.get(op) or self._passing.get(op)
        if found is None:
            found = self._quantized_weight(op, call.weight)
            if self._room == math.inf:
                self._weights[op] = found
            elif found.values.nbytes <= self._room:
                self._passing[op] = found
                self._room -= found.values.nbytes
        return found

    @contextmanager
    def passing(self, room: int = 0) -> Iterator[None]:
        """Keep none of the weights that are quantized meanwhile, and so many bytes of them until the end."""
        before, self._room = self._room, room
        try:
            yield
        finally:
            self._room = before
            self._passing.clear()

    def forget(self, op: str) -> None:
        """Free the quantized weight of an op that is done."""
        self._weights.pop(op, None)

    def weight_errors(self, op: str, call: Call, rows: int) -> Iterator[tuple[int, Tensor]]:
        """Give what rounding does to an op's weight, fp32, so many rows at a time, each with the first's number."""
        whole = None if call.kind == "embedding" else self._quantized_weight(op, call.weight)
        parts = torch.split(call.weight, rows)
        roundeds = [None] * len(parts) if whole is None else whole.split(rows)
        smoothed_by = None if whole is None else self._smoothed_by(op, call.weight)
        for start, part, rounded in zip(range(0, len(call.weight), rows), parts, roundeds, strict=True):
            exact = part.float()
            real = self._rows(op, exact, call.weight) if rounded is None else rounded.real().view(part.shape)
            yield start, (real if smoothed_by is None else real / smoothed_by) - exact

    def _quantized_weight(self, op: str, weight: Tensor) -> QuantizedWeight | RoundedWeight:
        smoothed_by = self._smoothed_by(op, weight)
        if smoothed_by is None:
            return self._rounded_weight(op, weight)
        # each row has scales of its own: part by part, as multiplying makes a wide copy
        parts = torch.split(weight, part_channels(weight.shape[1]))
        rounded = (self._rounded_weight(op, part.float() * smoothed_by) for part in parts)
        return joined([*rounded])

    def _rounded_weight(self, op: str, weight: Tensor) -> QuantizedWeight | RoundedWeight:
        scheme = self._scheme_of(op)
        if scheme.is_integer:
            return quantize_weight(weight)
        assert scheme.parts.weight is not None  # noqa: S101 - none is simulated without
        return round_weight(weight, scheme.parts.weight)

    def _smoothed_by(self, op: str, beside: Tensor) -> Tensor | None:
        """Scale of each input channel, on the device of this tensor; ``None`` if the op is not smoothed."""
        found = self._calibration.smoothing(op)
        return None if found is None else found.to(beside.device)

    def _rounded_input(self, op: str, x: Tensor) -> Tensor:
        activation = self._scheme_of(op).parts.activation
        if activation is None:
            return x
        if activation.kind == "dynamic":
            if activation == PER_TOKEN:  # as where products are of integers
                return per_token(x).real()
            return round_input(x, activation)
        if activation.dtype == "int8":
            return fake_quantized(x, self._calibration.input_qparams(op))
        return round_input(x, activation, self._calibration.largest_input(op))

    def _linear_input(self, op: str, x: Tensor, finite: Tensor | None) -> Rows | Tensor:
        smoothed_by = self._smoothed_by(op, x)
        x = x if smoothed_by is None else x / smoothed_by
        if self._scheme_of(op).is_integer:
            return self._quantized_rows(op, x)
        return self._rounded_input(op, filled(x, finite, 0))

    def _convolved(self, op: str, call: Call, x: Tensor, weight: RoundedWeight) -> Tensor:
        # a convolution's output has the layout of its input and its weight
        real = torch.empty_like(call.weight, dtype=torch.float32).copy_(weight.real().view(call.weight.shape))
        with profile.phase("local quantization", product=True):
            output = unquantized(replace(call, x=x, weight=real))
        return self._requantized(op, output)

    def _requantized(self, op: str, output: Tensor) -> Tensor:
        if not self._scheme_of(op).parts.output:
            return output
        return fake_quantized(output, self._calibration.output_qparams(op))

    def _quantized_rows(self, op: str, x: Tensor) -> Rows:
        if self._scheme_of(op).needs_ranges:
            qparams = self._calibration.input_qparams(op)
            integers = quantize_activation(x, qparams).sub_(128).to(torch.int8)
            return Rows(integers, torch.tensor(qparams.scale, device=x.device), 128 - qparams.zero_point)
        return per_token(x)

    def _linear(
        self, op: str, x: Rows | Tensor, weight: QuantizedWeight | RoundedWeight, bias: Tensor | None
    ) -> Tensor:
        if isinstance(weight, RoundedWeight):
            assert not isinstance(x, Rows)  # noqa: S101 - both come of one scheme
            return self._requantized(op, _product(x, weight, bias))
        assert isinstance(x, Rows)  # noqa: S101
        products = integer_linear(x.integers, weight.values)
        if x.scale.dim():
            output: Tensor = products.float() * x.scale * weight.scale
            return output if bias is None else output + bias
        correction = x.offset * weight.sums
        if products.dtype == torch.int32 and weight.values.shape[1] < INT32_SUM:
            products.add_(correction.int())
        else:
            products = products + correction
        return self._real(op, "linear", products, x.scale, weight.scale, bias)

    def _real(
        self, op: str, kind: str, products: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Turn integer products with a static scale into what they stand for."""
        scale = _per_channel(x_scale * weight_scale, kind)
        bias = None if bias is None else _per_channel(bias, kind)
        found = torch.empty_like(products, dtype=torch.float32)
        if not self._scheme_of(op).parts.output:
            for output, part in _rows(kind, found, products):
                torch.mul(part.float(), scale, out=output)
                if bias is not None:
                    output.add_(bias)
            return found
        y = self._calibration.output_qparams(op)
        y_scale = torch.tensor(y.scale, device=products.device)
        multiplier = scale / y_scale
        shift = None if bias is None else bias / scale
        for output, part in _rows(kind, found, products):
            output.copy_(part)
            if shift is not None:
                output.add_(shift)
            # the integers less the zero point, which fp32 holds exactly
            output.mul_(multiplier).round_().clamp_(-y.zero_point, 255 - y.zero_point).mul_(y_scale)
        return found


def joined(parts: Sequence[QuantizedWeight | RoundedWeight]) -> QuantizedWeight | RoundedWeight:
    """Put a weight together of rows that were rounded by themselves; all parts are of one kind."""
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    kind: Any = type(parts[0])
    found: QuantizedWeight | RoundedWeight = kind(*(None if c[0] is None else torch.cat(c) for c in columns))
    return found


def _per_channel(values: Tensor, kind: str) -> Tensor:
    """Shape ``(out,)`` so that it broadcasts over an op's output."""
    return values if kind == "linear" else values.view(-1, *[1] * int(kind[4]))


def _product(x: Tensor, weight: RoundedWeight, bias: Tensor | None) -> Tensor:
    """Multiply ``(*, in)`` by what a weight stands for, fp32; parts of it are widened as those of narrow ones."""
    rows, (outputs, features) = x.reshape(-1, x.shape[-1]), weight.values.shape
    channels = part_channels(features)
    parts = list(weight.split(channels))
    biases = [None] * len(parts) if bias is None else torch.split(bias.expand(outputs), channels)
    found = rows.new_empty((len(rows), outputs))
    for output, part, its_bias in zip(torch.split(found, channels, -1), parts, biases, strict=True):
        real = part.real(memory_for(part.values))
        with profile.phase("local quantization", product=True):
            output.copy_(functional.linear(rows, real, its_bias))
    return found.view(*x.shape[:-1], outputs)


def _rows(kind: str, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split outputs of one shape into parts that fit into a cache, none of them through a channel's values."""
    if kind == "linear":
        tensors = tuple(tensor.view(-1, tensor.shape[-1]) for tensor in tensors)
    elif tensors[0].dim() < int(kind[4]) + 2:  # no batch
        return iter([tensors])
    rows = rows_within(CHUNK, tensors[0])
    return zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)
