"""Names of the functions that ``__torch_function__`` is given."""

from __future__ import annotations


def name_of(func: object) -> str:
    """Return a torch function's name, and that of the attribute, such as ``T``, where it gets one."""
    name: str = getattr(func, "__name__", str(func))
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name
