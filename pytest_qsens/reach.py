"""Which ops of a calibrated model can be measured, and why the others cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.op_results import why_left_out, without_score

if TYPE_CHECKING:
    from pytest_qsens.engines import Engine, Unit
    from pytest_qsens.ops import Op
    from pytest_qsens.quant.assignment import Assignment
    from pytest_qsens.quant.calibration import Calibration
    from pytest_qsens.results import OpResult, Status


class Reach:
    """What of the ops the config, the calibration data and the evaluation data let be measured.

    Args:
        assignment: How each op is quantized.
        calibration: What it found of the ops.
        engine: Tells what the evaluation data reach, and what it can put something in the place of.

    """

    def __init__(self, assignment: Assignment, calibration: Calibration, engine: Engine) -> None:
        self._assignment = assignment
        self._calibration = calibration
        self._engine = engine

    def refused(self, op: Op) -> OpResult | None:
        """Say of an op, or group, that has no score why that is."""
        if self.flipped(op):
            return None
        without = self.left_out(op)
        statuses = {status for status, _ in without.values()}
        order: tuple[Status, ...] = ("unexercised", "unquantizable", "unquantized")
        gravest = next(status for status in order if status in statuses)
        return without_score(op, gravest, reason=why_left_out(op, without))

    def left_out(self, op: Op) -> dict[str, tuple[Status, str]]:
        """Members that cannot be measured → why."""
        return {member.name: why for member in op.ops if (why := self._why_not(member, op)) is not None}

    def flipped(self, op: Op) -> Unit:
        """Names of what is quantized, or not, when a score is measured."""
        return tuple(member.name for member in op.ops if self._why_not(member, op) is None)

    def _why_not(self, op: Op, group: Op) -> tuple[Status, str] | None:
        """Tell the status of an op that cannot be measured, by itself or in a group, and the reason."""
        refusal = self._assignment.refusal(op, group)
        if refusal is not None:
            return refusal
        why = self._calibration.refused.get(op.name) or self._engine.out_of_reach.get(op.name)
        if why is not None:
            return "unquantizable", why
        if op.name not in self._engine.exercised:
            return "unexercised", "the evaluation data never reached it"
        if op.name not in self._calibration.reached:
            return "unexercised", "the calibration data never reached it, so it has no scales"
        return None
