"""Numbers in low precision: integers, E4M3, and the formats whose blocks share a scale.

Scales and codes are those of torchao, bit for bit: integers as its ``IntxUnpackedToInt8Tensor`` and ``Int8Tensor``,
``fp8_e4m3`` as ``Float8Tensor``, ``mxfp8`` and ``mxfp4`` as ``MXTensor`` in all its modes, ``FLOOR`` being the one of
the standard (OCP Microscaling Formats v1.0, 6.3), ``nvfp4`` as ``NVFP4Tensor`` with a scale of the tensor. What has no
scale there, a tensor of zeros, is zero here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from pytest_qsens import profile
from pytest_qsens.quant.powers_of_two import powers_of_two
from pytest_qsens.quant.scaling_modes import POWERS_OF_TWO
from pytest_qsens.quant.schemes import HELD_IN_BF16

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from pytest_qsens.quant.op_scheme import ActivationScheme, WeightScheme

E4M3_MAX = 448.0
E2M1_MAX = 6.0
_E4M3_LEAST = 2.0**-6
"""The least normal number, below which torchao lets no scale of a block fall."""

_TENSOR_LEAST = 2.0**-120
"""The least scale of a tensor: with less, its inverse divided by that of a block is past all fp32 numbers."""

_CHUNK = 2**17
"""Values taken through several steps at a time, so that what is between the steps stays in a core's cache."""


class Scales(NamedTuple):
    """How values turn into codes and back; fp32, ``(*, groups, 1)``, or ``()`` for all of them.

    Attributes:
        scale: A code stands for ``(code - zero_point) * scale``.
        zero_point: Integer-valued; ``None`` if it is zero.
        inverse: What values are multiplied by; ``None`` if they are divided by the scale.

    """

    scale: Tensor
    zero_point: Tensor | None = None
    inverse: Tensor | None = None


@dataclass(frozen=True)
class RoundedWeight:
    """A weight in low precision.

    Attributes:
        values: Codes, ``(out, columns)``: int8 for integers, and for E2M1, whose numbers times 2 are integers; bf16 for
            E4M3, of which it holds all numbers: torch widens it ten times as fast as float8.
        scale: fp32, ``(out, groups)``: what one in a code stands for.
        zero_point: As `Scales` has it, ``(out, groups)``.

    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def split(self, channels: int) -> Iterator[RoundedWeight]:
        """Take so many output channels at a time."""
        for start in range(0, len(self.values), channels):
            part = slice(start, start + channels)
            yield RoundedWeight(
                self.values[part], self.scale[part], None if self.zero_point is None else self.zero_point[part]
            )

    def real(self, memory: Tensor | None = None) -> Tensor:
        """Return what it stands for, fp32, ``(out, columns)``; in ``memory`` of that form, if that is given."""
        found = torch.empty_like(self.values, dtype=torch.float32) if memory is None else memory
        groups = found.copy_(self.values).view(*self.scale.shape, -1)
        if self.zero_point is not None:
            groups.sub_(self.zero_point[..., None])
        groups.mul_(self.scale[..., None])
        return found


@profile.phase("local quantization")
def round_weight(weight: Tensor, scheme: WeightScheme) -> RoundedWeight:
    """Round a weight ``(out, ...)`` of any float dtype; dimensions after the first are one."""
    matrix = weight.flatten(1)
    rows, columns = matrix.shape
    size = columns if scheme.granularity in ("tensor", "channel") else scheme.size[-1]
    low, high = _extremes(matrix.view(rows, -1, size))
    if scheme.granularity == "tensor":
        low, high = low.amin().expand_as(low), high.amax().expand_as(high)
    elif scheme.granularity == "block":
        low, high = -_over_rows(-low, scheme.size[0]), _over_rows(high, scheme.size[0])
    largest = torch.maximum(-low.amin(), high.amax()) if scheme.dtype == "nvfp4" else None
    scales = _scales(scheme, low, high, largest)
    wide = 2.0 if _is_e2m1(scheme.dtype) else 1.0
    values = torch.empty((rows, columns), dtype=_stored(scheme.dtype), device=weight.device)
    step = max(1, _CHUNK // max(1, columns))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        groups = matrix[part].float().view(-1, columns // size, size)
        codes = _codes(scheme.dtype, groups, Scales(*(None if s is None else s[part] for s in scales)))  # type: ignore[arg-type] # scale is none of the None
        values[part] = codes.mul_(wide).flatten(1)
    zero_point = None if scales.zero_point is None else scales.zero_point.squeeze(-1)
    return RoundedWeight(values, scales.scale.squeeze(-1) / wide, zero_point)


def round_input(x: Tensor, scheme: ActivationScheme, largest: float | None = None) -> Tensor:
    """Round an input ``(*, in)``, fp32 and finite, and return what it becomes, of its shape.

    Args:
        x: The input.
        scheme: Of any dynamic kind, ``local``, or static with a format that is no integer.
        largest: The largest magnitude that calibration has seen, for scales that are not dynamic.

    """
    if not x.numel():
        return x
    known = None if largest is None else torch.tensor(largest, dtype=torch.float32, device=x.device)
    size = scheme.size[0] if scheme.size else x.shape[-1]
    groups = x if scheme.granularity == "tensor" else x.reshape(*x.shape[:-1], -1, size)
    if scheme.kind == "static":
        assert known is not None  # noqa: S101 - observed
        low, high = -known, known
    elif scheme.granularity == "tensor":  # as it is: a convolution's output has the layout of its input
        low, high = x.amin().clamp_(max=0), x.amax().clamp_(min=0)
    else:
        low, high = _extremes(groups)
    if scheme.dtype == "nvfp4" and known is None:
        known = torch.maximum(-low.amin(), high.amax())
    scales = _scales(scheme, low, high, known)
    codes = _codes(scheme.dtype, groups, scales)
    if scales.zero_point is not None:
        codes.sub_(scales.zero_point)
    return codes.mul_(scales.scale).reshape(x.shape)


def round_between(x: Tensor, scheme: ActivationScheme, low: Tensor, high: Tensor) -> Tensor:
    """Round values with static scales, in fp32, and return what they become, of their shape.

    Args:
        x: The values.
        scheme: Of integers or E4M3.
        low: The least of what shares a scale, at most 0; of a shape that goes with that of the values.
        high: The largest, at least 0.

    """
    scales = _scales(scheme, low, high, None)
    codes = _codes(scheme.dtype, x, scales)
    if scales.zero_point is not None:
        codes.sub_(scales.zero_point)
    return codes.mul_(scales.scale)


def _extremes(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the largest value of each group, and zero, fp32: ``(*, groups, 1)``."""
    return groups.amin(-1, keepdim=True).float().clamp_(max=0), groups.amax(-1, keepdim=True).float().clamp_(min=0)


