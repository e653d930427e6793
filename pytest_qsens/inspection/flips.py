"""What quantizing one part of an op makes of its output."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from pytest_qsens.graph.calls import filled, finite_rows, unquantized
from pytest_qsens.graph.narrow import part_channels
from pytest_qsens.quant.integers import fake_quantized

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qsens.graph.calls import Call
    from pytest_qsens.inspection.measure import Flipped
    from pytest_qsens.quant.calibration import Calibration
    from pytest_qsens.quant.schemes import Scheme
    from pytest_qsens.quant.simulate import Simulator


def part_flips(
    op: str, op_type: str, scheme: Scheme, simulator: Simulator, calibration: Calibration
) -> dict[str, Flipped]:
    """Give what each part of a scheme makes of an op's output: ``weight``, ``input`` and ``output``, if it has them.

    Args:
        op: Name of the op.
        op_type: Its type; of an embedding nothing but the weight is quantized, and keys and values have no parts.
        scheme: The scheme.
        simulator: Of that.
        calibration: Ranges of that.

    """
    parts = scheme.parts
    if op_type == "embedding":
        return {"weight": lambda call: simulator.output(op, call)}
    found: dict[str, Flipped] = {}
    if parts.weight is not None:
        found["weight"] = lambda call: _with_weight(op, call, simulator)
    if parts.activation is not None:
        found["input"] = lambda call: _with_input(op, call, simulator)
    if parts.output:
        qparams = calibration.output_qparams(op)
        found["output"] = lambda call: fake_quantized(unquantized(call), qparams)
    return found


def _with_weight(op: str, call: Call, simulator: Simulator) -> Tensor:
    if call.kind != "linear":
        errors = torch.cat([error for _, error in simulator.weight_errors(op, call, len(call.weight))])
        real = torch.empty_like(call.weight, dtype=torch.float32).copy_(call.weight + errors)  # keeps the layout
        return unquantized(replace(call, weight=real))
    channels = part_channels(call.weight.shape[1])  # the weight is never wide as a whole
    found = call.x.new_empty((*call.x.shape[:-1], len(call.weight)))
    for start, error in simulator.weight_errors(op, call, channels):
        part = slice(start, start + len(error))
        bias = None if call.bias is None else call.bias.expand(len(call.weight))[part]
        found[..., part] = functional.linear(call.x, call.weight[part].float() + error, bias)
    return found


def _with_input(op: str, call: Call, simulator: Simulator) -> Tensor:
    finite = finite_rows(call.x, call.kind)
    x = filled(call.x, finite, 0)
    output = unquantized(replace(call, x=x + simulator.input_error(op, replace(call, x=x))))
    return filled(output, finite, torch.nan)
