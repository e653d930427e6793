"""All modules of a model by name, with their classes: what tools match that smooth or fold more than ops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pytest_qsens.module_tree import ModuleTree

if TYPE_CHECKING:
    from torch import nn


def module_tree(model: nn.Module) -> ModuleTree:
    """List the modules of a model in registration order; works on the meta device."""
    modules = tuple(
        (name, tuple(cls.__name__ for cls in type(module).__mro__ if issubclass(cls, torch.nn.Module)))
        for name, module in model.named_modules()
    )
    return ModuleTree(type(model).__name__, modules)
