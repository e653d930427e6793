"""What quantizes an op that is inspected: what did so in the run of the result, or what would have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.configs.simulated import simulating
from pytest_qsens.quant.op_scheme import named
from pytest_qsens.quant.schemes import scheme_named

if TYPE_CHECKING:
    from pytest_qsens.ops import Op
    from pytest_qsens.quant.schemes import Scheme


def scheme_for(name: str, op: Op, where: str, *, by_config: bool) -> tuple[Scheme | None, str]:
    """Which scheme an op is quantized with.

    Args:
        name: Canonical name.
        op: The op.
        where: What the name is a value for.
        by_config: Whether a config gives the op its scheme: what it says of an embedding is of rows.

    Returns:
        The scheme and an empty text; or ``None`` and why the op cannot be quantized so.

    Raises:
        QsensError: If there is no scheme of this name, or nothing simulates it.

    """
    if by_config and op.type == "embedding":
        scheme, reason = simulating(named(name, where), op)
    else:
        scheme, reason = scheme_named(name, where), ""
    refusal = None if scheme is None else scheme.refusal(op.type, op.features)
    return (scheme, reason) if refusal is None else (None, refusal)
