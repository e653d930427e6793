"""What a quantized op returns, exact in its integers.

The arithmetic is that of torch's x86 kernels (fbgemm), written so that it needs none of them: integer products are
exact if what computes them is, which is tried before it is believed, and the float steps are single operations that
every IEEE machine rounds alike. The tests compare every step with the kernels bit for bit.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.ao.quantization.fx._decomposed  # registers the per-token primitives
from torch.ao.quantization.observer import PerChannelMinMaxObserver
from torch.nn import functional

from pytest_qsens import profile
from pytest_qsens.graph.calls import CONVOLUTIONS, finite_rows, unquantized
from pytest_qsens.quant.schemes import scheme_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from pytest_qsens.graph.calls import Call
    from pytest_qsens.quant.calibration import Calibration, QParams
    from pytest_qsens.quant.schemes import Scheme, Schemes


@dataclass(frozen=True)
class QuantizedWeight:
    """An int8 weight, symmetric per output channel.

    Attributes:
        values: int8, of the weight's shape.
        scale: float32, ``(out,)``.
        sums: int64, ``(out,)``: the sum of each channel's integers, for inputs with a zero point.

    """

    values: Tensor
    scale: Tensor
    sums: Tensor

    def split(self, channels: int) -> Iterator[QuantizedWeight]:
        """Take so many output channels at a time."""
        parts = (torch.split(tensor, channels) for tensor in (self.values, self.scale, self.sums))
        return map(QuantizedWeight, *parts)


class _Rows(NamedTuple):
    """A quantized input of a linear.

    Attributes:
        integers: int8, ``(*, in)``.
        scale: float32, ``()`` or ``(*, 1)``.
        offset: What to add to every integer before it is multiplied.

    """

    integers: Tensor
    scale: Tensor
    offset: int = 0

    def error(self, x: Tensor) -> Tensor:
        """Difference to what was quantized."""
        return self.integers.float().add_(self.offset).mul_(self.scale).sub_(x)


_CHUNK = 2**17
"""Values taken through several steps at a time, so that what is between the steps stays in a core's cache."""


@profile.phase("local quantization")
def quantize_weight(weight: Tensor) -> QuantizedWeight:
    """Quantize a weight ``(out, ...)``, of any float dtype, to int8 by each output channel's largest magnitude."""
    observer = PerChannelMinMaxObserver(
        ch_axis=0, dtype=torch.qint8, qscheme=torch.per_channel_symmetric, **_on(weight)
    )
    channels = weight.flatten(1)
    # its extremes stand for a channel: the observer's own search for them takes ten times as long
    observer(torch.stack((channels.amin(1), channels.amax(1)), 1).float())
    scale, _ = observer.calculate_qparams()
    values = torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
    sums = torch.empty_like(scale, dtype=torch.int64)
    parts = (values.flatten(1), channels, (1 / scale)[:, None], sums)
    rows = max(1, _CHUNK // max(1, parts[0].shape[1]))
    for integers, part, inverse, total in zip(*(torch.split(tensor, rows) for tensor in parts), strict=True):
        rounded = (part.float() * inverse).round_().clamp_(-128, 127)
        integers.copy_(rounded)
        total.copy_(rounded.sum(1, dtype=_exact_sum(part.shape[1])))
    if weight.dim() > 2:  # a convolution's output has the layout of its input and its weight
        values = torch.empty_like(weight, dtype=torch.int8).copy_(values)
    return QuantizedWeight(values, scale, sums)


def _on(tensor: Tensor) -> dict[str, Any]:
    """Arguments of an observer that put it on the device of what it observes."""
    return {"factory_kwargs": {"device": tensor.device}}


def _exact_sum(count: int) -> torch.dtype:
    """Return a dtype that adds up so many int8 values without rounding: fp32 below 2**24."""
    return torch.float32 if count < 2**24 // 128 else torch.float64


def quantize_activation(values: Tensor, qparams: QParams) -> Tensor:
    """Round to uint8, per tensor; the integers come as fp32.

    The kernels compute round_half_even(fma(x, 1 / scale, zero_point)) in fp32. float64 holds the product and the sum
    exactly for every value in range, so rounding it to fp32 is the one rounding of the fma.
    """
    inverse = 1 / torch.tensor(qparams.scale, dtype=torch.float32, device=values.device)
    found = torch.empty_like(values, memory_format=torch.contiguous_format)
    parts = (torch.split(tensor.reshape(-1), _CHUNK) for tensor in (found, values))
    for integers, part in zip(*parts, strict=True):
        integers.copy_(part.double().mul_(inverse.double()).add_(qparams.zero_point))
        integers.round_().clamp_(0, 255)
    return found


def quantized_embedding(rows: Tensor) -> Tensor:
    """Round looked-up embedding rows ``(*, dim)`` to uint8 with a scale and float zero point per row, and back.

    Each row is quantized on its own, so quantizing the looked-up ones equals looking up in a quantized table.
    """
    if not rows.numel():  # an observer that has seen nothing warns
        return rows
    flat = rows.reshape(-1, rows.shape[-1])
    observer = PerChannelMinMaxObserver(
        ch_axis=0, dtype=torch.quint8, qscheme=torch.per_channel_affine_float_qparams, **_on(flat)
    )
    observer(flat)
    scale, zero_point = observer.calculate_qparams()
    scale, zero_point = scale[:, None], zero_point[:, None]
    integers = (flat / scale + zero_point).round().clamp(0, 255)
    # embedding_byte computes fma(q, scale, bias) with bias = -scale * zero_point rounded to fp32; float64 holds the
    # product exactly, which makes the one rounding at the end that of the fma
    bias = -scale * zero_point
    values: Tensor = (integers.double() * scale.double() + bias.double()).float()
    return values.reshape(rows.shape)


def _per_channel(values: Tensor, kind: str) -> Tensor:
    """Shape ``(out,)`` so that it broadcasts over an op's output."""
    return values if kind == "linear" else values.view(-1, *[1] * int(kind[4]))


_INT32_SUM = 2**31 // (255 * 128)
"""So many products of uint8 and int8 can be added before int32 overflows."""

_INT32_LENGTH = 2**31 // (128 * 128)
"""So many products of int8 can be added before int32 overflows."""


_FLOAT32_INTEGERS = 2**24
"""fp32 holds all integers up to here."""


def _float64_mm(left: Tensor, right: Tensor) -> Tensor:
    return left.double() @ right.double()


@cache
def _int_mm_is_exact() -> bool:
    """Try torch's int8 product on the largest integers.

    Without VNNI instructions oneDNN adds pairs of products in int16, which saturates
    (https://uxlfoundation.github.io/oneDNN/dev_guide_int8_computations.html).
    """
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 33):
        left = torch.randint(0, 2, (rows, 256), generator=generator).mul(255).sub(128).to(torch.int8)
        right = torch.randint(0, 2, (256, 48), generator=generator).mul(254).sub(127).to(torch.int8)
        for other in (right, torch.full_like(right, 127)):
            if not torch.equal(torch._int_mm(left, other).double(), _float64_mm(left, other)):  # noqa: SLF001
                return False
    return True


