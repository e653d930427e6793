"""Gates of whole runs: the order of the ops, and how their errors meet."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_qsens.given_options import accepts_all, base_options, updating
from pytest_qsens.ops import TOTAL
from pytest_qsens.option_declarations import MODES
from pytest_qsens.quant.assignment import ADDED_AS

if TYPE_CHECKING:
    import pytest

    from pytest_qsens.options import Options
    from pytest_qsens.session.problems import Problems
    from pytest_qsens.session.run import Run


def predict(run: Run, options: Options) -> None:
    """Put what interactions say of the whole model beside what was measured of it."""
    if options.interactions and run.total is not None:
        from pytest_qsens.interactions import with_prediction

        ops = run.listed(lambda _: "not run")
        run.results[TOTAL] = with_prediction(run.total, ops, run.model) or run.total


def judge_joint(run: Run, options: Options, problems: Problems) -> None:
    """Judge what single ops say of the whole model."""
    run.joint = [gate.judge(run.total) for gate in options.gates.joint]
    for verdict in run.joint:
        if verdict.state != "held":
            problems.add(f"interactions of {run.model} {run.scheme}: {verdict}", unjudged=verdict.state == "not judged")


def judge_order(run: Run, config: pytest.Config, problems: Problems) -> None:
    """Compare the order of the ops with the snapshot's, as that is before it is updated."""
    gates = base_options(config).gates.ranks
    if not gates:
        return
    from pytest_qsens.rank_gates import judge_ranks
    from pytest_qsens.snapshot import load

    recorded = load(run.path, model=run.model, scheme=run.scheme, granularity=run.granularity).ops
    mode = run.mode if run.facts else base_options(config).mode
    # what would be added to a config has no place in the order of what is in it
    ops = [op for op in run.ops if op.name not in run.unquantized and ADDED_AS not in run.schemes.get(op.name, "")]
    found = judge_ranks(gates, ops, recorded, run.measured, MODES[mode])
    if updating(config):  # a part can be accepted, too, and what is not recorded has no order yet
        found = [verdict for verdict in found if verdict.state != "not judged"]
    if accepts_all(config):
        found = [replace(verdict, state="accepted") if verdict.state == "failed" else verdict for verdict in found]
    run.ranks = found
    for verdict in found:
        if verdict.state in ("failed", "not judged"):
            next_step = "; measure all ops, or give this run only thresholds, such as --qsens-fail nmse:5%"
            problems.add(
                f"the order of the ops of {run.model} {run.scheme}: {verdict}"
                f"{next_step * (verdict.state == 'not judged')}",
                unjudged=verdict.state == "not judged",
            )
