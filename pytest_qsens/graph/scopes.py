"""Which module is running, and which op a call belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self, cast

from pytest_qsens.graph.modules import op_type
from pytest_qsens.graph.narrow import stored
from pytest_qsens.ops import STATES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    import torch
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle


_NOT_GIVEN = (
    "its module ran, but gave them neither to transformers' attention interface nor to torch's "
    "scaled_dot_product_attention, outside of torch.vmap"
)
_NOT_ATTENDED = (
    "its module ran, but neither called torch's scaled_dot_product_attention, nor an attention function of "
    "transformers that multiplies with torch's matmul, bmm or baddbmm, outside of torch.vmap"
)
_NO_PRODUCT = (
    "its module ran, but did not multiply two activations here: one factor is a weight or a buffer, nothing was "
    "multiplied, or only inside of torch.vmap"
)
_NOT_CAUGHT = {**dict.fromkeys(STATES, _NOT_GIVEN), **dict.fromkeys(("qk", "pv"), _NOT_ATTENDED)}
"""Type of op → why it was not seen."""


class ModuleScopes:
    """While entered, knows the qualified name of the module whose forward is running.

    ``on_enter`` and ``on_exit``, if given, are called with the name around each module's forward.

    Attributes:
        entered: Names of the modules whose forwards have started.

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
        self._places: list[dict[object, int]] = []  # of each forward that is running
        self.entered: set[str] = set()
        self._handles: list[RemovableHandle] = []

    @property
    def current(self) -> str:
        """Name of the innermost running module; empty outside the model and in its root."""
        return self._stack[-1] if self._stack else ""

    def place(self, key: object) -> int:
        """Count what comes in the innermost running forward, from 0 on; equal keys have one number."""
        places = self._places[-1] if self._places else {}
        return places.setdefault(key, len(places))

    def __enter__(self) -> Self:
        for name, module in self._model.named_modules():
            self._handles += self._hooks(name, module)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stack.clear()
        self._places.clear()

    def _hooks(self, name: str, module: nn.Module) -> list[RemovableHandle]:
        def enter(*_: object) -> None:
            self._stack.append(name)
            self._places.append({})
            self.entered.add(name)
            if self._on_enter is not None:
                self._on_enter(name)

        def leave(*_: object) -> None:
            if self._on_exit is not None:
                self._on_exit(name)
            self._stack.pop()
            self._places.pop()

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


class OpIndex:
    """Finds the op that a call or a weight belongs to."""

    def __init__(self, model: nn.Module) -> None:
        self._weights: dict[str, Tensor] = {}
        # weight norms, parametrizations and pruning compute the weight anew for every call
        self._computed: dict[str, torch.Size] = {}
        self._owners: dict[int, tuple[str, ...]] = {}
        for name, module in model.named_modules():
            if op_type(module) is None:
                continue
            weight = cast("Tensor", module.weight)  # every op type has one
            if "weight" in module._parameters:  # noqa: SLF001 - tells a parameter from a computed attribute
                # what a graph holds; a model in Python uses what passes for it
                self._weights[name] = stored(weight)
                self._owners[id(stored(weight))] = (*self._owners.get(id(stored(weight)), ()), name)
            else:
                self._computed[name] = weight.shape

    def called(self, module: str, weight: object, shape: torch.Size | None) -> str | None:
        """Name of the op if ``module``, which is running, is one and calls it with its own weight.

        The running module decides, not the weight, so that tied weights stay two ops. A computed weight is told by
        its shape.
        """
        if module in self._computed:
            return module if shape == self._computed[module] else None
        own = self._weights.get(module)
        return module if own is not None and own is stored(weight) else None

    def owners(self, weight: object) -> tuple[str, ...]:
        """Names of the ops that have this weight."""
        return self._owners.get(id(stored(weight)), ())

    def out_of_reach(
        self, called: Collection[str], entered: Collection[str], users: Mapping[str, str], states: Collection[str] = ()
    ) -> dict[str, str]:
        """Why ops that took part in a run could not be replaced in it.

        Args:
            called: Ops whose own call was seen.
            entered: Modules whose forwards ran.
            users: Op → function or operator that used its weight in another way.
            states: Ops without weights that were looked for.

        """
        found = {
            op: f"its weight is used by {by} outside of its own forward" for op, by in users.items() if op not in called
        }
        for op in (*self._weights, *self._computed):
            if op in entered and op not in called:
                found.setdefault(op, "its forward ran, but makes no call with its weight that could be replaced")
        for op in states:
            if op.rpartition(":")[0] in entered and op not in called:
                found[op] = _NOT_CAUGHT.get(op.rpartition(":")[2], _NO_PRODUCT)
        return found
