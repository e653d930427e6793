"""Weights that stay in the bf16 or fp16 they are stored in, maybe in a mapped file, in a model that computes in fp32.

A part of a weight is widened at a time, into memory that stays in the processor's cache. The products are those of a
model in fp32, bit for bit, where kernels add in one order, as MKL does if asked (`pytest_qsens.threads`).
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map

from pytest_qsens.graph.names import name_of
from pytest_qsens.parts import rows_within

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

NARROW = (torch.bfloat16, torch.float16)

_WORTH_CHECKING = 2**18
"""Values in an fp32 weight from which it is tried whether it fits into bf16: many checkpoints were widened once."""

_PART = 2**20
"""Values widened at a time: 4 MiB in fp32."""


class NarrowWeight(Tensor):
    """A weight that passes as fp32 and is widened by whatever uses it.

    Linear layers and embeddings do so part by part, in one call of the operators below; everything else as a whole.

    Args:
        stored: In bf16 or fp16.

    """

    stored: Tensor

    @staticmethod
    def __new__(cls: type[Self], stored: Tensor) -> Self:
        """Make a tensor without memory of its own."""
        made: Self = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001 - what subclasses call
            cls, stored.shape, strides=stored.stride(), dtype=torch.float32, device=stored.device
        )
        made.stored = stored
        return made

    def __repr__(self) -> str:  # type: ignore[override] # torch's takes what nobody gives
        """Tell what it is instead of its values."""
        return f"{type(self).__name__}({tuple(self.shape)}, {self.stored.dtype})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever func returns
        """Route one torch function call; the protocol of ``torch.overrides``."""
        kwargs = dict(kwargs or {})
        if func is Tensor.__getitem__ and args[1] is ...:
            return args[0]
        if func is Tensor.to and _is_as_told(*args, **kwargs):
            return args[0]
        if name_of(func) in _FORM:
            with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - as subclasses do
                return func(*args, **kwargs)
        if not any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
            if func is functional.linear:
                return _call_linear(*args, **kwargs)
            if func is functional.embedding and _looks_up_only(*args, **kwargs):
                return _call_embedding(*args, **kwargs)
        return _call_widened(func, tuple(args), kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch leaves it to subclasses
        cls,
        func: Any,  # noqa: ANN401 - an operator
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever func returns
        """Compute one operator."""
        kwargs = dict(kwargs or {})
        if func in _VIEWS:
            return cls(args[0].stored)
        return _call_widened(func, tuple(args), kwargs)


_VIEWS = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)

_FORM = frozenset(
    {
        *("__set__", "detach", "dim", "element_size", "is_complex", "is_contiguous", "is_floating_point", "numel"),
        *("requires_grad_", "size", "stride", "_has_compatible_shallow_copy_type"),
        *(
            "data",
            "device",
            "dtype",
            "grad",
            "grad_fn",
            "is_cuda",
            "is_leaf",
            "is_meta",
            "is_sparse",
            "layout",
            "names",
        ),
        *("ndim", "output_nr", "requires_grad", "shape", "_backward_hooks", "_base", "_version"),
    }
)
"""Functions and attributes that need none of a weight's values. (Operators cannot widen it where a graph is traced.)"""


def _is_as_told(weight: Tensor, *args: Any, **kwargs: Any) -> bool:  # noqa: ANN401 - those of `Tensor.to`
    """Whether a weight is in fp32 and on the device that ``to`` asks for."""
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype)
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)  # noqa: SLF001 - what `nn.Module.to` calls
    return device in (None, weight.device) and dtype in (None, torch.float32)


def _widened(value: object) -> object:
    return value.stored.float() if isinstance(value, NarrowWeight) else value


_RENORMALIZING = (functional.embedding, functional.embedding_bag)
"""With ``max_norm`` these write into the rows they look up, and into a copy as well as into the weight."""


