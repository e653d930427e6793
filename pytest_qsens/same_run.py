"""Whether results are of one model on the same data: what is compared, and how a difference is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pytest_qsens.results import OpResult, RunInfo

OF_THE_MACHINE = frozenset({"cpu", "device", "machine"})
"""What of an environment may differ without other packages or data."""

SAME_MODEL = ("model", "granularity", "data", "checkpoint")
"""Facts of two runs whose scores are of the same ops on the same data."""

SAME_RUN = ("model", "scheme", "granularity", "mode", "engine", "data", "checkpoint")
"""Facts of two parts of one run."""

_NAMED = 3
"""Ops named in a message."""


def difference(one: RunInfo, other: RunInfo, names: Sequence[str]) -> str | None:
    """Tell the first fact in which two runs differ, versions of packages and what a config says included.

    Args:
        one: What is known of the first run.
        other: Of the second.
        names: Facts to compare, such as `SAME_MODEL`.

    """
    here, there = _facts(one, names), _facts(other, names)
    for name in dict.fromkeys((*here, *there)):
        if here.get(name) != there.get(name):
            return f"{name} {_shown(here, name)} and {_shown(there, name)}"
    return None


def _facts(run: RunInfo, names: Sequence[str]) -> dict[str, object]:
    versions = {name: value for name, value in run.environment.items() if name not in OF_THE_MACHINE}
    config = {f"config {name}": value for name, value in (run.config or {}).items() if name != "path"}
    return {**{name: getattr(run, name) for name in names}, **config, **versions}


def _shown(facts: Mapping[str, object], name: str) -> str:
    value = facts.get(name)
    return "not recorded" if value is None else repr(value)


def difference_of_ops(one: Iterable[OpResult], other: Iterable[OpResult]) -> str | None:
    """Tell how the ops of two results differ: in names, types, members of groups, weights, or order."""
    here, there = ([(op.op, op.type, op.ops, op.weights) for op in ops] for ops in (one, other))
    if here == there:
        return None
    alone = sorted({name for name, *_ in here} ^ {name for name, *_ in there})
    differing = sorted({name for name, *_ in set(here) ^ set(there)})
    what = f"not the same in both: {listed(differing)}" if differing else "the same in another order"
    what = f"in one of them only: {listed(alone)}" if alone else what
    return f"ops of the model, {len(here)} and {len(there)}, {what}"


def machine_difference(one: Mapping[str, str], other: Mapping[str, str]) -> str | None:
    """Tell how the machines of two environments differ."""
    found = [
        f"{name} {one.get(name)!r} and {other.get(name)!r}"
        for name in sorted(OF_THE_MACHINE)
        if one.get(name) != other.get(name)
    ]
    return ", ".join(found) or None


def listed(names: Sequence[str]) -> str:
    """Name the first few."""
    return f"{', '.join(names[:_NAMED])}{', ...' * (len(names) > _NAMED)}"
