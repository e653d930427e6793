"""The schemes by name. Importing this costs nothing, so that options can be checked early."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Scheme:
    """How the ops of a model are quantized.

    In every scheme weights are int8, symmetric, per output channel, by min/max. Embeddings are weight-only: uint8
    per row with floating-point zero points, as torch's ``embedding_byte`` executes them.

    Attributes:
        name: Name on the command line and in file names.
        description: One line for people.
        activation: ``static``: uint8 affine per tensor, scales from a histogram observer on the calibration data.
            ``dynamic``: int8 symmetric per token, scales from the values at hand.
        requantize_output: Whether the output is rounded to uint8 with an observer of its own.

    """

    name: str
    description: str
    activation: Literal["static", "dynamic"]
    requantize_output: bool = False

    def refusal(self, op_type: str) -> str | None:
        """Why an op of this type cannot be quantized, or ``None`` if it can."""
        if self.activation == "dynamic" and op_type.startswith("conv"):
            return f"{self.name} quantizes activations per token, and the input of a {op_type} has no tokens"
        return None


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            "w8a8",
            "int8 per-channel weights, static uint8 activations, uint8 outputs: what torch's x86 backend executes",
            activation="static",
            requantize_output=True,
        ),
        Scheme("w8a8_static", "int8 per-channel weights, static uint8 activations", activation="static"),
        Scheme("w8a8_dynamic", "int8 per-channel weights, dynamic int8 per-token activations", activation="dynamic"),
    )
}

Schemes = Scheme | Mapping[str, Scheme]
"""One scheme for all ops, or op → its own."""


def scheme_of(schemes: Schemes, op: str) -> Scheme | None:
    """Return what quantizes an op; ``None`` if nothing does."""
    return schemes if isinstance(schemes, Scheme) else schemes.get(op)


def all_of(schemes: Schemes) -> list[Scheme]:
    """List the schemes in use."""
    return [schemes] if isinstance(schemes, Scheme) else list(dict.fromkeys(schemes.values()))
