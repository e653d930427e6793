"""Floating-point operations of a model's products: how many are downstream of an op, and how long they take."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from pytest_qsens.graph.capture import Graph, capture
from pytest_qsens.graph.closure import closure, downstream

if TYPE_CHECKING:
    from collections.abc import Callable

    from subjects import Subject
    from torch.fx import Node

aten = torch.ops.aten

_FACTORS: dict[Any, int] = {
    aten.linear.default: 0,
    aten.mm.default: 0,
    aten.bmm.default: 0,
    aten.matmul.default: 0,
    aten.addmm.default: 1,
    aten.baddbmm.default: 1,
}
"""Product → which of its arguments is the first factor, whose last dimension is summed over."""

_CONVOLUTIONS = {getattr(getattr(aten, f"conv{n}d"), kind) for n in (1, 2, 3) for kind in ("default", "padding")}


class Downstream(NamedTuple):
    """FLOPs of the products after an op, up to the output."""

    body: float
    head: float
    """Of a last linear layer that makes logits."""


class Flops:
    """FLOPs of one forward of all evaluation batches.

    Attributes:
        forward: Of all products.
        head: Of the last linear layer, if it makes more values than it takes.
        after: Scored op → what is downstream of it.

    """

    def __init__(self, subject: Subject) -> None:
        self.forward = self.head = 0.0
        self.after = {op.name: Downstream(0.0, 0.0) for op in subject.ops}
        for batch in subject.spec.evaluation:
            self._add(capture(subject.model, batch, subject.spec.output))

    def _add(self, graph: Graph) -> None:
        costs = {node: cost for node in graph.nodes if (cost := flops(node))}
        head = _head(graph)
        logits = costs[head] if head is not None else 0.0
        self.forward += sum(costs.values())
        self.head += logits
        wanted = closure([graph.output], lambda node: node.all_input_nodes)
        for op, before in self.after.items():
            calls = graph.calls.get(op, ())
            after = (downstream(calls) - set(calls)) & wanted
            last = logits if head in after else 0.0
            body = sum(costs.get(node, 0.0) for node in after) - last
            self.after[op] = Downstream(before.body + body, before.head + last)

    def shares(self) -> dict[str, Any]:
        """In parts of a forward."""
        after = {op: [found.body / self.forward, found.head / self.forward] for op, found in self.after.items()}
        return {"forward": self.forward, "head": self.head / self.forward, "after": after}


def flops(node: Node) -> float:
    """Multiplications and additions of a call; 0 for what is no product."""
    if node.target in _FACTORS:
        return 2.0 * _size(node) * _shape(node, _FACTORS[node.target])[-1]
    if node.target in _CONVOLUTIONS:
        return 2.0 * _size(node) * _shape(node, 1)[1:].numel()
    if node.target is aten.scaled_dot_product_attention.default:
        return 4.0 * _shape(node, 0).numel() * _shape(node, 1)[-2]
    return 0.0


def _size(node: Node) -> int:
    return int(node.meta["val"].numel())


def _shape(node: Node, argument: int) -> torch.Size:
    return node.args[argument].meta["val"].shape  # type: ignore[union-attr, no-any-return]  # a node


def _head(graph: Graph) -> Node | None:
    linears = [node for node in graph.nodes if node.target is aten.linear.default]
    if not linears:
        return None
    out, into = _shape(linears[-1], 1)
    return linears[-1] if out > into else None


_KINDS = {
    "products": re.compile(
        r"aten::(mm|addmm|bmm|baddbmm|_int_mm|linear|mv|addmv|dot|.*conv.*)|mkldnn.*|aten::mkldnn.*"
    ),
    "attention": re.compile(r"aten::.*(scaled_dot_product|flash_attention|efficient_attention).*"),
}


def time_shares(work: Callable[[], object], listed: int = 6) -> dict[str, Any]:
    """Shares of the wall time of some work: products, attention, what else torch does, and all outside of it."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        start = time.perf_counter()
        work()
        wall = time.perf_counter() - start
    times = {event.key: event.self_cpu_time_total * 1e-6 for event in profiled.key_averages()}
    found = {
        kind: sum(value for key, value in times.items() if pattern.fullmatch(key)) for kind, pattern in _KINDS.items()
    }
    rest = {key: value for key, value in times.items() if not any(p.fullmatch(key) for p in _KINDS.values())}
    largest = sorted(rest, key=lambda key: -rest[key])[:listed]
    found |= {"elementwise and copies": sum(rest.values()), "outside of torch": wall - sum(times.values())}
    return {
        "wall": wall,
        "shares": {kind: value / wall for kind, value in found.items()},
        "largest": {key: rest[key] / wall for key in largest},
    }
