"""Watch or replace the calls of ops while a model runs in Python, without a graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pytest_qsens.graph.attention import StateHooks
from pytest_qsens.graph.calls import Call, bind, is_op_call, is_vmapped, of_state, weight_argument
from pytest_qsens.graph.names import name_of
from pytest_qsens.graph.products import ProductHooks
from pytest_qsens.graph.scopes import ModuleScopes, OpIndex

Handler = Callable[[str, Call, Callable[[], Tensor]], Tensor]
"""Gets the op's name, its call and what the call would compute; returns the value to use."""

_METADATA = {"device", "dtype", "is_cuda", "is_meta", "layout", "ndim", "requires_grad", "shape"}
"""Attributes of a weight that are no use of its values."""


class OpInterceptor(TorchFunctionMode):
    """While entered, every call of an op of ``model``, and these of its ops without weights, go through ``handler``."""

    def __init__(self, model: nn.Module, handler: Handler, states: Collection[str] = ()) -> None:
        super().__init__()
        self._index = OpIndex(model)
        self._scopes = ModuleScopes(model)
        self._handler = handler
        self._states = states
        self._hooks = StateHooks(model, states, self._scopes, self._state)
        self._products = ProductHooks(model, states, self._scopes, self._hooks, self._state, self._product)
        self._called: set[str] = set()
        self._users: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._scopes.__enter__()
        self._products.__enter__()
        self._hooks.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call] # torch leaves it untyped
        return self

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call] # torch leaves it untyped
        self._hooks.__exit__(*exc)
        self._products.__exit__(*exc)
        self._scopes.__exit__(*exc)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever func returns
        """Route one torch function call; the protocol of ``torch.overrides``."""
        kwargs = kwargs or {}
        if is_op_call(func):
            if is_vmapped(*args, *kwargs.values()):
                return func(*args, **kwargs)
            weight = weight_argument(func, args, kwargs)
            op = self._index.called(self._scopes.current, weight, getattr(weight, "shape", None))
            if op is not None:
                self._called.add(op)
                return self._handler(op, bind(func, args, kwargs), lambda: func(*args, **kwargs))
        name = name_of(func)
        if name not in _METADATA:
            for argument in tree_leaves((args, kwargs)):
                for op in self._index.owners(argument):
                    self._users.setdefault(op, name)
        return func(*args, **kwargs)

    def out_of_reach(self) -> dict[str, str]:
        """Ops that took part in what ran so far but not by a call of their own, and why."""
        return self._index.out_of_reach(self._called, self._scopes.entered, self._users, self._states)

    def _state(self, op: str, kind: str, state: Tensor) -> Tensor:
        self._called.add(op)
        return self._handler(op, of_state(kind, state), lambda: state)

    def _product(self, op: str, call: Call | None, multiply: Callable[[], Tensor]) -> Tensor:
        if call is None:  # the factors went through
            return multiply()
        self._called.add(op)
        return self._handler(op, call, multiply)


@contextmanager
def unchanged_state(model: nn.Module) -> Iterator[None]:
    """Undo what the forward writes into the model's own buffers, so that no run depends on the ones before."""
    saved = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers()]  # noqa: SLF001 - no public name
    try:
        yield
    finally:
        for buffer, version, value in saved:
            if buffer._version != version:  # noqa: SLF001
                buffer.copy_(value)
