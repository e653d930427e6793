"""Modules that attend in ways that their own methods do not show."""

from __future__ import annotations

from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn import functional as other_name
from torch.nn.attention.flex_attention import flex_attention as flexible
from torch.nn.functional import scaled_dot_product_attention as sdpa

if TYPE_CHECKING:
    from collections.abc import Callable


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend, for others."""
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def attend_later(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Call what attends."""
    return attend(query, key, value)


def logged(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate, as some do."""

    @wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401 - whatever it takes
        return function(*args, **kwargs)

    return inner


class Kernel:
    """No module, and attends."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend."""
        return sdpa(query, key, value)


class Base(nn.Module):
    """Makes heads; what attends is a subclass's."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over ``(N, tokens, 8)``."""
        query, key, value = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.product(query, key, value).transpose(1, 2).flatten(2)

    def product(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Multiply ``(N, heads, tokens, dim)``."""
        raise NotImplementedError


class ByHelper(Base):
    """By a function of a function."""

    def product(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Multiply ``(N, heads, tokens, dim)``."""
        return attend_later(query, key, value)


class ByClosure(Base):
    """By a function in the method."""

    def product(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Multiply ``(N, heads, tokens, dim)``."""

        def inner() -> Tensor:
            return functional.scaled_dot_product_attention(query, key, value)

        return inner()


class ByComprehension(Base):
    """Sample by sample."""

    def product(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Multiply ``(N, heads, tokens, dim)``."""
        return torch.cat([sdpa(q, k, v) for q, k, v in zip(query.split(1), key.split(1), value.split(1), strict=True)])


class ByOtherName(Base):
    """By another name of the module."""

    def product(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Multiply ``(N, heads, tokens, dim)``."""
        return other_name.scaled_dot_product_attention(query, key, value)


class ByAlias(Base):
    """By another name of the function."""

    def product(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Multiply ``(N, heads, tokens, dim)``."""
        return sdpa(query, key, value)


class ByPrivateName(Base):
    """By torch's own name for it."""

    def product(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Multiply ``(N, heads, tokens, dim)``."""
        return torch._C._nn.scaled_dot_product_attention(query, key, value)


class ByOperator(Base):
    """By the operator."""

    def product(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Multiply ``(N, heads, tokens, dim)``."""
        found: Tensor = torch.ops.aten.scaled_dot_product_attention(query, key, value)
        return found


class ByDecorated(Base):
    """By a decorated method."""

    @logged
    def product(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Multiply ``(N, heads, tokens, dim)``."""
        return getattr(functional, "scaled_dot_product_attention")(query, key, value)  # noqa: B009 - the subject


KERNEL = Kernel()


class ByObject(Base):
    """By an object that it calls."""

    def product(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Multiply ``(N, heads, tokens, dim)``."""
        return KERNEL(query, key, value)


class Given(Base):
    """By what it is given."""

    def __init__(self, kernel: Callable[..., Tensor]) -> None:
        super().__init__()
        self.kernel = kernel

    def product(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Multiply ``(N, heads, tokens, dim)``."""
        return self.kernel(query, key, value)


class InDtype(Base):
    """In a dtype that is not the model's, with a mask in fp32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def product(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Multiply ``(N, heads, tokens, dim)``."""
        mask = torch.full((query.shape[-2], key.shape[-2]), -torch.inf).triu(1)
        states = (state.to(self.dtype) for state in (query, key, value))
        return sdpa(*states, mask).float()


class Mapped(nn.Module):
    """Attends sample by sample inside of ``torch.vmap``, where its layer runs, too."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over ``(N, tokens, 8)``, and multiply."""

        def attend(sample: Tensor) -> Tensor:
            query, key, value = self.qkv(sample).chunk(3, -1)
            return sdpa(query[None], key[None], value[None])[0] @ (query.mT @ key)

        found: Tensor = torch.vmap(attend)(x)
        return found


class Flexible(Base):
    """By torch's ``flex_attention``, which nothing catches."""

    def product(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Multiply ``(N, heads, tokens, dim)``."""
        found: Tensor = flexible(query, key, value)  # type: ignore[assignment] # one tensor
        return found


class ByHand(Base):
    """By products and a softmax of its own."""

    def product(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Multiply ``(N, heads, tokens, dim)``."""
        scores = query @ key.mT / query.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
        return functional.dropout(scores.softmax(-1), training=self.training) @ value


class ByEinsum(Base):
    """By products in another notation."""

    def product(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Multiply ``(N, heads, tokens, dim)``."""
        scores = torch.einsum("nhqd,nhkd->nhqk", query, key)
        return torch.einsum("nhqk,nhkd->nhqd", functional.softmax(scores + 0.0, -1), value)


_HIDDEN = {"attend": "scaled_dot_product_" + "attention"}


class Hidden(Base):
    """By a name that is put together while it runs."""

    def product(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Multiply ``(N, heads, tokens, dim)``."""
        found: Tensor = getattr(functional, _HIDDEN["attend"])(query, key, value)
        return found


class Gated(Base):
    """No attention: mixes features by a softmax of what no product of two activations made."""

    def forward(self, x: Tensor) -> Tensor:
        """Mix ``(N, tokens, 8)``."""
        first, second, _ = self.qkv(x).chunk(3, -1)
        return first.softmax(-1) * second


CAUGHT: dict[str, Callable[[], nn.Module]] = {
    **{cls.__name__: cls for cls in (ByHelper, ByClosure, ByComprehension, ByOtherName, ByAlias, ByPrivateName)},
    **{cls.__name__: cls for cls in (ByOperator, ByDecorated, ByObject)},
    "a function": lambda: Given(attend),
    "torch's own": lambda: Given(functional.scaled_dot_product_attention),
    "a partial": lambda: Given(partial(attend_later)),
    "a partial of torch's own": lambda: Given(partial(functional.scaled_dot_product_attention, is_causal=True)),
    "an object": lambda: Given(Kernel()),
}
"""What is listed, and caught while it runs."""
