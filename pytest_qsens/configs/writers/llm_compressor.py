"""llm-compressor: a ``recipe.yaml`` of one modifier that quantizes, after those that smooth.

Groups are those of compressed-tensors. What is smoothed is named layer by layer, with the layer before it, which is
looked for where llm-compressor's own mappings have it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_qsens.configs.llm_compressor_mappings import mappings_of
from pytest_qsens.configs.llm_compressor_smoothing import NAME, Inapplicable, sets_of
from pytest_qsens.configs.writers.assigned import Assigned, Inexpressible
from pytest_qsens.configs.writers.compressed_tensors import groups

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_qsens.module_tree import ModuleTree
    from pytest_qsens.quant.op_scheme import SmoothQuant


def write(assigned: Sequence[Assigned], tree: ModuleTree | None) -> dict[str, object]:
    """Write a recipe.

    Raises:
        Inexpressible: If compressed-tensors does not quantize a type of op, or has no terms for a scheme; if nothing
            is quantized at all; if layers are smoothed that no mapping of the architecture smooths together.

    """
    if all(one.scheme is None for one in assigned):
        raise Inexpressible(assigned[0], "a recipe quantizes something, and nothing is to be")
    rounded = [one if one.scheme is None else Assigned(one.op, replace(one.scheme, smoothing=None)) for one in assigned]
    try:
        modifiers: dict[str, object] = {"QuantizationModifier": groups(rounded)}
    except Inexpressible as refused:  # with the scheme that was given
        raise Inexpressible(next(one for one in assigned if one.op == refused.one.op), refused.why) from refused
    strengths = _mappings(assigned, tree)
    found: dict[str, object] = {}
    for number, (smoothing, mappings) in enumerate(strengths.items()):
        options = {"smoothing_strength": smoothing.alpha, "mappings": mappings}
        found[f"smoothing_{number}_modifiers"] = {NAME: options}
    return {"quant_stage": {**found, "quant_modifiers": modifiers}}


def _mappings(assigned: Sequence[Assigned], tree: ModuleTree | None) -> dict[SmoothQuant, list[list[object]]]:
    """Find the layer before all that are smoothed: mappings by name, for each strength."""
    left = {one.op.name: one for one in assigned if one.scheme is not None and one.scheme.smoothing is not None}
    if not left:
        return {}
    if tree is None:
        raise Inexpressible(
            next(iter(left.values())),
            "a recipe names the layer before those that are smoothed, which `qsens config` finds with --model",
        )
    quantized = {one.op.name: one for one in assigned if one.scheme is not None}
    found: dict[SmoothQuant, list[list[object]]] = {}
    for smooth, balance in _sets(tree):
        schemes = {name: quantized[name].scheme for name in balance if name in quantized}
        smoothings = {None if scheme is None else scheme.smoothing for scheme in schemes.values()}
        if not left.keys() & schemes.keys():
            continue
        if len(smoothings) > 1:
            one = next(left[name] for name in schemes if name in left)
            raise Inexpressible(one, f"{smooth} smooths {', '.join(balance)} alike")
        smoothing = smoothings.pop()
        assert smoothing is not None  # noqa: S101  # for mypy: one is smoothed
        if not smoothing.shared:
            raise Inexpressible(left[next(iter(schemes))], f"scales of {', '.join(balance)} are shared there")
        found.setdefault(smoothing, []).append([balance, smooth])
        for name in schemes:
            del left[name]
    if left:
        one = next(iter(left.values()))
        raise Inexpressible(one, f"no mapping of llm-compressor for {tree.architecture} smooths its input")
    return found


def _sets(tree: ModuleTree) -> list[tuple[str, list[str]]]:
    found = []
    for mapping in mappings_of(tree):
        try:
            found += [*sets_of(mapping, (), tree)]
        except Inapplicable:  # what it would smooth is refused for that
            continue
    return found
