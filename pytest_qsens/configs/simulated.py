"""Which of the schemes that can be simulated a config means, or what of it cannot be simulated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.quant.obstacles import obstacles
from pytest_qsens.quant.op_scheme import OpScheme, Unknown, WeightScheme
from pytest_qsens.quant.schemes import SCHEMES, Scheme, simulated

if TYPE_CHECKING:
    from pytest_qsens.ops import Op

EMBEDDING = OpScheme(WeightScheme("int8", symmetric=False))
"""What every scheme with int8 weights does to an embedding: uint8 rows with floating-point zero points."""


def simulated_as(scheme: OpScheme | Unknown, op: Op) -> tuple[str | None, str]:
    """Name which simulated scheme an op is quantized with, and why if there is none: see `simulating`."""
    found, reason = simulating(scheme, op)
    return None if found is None else found.name, reason


def simulating(scheme: OpScheme | Unknown, op: Op) -> tuple[Scheme | None, str]:
    """Which simulated scheme an op is quantized with.

    Args:
        scheme: How the config says it is.
        op: The op; its features may be unknown, and then nothing is in their way.

    Returns:
        The scheme and an empty text; or ``None`` and why it cannot be simulated, naming every property that is in the
        way. For an embedding that is `EMBEDDING` it is the first of `SCHEMES`: all that quantize it so do the same.

    """
    if isinstance(scheme, Unknown):
        return None, scheme.reason
    if op.type == "embedding" and scheme.of_layers:
        if scheme == EMBEDDING:
            return next(iter(SCHEMES.values())), ""
        reasons = _obstacles_of_rows(scheme)
        return (None, "; ".join(reasons)) if reasons else (Scheme(scheme, rows=True), "")
    found = simulated(scheme)
    if found is None:
        return None, "; ".join(obstacles(scheme))
    refusal = found.refusal(op.type, op.features)
    return (found, "") if refusal is None else (None, refusal)


def _obstacles_of_rows(scheme: OpScheme) -> list[str]:
    """Name what keeps rows of an embedding from being rounded like this: of others the extremes are known at most."""
    weight = scheme.weight
    if scheme.activation is not None or scheme.output or weight is None:
        return [f"rows of embeddings are simulated with weights only, such as {EMBEDDING.name}, not as {scheme.name}"]
    if weight.granularity not in ("tensor", "channel", "group") or weight.dtype == "nvfp4":
        known = "per tensor, row or group"
        return [*obstacles(scheme), f"rows of embeddings are simulated with scales {known}, not {scheme.name}"]
    return obstacles(scheme)


def is_simulated(scheme: OpScheme | None) -> bool:
    """Whether this is a scheme that means embeddings, too, in a way of their own: `EMBEDDING`."""
    found = None if scheme is None else simulated(scheme)
    return found is not None and found.refusal("embedding") is None
