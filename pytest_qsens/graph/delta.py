"""Changes to a clean run: where a layer is linear in the one argument that changes, differences go through it, W·δ.

Nothing cancels in that product, so that bf16 with fp32 accumulation is enough if the weight is bf16 to begin with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pytest_qsens import profile
from pytest_qsens.graph.narrow import LINEAR, narrow_transposed
from pytest_qsens.graph.together import Head, Together, settled_calls
from pytest_qsens.samples import Sums, summed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch.fx import Node

    from pytest_qsens.graph.replay import Run
    from pytest_qsens.graph.schedule import Step
    from pytest_qsens.samples import Rows
    from pytest_qsens.sketches import Sketcher

aten = torch.ops.aten

_WORTH_BF16 = 2**18
"""Values in a weight from which bf16 products pay. It takes many values for their rounding to average out, too."""

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


def _narrow_linear(differences: Tensor, weight: Tensor) -> Tensor:
    """Multiply by a narrow weight: in its dtype, if that is what the differences come in."""
    multiply = functional.linear if differences.dtype == weight.dtype else LINEAR
    found: Tensor = multiply(differences, weight)
    return found


RULES: dict[Any, LinearMap] = {
    aten.linear.default: LinearMap(0, 1, functional.linear),
    LINEAR: LinearMap(0, 1, _narrow_linear),
    aten.addmm.default: LinearMap(1, 2, torch.matmul),
}
"""Operator → how differences go through it. Everything else is computed from values, as in a replay.

Convolutions are not here: what their kernels give for one sample depends on how many there are.
"""


class Weights:
    """How differences are multiplied by weights; what is made for that is made once for all batches.

    Args:
        fast_bf16: Whether bf16 products are faster than fp32 here.

    """

    def __init__(self, *, fast_bf16: bool) -> None:
        self._fast_bf16 = fast_bf16
        self._grams: dict[int, Tensor] = {}  # by identity: the model keeps its weights

    def dtype(self, weight: Tensor) -> torch.dtype:
        """Return the dtype in which differences are multiplied by a weight."""
        narrow = self._fast_bf16 and weight.dtype == torch.bfloat16 and weight.numel() >= _WORTH_BF16
        return torch.bfloat16 if narrow else torch.float32

    def product(self, values: Tensor, weight: Tensor) -> Tensor:
        """Multiply ``(*, in)`` by a weight ``(out, in)``, in the dtype for differences; fp32 comes out."""
        dtype = self.dtype(weight)
        multiply = functional.linear if weight.dtype == dtype else LINEAR
        found: Tensor = multiply(values.to(dtype), weight)
        return found.float()

    def transposed(self, values: Tensor, weight: Tensor) -> Tensor:
        """Multiply ``(*, out)`` by the transpose of a weight ``(out, in)``; as `product`."""
        dtype = self.dtype(weight)
        if weight.dtype == dtype:
            return torch.matmul(values.to(dtype), weight).float()
        return narrow_transposed(values, weight)

    def gram(self, weight: Tensor) -> Tensor:
        """WᵀW, float64: the squared length of W·δ is δᵀ(WᵀW)δ."""
        key = id(weight)
        if key not in self._grams:
            self._grams[key] = _gram(weight, self.dtype(weight))
        return self._grams[key]


class DeltaRun(Together):
    """Several changes to a clean run at once; errors are differences to its output.

    Args:
        run: The clean run.
        weights: How they are multiplied by.
        rows: Of each sample; ``None`` takes the batch for one.
        sketcher: Of the differences to its output; ``None`` sketches nothing.

    """

    def __init__(self, run: Run, weights: Weights, rows: Rows | None = None, sketcher: Sketcher | None = None) -> None:
        self._weights = weights
        rules = {node: RULES[node.target] for node in run.graph.nodes if node.target in RULES and run.is_original(node)}
        shared = settled_calls(run, {node: (rule.argument, rule.weight) for node, rule in rules.items()})
        super().__init__(run, run.output, shared, rows, sketcher)

    def _form(self, node: Node) -> torch.dtype:
        return self._weights.dtype(self._weight(node))

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

    def _stacked_bytes(self, node: Node) -> int:
        return int(self._shared[node].meta["val"].numel()) * self._form(node).itemsize

    def _beside_bytes(self, node: Node) -> int:
        form, value = self._form(node), node.meta["val"]
        return 0 if form == value.dtype else int(value.numel()) * form.itemsize

    def _head_errors(self, values: Iterable[Tensor], head: Head) -> Iterator[Sums]:
        clean, weight = self.run.values(head.source), self._weight(head.node)
        for value in values:
            rows = self._rows(value - clean, head)
            found = _squared_lengths(rows, self._weights.gram(weight), self.rows)
            yield found if self.sketcher is None else found._replace(sketch=self.sketcher.through(rows, weight))

    def _weight(self, node: Node) -> Tensor:
        found: Tensor = self.run.graph.constants[node.args[RULES[node.target].weight]]  # type: ignore[index] # a node
        return found


@profile.phase("scoring")
def _squared_lengths(delta: Tensor, gram: Tensor, samples: Rows) -> Sums:
    """Sum of (W·δ)² over the rows δ, ``(*, in)``."""
    rows = delta.reshape(-1, delta.shape[-1]).double()
    with profile.phase("scoring", product=True):
        products = rows @ gram
    lengths = products.mul_(rows)
    whole = float(lengths.sum().clamp_min(0))  # what should be zero can come out below
    if len(samples) < 2:
        return Sums(whole, (whole,))
    return Sums(whole, summed([lengths.sum(1).clamp_min_(0)], samples, len(lengths)).samples)


@profile.phase("scoring", product=True)
def _gram(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """WᵀW of ``(out, in)``, multiplied in ``dtype``, and summed in float64 over parts of the rows."""
    found = weight.new_zeros((weight.shape[1], weight.shape[1]), dtype=torch.float64)
    for part in torch.split(weight, _GRAM_ROWS):
        rows = part.to(dtype)
        found += rows.t() @ rows
    return found
