"""What is reached in a graph from some of its nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch.fx import Node


def closure(start: Iterable[Node], following: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """Nodes reached from ``start``, those included, by going from a node to those ``following`` it."""
    found = set(start)
    todo = list(found)
    while todo:
        fresh = set(following(todo.pop())) - found
        todo += fresh
        found |= fresh
    return found


def downstream(start: Iterable[Node]) -> set[Node]:
    """Nodes that depend on the value of any of ``start`` through arguments, those included."""
    return closure(start, lambda node: node.users)
