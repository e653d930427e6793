"""Which module is running, and which op a call belongs to."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Self, cast

from pytest_qsens.graph.modules import op_type

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle


class ModuleScopes:
    """While entered, knows the qualified name of the module whose forward is running.

    ``on_enter`` and ``on_exit``, if given, are called with the name around each module's forward.
    """

    def __init__(
        self,
        model: nn.Module,
        on_enter: Callable[[str], None] | None = None,
        on_exit: Callable[[str], None] | None = None,
    ) -> None:
        self._model = model
        self._on_enter = on_enter
        self._on_exit = on_exit
        self._stack: list[str] = []
        self._handles: list[RemovableHandle] = []

    @property
    def current(self) -> str:
        """Name of the innermost running module; empty outside the model and in its root."""
        return self._stack[-1] if self._stack else ""

    def __enter__(self) -> Self:
        for name, module in self._model.named_modules():
            self._handles += self._hooks(name, module)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stack.clear()

    def _hooks(self, name: str, module: nn.Module) -> list[RemovableHandle]:
        def enter(*_: object) -> None:
            self._stack.append(name)
            if self._on_enter is not None:
                self._on_enter(name)

        def leave(*_: object) -> None:
            if self._on_exit is not None:
                self._on_exit(name)
            self._stack.pop()

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


class OpIndex:
    """Finds the op that a call or a weight belongs to."""

    def __init__(self, model: nn.Module) -> None:
        self._weights: dict[str, Tensor] = {
            name: cast("Tensor", module.weight)  # every op type has one
            for name, module in model.named_modules()
            if op_type(module) is not None
        }
        owners = Counter(id(weight) for weight in self._weights.values())
        self._by_weight = {id(w): name for name, w in self._weights.items() if owners[id(w)] == 1}

    def called(self, module: str, weight: object) -> str | None:
        """Name of the op if ``module``, which is running, is one and calls it with its own weight.

        The running module decides, not the weight, so that tied weights stay two ops.
        """
        own = self._weights.get(module)
        return module if own is not None and own is weight else None

    def owner(self, weight: object) -> str | None:
        """Name of the only op that has this weight, if there is one."""
        return self._by_weight.get(id(weight))
