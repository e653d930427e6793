"""Operators that give a tensor as it is: where one stands in a graph, an op can put another tensor in its place."""

from __future__ import annotations

from typing import Any

import torch

_library: Any = torch.library.Library("qsens", "FRAGMENT")  # type: ignore[no-untyped-call] # torch's
for _name in ("query", "key", "value", "left", "right", "right_rows"):
    _library.define(f"{_name}(Tensor(a) state) -> Tensor(a)")
    _library.impl(_name, torch.ops.aten.alias.default, "CompositeImplicitAutograd")

MARKS: dict[str, Any] = {
    "q": torch.ops.qsens.query.default,
    "k": torch.ops.qsens.key.default,
    "v": torch.ops.qsens.value.default,
}
"""Type of op → operator that marks its tensor in a graph."""

FACTORS: dict[str, Any] = {
    "left": torch.ops.qsens.left.default,
    "right": torch.ops.qsens.right.default,
    "right_rows": torch.ops.qsens.right_rows.default,
}
"""Kind of call → operator that marks a factor of a product.

The left one, ``(*, rows, inner)``, the right one, ``(*, inner, columns)``, or the right one transposed, as attention is
given its keys.
"""
