"""Products of integers with the bits of torch's x86 kernels (fbgemm), written so that it needs none of them.

Integer products are exact if what computes them is, which is tried before it is believed, and the float steps are
single operations that every IEEE machine rounds alike. The tests compare every step with the kernels bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.ao.quantization.fx._decomposed  # registers the per-token primitives
from torch.ao.quantization.observer import PerChannelMinMaxObserver

from pytest_qsens import profile
from pytest_qsens.graph.calls import CONVOLUTIONS
from pytest_qsens.parts import rows_within

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from pytest_qsens.graph.calls import Call
    from pytest_qsens.quant.observers import QParams


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

    def real(self) -> Tensor:
        """Return what it stands for, fp32, of the weight's shape."""
        return self.values * self.scale.view(-1, *[1] * (self.values.dim() - 1))


class Rows(NamedTuple):
    """A quantized input of a linear.

    Attributes:
        integers: int8, ``(*, in)``.
        scale: float32, ``()`` or ``(*, 1)``.
        offset: What to add to every integer before it is multiplied.

    """

    integers: Tensor
    scale: Tensor
    offset: int = 0

    def real(self) -> Tensor:
        """Return what it stands for, fp32."""
        return self.integers.float().add_(self.offset).mul_(self.scale)

    def error(self, x: Tensor) -> Tensor:
        """Difference to what was quantized."""
        return self.real().sub_(x)


def per_token(x: Tensor) -> Rows:
    """Quantize ``(*, in)`` to int8, each row by its largest magnitude, symmetric."""
    primitives: Any = torch.ops.quantized_decomposed
    scale, zero_point = primitives.choose_qparams_per_token(x, torch.int8)
    return Rows(primitives.quantize_per_token(x, scale, zero_point, -128, 127, torch.int8), scale)


CHUNK = 2**17
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
    rows = rows_within(CHUNK, channels)
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
    parts = (torch.split(tensor.reshape(-1), CHUNK) for tensor in (found, values))
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


INT32_SUM = 2**31 // (255 * 128)
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


def integer_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply int8 ``(*, in)`` by int8 ``(out, in)`` exactly; the result is integer-valued, ``(*, out)``."""
    rows = x.reshape(-1, x.shape[-1])
    # _int_mm of other devices asks for sizes that models don't have; float64 is exact below 2**53
    fast = x.device.type == "cpu" and rows.shape[1] < _INT32_LENGTH and _int_mm_is_exact()
    multiply = torch._int_mm if fast else _float64_mm  # noqa: SLF001 - torch's only int8 product
    with profile.phase("local quantization", product=True):
        product = multiply(rows, weight.t())
    return product.reshape(*x.shape[:-1], weight.shape[0])


def fake_quantized(values: Tensor, qparams: QParams) -> Tensor:
    """Round to uint8 and back; the kernels' own rounding differs in the last place.

    ``torch.fake_quantize_per_tensor_affine`` does the same, but value by value, which takes longer than a convolution.
    """
    integers = (values * (1 / qparams.scale)).round_().clamp_(-qparams.zero_point, 255 - qparams.zero_point)
    return integers.mul_(qparams.scale)


def convolution_products(call: Call, weight: QuantizedWeight, x: QParams) -> Tensor:
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
