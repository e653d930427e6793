"""Products of two activations: found in a model, caught while it runs, each an op of the module that makes it.

What is caught are the factors, just before they are multiplied. Only what torch's ``scaled_dot_product_attention``
multiplies last, probabilities and values, is inside of it: there the call itself is caught.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pytest_qsens.graph.attention import EAGER, SDPA, attends, holds_attention, methods_of
from pytest_qsens.graph.calls import Call, is_vmapped, of_attention
from pytest_qsens.graph.modules import op_type
from pytest_qsens.graph.references import names_in
from pytest_qsens.ops import PRODUCTS, Op

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
    from types import FrameType

    from pytest_qsens.graph.attention import Mark, StateHooks
    from pytest_qsens.graph.scopes import ModuleScopes

Multiply = Callable[[str, Call | None, Callable[[], Tensor]], Tensor]
"""Gets the op's name, its call where that is caught as a whole, and what multiplies; returns the product."""

aten = torch.ops.aten

_NAMES = {"matmul", "bmm", "mm", "baddbmm"}
"""Of functions and methods that multiply matrices."""


class _Factors(NamedTuple):
    """Where a function has its factors: positions, and names as keywords."""

    left: int
    right: int
    names: tuple[tuple[str, ...], tuple[str, ...]]


_ATTENTIONS = ("qk", "pv")
"""Products of a module that attends."""

_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
"""Parameters of torch's attention that can be positional."""

_MATMUL = _Factors(0, 1, (("input", "self"), ("other", "mat2", "tensor2")))
_BADDBMM = _Factors(1, 2, (("batch1",), ("batch2",)))
_FUNCTIONS: dict[Any, _Factors] = {
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _MATMUL),
    **dict.fromkeys((torch.bmm, Tensor.bmm, torch.mm, Tensor.mm), _MATMUL),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm), _BADDBMM),
    **dict.fromkeys((aten.matmul, aten.matmul.default, aten.bmm, aten.bmm.default), _MATMUL),
    **dict.fromkeys((aten.mm, aten.mm.default), _MATMUL),
    **dict.fromkeys((aten.baddbmm, aten.baddbmm.default), _BADDBMM),
}


def list_products(model: nn.Module) -> tuple[Op, ...]:
    """List the products that modules may make, in registration order; works on the meta device.

    Modules that attend have two, ``qk`` and ``pv``. Any module whose forward, with the methods and the functions of the
    same file that it may call, names a function that multiplies matrices has one ``matmul`` for each time that it does.
    Which of them are made, and of activations, a run shows. Modules of torch make theirs where nobody can see them.
    """
    found: dict[type[nn.Module], tuple[str, ...]] = {}
    listed = []
    for name, module in model.named_modules():
        cls = type(module)
        if cls not in found:
            found[cls] = () if op_type(module) is not None else tuple(_kinds(cls))
        kinds = found[cls] if "qk" in found[cls] or not holds_attention(module) else (*_ATTENTIONS, *found[cls])
        listed += [Op(f"{name}:{kind}", kind.partition("_")[0], elements=0) for kind in kinds]
    return tuple(listed)


def _kinds(cls: type[nn.Module]) -> Iterator[str]:
    if cls.__module__.partition(".")[0] == "torch":
        return
    if attends(cls):
        yield from _ATTENTIONS
    for number in range(sum(map(_times, _reached(cls)))):
        yield f"matmul_{number}" if number else "matmul"


def _reached(cls: type[nn.Module]) -> Iterator[CodeType]:
    """Give the code that a forward may run: its own, that of methods, and of functions in the same file."""
    methods = methods_of(cls)
    waiting, seen = [methods[name] for name in ("forward",) if name in methods], set[CodeType]()
    while waiting:
        function = waiting.pop()
        if function.__code__ in seen:
            continue
        seen.add(function.__code__)
        yield function.__code__
        for name in names_in(function.__code__):
            beside = function.__globals__.get(name)
            if name in methods:
                waiting.append(methods[name])
            elif isinstance(beside, FunctionType) and beside.__module__ == function.__module__ and name != EAGER:
                waiting.append(beside)


def _times(code: CodeType) -> int:
    """Count the places where code multiplies matrices."""
    count = sum(
        instruction.argval in _NAMES if instruction.opname.startswith("LOAD_") else instruction.argrepr in ("@", "@=")
        for instruction in dis.get_instructions(code)
        if instruction.opname.startswith(("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL", "BINARY_OP"))
    )
    return count + sum(_times(constant) for constant in code.co_consts if isinstance(constant, CodeType))


