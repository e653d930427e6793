"""What is known of a run, put together as result files have it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.collection.catalogue import catalogue
from pytest_qsens.collection.choice import select, wants_total
from pytest_qsens.collection.subjects import Subject
from pytest_qsens.given_options import base_options
from pytest_qsens.op_results import without_score
from pytest_qsens.ops import TOTAL, Op
from pytest_qsens.shards import ELSEWHERE

if TYPE_CHECKING:
    import pytest

    from pytest_qsens.results import RunResult
    from pytest_qsens.session.run import Run


def result_of(run: Run, config: pytest.Config, wall_seconds: float) -> RunResult:
    """Put what is known of a run together as result files have it."""
    from pytest_qsens.results import Cost, RunInfo, RunResult

    options = base_options(config)
    selected: set[str] = set()
    if (run.model, run.scheme, run.granularity) == chosen(config):
        selected = {op.name for op in select(catalogue(config).known(options.run_spec), options)}

    def reason(op: Op) -> str:
        if op.name in run.elsewhere:
            return ELSEWHERE
        return "not run" if not selected or op.name in selected else "not selected by --qsens-ops or --qsens-max-ops"

    total = run.total
    if total is None:
        why = "not run" if wants_total(options) else "only some ops were asked for"
        total = without_score(Op(TOTAL, TOTAL), "unrun", reason=ELSEWHERE if TOTAL in run.elsewhere else why)
    info = RunInfo(
        model=run.model,
        scheme=run.scheme,
        engine="+".join(run.engines) or options.engine,
        mode=run.mode if run.facts else options.mode,
        environment=run.environment,
        cost=Cost(wall_seconds, run.reference_seconds, run.forwards_per_op),
        engine_reason=run.engine_reason,
        data=run.data,
        profile=run.profile,
        reference=run.reference,
        checkpoint=run.checkpoint,
        shard=options.shard,
        cached=len(run.cached),
        granularity=run.granularity,
        config=run.config["about"] if run.config else None,
    )
    ops, joint = run.listed(reason), None
    if options.interactions:
        from pytest_qsens.interactions import matrix

        joint = matrix(ops, run.model)
    return RunResult(info, ops, total, joint)


def chosen(config: pytest.Config) -> Subject | None:
    """Tell what the options of the command line and the ini file are about."""
    options = base_options(config)
    if options.model is None:
        return None
    return Subject(catalogue(config).known(options.run_spec).label, options.label, options.granularity)
