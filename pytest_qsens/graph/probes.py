"""What backward passes from random probes tell about the errors of ops.

An op's error δ changes the output of the model by J·δ, where J is the Jacobian. A backward pass that starts from a
probe r with E[r·rᵀ] = M brings g = Jᵀ·r, and E[(g·δ)²] = δᵀJᵀMJδ: the squared length of the change for random signs
(M is the identity; Hutchinson, 1989), twice the KL divergence for the Fisher information of the outputs as M.

One scalar product for each probe is far too few: its square has a relative variance of two. But rounding errors are
nearly independent of each other where they are made, so that squares add up over them, a sum of many terms for each
probe: those of the input, value by value, with the gradient of the input; and those of the weight and of a requantized
output, channel by channel: within a channel, an error of the weight is the same for all rows, and a product summed
over the rows before it is squared.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch.fx import Node

    from pytest_qsens.graph.backward import Gradient


class Error(NamedTuple):
    """How a quantized call differs from what it is compared with: what its input's rounding makes of it, and the rest.

    Attributes:
        rest: Difference of its outputs, without the part that comes from rounding the input.
        input: The rounding of the input itself, of the input's shape; ``None`` for an embedding.

    """

    rest: Tensor
    input: Tensor | None = None


class _Sums(NamedTuple):
    """What passes bring to one call.

    Attributes:
        by_value: Sum of squares of gradient times rounding, over the values of the input, ``(passes,)``.
        by_channel: Gradient times the rest of the error, summed over rows, ``(passes, samples, channels)``.
        products: g·δ, ``(passes, samples)``.

    """

    by_value: Tensor
    by_channel: Tensor | None
    products: Tensor

    def plus(self, other: _Sums) -> _Sums:
        """Add another call of the op: both share the errors of its weight."""
        one, two = self.by_channel, other.by_channel
        return _Sums(
            self.by_value + other.by_value,
            None if one is None or two is None else _added(one, two),
            _added(self.products, other.products),
        )


class ProbedErrors:
    """Adds up what backward passes through the graph of one batch bring to each op.

    Args:
        ops: Call → its op.
        error: Computes the error of a call.
        probes: Number of backward passes.
        samples: Size of the first dimension of values that hold independent samples there; ``None`` if none do.

    """

    def __init__(
        self,
        ops: Mapping[Node, str],
        error: Callable[[str, Gradient], Error],
        probes: int,
        samples: int | None,
    ) -> None:
        self._ops = ops
        self._error = error
        self._probes = probes
        self._samples = samples
        self._region: object = None
        self._errors: dict[Node, Error] = {}
        self._found: defaultdict[Node, list[_Sums]] = defaultdict(list)

    @torch.no_grad()
    def watch(self, gradient: Gradient) -> None:
        """Take the gradients at one call of an op; see `pytest_qsens.graph.backward.Backward.passes`."""
        if gradient.region != self._region:
            self._region = gradient.region
            self._errors.clear()
        error = self._errors.get(gradient.node)
        if error is None:
            error = self._error(self._ops[gradient.node], gradient)
            if len(gradient.passes) < self._probes:  # others come later
                self._errors[gradient.node] = error
        self._found[gradient.node].append(self._sums(gradient, error))

    def sums(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By op, float64: an estimate of δᵀJᵀMJδ for each pass, and g·δ for each pass and sample.

        The former, ``(probes,)``, takes rounding errors for independent; the squares of the latter,
        ``(probes, samples)``, add up to an estimate without that assumption.
        """
        by_op: dict[str, _Sums] = {}
        for node, parts in self._found.items():
            op = self._ops[node]
            channels = [part.by_channel for part in parts if part.by_channel is not None]
            whole = _Sums(
                torch.cat([part.by_value for part in parts]),
                torch.cat(channels) if channels else None,
                torch.cat([part.products for part in parts]),
            )
            by_op[op] = by_op[op].plus(whole) if op in by_op else whole
        return {op: (_squares(found).cpu(), found.products.cpu()) for op, found in by_op.items()}

    def _sums(self, gradient: Gradient, error: Error) -> _Sums:
        call = gradient.call
        rest = gradient.output * error.rest
        if error.input is None or gradient.input is None:
            looked_up = call.kind == "embedding"
            by_value = torch.stack(
                [_by_row(part, call.x) if looked_up else part.double().square().sum() for part in rest]
            )
            return _Sums(by_value, None, self._by_sample(rest).double())
        by_channel = self._by_sample(rest, -1 if call.kind == "linear" else -1 - int(call.kind[4])).double()
        rounding = gradient.input * error.input
        products = _added(by_channel.sum(-1), self._by_sample(rounding).double())
        return _Sums(rounding.flatten(1).square_().sum(1).double(), by_channel, products)

    def _by_sample(self, values: Tensor, channel: int | None = None) -> Tensor:
        """Sum over what is of one sample, and maybe channel: ``(passes, *)`` → ``(passes, samples[, channels])``."""
        kept = None if channel is None else channel % values.dim()
        apart = self._samples == values.shape[1] and kept != 1
        dims = [dim for dim in range(1, values.dim()) if dim != kept and not (apart and dim == 1)]
        found = values.sum(dims) if dims else values
        return found if apart else found.unsqueeze(1)


def _squares(found: _Sums) -> Tensor:
    return found.by_value if found.by_channel is None else found.by_value + found.by_channel.square().sum((1, 2))


def _added(one: Tensor, other: Tensor) -> Tensor:
    """Add ``(passes, samples, *)``; where only one of them holds samples apart, all are added up."""
    if one.shape == other.shape:
        return one + other
    return one.sum(1, keepdim=True) + other.sum(1, keepdim=True)


def _by_row(product: Tensor, indices: Tensor) -> Tensor:
    """Sum of squares over what is looked up in an embedding, summed before over equal indices: their errors are equal.

    Args:
        product: ``(*, dim)``.
        indices: ``(*,)``.

    Returns:
        float64, ``()``.

    """
    flat = product.reshape(-1, product.shape[-1]).double()
    rows, place = torch.unique(indices.reshape(-1), return_inverse=True)
    return flat.new_zeros((len(rows), flat.shape[1])).index_add_(0, place, flat).square().sum()


def common_samples(inputs: Iterable[Tensor]) -> int | None:
    """Return the size of the first dimension of all inputs of a model; ``None`` if they differ."""
    sizes = {value.shape[0] if value.dim() else None for value in inputs}
    return next(iter(sizes)) if len(sizes) == 1 else None


def signs(output: Tensor, seed: int) -> Tensor:
    """Draw +1 and -1, of the shape and dtype of an output."""
    drawn = torch.randint(0, 2, output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    return drawn.to(output).mul_(2).sub_(1)


def fisher_root(logits: Tensor, seed: int) -> Tensor:
    """Draw a label y for every position from the model's own distribution p: p - onehot(y), ``(*, classes)``.

    The expectation of its outer product is the Fisher information of the logits, diag(p) - p·pᵀ, and
    KL(p ‖ q) ≈ ½·δᵀFδ.
    """
    rows = logits.reshape(-1, logits.shape[-1]).float().cpu()
    generator = torch.Generator().manual_seed(seed)
    found = rows.softmax(-1)
    labels = torch.multinomial(found, 1, generator=generator)
    found.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=found.dtype))
    return found.reshape(logits.shape).to(logits)
