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
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch.fx import Node

    from pytest_qsens.graph.backward import Gradient


class Error(NamedTuple):
    """How a quantized call differs from what it is compared with.

    Attributes:
        whole: Difference of its outputs.
        by_input: The part of it that comes from rounding the input; ``None`` for an embedding.
        input: The rounding of the input itself, of the input's shape; ``None`` for an embedding.

    """

    whole: Tensor
    by_input: Tensor | None = None
    input: Tensor | None = None


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
        self._by_value: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros(probes, dtype=torch.float64))
        self._by_channel: defaultdict[tuple[str, int], list[Tensor]] = defaultdict(list)
        self._whole: defaultdict[str, list[list[Tensor]]] = defaultdict(lambda: [[] for _ in range(probes)])

    @torch.no_grad()
    def watch(self, gradient: Gradient) -> None:
        """Take the gradient at one call of an op; see `pytest_qsens.graph.backward.Backward.passes`."""
        op = self._ops.get(gradient.node)
        if op is None:
            return
        if gradient.region != self._region:  # no other pass comes back to those
            self._region = gradient.region
            self._errors.clear()
        if gradient.node not in self._errors:
            self._errors[gradient.node] = self._error(op, gradient)
        error, call, probe = self._errors[gradient.node], gradient.call, gradient.probe
        product = gradient.output * error.whole
        self._whole[op][probe].append(self._apart(product).sum(1))
        if error.by_input is None or error.input is None or gradient.input is None:
            self._by_value[op][probe] += _by_row(product, call.x)
            return
        self._by_value[op][probe] += float((gradient.input * error.input).square_().sum())
        channel = -1 if call.kind == "linear" else -1 - int(call.kind[4])
        of_weight = self._apart(product.sub_(gradient.output * error.by_input).movedim(channel, -1))
        self._by_channel[op, probe].append(of_weight.view(len(of_weight), -1, product.shape[channel]).sum(1))

    def squares(self) -> dict[str, Tensor]:
        """By op: an estimate of δᵀJᵀMJδ for each pass, with rounding errors taken for independent; ``(probes,)``."""
        found = {}
        for op, by_value in self._by_value.items():
            by_channel = [_summed(self._by_channel[op, probe]).square().sum().cpu() for probe in range(self._probes)]
            found[op] = by_value + torch.stack(by_channel)
        return found

    def products(self) -> dict[str, Tensor]:
        """By op: g·δ for each pass and sample, ``(probes, samples)``; its squares add up to one without assumptions."""
        return {op: torch.stack([_summed(calls) for calls in passes]).cpu() for op, passes in self._whole.items()}

    def _apart(self, values: Tensor) -> Tensor:
        """Flatten what is of one sample: ``(samples, values of each)``, or ``(1, values)``."""
        return values.reshape(self._samples if values.shape[0] == self._samples else 1, -1)


def _by_row(product: Tensor, indices: Tensor) -> float:
    """Sum of squares over what is looked up in an embedding, summed before over equal indices: their errors are equal.

    Args:
        product: ``(*, dim)``.
        indices: ``(*,)``.

    """
    flat = product.reshape(-1, product.shape[-1]).double()
    rows, place = torch.unique(indices.reshape(-1), return_inverse=True)
    return float(flat.new_zeros((len(rows), flat.shape[1])).index_add_(0, place, flat).square_().sum())


def _summed(calls: Sequence[Tensor]) -> Tensor:
    """Sum over the calls of an op, ``(samples, *)``, float64: they share the errors of its weight."""
    if not calls:
        return torch.zeros(1, dtype=torch.float64)
    alike = all(call.shape == calls[0].shape for call in calls)
    return torch.stack([(call if alike else call.sum(0, keepdim=True)).double() for call in calls]).sum(0)


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
