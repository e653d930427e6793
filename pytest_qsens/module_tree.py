"""All modules of a model as names, with those of their classes. No torch needed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModuleTree:
    """What a model is made of.

    Attributes:
        architecture: Name of the model's class.
        modules: Name of each module, the model's own being empty, and the names of its class and of those above it up
            to torch's ``Module``, in registration order.

    """

    architecture: str
    modules: tuple[tuple[str, tuple[str, ...]], ...]