class ProductHooks(TorchFunctionMode):
    """While entered, the wanted products go through functions: to be entered before `StateHooks`, as caches come first.

    The products of an attention function of transformers are ``qk`` and ``pv`` of the module that calls it, whatever
    implements it; so is what torch's own makes. Others of one forward are told by the place in Python that makes them,
    in the order in which these come, so that one in a loop is one op. A factor that is a parameter or a buffer, or a
    view of one, is no activation.

    Args:
        model: The model.
        ops: Names of the wanted ops; others are left aside.
        scopes: Tells which module is running.
        attention: Tells when an attention function is.
        mark: Takes and gives a factor; the kinds are those of `pytest_qsens.graph.marks.FACTORS`.
        multiply: Gives a product.

    """

    def __init__(
        self,
        model: nn.Module,
        ops: Collection[str],
        scopes: ModuleScopes,
        attention: StateHooks,
        mark: Mark,
        multiply: Multiply,
    ) -> None:
        super().__init__()
        self._ops = frozenset(name for name in ops if is_product(name))
        self._scopes = scopes
        self._attention = attention
        self._mark = mark
        self._multiply = multiply
        state = (*model.parameters(), *model.buffers()) if self._ops else ()
        self._state = {tensor.untyped_storage().data_ptr() for tensor in state if _is_dense(tensor)} - {0}

    def __enter__(self) -> Self:
        if self._ops:
            super().__enter__()  # type: ignore[no-untyped-call] # torch leaves it untyped
        return self

    def __exit__(self, *exc: object) -> None:
        if self._ops:
            super().__exit__(*exc)  # type: ignore[no-untyped-call] # torch leaves it untyped

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever func returns
        """Route one torch function call; the protocol of ``torch.overrides``."""
        kwargs = kwargs or {}
        factors = _FUNCTIONS.get(func)
        if (factors is None and func not in SDPA) or "out" in kwargs or is_vmapped(*args, *kwargs.values()):
            return func(*args, **kwargs)
        return self._attended(args, kwargs) if factors is None else self._multiplied(func, factors, args, kwargs)

    def _attended(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        given = dict(zip(_ATTENTION, args, strict=False)) | dict(kwargs)
        qk, pv = (f"{self._scopes.current}:{kind}" for kind in ("qk", "pv"))
        if qk in self._ops:
            given["query"] = self._mark(qk, "left", given["query"])
            given["key"] = self._mark(qk, "right_rows", given["key"])

        def attend() -> Tensor:
            return functional.scaled_dot_product_attention(**given)

        return self._multiply(pv, of_attention(**given), attend) if pv in self._ops else attend()

    def _multiplied(
        self, func: Callable[..., Any], factors: _Factors, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:  # noqa: ANN401 - whatever func returns
        positional, named = list(args), dict(kwargs)
        places: list[tuple[Any, Any]] = []
        for position, names in zip((factors.left, factors.right), factors.names, strict=True):
            holder: Any = positional if position < len(positional) else named
            key = position if position < len(positional) else next((name for name in names if name in named), None)
            if key is None or not self._is_activation(holder[key]):
                return func(*args, **kwargs)
            places.append((holder, key))
        op = self._op()
        if op not in self._ops:
            return func(*args, **kwargs)
        for (holder, key), kind in zip(places, ("left", "right"), strict=True):
            holder[key] = self._mark(op, kind, holder[key])
        return self._multiply(op, None, lambda: func(*positional, **named))

    def _is_activation(self, value: object) -> bool:
        if not isinstance(value, Tensor) or not _is_dense(value) or not value.is_floating_point() or not value.dim():
            return False
        return value.untyped_storage().data_ptr() not in self._state

    def _op(self) -> str:
        """Name the op of the product that is being made."""
        module, attending = self._scopes.current, self._attention.inside
        if attending is not None:
            attending.products += 1
            return f"{module}:{('qk', 'pv', '')[min(attending.products, 3) - 1]}"
        number = self._scopes.place(_caller())
        return f"{module}:matmul_{number}" if number else f"{module}:matmul"


def is_product(op: str) -> bool:
    """Whether this is the name of a product, of all names of ops."""
    return op.rpartition(":")[2].partition("_")[0] in PRODUCTS and ":" in op


def _is_dense(tensor: Tensor) -> bool:
    """Whether it has memory of its own kind, which sparse ones have not."""
    return tensor.layout == torch.strided


def _caller() -> tuple[CodeType, int] | None:
    """Return the place in a model's own code that has called torch."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - the only way to know it
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "pytest_qsens"):
        frame = frame.f_back
    return None if frame is None else (frame.f_code, frame.f_lasti)