def _integer_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply int8 ``(*, in)`` by int8 ``(out, in)`` exactly; the result is integer-valued, ``(*, out)``."""
    rows = x.reshape(-1, x.shape[-1])
    # _int_mm of other devices asks for sizes that models don't have; float64 is exact below 2**53
    fast = x.device.type == "cpu" and rows.shape[1] < _INT32_LENGTH and _int_mm_is_exact()
    multiply = torch._int_mm if fast else _float64_mm  # noqa: SLF001 - torch's only int8 product
    with profile.phase("local quantization", product=True):
        product = multiply(rows, weight.t())
    return product.reshape(*x.shape[:-1], weight.shape[0])


class Simulator:
    """Computes the outputs of quantized ops; every weight is quantized once.

    Args:
        schemes: What quantizes every op, or each; nothing is asked of an op without a scheme.
        calibration: Ranges of their inputs and outputs.

    """

    def __init__(self, schemes: Schemes, calibration: Calibration) -> None:
        self._schemes = schemes
        self._calibration = calibration
        self._weights: dict[str, QuantizedWeight] = {}
        self._passing: dict[str, QuantizedWeight] = {}
        self._room: float = math.inf

    @profile.phase("local quantization")
    def output(self, op: str, call: Call) -> Tensor:
        """Return what ``op`` gives for this call when it is quantized: fp32, of the unquantized output's shape.

        A row (or sample) of the input with NaN or infinite values gives NaN, where a kernel would turn them into some
        integer.
        """
        if call.kind == "embedding":
            return quantized_embedding(functional.embedding(call.x, call.weight).float())
        weight = self._weight(op, call)
        if call.kind == "linear":
            output = self._linear(op, self._quantized_rows(op, call.x), weight, call.bias)
        else:
            x = self._calibration.input_qparams(op)
            scale = torch.tensor(x.scale, device=call.x.device)
            output = self._real(op, call.kind, _convolution(call, weight, x), scale, weight.scale, call.bias)
        return _without_infinities(output, finite_rows(call.x, call.kind))

    @profile.phase("local quantization")
    def rounded(self, op: str, call: Call) -> tuple[Tensor, Tensor]:
        """Return what a quantized linear or convolution gives, and its `input_error`: both fp32.

        A convolution multiplies what integers stand for, in fp32. That is several times faster than what `output` does;
        now and then, a value is rounded to the integer beside. Nothing is said of inputs that are not finite.
        """
        weight = self._weight(op, call)
        if call.kind == "linear":
            rows = self._quantized_rows(op, call.x)
            return self._linear(op, rows, weight, call.bias), rows.error(call.x)
        rounding = self.input_error(op, call)
        scale = weight.scale.view(-1, *[1] * (weight.values.dim() - 1))
        real = replace(call, x=call.x + rounding, weight=weight.values * scale)
        with profile.phase("local quantization", product=True):
            output = unquantized(real)
        if self._scheme_of(op).requantize_output:
            output = _fake_quantized(output, self._calibration.output_qparams(op))
        return output, rounding

    @profile.phase("local quantization")
    def input_error(self, op: str, call: Call) -> Tensor:
        """Return what quantizing the input of a linear or a convolution adds to it: fp32, of its shape."""
        if call.kind == "linear":
            return self._quantized_rows(op, call.x).error(call.x)
        return _fake_quantized(call.x, self._calibration.input_qparams(op)).sub_(call.x)

    def blocks(self, op: str, call: Call, channels: int) -> Iterator[Tensor]:
        """Return the output of a linear, ``channels`` of it at a time: ``(*, channels)``."""
        with profile.phase("local quantization"):
            rows, weight = self._quantized_rows(op, call.x), self._weight(op, call)
            finite = finite_rows(call.x, call.kind)
        parts = list(weight.split(channels))
        biases = call.bias if call.bias is None else torch.split(call.bias.expand(weight.scale.shape), channels)
        for part, bias in zip(parts, biases or [None] * len(parts), strict=True):
            with profile.phase("local quantization"):
                output = _without_infinities(self._linear(op, rows, part, bias), finite)
            yield output

    def _weight(self, op: str, call: Call) -> QuantizedWeight:
        found = self._weights.get(op) or self._passing.get(op)
        if found is None:
            found = quantize_weight(call.weight)
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

    def _scheme_of(self, op: str) -> Scheme:
        scheme = scheme_of(self._schemes, op)
        if scheme is None:
            raise LookupError(f"nothing quantizes {op}")
        return scheme

    def _quantized_rows(self, op: str, x: Tensor) -> _Rows:
        if self._scheme_of(op).activation == "static":
            qparams = self._calibration.input_qparams(op)
            integers = quantize_activation(x, qparams).sub_(128).to(torch.int8)
            return _Rows(integers, torch.tensor(qparams.scale, device=x.device), 128 - qparams.zero_point)
        primitives: Any = torch.ops.quantized_decomposed
        scale, zero_point = primitives.choose_qparams_per_token(x, torch.int8)
        return _Rows(primitives.quantize_per_token(x, scale, zero_point, -128, 127, torch.int8), scale)

    def _linear(self, op: str, x: _Rows, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        products = _integer_linear(x.integers, weight.values)
        if x.scale.dim():
            output: Tensor = products.float() * x.scale * weight.scale
            return output if bias is None else output + bias
        correction = x.offset * weight.sums
        if products.dtype == torch.int32 and weight.values.shape[1] < _INT32_SUM:
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
        if not self._scheme_of(op).requantize_output:
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


def _without_infinities(values: Tensor, finite: Tensor | None) -> Tensor:
    """Put NaN into the rows (or samples) that are not finite."""
    if finite is None:
        return values
    return values.masked_fill(~finite.view(*finite.shape, *[1] * (values.dim() - finite.dim())), torch.nan)


def _rows(kind: str, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split outputs of one shape into parts that fit into a cache, none of them through a channel's values."""
    if kind == "linear":
        tensors = tuple(tensor.view(-1, tensor.shape[-1]) for tensor in tensors)
    elif tensors[0].dim() < int(kind[4]) + 2:  # no batch
        return iter([tensors])
    rows = max(1, _CHUNK // max(1, tensors[0].shape[1:].numel()))
    return zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)


