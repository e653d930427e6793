"""The part of the tests that is measured here, where several machines share them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_qsens.collection.catalogue import catalogue
from pytest_qsens.collection.parametrized import FIXTURES, made_for, made_with
from pytest_qsens.collection.subjects import Case
from pytest_qsens.given_options import base_options
from pytest_qsens.ops import TOTAL, Op
from pytest_qsens.shards import predicted_costs, split

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_qsens.collection.subjects import Subject

_ELSEWHERE = pytest.StashKey[dict["Subject", set[str]]]()


def keep_part(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what other shards measure; tests of no op run in every shard.

    What is divided is all that the tests were made for, not what ``-k``, ``--lf`` and node ids leave of it: failures
    differ between machines, and each repeats its own.
    """
    shard = base_options(config).shard
    if shard is None:
        return
    mine: dict[Subject, frozenset[str]] = {}
    for key, made in made_for(config).items():
        ops = [unit for unit in made.units if unit.name in made.names]
        costs = predicted_costs(made.model.ops, made.engine, made.units)
        parts = split(ops, costs, shard.count, total=TOTAL in made.names)
        mine[key] = parts[shard.index - 1]
        config.stash.setdefault(_ELSEWHERE, {})[key] = made.names - mine[key]
    dropped = [item for item in items if (case := _case(item)) and case.op not in mine[case.subject]]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        gone = set(map(id, dropped))
        items[:] = [item for item in items if id(item) not in gone]


def elsewhere(config: pytest.Config) -> Mapping[Subject, set[str]]:
    """Names of what other shards measure."""
    return config.stash.get(_ELSEWHERE, {})


def _case(item: pytest.Item) -> Case | None:
    """Tell the op that a test is of, whether it takes its score or not; ``None`` if it is of none."""
    if not isinstance(item, pytest.Function) or not FIXTURES.intersection(item.fixturenames):
        return None
    op = item.callspec.params.get("qsens_op")
    if not isinstance(op, Op) and "qsens_total" not in item.fixturenames:
        return None
    options = made_with(item)
    model = catalogue(item.config).known(options.run_spec)
    name, members = (op.name, op.member_names) if isinstance(op, Op) else (TOTAL, ())
    return Case(model.label, options.label, name, options.granularity, members)
