"""Which of the schemes that can be simulated a config means, or what of it cannot be simulated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.quant.obstacles import obstacles
from pytest_qsens.quant.op_scheme import OpScheme, Unknown, WeightScheme
from pytest_qsens.quant.schemes import SCHEMES, simulated

if TYPE_CHECKING:
    from pytest_qsens.ops import Op

EMBEDDING = OpScheme(WeightScheme("int8", symmetric=False))
"""What every scheme with int8 weights does to an embedding: uint8 rows with floating-point zero points."""


def simulated_as(scheme: OpScheme | Unknown, op: Op) -> tuple[str | None, str]:
    """Which simulated scheme an op is quantized with.

    Args:
        scheme: How the config says it is.
        op: The op; its features may be unknown, and then nothing is in their way.

    Returns:
        The scheme's name and an empty text; or ``None`` and why it cannot be simulated, naming every property that is
        in the way. For an embedding the name is that of the first of `SCHEMES`: all that quantize it do the same to it.

    """
    if isinstance(scheme, Unknown):
        return None, scheme.reason
    if op.type == "embedding" and scheme.cache is None:
        if scheme == EMBEDDING:
            return next(iter(SCHEMES)), ""
        return None, f"rows of embeddings are simulated as {EMBEDDING.name}, not as {scheme.name}"
    found = simulated(scheme)
    if found is None:
        return None, "; ".join(obstacles(scheme))
    refusal = found.refusal(op.type, op.features)
    return (found.name, "") if refusal is None else (None, refusal)


def is_simulated(scheme: OpScheme | None) -> bool:
    """Whether this is a scheme that means embeddings, too, in a way of their own: `EMBEDDING`."""
    found = None if scheme is None else simulated(scheme)
    return found is not None and found.refusal("embedding") is None
