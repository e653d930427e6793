"""What quantizing one part of an op makes of its output."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_qsens.graph.calls import finite_rows, unquantized
from pytest_qsens.inspection.ranges import over
from pytest_qsens.quant.calibration import Calibration
from pytest_qsens.quant.integers import fake_quantized
from pytest_qsens.quant.op_scheme import OpScheme
from pytest_qsens.quant.schemes import Scheme
from pytest_qsens.quant.simulate import Simulator

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qsens.graph.calls import Call
    from pytest_qsens.inspection.measure import Flipped


def part_flips(
    op: str, op_type: str, scheme: Scheme, simulator: Simulator, calibration: Calibration
) -> dict[str, Flipped]:
    """Give what each part of a scheme makes of an op's output: ``weight``, ``input`` and ``output``, if it has them.

    Args:
        op: Name of the op.
        op_type: Its type; of an embedding nothing but the weight is quantized.
        scheme: The scheme.
        simulator: Of that.
        calibration: Ranges of that.

    """
    parts = scheme.parts
    if op_type == "embedding":
        return {"weight": lambda call: simulator.output(op, call)}
    found: dict[str, Flipped] = {}
    if parts.weight is not None:
        alone = Scheme(OpScheme(parts.weight))
        of_weight = Simulator(alone, Calibration(alone))
        found["weight"] = lambda call: of_weight.output(op, call)
    if parts.activation is not None:
        found["input"] = lambda call: _with_input(op, call, simulator)
    if parts.output:
        qparams = calibration.output_qparams(op)
        found["output"] = lambda call: fake_quantized(unquantized(call), qparams)
    return found


def _with_input(op: str, call: Call, simulator: Simulator) -> Tensor:
    finite = finite_rows(call.x, call.kind)
    x = call.x if finite is None else call.x.masked_fill(~over(finite, call.x), 0)
    output = unquantized(replace(call, x=x + simulator.input_error(op, replace(call, x=x))))
    return output if finite is None else output.masked_fill(~over(finite, output), float("nan"))
