"""Result files that plans are made from: each of one scheme, all of one model on the same data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_qsens.configs.rules import CLASS_OF
from pytest_qsens.errors import QsensError
from pytest_qsens.plans import caches
from pytest_qsens.quant.op_scheme import parse
from pytest_qsens.result_files import load
from pytest_qsens.same_run import SAME_MODEL, difference, difference_of_ops, machine_difference

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from pytest_qsens.results import OpResult, RunResult


@dataclass(frozen=True)
class ResultFile:
    """One of them, and its entries that are planned: of layers, or of queries, keys and values."""

    path: Path
    result: RunResult
    entries: Mapping[str, OpResult]

    @property
    def scheme(self) -> str:
        """That all of it was measured under."""
        return self.result.run.scheme

    @property
    def of_cache(self) -> bool:
        """Whether that is of keys and values."""
        return caches.is_of_cache(self.scheme)

    @property
    def queries(self) -> bool:
        """Whether that is of queries, too."""
        return caches.quantizes_queries(self.scheme)


def read_file(path: Path) -> ResultFile:
    """Read one.

    Raises:
        QsensError: If it cannot be used, is a shard or of a config, has a scheme that is not planned, or no scores.

    """
    result = load(path)
    if result.run.shard is not None:
        raise QsensError(
            f"{path} is shard {result.run.shard}. Put all shards together with `qsens merge`, and plan then"
        )
    if result.run.config is not None:
        raise QsensError(
            f"{path} is a result of the config {result.run.scheme}, whose ops have schemes of their own. Plans are "
            "made of results of --qsens-scheme, a file for each scheme"
        )
    parts = parse(result.run.scheme)
    if parts is not None and parts.products is not None:
        raise QsensError(
            f"{path} is a result of scheme {result.run.scheme}, of products of two activations. Plans are of layers, "
            "or of keys and values: their budgets are of what is stored"
        )
    if caches.is_of_cache(result.run.scheme):
        entries = caches.entries_of(result.ops)
    else:
        entries = {op.op: op for op in result.ops if set(op.type.split("+")) <= CLASS_OF.keys()}
    if not any(op.isolated for op in entries.values()):
        raise QsensError(
            f"{path}: no op of it has a score in mode isolated, which plans are made from. Measure with "
            "--qsens-mode isolated or both"
        )
    return ResultFile(path, result, entries)


def check_same(first: ResultFile, other: ResultFile) -> None:
    """Check that two files are of one model on the same data.

    Raises:
        QsensError: Naming the first difference.

    """
    if first.of_cache != other.of_cache:
        layers, cache = (other, first) if first.of_cache else (first, other)
        raise QsensError(
            f"{layers.path} is of layers ({layers.scheme}) and {cache.path} of keys and values ({cache.scheme}): bits "
            "of weights and those of a cache are no one budget. Plan each by itself, and put the rules of the cache's "
            "plan before those of the layers' in one config"
        )
    here, there = first.result.run, other.result.run
    what = difference(here, there, SAME_MODEL)
    ops = [[*file.entries.values()] for file in (first, other)]
    if first.queries != other.queries:  # one of them knows of no queries
        ops = [caches.without_queries(file.entries) for file in (first, other)]
    what = what or difference_of_ops(*ops)
    if what is None and machine_difference(here.environment, there.environment) is None:
        same = here.reference == there.reference
        what = None if same else f"unquantized outputs, reference {here.reference} and {there.reference}"
    if what is not None:
        raise _foreign(first, other, what)


def _foreign(first: ResultFile, other: ResultFile, what: str) -> QsensError:
    return QsensError(
        f"{first.path} and {other.path} are not of one model on the same data: {what}. Measure every scheme with the "
        "same command but for --qsens-scheme and --qsens-json"
    )


def check_schemes(files: Sequence[ResultFile]) -> None:
    """Check that no two are of one scheme.

    Raises:
        QsensError: Naming two that are.

    """
    seen: dict[str, ResultFile] = {}
    for file in files:
        other = seen.setdefault(file.scheme, file)
        if other is not file:
            raise QsensError(
                f"{other.path} and {file.path} are both of scheme {file.scheme}. Give one file for each scheme"
            )