def _fake_quantized(values: Tensor, qparams: QParams) -> Tensor:
    """Round to uint8 and back; the kernels' own rounding differs in the last place.

    ``torch.fake_quantize_per_tensor_affine`` does the same, but value by value, which takes longer than a convolution.
    """
    integers = (values * (1 / qparams.scale)).round_().clamp_(-qparams.zero_point, 255 - qparams.zero_point)
    return integers.mul_(qparams.scale)


def _convolution(call: Call, weight: QuantizedWeight, x: QParams) -> Tensor:
    """Sum (x - zero_point) * weight over integers, exactly: fp32 where that holds every sum, else float64."""
    # padding is with real zeros, which is integer zero once the zero point is taken off
    integers = quantize_activation(call.x, x).sub_(x.zero_point)
    centred = torch.empty_like(call.x).copy_(integers)  # keeps the layout
    largest = max(x.zero_point, 255 - x.zero_point) * int(weight.values.flatten(1).int().abs().sum(1).max())
    with profile.phase("local quantization", product=True):
        if largest < _FLOAT32_INTEGERS and centred.device.type == "cpu":
            products = CONVOLUTIONS[call.kind](centred, weight.values.float(), None, **(call.conv or {}))
            if torch.equal(products, products.round()):  # an algorithm with fractions in it, such as Winograd's, shows
                return products
        return CONVOLUTIONS[call.kind](centred.double(), weight.values.double(), None, **(call.conv or {}))
