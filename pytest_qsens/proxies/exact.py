"""The exact scores that proxies are compared with: from a result file that fits, or measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_qsens.compare import FEWEST
from pytest_qsens.errors import QsensError
from pytest_qsens.models.arguments import check_same
from pytest_qsens.result_files import load

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from pytest_qsens.models.source import ModelSource
    from pytest_qsens.ops import Op
    from pytest_qsens.results import OpResult, RunInfo

_NAMES_SHOWN = 3


@dataclass(frozen=True)
class Exact:
    """Scores of ops.

    Attributes:
        where: What they come from.
        nmse: Op → NMSE with only this op quantized.
        forwards: What they cost, in forwards of the evaluation data, if that is known.

    """

    where: str
    nmse: Mapping[str, float]
    forwards: float | None


def read_exact(path: Path, source: ModelSource, scheme: str, ops: Sequence[Op]) -> Exact:
    """Take the isolated scores of a result file.

    Args:
        path: Written by ``pytest --qsens-json``.
        source: The model that proxies are going to be computed of.
        scheme: Likewise.
        ops: Of that model.

    Raises:
        QsensError: If the file is of another model, scheme, checkpoint, data, or of other ops, or has no exact scores
            that can be ranked.

    """
    result = load(path)
    run = result.run
    _check_origin(path, run, source, scheme)
    if run.granularity != "op":
        raise QsensError(
            f"{path} holds scores of groups of ops (granularity {run.granularity!r}), and proxies are of single ops. "
            "Measure with --qsens-granularity op."
        )
    measured = [op for op in result.ops if op.status == "measured" and op.isolated is not None]
    if not measured:
        statuses = ", ".join(sorted({op.status for op in result.ops})) or "no op"
        modes = f", mode {run.mode}" if run.mode != "isolated" else ""
        raise QsensError(
            f"{path}: no exact score in it ({statuses}{modes}). Measure them: `pytest --qsens-model {run.model} "
            f"--qsens-scheme {scheme} --qsens-json FILE`."
        )
    _check_ops(path, measured, ops)
    nmse = {op.op: op.isolated["nmse"] or 0.0 for op in measured if op.isolated is not None}
    forwards = None if run.cost.forwards_per_op is None else run.cost.forwards_per_op * len(nmse)
    return ranked(Exact(str(path), nmse, forwards))


def ranked(exact: Exact) -> Exact:
    """Check that scores can be ranked.

    Raises:
        QsensError: If they are too few, or all the same.

    """
    if len(exact.nmse) < FEWEST:
        raise QsensError(f"{exact.where}: {len(exact.nmse)} exact scores, and {FEWEST} are needed. Measure more ops.")
    if len(set(exact.nmse.values())) == 1:
        value = next(iter(exact.nmse.values()))
        raise QsensError(
            f"{exact.where}: all {len(exact.nmse)} exact scores are the same ({value:.6g}), so there is no order of "
            "ops that a proxy could agree with."
        )
    return exact


def _check_origin(path: Path, run: RunInfo, source: ModelSource, scheme: str) -> None:
    check_same(path, run, source)
    if run.scheme != scheme:
        raise QsensError(f"{path} is a result of scheme {run.scheme!r}, not {scheme!r}. Give the scheme with --scheme.")


def _check_ops(path: Path, measured: Collection[OpResult], ops: Sequence[Op]) -> None:
    types = {op.name: op.type for op in ops}
    strangers = [op.op for op in measured if types.get(op.op) != op.type]
    if strangers:
        more = ", ..." if len(strangers) > _NAMES_SHOWN else ""
        raise QsensError(
            f"{path}: {len(strangers)} of its {len(measured)} measured ops are none of the model's, or of another "
            f"type there ({', '.join(strangers[:_NAMES_SHOWN])}{more}). Is it the same model? Measure it again."
        )
