"""Watch or replace the calls of ops while a model runs in Python, without a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pytest_qsens.graph.calls import Call, bind, is_op_call, weight_argument
from pytest_qsens.graph.scopes import ModuleScopes, OpIndex

Handler = Callable[[str, Call, Callable[[], Tensor]], Tensor]
"""Gets the op's name, its call and what the call would compute; returns the value to use."""


class OpInterceptor(TorchFunctionMode):
    """While entered, every call of an op of ``model`` goes through ``handler``.

    Attributes:
        inlined: Op name → a function that uses its weight in another way than the op's own call. An op can be here
            and be called as well.

    """

    def __init__(self, model: nn.Module, handler: Handler) -> None:
        super().__init__()
        self._index = OpIndex(model)
        self._scopes = ModuleScopes(model)
        self._handler = handler
        self.inlined: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._scopes.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call] # torch leaves it untyped
        return self

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call] # torch leaves it untyped
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
            op = self._index.called(self._scopes.current, weight_argument(func, args, kwargs))
            if op is not None:
                return self._handler(op, bind(func, args, kwargs), lambda: func(*args, **kwargs))
        name = getattr(func, "__name__", str(func))
        if name != "__get__":  # reading .dtype or .device of a weight is no use of it
            for argument in (*args, *kwargs.values()):
                op = self._index.owner(argument)
                if op is not None:
                    self.inlined.setdefault(op, name)
        return func(*args, **kwargs)


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
