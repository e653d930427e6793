"""llm-compressor: a ``recipe.yaml`` of one modifier that quantizes, with the groups of compressed-tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.configs.writers.assigned import Inexpressible
from pytest_qsens.configs.writers.compressed_tensors import groups

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_qsens.configs.writers.assigned import Assigned


def write(assigned: Sequence[Assigned]) -> dict[str, object]:
    """Write a recipe.

    Raises:
        Inexpressible: If compressed-tensors does not quantize a type of op, or has no terms for a scheme; if nothing
            is quantized at all.

    """
    if all(one.scheme is None for one in assigned):
        raise Inexpressible(assigned[0], "a recipe quantizes something, and nothing is to be")
    return {"quant_stage": {"quant_modifiers": {"QuantizationModifier": groups(assigned)}}}
