"""Attention that runs in modules whose keys and values are no ops: seen while the model runs, so that it can be told.

Ops are listed before anything runs, by what code refers to. Names that are put together while a module runs, and
attention that is multiplied by hand, are seen only then.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from pytest_qsens.graph.attention import SDPA, origin
from pytest_qsens.graph.scopes import ModuleScopes
from pytest_qsens.ops import STATES
from pytest_qsens.wording import first_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

_MATMULS = frozenset(
    {
        *(torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.bmm, Tensor.bmm),
        *(torch.baddbmm, Tensor.baddbmm, torch.mm, Tensor.mm, torch.einsum, functional.linear),
    }
)
_SOFTMAXES = frozenset({torch.softmax, Tensor.softmax, functional.softmax, torch.special.softmax})

BY_PRODUCT = "product"
BY_HAND = "hand"

_SHOWN = 3


class AttentionWatch(TorchFunctionMode):
    """While entered, sees which modules attend.

    By hand is what a softmax of a product of two activations multiplies.

    Args:
        model: The model.
        states: Names of the queries, keys and values that are ops, or of products where none are.

    Attributes:
        found: Module that attends, and is not the owner of one of these → `BY_PRODUCT` or `BY_HAND`.

    """

    def __init__(self, model: nn.Module, states: Collection[str]) -> None:
        super().__init__()
        self._scopes = ModuleScopes(model)
        # a product by hand that is an op says nothing of keys and values, where these are ops of others
        own = [name for name in states if name.rpartition(":")[2] in STATES] or states
        self._known = {name.rpartition(":")[0] for name in own}
        self._known |= {name for name, module in model.named_modules() if _stores_nothing(type(module))}
        self._parameters = {id(parameter) for parameter in model.parameters()}
        self._scores: Any = WeakTensorKeyDictionary()
        self._shares: Any = WeakTensorKeyDictionary()
        self._entered = ExitStack()
        self.found: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._entered.enter_context(self._scopes)
        super().__enter__()  # type: ignore[no-untyped-call] # torch leaves it untyped
        return self

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        self._entered.close()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever func returns
        """Route one torch function call; the protocol of ``torch.overrides``."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and self._scopes.current not in self._known:
            self._see(func, [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)], result)
        return result

    def _see(self, func: Callable[..., Any], given: Sequence[Tensor], result: Tensor) -> None:
        if func in SDPA:
            self.found[self._scopes.current] = BY_PRODUCT
        elif func in _MATMULS:
            if any(one in self._shares for one in given):
                self.found.setdefault(self._scopes.current, BY_HAND)
            elif not any(id(one) in self._parameters for one in given):
                self._scores[result] = True
        elif func in _SOFTMAXES:
            if any(one in self._scores for one in given):
                self._shares[result] = True
        else:  # scaled, masked, dropped out, cast or reshaped
            for kind in (self._scores, self._shares):
                if any(one in kind and one.numel() == result.numel() for one in given):
                    kind[result] = True


def _stores_nothing(cls: type[nn.Module]) -> bool:
    """Whether what a class attends to is known to come from no cache: `torch.nn.MultiheadAttention`, vision towers."""
    if origin(cls) != "transformers":
        return origin(cls) == "torch"
    return not any("past" in name for name in cls.forward.__code__.co_varnames)


def told(found: Mapping[str, str]) -> list[str]:
    """Sentences about attention whose keys and values are no ops.

    Args:
        found: Of `AttentionWatch`, of the whole model.

    """
    sentences = []
    for kind, how, step in (
        (BY_PRODUCT, "torch's scaled_dot_product_attention was called in", "call it by its name in their own methods"),
        (
            BY_HAND,
            "a softmax of a product multiplies values by hand in",
            "call torch.nn.functional.scaled_dot_product_attention there",
        ),
    ):
        names = [name or "the model itself" for name, one in found.items() if one == kind]
        if names:
            sentences.append(
                f"{how} {first_of(names, _SHOWN)}, whose keys and values are not among the ops and stay as they are. "
                f"To have them measured, {step}."
            )
    return sentences
