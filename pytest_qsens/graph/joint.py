"""Changes to a run in which everything is quantized: quantized layers take the rows of all changes at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.fx import Node

from pytest_qsens import profile
from pytest_qsens.graph.delta import RULES
from pytest_qsens.graph.footprint import value_bytes
from pytest_qsens.graph.together import Together, settled_calls
from pytest_qsens.samples import Sums, summed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from pytest_qsens.graph.replay import Override, Run
    from pytest_qsens.graph.schedule import Step
    from pytest_qsens.graph.together import Head
    from pytest_qsens.samples import Rows


_BLOCK = 2**17
"""Values of the head's output computed and compared at a time: they stay in a core's cache."""

_CHANNELS = 64
"""A multiple of so many channels of it: every part reads the whole input again, and fp32 products keep their bits."""


_QUANTIZING = 9
"""Bytes for each value that a quantized call takes: fp32 twice, and int8, while it is rounded."""

_MULTIPLYING = 8
"""Bytes for each value that it gives, beside the result: integers, and what they are scaled in."""

_COMPARING = 24
"""Bytes for each value of a part of the head's output: fp32, and in float64 the value and its distance."""


class RowWise(NamedTuple):
    """A quantized call that computes every row of its input by itself.

    Attributes:
        call: What it computes, from the arguments of the node.
        blocks: The same, so many channels at a time: ``(channels, *arguments)`` → outputs.

    """

    call: Override
    blocks: Callable[..., Iterator[Tensor]]


class JointRun(Together):
    """Several changes at once to a run with everything quantized.

    Args:
        run: That run.
        reference: The output of the clean one.
        quantized: Calls that are quantized.
        factors: What the output of every op is multiplied by, from the output; ``None`` if by nothing.
        rows: Of each sample; ``None`` takes the batch for one.

    """

    def __init__(
        self,
        run: Run,
        reference: Tensor,
        quantized: Mapping[Node, RowWise],
        factors: Callable[[Tensor], Tensor] | None,
        rows: Rows | None = None,
    ) -> None:
        self._quantized = quantized
        self._factors = factors
        rules = {node: RULES[node.target] for node in quantized if node.target in RULES}
        shared = settled_calls(run, {node: (rule.argument, rule.weight) for node, rule in rules.items()})
        super().__init__(run, reference, shared, rows)

    def _form(self, node: Node) -> torch.dtype:
        dtype: torch.dtype = self.run.clean[self.run.order[self._shared[node]]].dtype
        return dtype

    def _stacked(self, values: Sequence[Tensor], clean: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG002 - the base's
        return torch.stack(tuple(values))

    def _products(self, step: Step, stacked: Tensor) -> Iterator[Tensor]:
        values = profile.call(step.node, self._quantized[step.node].call, self._arguments(step.node, stacked), {})
        for value in values:
            yield value if self._factors is None else value * self._factors(value)

    def _stacked_bytes(self, node: Node) -> int:
        return value_bytes(self._shared[node])

    def _beside_bytes(self, node: Node) -> int:
        inputs, outputs = self._shared[node].meta["val"].numel(), node.meta["val"].numel()
        return int(max(_QUANTIZING * inputs, inputs + _MULTIPLYING * outputs))

    def _head_bytes(self, head: Head) -> int:
        value, rows = head.source.meta["val"], self.reference.numel() // self.reference.shape[-1]
        taken = rows * value.shape[-1]
        comparing = _COMPARING * rows * min(_CHANNELS, self.reference.shape[-1])
        return int(value.nbytes + taken * value.itemsize + max(_QUANTIZING * taken, taken + comparing))

    def _head_errors(self, values: Iterable[Tensor], head: Head) -> list[Sums]:
        rows = [self._rows(value, head) for value in values]  # follows the changes
        return self._compared(rows, head) if rows else []

    @profile.phase("scoring")
    def _compared(self, rows: Sequence[Tensor], head: Head) -> list[Sums]:
        reference = self.reference.reshape(-1, self.reference.shape[-1])
        channels = _CHANNELS * max(1, _BLOCK // max(1, len(rows) * reference.shape[0]) // _CHANNELS)
        blocks = self._quantized[head.node].blocks(channels, *self._arguments(head.node, torch.stack(tuple(rows))))
        factors = self._head_factors(head, channels)
        found = reference.new_zeros(len(rows), dtype=torch.float64)
        by_row = reference.new_zeros(len(rows), len(reference), dtype=torch.float64)
        for block, expected in zip(blocks, torch.split(reference, channels, -1), strict=True):
            output = block.reshape(len(rows), *expected.shape)
            if factors is not None:
                output = output * next(factors)
            squares = (output.double() - expected.double()).square_()
            found += squares.sum((1, 2))
            if len(self.rows) > 1:
                by_row += squares.sum(2)
            del squares  # not beside those of the next block
        wholes = found.tolist()
        if len(self.rows) < 2:
            return [Sums(whole, (whole,)) for whole in wholes]
        return [
            Sums(whole, summed([row], self.rows, len(reference)).samples)
            for whole, row in zip(wholes, by_row, strict=True)
        ]

    def _head_factors(self, head: Head, channels: int) -> Iterator[Tensor] | None:
        if self._factors is None:
            return None
        found = self._rows(self._factors(self.run.values(head.node)), head)
        return iter(torch.split(found.reshape(-1, found.shape[-1]), channels, -1))

    def _arguments(self, node: Node, value: Tensor) -> list[object]:
        """Arguments of a call, with another value of the one that changes."""
        constants, position = self.run.graph.constants, RULES[node.target].argument
        return [
            value if i == position else constants[argument] if isinstance(argument, Node) else argument
            for i, argument in enumerate(node.args)
        ]