def _over_rows(magnitude: Tensor, rows: int) -> Tensor:
    """Take the largest over so many rows at a time; the last block may have fewer."""
    return torch.cat([part.amax(0, keepdim=True).expand_as(part) for part in torch.split(magnitude, rows)])


def _is_e2m1(dtype: str) -> bool:
    return dtype in ("mxfp4", "nvfp4")


def _stored(dtype: str) -> torch.dtype:
    return torch.bfloat16 if dtype in HELD_IN_BF16 else torch.int8


def _bounds(dtype: str) -> tuple[int, int]:
    half = 2 ** (int(dtype.removeprefix("int")) - 1)
    return -half, half - 1


def _scales(scheme: WeightScheme | ActivationScheme, low: Tensor, high: Tensor, largest: Tensor | None) -> Scales:
    """Find the scale of each group from its extremes; ``largest`` is the largest magnitude in a tensor of NVFP4."""
    magnitude, dtype = torch.maximum(-low, high), scheme.dtype
    if dtype in POWERS_OF_TWO:
        return Scales(powers_of_two(magnitude, dtype, scheme.scaling_mode))
    if dtype == "nvfp4":
        assert largest is not None  # noqa: S101 - its scheme has one
        return _nvfp4_scales(magnitude, largest)
    if dtype == "fp8_e4m3":
        scale = magnitude / E4M3_MAX
        # a group of zeros: what compressed-tensors does, where torchao divides zero by zero
        return Scales(scale.masked_fill(scale == 0, torch.finfo(torch.float32).eps))
    least, most = _bounds(dtype)
    limit = torch.finfo(torch.float32).eps if dtype == "int8" else torch.finfo(torch.float32).tiny
    if scheme.symmetric:
        scale = (magnitude / ((most - least) / 2)).clamp_(min=limit)
        return Scales(scale, inverse=1 / scale)
    scale = ((high - low) / (most - least)).clamp_(min=limit)
    zero_point = (least - torch.round(low / scale)).clamp_(least, most)
    return Scales(scale, zero_point, 1 / scale)


def _nvfp4_scales(magnitude: Tensor, largest: Tensor) -> Scales:
    """Return E4M3 scales of blocks, times that of the tensor, with which the largest of all becomes 448 * 6."""
    of_tensor = (largest / (E4M3_MAX * E2M1_MAX)).clamp_(min=_TENSOR_LEAST)
    of_block = (magnitude / E2M1_MAX / of_tensor).clamp_(_E4M3_LEAST, E4M3_MAX).to(torch.float8_e4m3fn).float()
    return Scales(of_tensor * of_block, inverse=(1 / of_tensor) / of_block)


def _codes(dtype: str, groups: Tensor, scales: Scales) -> Tensor:
    """Round values ``(*, groups, size)`` to numbers of the format, in fp32."""
    found = groups / scales.scale if scales.inverse is None else groups * scales.inverse
    if dtype in ("fp8_e4m3", "mxfp8"):
        return found.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()
    if _is_e2m1(dtype):
        return _to_e2m1(found)
    least, most = _bounds(dtype)
    found.round_()
    if scales.zero_point is not None:
        found.add_(scales.zero_point)
    return found.clamp_(least, most)


def _to_e2m1(values: Tensor) -> Tensor:
    """Round to 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, ties to the even mantissa; more than 6 is 6.

    Neighbours are 0.5 apart up to 2, 1 up to 4, then 2; numbers that fp32 holds next to multiples of the distance are
    rounded as integers are.
    """
    magnitude = values.abs().clamp_(max=E2M1_MAX)
    distance = torch.full_like(magnitude, 0.5).masked_fill_(magnitude >= 2, 1).masked_fill_(magnitude >= 4, 2)
    return magnitude.div_(distance).round_().mul_(distance).copysign_(values)
