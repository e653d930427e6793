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
from functools import lru_cache, partial, wraps
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pytest_qsens.graph.calls import is_vmapped
from pytest_qsens.graph.references import names_in, refers
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

_NAMES = (_INTERFACE, _PRODUCT, "flex_attention")

_METHODS = (FunctionType, staticmethod, classmethod, property)

SDPA: tuple[Any, ...] = (
    functional.scaled_dot_product_attention,  # the same object as torch._C._nn's
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
"""Torch's attention, by all its names."""

_CACHE = ("past_key_values", "past_key_value")
"""Parameters of a forward that takes a cache, as compressed-tensors knows them, too."""


def list_states(model: nn.Module) -> tuple[Op, ...]:
    """List queries, keys and values of attention modules in registration order; works on the meta device.

    Attention modules are told by their methods: they refer to transformers' attention interface, or to torch's
    ``scaled_dot_product_attention`` or ``flex_attention``; those that are not of transformers also by a function that
    they call. A module of transformers whose forward takes no cache, as in vision towers, has nothing to store in one,
    and `torch.nn.MultiheadAttention` takes none.
    """
    caching: dict[type[nn.Module], bool] = {}
    found = []
    for name, module in model.named_modules():
        cls = type(module)
        if cls not in caching:
            caching[cls] = _may_cache(cls)
        if caching[cls] or holds_attention(module):
            found += [Op(f"{name}:{kind}", kind, elements=0) for kind in STATES]
    return tuple(found)


def origin(cls: type[nn.Module]) -> str:
    """Package that a class of modules is from."""
    return cls.__module__.partition(".")[0]


def takes_cache(cls: type[nn.Module]) -> bool:
    """Whether the forward of a class of transformers can be given a cache."""
    return any(name in inspect.signature(cls.forward).parameters for name in _CACHE)


def _may_cache(cls: type[nn.Module]) -> bool:
    """Whether modules of a class attend, to what may come from a cache."""
    return attends(cls) and (origin(cls) != "transformers" or takes_cache(cls))


def attends(cls: type[nn.Module]) -> bool:
    """Whether methods of a class refer to transformers' attention interface, or torch's product; not torch's own."""
    if origin(cls) == "torch":
        return False
    if origin(cls) == "transformers":  # its modules are known to attend by themselves, and functions to be shared
        used = {name for method in methods_of(cls).values() for name in names_in(method.__code__)}
        return not {_INTERFACE, _PRODUCT}.isdisjoint(used)
    return any(refers(method, _NAMES, _objects()) for method in _members(cls).values() if isinstance(method, _METHODS))


def holds_attention(module: nn.Module) -> bool:
    """Whether a module was given a function that attends, or an object with one."""
    if origin(type(module)) in ("torch", "transformers"):
        return False
    held = (value for name, value in vars(module).items() if not name.startswith("_"))
    known = {id(one) for one in _objects()}
    return any(
        id(value) in known
        or (
            refers(value, _NAMES, _objects())
            if isinstance(value, FunctionType | MethodType | partial)
            else _has_methods_that_attend(type(value))  # type: ignore[arg-type] # hashable, as all types
        )
        for value in held
    )


@lru_cache(maxsize=1024)  # every module of a model may hold its config, whose class refers to much
def _has_methods_that_attend(cls: type) -> bool:
    return refers(cls, _NAMES, _objects())


def _objects() -> list[object]:
    """Functions that attend, whatever a module calls them."""
    flex = sys.modules.get("torch.nn.attention.flex_attention")
    return [*SDPA, *([] if flex is None else [flex.flex_attention])]


def methods_of(cls: type[nn.Module]) -> dict[str, FunctionType]:
    """Methods of a class by name, unwrapped, but for those of torch and of transformers' models as a whole."""
    methods = {name: inspect.unwrap(one) for name, one in _members(cls).items() if isinstance(one, FunctionType)}
    return {name: method for name, method in methods.items() if isinstance(method, FunctionType)}


def _members(cls: type[nn.Module]) -> dict[str, Any]:
    """Collect what a class has, but for what it has from torch and from transformers' models as a whole."""
    shared = {nn.Module, object}
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is not None:
        shared |= set(modeling.PreTrainedModel.__mro__)
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base not in shared:
            found |= vars(base)
    return found


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
        if func not in SDPA or is_vmapped(*args, *(kwargs or {}).values()):
            return func(*args, **(kwargs or {}))
        given = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs or {})
        states = self._change(given.pop("query"), given.pop("key"), given.pop("value"))
        return func(*states, *args[3:], **given)