def _call_widened(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401 - whatever func returns
    """Call a function with wide copies.

    Raises:
        RuntimeError: If it writes into one, which would be lost.

    """
    wide_args, wide_kwargs = tree_map(_widened, (args, kwargs))
    found = func(*wide_args, **wide_kwargs)
    pairs = zip(tree_leaves((args, kwargs)), tree_leaves((wide_args, wide_kwargs)), strict=True)
    for narrow, wide in pairs:
        if not isinstance(narrow, NarrowWeight) or func in _RENORMALIZING or wide.is_inference():
            continue
        if wide._version:  # noqa: SLF001 - torch has no public name
            raise RuntimeError(
                f"{name_of(func)} writes into a weight of shape {tuple(narrow.shape)}, which is kept as it is stored, "
                f"in {narrow.stored.dtype}. A model whose weights change while it runs cannot be measured."
            )
    return found


def stored(weight: Any) -> Any:  # noqa: ANN401 - what a call has for a weight, which may be none of ours
    """Return a weight as it is stored."""
    return weight.stored if isinstance(weight, NarrowWeight) else weight


def keep_narrow(model: nn.Module) -> None:
    """Make a model compute in fp32, and keep the weights of its linear layers and embeddings as they are stored.

    Weights stored in fp32 are narrowed if that loses nothing. All else that is floating point becomes fp32.
    """
    kept: dict[int, nn.Parameter] = {}
    for module in model.modules():
        weight = module._parameters.get("weight") if isinstance(module, nn.Linear | nn.Embedding) else None  # noqa: SLF001 - tells a parameter from a computed weight
        if weight is not None and id(weight) not in kept and (found := _narrow(weight)) is not None:
            kept[id(weight)] = found
    _cast(model, kept)


def make_wide(model: nn.Module) -> None:
    """Make all of a model fp32."""
    wide = {
        id(value): nn.Parameter(value.stored.float(), requires_grad=False)
        for value in model.parameters()
        if isinstance(value, NarrowWeight)
    }
    _cast(model, wide)


def _cast(model: nn.Module, parameters: Mapping[int, nn.Parameter]) -> None:
    """Put these parameters in the place of those with the given identity; cast all others, and buffers, to fp32."""
    for module in model.modules():
        for name, parameter in module._parameters.items():  # noqa: SLF001 - as `nn.Module.float` goes through them
            if parameter is not None and id(parameter) in parameters:
                module._parameters[name] = parameters[id(parameter)]  # noqa: SLF001
            elif parameter is not None and parameter.is_floating_point():
                parameter.data = parameter.data.float()
        for name, buffer in module._buffers.items():  # noqa: SLF001
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.float()  # noqa: SLF001


def mapped_bytes(model: nn.Module) -> int:
    """Bytes of narrow weights, which may lie in mapped files: memory they are in counts as free to the system."""
    return sum(value.stored.nbytes for value in model.parameters() if isinstance(value, NarrowWeight))


def _narrow(weight: nn.Parameter) -> nn.Parameter | None:
    """Return what takes the place of a weight that is narrow or may as well be; ``None`` if it is neither."""
    if isinstance(weight, NarrowWeight):
        return weight
    found: Tensor | None = weight.data
    if weight.dtype not in NARROW:
        found = _lossless(weight.data) if weight.dtype == torch.float32 and weight.numel() >= _WORTH_CHECKING else None
    if found is None:
        return None
    # a parameter inside of it: replays take parameters for what nobody writes into
    return nn.Parameter(NarrowWeight(nn.Parameter(found, requires_grad=False)), requires_grad=False)


def _lossless(weight: Tensor) -> Tensor | None:
    """Return a weight in bf16 if nothing of it is lost; checked part by part, as most are told by the first."""
    rows = rows_within(_PART, weight)
    found = torch.empty_like(weight, dtype=torch.bfloat16)
    for narrow, part in zip(torch.split(found, rows), torch.split(weight, rows), strict=True):
        narrow.copy_(part)
        if not torch.equal(narrow.float(), part):
            return None
    return found


_GROUP = 64
"""Channels that kernels compute together, or a multiple of it: parts end where a group does, which keeps the bits."""


class _Buffer(threading.local):
    """Memory that parts are widened into: fresh memory would have to be asked of the system every time."""

    def __init__(self) -> None:
        self._memory: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def widened(self, part: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a part ``(rows, in)`` in another dtype, until the next call."""
        return self.memory(part, dtype).copy_(part)

    def memory(self, part: Tensor, dtype: torch.dtype) -> Tensor:
        """Return memory for a part in another dtype, until the next call."""
        key = part.device, dtype
        memory = self._memory.get(key)
        if memory is None or memory.numel() < part.numel():
            memory = self._memory[key] = part.new_empty(max(_PART, part.numel()), dtype=dtype)
        return memory[: part.numel()].view(part.shape)


_buffer = _Buffer()


def memory_for(part: Tensor) -> Tensor:
    """Return memory for a part ``(rows, in)`` in fp32, until the next call, of this or of an operator below."""
    return _buffer.memory(part, torch.float32)


def part_channels(features: int) -> int:
    """Return how many output channels of a weight are widened at a time, with the bits of all at once."""
    return _GROUP * max(1, _PART // max(1, features) // _GROUP)


_library: Any = torch.library.Library("qsens", "DEF")  # type: ignore[no-untyped-call] # torch's
_library.define("linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor")
_library.define("embedding(Tensor weight, Tensor indices) -> Tensor")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a linear layer from a narrow weight ``(out, in)`` in the dtype of ``x``, ``(*, in)``."""
    channels = part_channels(weight.shape[1])
    parts = torch.split(weight, channels)
    if len(parts) == 1:
        return functional.linear(x, _buffer.widened(weight, x.dtype), bias)
    found = x.new_empty((*x.shape[:-1], weight.shape[0]))
    biases = [None] * len(parts) if bias is None else torch.split(bias.expand(weight.shape[0]), channels)
    for output, part, its_bias in zip(torch.split(found, channels, -1), parts, biases, strict=True):
        output.copy_(functional.linear(x, _buffer.widened(part, x.dtype), its_bias))
    return found


def narrow_transposed(values: Tensor, weight: Tensor) -> Tensor:
    """Multiply ``(*, out)`` by the transpose of a narrow weight ``(out, in)``, part by part, in the values' dtype."""
    channels = rows_within(_PART, weight)
    found = values.new_zeros((*values.shape[:-1], weight.shape[1]))
    for part, rows in zip(torch.split(values, channels, -1), torch.split(weight, channels), strict=True):
        found += torch.matmul(part, _buffer.widened(rows, values.dtype))
    return found


def _embedding(weight: Tensor, indices: Tensor) -> Tensor:
    """Look up rows of a narrow weight ``(rows, dim)``, fp32, ``(*, dim)``."""
    return torch.embedding(weight, indices).float()


_library.impl("linear", _linear, "CompositeExplicitAutograd")
_library.impl("embedding", _embedding, "CompositeExplicitAutograd")


LINEAR = torch.ops.qsens.linear.default
"""Linear layer in the dtype of its input: input, narrow weight, bias."""

EMBEDDING = torch.ops.qsens.embedding.default
"""Rows of a narrow weight in fp32: weight, indices."""


def _call_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002 - torch's name
    return cast("Tensor", LINEAR(input, stored(weight), bias))


def _call_embedding(x: Tensor, weight: Tensor, *_: object, **__: object) -> Tensor:
    return cast("Tensor", EMBEDDING(stored(weight), x))


def _looks_up_only(
    _x: Tensor, _weight: Tensor, _padding_idx: object = None, max_norm: float | None = None, *_: object, **__: object
) -> bool:
    """Whether an embedding leaves its weight as it is."""
    return max_norm is None
