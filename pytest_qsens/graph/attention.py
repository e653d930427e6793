"""Queries, keys and values of attention, where a cache would store them: found in a model, caught while it runs.

A module of transformers hands them to the library's attention interface, after rotary embeddings and before the heads
of grouped-query attention are repeated: that is what its cache returns. A module that attends by itself hands them to
torch's ``scaled_dot_product_attention``.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from types import FunctionType
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pytest_qsens.ops import STATES, Op

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from pytest_qsens.graph.scopes import ModuleScopes

Mark = Callable[[str, str, Tensor], Tensor]
"""Gets the op's name, its type, and the tensor; returns the tensor to use."""

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_PRODUCT = "scaled_dot_product_attention"
EAGER = "eager_attention_forward"
"""Name of the function with which modules of transformers attend if no other is chosen."""

_CACHE = ("past_key_values", "past_key_value")
"""Parameters of a forward that takes a cache, as compressed-tensors knows them, too."""


def list_states(model: nn.Module) -> tuple[Op, ...]:
    """List queries, keys and values of attention modules in registration order; works on the meta device.

    Attention modules are told by their methods: they refer to transformers' attention interface, or to torch's
    ``scaled_dot_product_attention``. A module of transformers whose forward takes no cache, as in vision towers, has
    nothing to store in one, and `torch.nn.MultiheadAttention` takes none.
    """
    modules = dict(model.named_modules())
    caching = {cls for cls in set(map(type, modules.values())) if _may_cache(cls)}
    return tuple(
        Op(f"{name}:{kind}", kind, elements=0)
        for name, module in modules.items()
        if type(module) in caching
        for kind in STATES
    )


def _may_cache(cls: type[nn.Module]) -> bool:
    """Whether modules of a class attend, to what may come from a cache."""
    if not attends(cls):
        return False
    takes = any(name in inspect.signature(cls.forward).parameters for name in _CACHE)
    return takes or cls.__module__.partition(".")[0] != "transformers"


def attends(cls: type[nn.Module]) -> bool:
    """Whether methods of a class refer to transformers' attention interface, or torch's product; not torch's own."""
    if cls.__module__.partition(".")[0] == "torch":
        return False
    methods = methods_of(cls).values()
    return not {_INTERFACE, _PRODUCT}.isdisjoint(name for method in methods for name in method.__code__.co_names)


def methods_of(cls: type[nn.Module]) -> dict[str, FunctionType]:
    """Methods of a class by name, unwrapped, but for those of torch and of transformers' models as a whole."""
    shared = {nn.Module, object}
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is not None:
        shared |= set(modeling.PreTrainedModel.__mro__)
    found: dict[str, object] = {}
    for base in reversed(cls.__mro__):
        if base not in shared:
            found |= vars(base)
    methods = {name: inspect.unwrap(method) for name, method in found.items() if isinstance(method, FunctionType)}
    return {name: method for name, method in methods.items() if isinstance(method, FunctionType)}


@dataclass
class Attending:
    """One call of an attention function.

    Attributes:
        products: How many it has made so far.

    """

    products: int = 0


class StateHooks:
    """While entered, the wanted queries, keys and values of a model go through ``mark``.

    Args:
        model: The model.
        states: Names of the wanted ops; products of activations among them, for which it is noted when modules attend.
        scopes: Tells which module is running.
        mark: Takes and gives a tensor.

    Attributes:
        inside: The call of an attention function that is running; ``None`` if none is.

    """

    def __init__(self, model: nn.Module, states: Collection[str], scopes: ModuleScopes, mark: Mark) -> None:
        self._states = frozenset(states)
        owners = {name.rpartition(":")[0] for name in self._states}
        wanted = {name: module for name, module in model.named_modules() if name in owners}
        self._names = {id(module): name for name, module in wanted.items()}
        scopes_of_forwards = (inspect.unwrap(type(module).forward).__globals__ for module in wanted.values())
        self._scopes_of_forwards = list({id(scope): scope for scope in scopes_of_forwards}.values())
        self._scopes = scopes
        self._mark = mark
        self.inside: Attending | None = None
        self._entered = ExitStack()

    def __enter__(self) -> Self:
        if not self._states:
            return self
        modeling = sys.modules.get("transformers.modeling_utils")
        if modeling is not None:
            # the former since transformers 5.1; earlier a module asks for a function by name, or takes its own
            for method in ("get_interface", "__getitem__"):
                if (find := getattr(modeling.AttentionInterface, method, None)) is not None:
                    self._entered.enter_context(
                        _with_attribute(modeling.AttentionInterface, method, self._giving(find))
                    )
        for scope in self._scopes_of_forwards:
            if EAGER in scope:
                self._entered.enter_context(_with_entry(scope, EAGER, self._attending(scope[EAGER])))
        self._entered.enter_context(_Products(self._product))
        return self

    def __exit__(self, *_: object) -> None:
        self._entered.close()

    def _giving(self, find: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a method that finds an attention function."""

        @wraps(find)
        def found(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - transformers'
            return self._attending(find(*args, **kwargs))

        return found

    def _attending(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - transformers'
            if self.inside is not None:  # an interface that was found by another one
                return function(module, query, key, value, *args, **kwargs)
            name = self._names.get(id(module))
            if name is not None:
                query, key, value = self._marked(name, query, key, value)
            with self._attended():
                return function(module, query, key, value, *args, **kwargs)

        return attend

    @contextmanager
    def _attended(self) -> Iterator[None]:
        """See that the products inside of an attention function are not taken for a module's own."""
        self.inside = Attending()
        try:
            yield
        finally:
            self.inside = None

    def _product(self, *states: Tensor) -> list[Tensor]:
        return [*states] if self.inside is not None else self._marked(self._scopes.current, *states)

    def _marked(self, module: str, *states: Tensor) -> list[Tensor]:
        names = [f"{module}:{kind}" for kind in STATES]
        return [
            self._mark(name, kind, state) if name in self._states else state
            for name, kind, state in zip(names, STATES, states, strict=True)
        ]


@contextmanager
def _with_attribute(cls: type, name: str, value: object) -> Iterator[None]:
    """Give a class another attribute for a while; one that it inherits is inherited again."""
    own = vars(cls).get(name)
    setattr(cls, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(cls, name)
        else:
            setattr(cls, name, own)


@contextmanager
def _with_entry(scope: dict[str, Any], name: str, value: object) -> Iterator[None]:
    """Give a module's scope another value for a while."""
    own = scope[name]
    scope[name] = value
    try:
        yield
    finally:
        scope[name] = own


class _Products(TorchFunctionMode):
    """While entered, what every ``scaled_dot_product_attention`` multiplies goes through a function."""

    def __init__(self, change: Callable[..., list[Tensor]]) -> None:
        super().__init__()
        self._change = change

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever func returns
        """Route one torch function call; the protocol of ``torch.overrides``."""
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs or {})
        states = self._change(given.pop("query"), given.pop("key"), given.pop("value"))
        return func(*states, *args[3:], **given)
