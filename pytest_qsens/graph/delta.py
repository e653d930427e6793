"""Changes to a clean run: where a layer is linear in the one argument that changes, differences go through it, W·δ.

Nothing cancels in that product, so that bf16 with fp32 accumulation is enough if the weight is bf16 to begin with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pytest_qsens import profile
from pytest_qsens.graph.together import Head, Together, settled_calls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch.fx import Node

    from pytest_qsens.graph.replay import Run
    from pytest_qsens.graph.schedule import Step

aten = torch.ops.aten

_WORTH_NARROWING = 2**18
"""Values in a weight from which bf16 products pay. It takes many values for their rounding to average out, too."""

_CHECKED = 2**18
"""Values of a weight compared at a time."""

_GRAM_ROWS = 4096
"""Rows of a weight multiplied at a time: what rounding each part to the weight's dtype does averages out over parts."""


class LinearMap(NamedTuple):
    """How differences go through a call that is linear in one of its arguments.

    Attributes:
        argument: Position of that argument.
        weight: Position of the other factor, which must be a constant.
        apply: ``(differences, weight)`` → differences of the output; those of several changes lie in the first
            dimension of both. A change's results must not depend on how many there are.

    """

    argument: int
    weight: int
    apply: Callable[[Tensor, Tensor], Tensor]


RULES: dict[Any, LinearMap] = {
    aten.linear.default: LinearMap(0, 1, functional.linear),
    aten.addmm.default: LinearMap(1, 2, torch.matmul),
}
"""ATen op → how differences go through it. Everything else is computed from values, as in a replay.

Convolutions are not here: what their kernels give for one sample depends on how many there are.
"""


class Weights:
    """Weights in the form in which differences are multiplied by them, made once for all batches.

    Args:
        narrow: Whether bf16 products are faster than fp32 here.

    """

    def __init__(self, *, narrow: bool) -> None:
        self._narrow = narrow
        self._narrowed: dict[int, Tensor] = {}  # by identity: the model keeps its weights
        self._grams: dict[int, Tensor] = {}

    def narrowed(self, weight: Tensor) -> Tensor:
        """Return a weight in bf16 if that loses nothing and pays, else as it is."""
        if not self._narrow or weight.numel() < _WORTH_NARROWING:
            return weight
        key = id(weight)
        if key not in self._narrowed:
            found = _narrowed(weight)
            self._narrowed[key] = weight if found is None else found
        return self._narrowed[key]

    def gram(self, weight: Tensor) -> Tensor:
        """WᵀW, float64: the squared length of W·δ is δᵀ(WᵀW)δ."""
        key = id(weight)
        if key not in self._grams:
            self._grams[key] = _gram(self.narrowed(weight))
        return self._grams[key]


class DeltaRun(Together):
    """Several changes to a clean run at once; errors are differences to its output.

    Args:
        run: The clean run.
        weights: Those of the model, in the form in which they are multiplied.

    """

    def __init__(self, run: Run, weights: Weights) -> None:
        self._weights = weights
        rules = {node: RULES[node.target] for node in run.graph.nodes if node.target in RULES and run.is_original(node)}
        super().__init__(
            run, run.output, settled_calls(run, {node: (rule.argument, rule.weight) for node, rule in rules.items()})
        )

    def _form(self, node: Node) -> torch.dtype:
        return self._weight(node).dtype

    def _stacked(self, values: Sequence[Tensor], clean: Tensor, dtype: torch.dtype) -> Tensor:
        found = clean.new_empty((len(values), *clean.shape), dtype=dtype)
        for row, value in zip(found, values, strict=True):
            row.copy_(value - clean)
        return found

    def _products(self, step: Step, stacked: Tensor) -> Iterator[Tensor]:
        before: Tensor = self.run.clean[step.position]
        apply = RULES[step.node.target].apply
        for product in profile.call(step.node, apply, (stacked, self._weight(step.node)), {}, linear=True):
            yield product.to(before.dtype).add_(before)

    def _head_errors(self, values: Iterable[Tensor], head: Head) -> Iterator[float]:
        clean = self.run.values(head.source)
        for value in values:
            yield _squared_length(self._rows(value - clean, head), self._weights.gram(self._constant(head.node)))

    def _weight(self, node: Node) -> Tensor:
        return self._weights.narrowed(self._constant(node))

    def _constant(self, node: Node) -> Tensor:
        found: Tensor = self.run.graph.constants[node.args[RULES[node.target].weight]]  # type: ignore[index] # a node
        return found


def _narrowed(weight: Tensor) -> Tensor | None:
    """Return the weight in bf16 if it loses nothing; checked part by part, as its like in fp32 may be large."""
    found = weight.to(torch.bfloat16)
    rows = max(1, _CHECKED // weight.shape[1:].numel())
    parts = zip(torch.split(found, rows), torch.split(weight, rows), strict=True)
    return found if all(torch.equal(narrow.to(part.dtype), part) for narrow, part in parts) else None


@profile.phase("scoring")
def _squared_length(delta: Tensor, gram: Tensor) -> float:
    """Sum of (W·δ)² over the rows δ, ``(*, in)``."""
    rows = delta.reshape(-1, delta.shape[-1]).double()
    with profile.phase("scoring", product=True):
        products = rows @ gram
    return float((products * rows).sum().clamp_min(0))  # what should be zero can come out below


@profile.phase("scoring", product=True)
def _gram(weight: Tensor) -> Tensor:
    """WᵀW of ``(out, in)``, summed in float64 over parts of the rows."""
    found = weight.new_zeros((weight.shape[1], weight.shape[1]), dtype=torch.float64)
    for rows in torch.split(weight, _GRAM_ROWS):
        found += rows.t() @ rows
    return found
