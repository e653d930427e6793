"""What a plan does to the model, measured: everything that it quantizes, quantized at once."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_qsens.calibrated import calibrate
from pytest_qsens.environment import environment
from pytest_qsens.errors import QsensError
from pytest_qsens.manifest import load_manifest
from pytest_qsens.models.arguments import check_same
from pytest_qsens.models.spec import built
from pytest_qsens.quant.assignment import Assignment
from pytest_qsens.quant.schemes import scheme_named
from pytest_qsens.threads import reproducible_sums

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from pytest_qsens.models.source import ModelSource
    from pytest_qsens.ops import Op
    from pytest_qsens.plans.problem import Problem
    from pytest_qsens.results import RunInfo

_ENGINE = "eager"
"""One joint forward needs no graph, whose capture takes longer."""


class Verifier:
    """Measures plans of one model.

    Args:
        source: The model and its data.
        path: Result file that the plans come from.
        run: Of that file.
        problem: What the plans choose from.

    Raises:
        QsensError: If the model is not the one of the result, or cannot be loaded.

    """

    def __init__(self, source: ModelSource, path: Path, run: RunInfo, problem: Problem) -> None:
        check_same(path, run, source)
        source.check()
        self._ops = _of_plan(load_manifest(source, None), problem)
        _check_ops(path, self._ops, problem)
        reproducible_sums()
        spec = source.load()
        self._spec = replace(spec, model=built(spec))
        self._path, self._run = path, run

    def nmse(self, assignment: Mapping[str, str | None]) -> float:
        """Measure the joint NMSE.

        Args:
            assignment: Op → name of its scheme, ``None`` for those that stay unquantized.

        Raises:
            QsensError: If the model fails under the plan.

        """
        schemes = {op: scheme_named(name, "scheme") for op, name in assignment.items() if name is not None}
        if not schemes:
            return 0.0
        planned = Assignment(
            "the plan",
            schemes,
            {op: name or "unquantized" for op, name in assignment.items()},
            {op: ("unquantized", "the plan leaves it unquantized") for op, name in assignment.items() if name is None},
        )
        calibrated = calibrate(self._spec, self._ops, planned, engine=_ENGINE, divergence=False)
        self._check_reference(calibrated.reference_digest)
        total = calibrated.total()
        if total.isolated is None:
            raise QsensError(f"the plan cannot be measured: {total.reason}")
        return total.isolated["nmse"] or 0.0

    def _check_reference(self, found: str) -> None:
        """Compare the unquantized outputs with those of the result, which is all that tells one factory from another.

        Raises:
            QsensError: If they are others, although everything that they are made with is the same.

        """
        run = self._run
        here = environment("cpu", _ENGINE)
        elsewhere = any(run.environment.get(name) != value for name, value in here.items())
        if run.reference is None or elsewhere or None not in (run.checkpoint, run.data):
            return
        if found not in run.reference.split("+"):
            raise QsensError(
                f"{self._path}: the unquantized outputs of {run.model} are not those of the result (reference {found}, "
                f"not {run.reference}): its code, weights or data have changed, or it is another one each time. "
                "Measure again, and seed what is random"
            )


def _of_plan(ops: Sequence[Op], problem: Problem) -> tuple[Op, ...]:
    """List the ops of a model that the schemes of a plan are of."""
    schemes = [scheme_named(name, "scheme") for name in problem.schemes]
    return tuple(op for op in ops if any(scheme.means(op.type) for scheme in schemes))


def _check_ops(path: Path, ops: Sequence[Op], problem: Problem) -> None:
    planned = {op for unit in problem.units for op in unit.ops}
    strangers = sorted(planned ^ {op.name for op in ops})
    if strangers:
        raise QsensError(
            f"{path}: {len(strangers)} ops are in the result or in the model only, {strangers[0]} for one. "
            "Is it the same model? Measure it again."
        )
