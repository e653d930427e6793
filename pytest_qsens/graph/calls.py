"""One call of an op, seen alike whether a graph node or Python makes it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn import functional

from pytest_qsens.graph.marks import FACTORS, MARKS
from pytest_qsens.graph.narrow import EMBEDDING, LINEAR, stored
from pytest_qsens.ops import STATES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

aten = torch.ops.aten

CONVOLUTIONS: dict[str, Callable[..., Tensor]] = {
    "conv1d": functional.conv1d,
    "conv2d": functional.conv2d,
    "conv3d": functional.conv3d,
}
"""Kind of call → function."""


@dataclass(frozen=True)
class Call:
    """Arguments of one call.

    Attributes:
        kind: ``linear``, ``conv1d``, ``conv2d``, ``conv3d``, ``embedding``, one of `STATES`, one of `FACTORS` for a
            factor of a product of activations, or ``pv`` for attention as a whole.
        x: Activations ``(*, in)`` for linear, ``(N, C, *spatial)`` for convolutions; integer indices for embedding;
            keys or values, ``(N, heads, tokens, dim)`` or without some of the first; a factor; values of ``pv``.
        weight: ``(out, in)`` for linear whatever the layout in memory, ``(out, in / groups, *kernel)`` for
            convolutions, ``(rows, dim)`` for embedding. In fp32, or as narrow as it is stored. Empty for what has
            none; keys, values and factors are given as they are.
        bias: ``(out,)`` or ``None``.
        conv: ``stride``, ``padding``, ``dilation`` and ``groups`` of a convolution.
        attention: Arguments of torch's ``scaled_dot_product_attention`` by name, for ``pv``.

    """

    kind: str
    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    conv: Mapping[str, Any] | None = None
    attention: Mapping[str, Any] | None = None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:
    return Call("linear", x, stored(weight), bias)


def _addmm(bias: Tensor, x: Tensor, weight: Tensor) -> Call:
    # GPT-2's Conv1D keeps its weight as (in, out)
    return Call("linear", x, weight.t(), bias)


def _embedding(weight: Tensor, x: Tensor, *_: object, **__: object) -> Call:
    # the padding index and the gradient options do not change the forward
    return Call("embedding", x, stored(weight))


def _functional_embedding(x: Tensor, weight: Tensor, *_: object, **__: object) -> Call:
    return Call("embedding", x, stored(weight))


def of_state(kind: str, state: Tensor) -> Call:
    """Return the call that gives keys or values, or a factor of a product, as they are."""
    return Call(kind, state, state.new_empty(0))


def of_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,  # noqa: ANN401 - scale and enable_gqa
) -> Call:
    """Return the call that attends, and multiplies probabilities and values in the end."""
    given: dict[str, Any] = {"query": query, "key": key, "value": value, "attn_mask": attn_mask, **options}
    given |= {"dropout_p": dropout_p, "is_causal": is_causal}
    return Call("pv", value, value.new_empty(0), attention=given)


def _state(kind: str) -> Callable[..., Call]:
    return lambda state: of_state(kind, state)


def _conv(kind: str) -> Callable[..., Call]:
    def bind(  # the signature of torch.conv1d, conv2d and conv3d
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Call:
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return Call(kind, x, weight, bias, options)

    return bind


_BINDERS: dict[Any, Callable[..., Call]] = {
    aten.linear.default: _linear,
    torch.nn.functional.linear: _linear,
    LINEAR: _linear,
    aten.addmm.default: _addmm,
    torch.addmm: _addmm,
    aten.embedding.default: _embedding,
    torch.embedding: _embedding,
    EMBEDDING: _embedding,
    torch.nn.functional.embedding: _functional_embedding,
    aten.conv1d.default: _conv("conv1d"),
    aten.conv1d.padding: _conv("conv1d"),
    torch.conv1d: _conv("conv1d"),
    aten.conv2d.default: _conv("conv2d"),
    aten.conv2d.padding: _conv("conv2d"),
    torch.conv2d: _conv("conv2d"),
    aten.conv3d.default: _conv("conv3d"),
    aten.conv3d.padding: _conv("conv3d"),
    torch.conv3d: _conv("conv3d"),
    **{mark: _state(kind) for kind, mark in (MARKS | FACTORS).items()},
    aten.scaled_dot_product_attention.default: of_attention,
}

_ADDMM = (aten.addmm.default, torch.addmm)
_WEIGHT_FIRST = (aten.embedding.default, torch.embedding, EMBEDDING)
_NAMES = {"input": "x", "indices": "x", "self": "x"}
_ADDMM_NAMES = {"input": "bias", "self": "bias", "mat1": "x", "mat2": "weight"}


def finite_rows(values: Tensor, kind: str) -> Tensor | None:
    """Whether each independent part of an op's input or output is finite; ``None`` if all are.

    Returns:
        Booleans: ``(*,)`` for a linear's ``(*, in)`` and for keys and values, ``(N,)`` for a convolution's
        ``(N, C, *spatial)``, ``()`` for one without the batch dimension.

    """
    if not values.numel() or all(map(math.isfinite, torch.stack(torch.aminmax(values)).tolist())):  # one pass
        return None
    finite = torch.isfinite(values)
    if kind in ("linear", *STATES):
        return finite.all(-1)
    batched = values.dim() == int(kind[4]) + 2
    return finite.flatten(1).all(1) if batched else finite.all()


def filled(values: Tensor, finite: Tensor | None, value: float) -> Tensor:
    """Put a number into the rows (or samples) that are not finite, as `finite_rows` tells them."""
    if finite is None:
        return values
    return values.masked_fill(~finite.view(*finite.shape, *[1] * (values.dim() - finite.dim())), value)


def finite_channels(x: Tensor, kind: str) -> Tensor:
    """Return an input or output of a linear or a convolution, channels last, without the rows that are not finite.

    Returns:
        A linear's ``(*, in)``, or, where rows are left out, ``(rows, in)``; of a convolution, whose samples are left
        out as a whole, ``(samples, positions, C)``.

    """
    finite = finite_rows(x, kind)
    if kind != "linear":
        batched = x if x.dim() == int(kind[4]) + 2 else x[None]
        x = batched.flatten(2).transpose(1, 2)
        finite = None if finite is None else finite.view(-1)
    return x if finite is None else x[finite]


def channel_rows(x: Tensor, kind: str) -> Tensor:
    """Return an input or output of an op as ``(rows, channels)``, without what is not finite.

    Channels of queries, keys and values are those of all heads, one head after the other.
    """
    if kind in STATES:
        finite = finite_rows(x, kind)
        rows = token_major(x, kind).reshape(-1, x.shape[-1] * (x.shape[1] if x.dim() > 3 else 1))
        if finite is None:
            return rows
        return rows[(finite.all(1) if x.dim() > 3 else finite).reshape(-1)]  # a token is that of all heads
    found = finite_channels(x, kind)
    return found.reshape(-1, found.shape[-1])


def token_major(values: Tensor, kind: str) -> Tensor:
    """Bring queries, keys or values ``(N, heads, tokens, dim)`` into the order of tokens; others are in it."""
    return values.transpose(1, 2) if kind in STATES and values.dim() > 3 else values


def unquantized(call: Call) -> Tensor:
    """Compute what a call gives in the model, fp32."""
    if call.attention is not None:
        return functional.scaled_dot_product_attention(**call.attention)
    if call.kind in (*STATES, *FACTORS):
        return call.x.clone()  # as fresh as what others compute
    if call.kind == "embedding":
        return functional.embedding(call.x, call.weight).float()
    if call.kind == "linear":
        found: Tensor = LINEAR(call.x, call.weight, call.bias)
        return found
    return CONVOLUTIONS[call.kind](call.x, call.weight, call.bias, **(call.conv or {}))


def convolution_gradient(call: Call, gradient: Tensor) -> Tensor:
    """Multiply the gradient of a convolution's output by its Jacobian: the gradient of its input, of that shape.

    It is a product of matrices where the kernel meets every value once, and else a transposed convolution. Both take
    gradients of several passes at once under ``torch.vmap``, where autograd's own operator takes them one by one.
    """
    dims, options, x = int(call.kind[4]), call.conv or {}, call.x
    stride, dilation = (_for_each(options[name], dims) for name in ("stride", "dilation"))
    kernel = list(call.weight.shape[2:])
    before = after = [0] * dims
    if options["padding"] == "same":
        reach = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        before, after = [total // 2 for total in reach], [total - total // 2 for total in reach]
    elif options["padding"] != "valid":
        before = after = _for_each(options["padding"], dims)
    shape = x.shape[-dims:]
    if before != after:  # the operator pads both sides alike: take the gradient of the padded input
        shape = torch.Size(size + one + other for size, one, other in zip(shape, before, after, strict=True))
    trimmed = before if before == after else [0] * dims
    single = x.dim() == dims + 1  # no batch
    batch = gradient.unsqueeze(0) if single else gradient
    if stride == kernel and max(dilation) == 1 and not any(trimmed) and options["groups"] == 1:
        found = _gradient_of_patches(call.weight, batch, shape)
    else:
        sizes = zip(shape, gradient.shape[-dims:], kernel, stride, dilation, trimmed, strict=True)
        rest = [  # what a stride leaves over
            size + 2 * off - (count - 1) * step - spread * (kernel - 1) - 1
            for size, count, kernel, step, spread, off in sizes
        ]
        found = aten.convolution(batch, call.weight, None, stride, trimmed, dilation, True, rest, options["groups"])
    found = found.squeeze(0) if single else found
    if before != after:
        for dim, (start, size) in enumerate(zip(before, x.shape[-dims:], strict=True), -dims):
            found = found.narrow(dim, start, size)
    return found


def _gradient_of_patches(weight: Tensor, gradient: Tensor, shape: Sequence[int]) -> Tensor:
    """Gradient of an input ``(N, in, *shape)`` cut into patches of the kernel's size, from ``(N, out, *counts)``."""
    kernel = weight.shape[2:]
    counts, dims = gradient.shape[2:], len(kernel)
    patches = torch.tensordot(gradient, weight, ([1], [0]))  # (N, *counts, in, *kernel)
    sides = [dim for pair in zip(range(1, dims + 1), range(dims + 2, 2 * dims + 2), strict=True) for dim in pair]
    covered = [count * size for count, size in zip(counts, kernel, strict=True)]
    found = patches.permute(0, dims + 1, *sides).reshape(gradient.shape[0], weight.shape[1], *covered)
    rest = [part for size, part in zip(reversed(shape), reversed(covered), strict=True) for part in (0, size - part)]
    return functional.pad(found, rest) if any(rest) else found


def _for_each(value: int | Sequence[int], dims: int) -> list[int]:
    """Spread an option of a convolution over its dimensions."""
    found = [value] if isinstance(value, int) else list(value)
    return found * dims if len(found) == 1 else found


def is_vmapped(*values: object) -> bool:
    """Whether some of these are tensors inside of ``torch.vmap``, whose values nobody can read."""
    return any(isinstance(value, Tensor) and is_functorch_wrapped_tensor(value) for value in values)


def is_op_call(target: object) -> bool:
    """Whether a graph node's target or a torch function can be a call of a layer's op."""
    return target in _BINDERS and target is not aten.scaled_dot_product_attention.default


def weight_argument(target: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:  # noqa: ANN401 - tensor or node
    """Return the weight among the arguments of a call: a tensor, or a graph node."""
    name, position = ("mat2", 2) if target in _ADDMM else ("weight", 0 if target in _WEIGHT_FIRST else 1)
    return args[position] if len(args) > position else kwargs.get(name)


def bind(target: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """Sort the arguments of a call, whatever their order in ``target``'s signature."""
    names = _ADDMM_NAMES if target in _ADDMM else _NAMES
    return _BINDERS[target](*args, **{names.get(key, key): value for key, value in kwargs.items()})
