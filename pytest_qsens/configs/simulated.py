"""Which of the schemes that can be simulated a config means, or what of it cannot be simulated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.quant.op_scheme import ActivationScheme, OpScheme, Unknown, WeightScheme
from pytest_qsens.quant.schemes import SCHEMES

if TYPE_CHECKING:
    from pytest_qsens.quant.schemes import Scheme


def described(scheme: Scheme) -> OpScheme:
    """Put a simulated scheme in a config's terms, for every op but embeddings."""
    static = scheme.activation == "static"
    return OpScheme(
        WeightScheme("int8"),
        ActivationScheme("int8", scheme.activation, "tensor" if static else "token", symmetric=not static),
        scheme.requantize_output,
    )


EMBEDDING = OpScheme(WeightScheme("int8", symmetric=False))
"""What every simulated scheme does to an embedding: uint8 rows with floating-point zero points."""

_BY_SCHEME = {described(scheme): scheme for scheme in SCHEMES.values()}


def simulated_as(scheme: OpScheme | Unknown, op_type: str) -> tuple[str | None, str]:
    """Which of `SCHEMES` an op is quantized with.

    Args:
        scheme: How the config says it is.
        op_type: Type of the op, as in `Op`.

    Returns:
        The scheme's name and an empty text; or ``None`` and why it cannot be simulated, naming every property that is
        in the way. For an embedding the name is that of the first scheme: all do the same to it.

    """
    if isinstance(scheme, Unknown):
        return None, scheme.reason
    if op_type == "embedding":
        if scheme == EMBEDDING:
            return next(iter(SCHEMES)), ""
        return None, f"rows of embeddings are simulated as {EMBEDDING.name}, not as {scheme.name}"
    found = _BY_SCHEME.get(scheme)
    if found is None:
        return None, "; ".join(_obstacles(scheme))
    refusal = found.refusal(op_type)
    return (found.name, "") if refusal is None else (None, refusal)


def is_simulated(scheme: OpScheme | None) -> bool:
    """Whether this is one of `SCHEMES`."""
    return scheme in _BY_SCHEME


def _obstacles(scheme: OpScheme) -> list[str]:
    return [*_of_weight(scheme.weight), *_of_activation(scheme.activation), *_of_output(scheme)]


def _of_weight(weight: WeightScheme | None) -> list[str]:
    if weight is None:
        return ["weights are not quantized (simulated: int8)"]
    found = []
    if weight.dtype != "int8":
        found.append(f"weights are {weight.dtype} (simulated: int8)")
    if weight.granularity != "channel":
        found.append(f"weights have a scale per {_per(weight.granularity, weight.size)} (simulated: per channel)")
    if not weight.symmetric:
        found.append("weights have zero points (simulated: symmetric)")
    return found


def _of_activation(activation: ActivationScheme | None) -> list[str]:
    if activation is None:
        return ["activations are not quantized (simulated: int8, static or dynamic)"]
    found = []
    if activation.dtype != "int8":
        found.append(f"activations are {activation.dtype} (simulated: int8)")
    if activation.kind == "local":
        found.append("activations have scales of two kinds, static and dynamic (simulated: one of them)")
        return found
    static = activation.kind == "static"
    usual = "tensor" if static else "token"
    if activation.granularity != usual:
        found.append(
            f"{activation.kind} activations have a scale per {_per(activation.granularity, activation.size)} "
            f"(simulated: per {usual})"
        )
    if activation.symmetric == static:
        found.append(
            f"{activation.kind} activations {'are symmetric' if static else 'have zero points'} "
            f"(simulated: {'with zero points' if static else 'symmetric'})"
        )
    return found


def _of_output(scheme: OpScheme) -> list[str]:
    if scheme.output and (scheme.activation is None or scheme.activation.kind != "static"):
        return ["outputs are requantized (simulated: with static activations only)"]
    return []


def _per(granularity: str, size: tuple[int, ...]) -> str:
    if granularity == "group":
        return f"group of {size[0]}"
    return f"block of {size[0]} x {size[1]}" if granularity == "block" else granularity
