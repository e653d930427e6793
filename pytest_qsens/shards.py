"""Which part of the ops a machine measures: whole blocks, balanced by what they are going to cost. No torch needed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from pytest_qsens.errors import QsensError
from pytest_qsens.ops import TOTAL

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_qsens.ops import Op

ELSEWHERE = "in another shard"
"""Reason of an op that other shards measure; what merges shards goes by it."""

WHOLE_RUNS = frozenset({"eager", "fx", "inc"})
"""Engines that run the whole model for each op. The others run what is downstream of it."""

_LOCAL = 0.1
"""Cost of quantizing an op itself, where 1 is a replay of all that is downstream of the first op: as in MiniLM."""

_TOTAL = 4
"""Cost of the whole model in the same unit: a full run with every op quantized, 2 in MiniLM, 6 in a text model."""


@dataclass(frozen=True)
class Shard:
    """Part ``index`` of ``count``; the first one is 1."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str, where: str) -> Shard:
        """Read ``i/N``.

        Raises:
            QsensError: If it is anything else, or i is not between 1 and N; names ``where``.

        """
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text.strip())
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise QsensError(f"{where} takes i/N, part i of N, the first one 1/N and the last one N/N, not {text!r}")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def predicted_costs(ops: Sequence[Op], engine: str, units: Sequence[Op] | None = None) -> dict[str, int]:
    """Predict what each op, and `TOTAL`, costs with an engine, in a unit of its own.

    What is downstream of an op is known by its place in the model alone: cost falls linearly from the first op to the
    last. A group costs what is downstream of its first op, and the quantizing of all. Whole numbers, so that every
    machine comes to the same sums.

    Args:
        ops: All ops of the model, in its order.
        engine: One of `pytest_qsens.option_declarations.ENGINES`.
        units: What is measured, where that are groups.

    """
    units = ops if units is None else units
    if engine in WHOLE_RUNS:
        return {**dict.fromkeys((unit.name for unit in units), 1), TOTAL: 1}
    count, finest = len(ops), round(1 / _LOCAL)
    downstream = {op.name: finest * (count - place) for place, op in enumerate(ops)}
    costs = {unit.name: max(downstream[op.name] for op in unit.ops) + count * len(unit.ops) for unit in units}
    return {**costs, TOTAL: _TOTAL * finest * count}


def split(ops: Sequence[Op], costs: Mapping[str, int], count: int, *, total: bool) -> tuple[frozenset[str], ...]:
    """Distribute ops over shards: the most expensive block first, each to the shard with the least to do.

    The largest load is less than the mean one plus the most expensive block, and no shard is empty unless there is less
    to measure than shards. Ops of a block that are neighbours stay together, as they are measured together, unless
    there are fewer blocks than shards.

    Args:
        ops: What is measured, in model order.
        costs: Of each op, and of `TOTAL`; positive.
        count: How many shards.
        total: Whether the whole model is measured as well, which counts as a block.

    Returns:
        The names in each shard.

    """
    whole = [(TOTAL,)] if total else []
    blocks = [tuple(op.name for op in block) for _, block in groupby(ops, key=lambda op: op.block)]
    if len(blocks) + len(whole) < count:
        blocks = [(op.name,) for op in ops]
    units = [(sum(costs[name] for name in unit), unit) for unit in (*blocks, *whole)]
    loads = [0] * count
    parts: list[set[str]] = [set() for _ in loads]
    for cost, unit in sorted(units, key=lambda it: -it[0]):  # stable: equal costs in model order
        least = loads.index(min(loads))
        loads[least] += cost
        parts[least].update(unit)
    return tuple(map(frozenset, parts))
