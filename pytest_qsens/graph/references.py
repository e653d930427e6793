"""What functions refer to, and the functions that they call: read from their code, without running it."""

from __future__ import annotations

import inspect
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_FOREIGN = ("torch", "builtins", "typing", "functools", "math", "numpy", "einops")
"""Packages whose functions are not followed: they call each other, and no model's own attention is there."""


def names_in(code: CodeType) -> Iterator[str]:
    """Names of globals, attributes and imports that code refers to, and of the functions and comprehensions in it."""
    for part in _codes(code):
        yield from part.co_names


def refers(value: object, names: Iterable[str], objects: Iterable[object]) -> bool:
    """Whether a function, or one that it calls, refers to one of these names or objects, under whatever name.

    Followed are globals, attributes of imported modules, closures, defaults, decorated and partial functions, and the
    methods of plain classes and of callable objects; not what torch and other libraries define, and no modules that are
    called, which have methods of their own.

    Args:
        value: A function, a method, or what wraps one; nothing else refers to anything.
        names: Of globals or attributes, or strings that stand for them in the code.
        objects: Told by identity.

    """
    wanted, known = frozenset(names), {id(one) for one in objects}
    pending, seen = [value], set[int]()
    while pending:
        found = pending.pop()
        if id(found) in known:
            return True
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, partial):
            pending.append(found.func)
        for function in _functions(found):
            if not wanted.isdisjoint(_said(function.__code__)):
                return True
            pending += _referred(function)
    return False


def _functions(value: object) -> Iterator[FunctionType]:
    """Functions that something consists of, but for those of `_FOREIGN` packages."""
    if isinstance(value, type):
        own = not issubclass(value, nn.Module) and _is_followed(value.__module__)
        members = vars(value).values() if own else ()
        yield from (part for member in members if not isinstance(member, type) for part in _functions(member))
    elif isinstance(value, staticmethod | classmethod | MethodType):
        yield from _functions(value.__func__)
    elif isinstance(value, property):
        yield from (part for one in (value.fget, value.fset) for part in _functions(one))
    elif isinstance(value, FunctionType):
        whole = inspect.unwrap(value)
        if isinstance(whole, FunctionType) and whole is not value:
            yield from _functions(whole)
        if _is_followed(value.__module__):
            yield value
    elif callable(value) and not isinstance(value, nn.Module | partial):
        yield from _functions(type(value))


def _is_followed(module: str | None) -> bool:
    return (module or "").partition(".")[0] not in _FOREIGN


def _said(code: CodeType) -> Iterator[str]:
    """Names in code, and strings by which ``getattr`` may find them."""
    for part in _codes(code):
        yield from part.co_names
        yield from (constant for constant in part.co_consts if isinstance(constant, str))


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _referred(function: FunctionType) -> Iterator[object]:
    """Values that a function refers to."""
    names = frozenset(names_in(function.__code__))
    for name in names:
        value = function.__globals__.get(name)
        if isinstance(value, ModuleType):
            yield from _attributes(vars(value), names)
        else:
            yield value
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()


def _attributes(scope: Mapping[str, object], names: frozenset[str]) -> Iterator[object]:
    for name in names & scope.keys():
        value = scope[name]
        if isinstance(value, ModuleType):  # a package's module, one step further
            yield from (vars(value)[inner] for inner in names & vars(value).keys())
        else:
            yield value
