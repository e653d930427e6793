"""The scales of SmoothQuant: how large the channels of inputs and weights are, and which layers read one tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from pytest_qsens.graph.calls import finite_rows
from pytest_qsens.quant.schemes import all_of, scheme_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from pytest_qsens.graph.calls import Call
    from pytest_qsens.quant.op_scheme import SmoothQuant
    from pytest_qsens.quant.schemes import Schemes

LEAST = 1e-5
"""The least magnitude of a weight's channel, and the least scale: of the paper's own code, and Neural Compressor's.

The least scale is also that of llm-compressor.
"""

_READERS = 1024
"""Tensors that are remembered before those that are gone are forgotten."""

_ROWS = 2**12
"""Rows of a weight that are looked at a time."""


class Smoothing:
    """Finds the scale of every input channel of the ops whose scheme asks for it.

    Linear layers that read the same tensor are noted whatever quantizes them, if anything: so an op's scales do not
    depend on how others are quantized.

    Args:
        schemes: Of every op, or each.

    """

    def __init__(self, schemes: Schemes) -> None:
        self._schemes = schemes
        self.wanted = any(scheme.smooths for scheme in all_of(schemes))
        self._inputs: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        self._parents: dict[str, str] = {}
        self._readers: dict[tuple[object, ...], tuple[StorageWeakRef, str]] = {}
        self._scales: dict[str, Tensor] = {}

    def of(self, op: str) -> SmoothQuant | None:
        """Return how an op is smoothed, if it is."""
        scheme = scheme_of(self._schemes, op)
        return None if scheme is None else scheme.parts.smoothing

    def observe(self, op: str, call: Call) -> None:
        """Look at one call of a linear layer; rows that are not finite are left out."""
        rows = finite_rows(call.x, call.kind)
        x = call.x if rows is None else call.x[rows]
        if x.numel():
            reach = _reach(x.reshape(-1, x.shape[-1]))
            known = self._inputs.get(op)
            self._inputs[op] = reach if known is None else torch.maximum(known, reach)
        if op not in self._weights:
            parts = [_reach(part).amax(0) for part in torch.split(call.weight, _ROWS)]
            self._weights[op] = torch.stack(parts).amax(0)
        self._join(op, call.x)

    def _join(self, op: str, x: Tensor) -> None:
        """Put an op together with the others that read this tensor.

        The storage is known again as long as it lives; a weak reference keeps its place from being used by another.
        """
        storage = StorageWeakRef(x.untyped_storage())  # type: ignore[no-untyped-call] # torch's
        version = None if x.is_inference() else x._version  # noqa: SLF001 - torch has no public name
        key = storage.cdata, x.storage_offset(), x.numel(), x.shape[-1], x.stride(-1), version
        known = self._readers.get(key)
        if known is not None and not known[0].expired():  # type: ignore[no-untyped-call]
            self._parents[self._root(op)] = self._root(known[1])
            return
        if len(self._readers) >= _READERS:
            alive = ((k, reader) for k, reader in self._readers.items() if not reader[0].expired())  # type: ignore[no-untyped-call]
            self._readers = dict(alive)
        self._readers[key] = storage, op

    def _root(self, op: str) -> str:
        while (parent := self._parents.get(op, op)) != op:
            op = parent
        return op

    def settle(self) -> None:
        """Find the scales; nothing is observed any more."""
        groups: dict[str, list[str]] = {}
        for op in self._inputs:
            groups.setdefault(self._root(op), []).append(op)
        for members in groups.values():
            for op in members:
                smoothing = self.of(op)
                if smoothing is not None:
                    readers = members if smoothing.shared else [op]
                    x, weight = (
                        torch.stack([of[reader] for reader in readers]).amax(0) for of in (self._inputs, self._weights)
                    )
                    by_range = smoothing.statistic == "range"
                    self._scales[op] = (
                        range_scale(x.sum(0), weight, smoothing.alpha)
                        if by_range
                        else smoothing_scale(x.amax(0), weight, smoothing.alpha)
                    )
        self._inputs, self._weights, self._readers = {}, {}, {}

    def scale(self, op: str) -> Tensor | None:
        """Scale of every input channel, fp32, ``(in,)``: inputs are divided by it, and the weight's columns multiplied.

        ``None`` if the op is not smoothed.
        """
        return self._scales.get(op)

    def state(self) -> dict[str, Tensor]:
        """Op → its scales."""
        return self._scales

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take the scales that another has found."""
        self._scales = dict(state)


def _reach(matrix: Tensor) -> Tensor:
    """How far each column of ``(rows, columns)`` reaches up and down from 0, fp32, ``(2, columns)``."""
    return torch.stack([matrix.amax(0), -matrix.amin(0)]).float()


def smoothing_scale(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Find the scale of each channel: ``max|X_j|^alpha / max|W_j|^(1 - alpha)``, at least `LEAST`.

    Xiao et al. 2022, equation 4. A channel that never fires has 1, as in Intel Neural Compressor.

    Args:
        inputs: Largest magnitude of each channel of the input, ``(in,)``.
        weights: Of the weight.
        alpha: Migration strength: 0 makes all weights, 1 all inputs alike.

    """
    # in double: powers of fp32 differ in their last bits from one way to compute them to another
    x, w = inputs.double(), weights.double().clamp_(min=LEAST)
    found = (x.pow(alpha) / w.pow(1 - alpha)).clamp_(min=LEAST)
    return found.masked_fill_(x == 0, 1.0).float()


def range_scale(ranges: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Find the scale of each channel as llm-compressor: ``ranges^alpha / (2 max|W_j|)^(1 - alpha)``, at least `LEAST`.

    llmcompressor 0.14, ``SmoothQuantModifier._calculate_smoothing_scales``. Where all weights of a channel are 0, it is
    the range itself.

    Args:
        ranges: Largest minus smallest value of each channel of the input, ``(in,)``.
        weights: Largest magnitude of each channel of the weight, ``(in,)``.
        alpha: As of `smoothing_scale`.

    """
    x, w = ranges.double(), 2 * weights.double()
    found = torch.where(w > 0, x.pow(alpha) / w.pow(1 - alpha), x)
    return found.clamp_(min=LEAST).float()
