"""What tools call the ways to find static scales, and which of ours mean the same."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_qsens.configs.documents import as_text
from pytest_qsens.errors import QsensError
from pytest_qsens.quant.observer_names import AVERAGING_CONSTANT, OBSERVERS, canonical
from pytest_qsens.quant.op_scheme import OpScheme

if TYPE_CHECKING:
    from pytest_qsens.configs.fields import ConfigFields
    from pytest_qsens.quant.op_scheme import Kind, Unknown

COMPRESSED_TENSORS = {"static_minmax": "minmax", "minmax": "moving_average"}
"""Name in llm-compressor 0.14, of static activations → ours."""

NEURAL_COMPRESSOR = {"kl": "histogram", "minmax": "minmax"}
"""``algorithm`` of static activations → ours; ``kl`` is torch's `HistogramObserver` (``adaptor/pytorch.py``)."""

LLM_COMPRESSORS_DEFAULT = "minmax"
"""What finds static scales of activations, and those of tensors in local ones, where no observer is named."""

_WITHOUT_MEMORY = ("minmax", "memoryless_minmax", "static_minmax")
"""All the same where one tensor is seen, as it is of weights and with dynamic scales."""

_LESS = {
    "mse": "it takes a moving average of what fits each batch best, with errors to the power of 2.4; "
    "where it finds static scales, 'mse' is taken, which fits all batches, with squared errors",
    "minmax": "it takes a moving average of the extremes of each batch, and 'static_minmax' is taken",
    "memoryless_mse": "it takes what fits the last batch best",
    "memoryless_minmax": "it takes the extremes of the last batch",
}


def named_by_llm_compressor(fields: ConfigFields, key: str, name: str | None, kind: Kind | None) -> str:
    """Read an observer's name: ours, or what comes nearest; empty if there is none. What has no equal is a problem.

    Args:
        fields: It is from.
        key: It is under.
        name: Itself.
        kind: Of an activation's scales; ``None`` for a weight.

    """
    if name is None:
        return ""
    lower = name.lower()
    if kind == "static" and lower in COMPRESSED_TENSORS:
        return COMPRESSED_TENSORS[lower]
    of_one = kind in (None, "dynamic") and lower in _WITHOUT_MEMORY
    if of_one or (kind == "local" and lower == "static_minmax"):
        return ""
    why = _LESS.get(lower, "it finds scales in its own way")
    fields.problem(key, f"{name!r} changes numbers and is not simulated: {why}")
    return "" if kind != "static" else "mse" if lower == "mse" else "minmax"


def check_averaging(fields: ConfigFields, observer: str) -> None:
    """Read ``observer_kwargs``: all but the usual constant of a moving average is a problem."""
    harmless: list[dict[str, float]] = [{}]
    harmless += [{"averaging_constant": AVERAGING_CONSTANT}] if observer == "moving_average" else []
    fields.changes_numbers("observer_kwargs", "the observer finds scales in its own way", *harmless)


def named_by_us(fields: ConfigFields, kind: str) -> str:
    """Read ``observer`` of our own format.

    Raises:
        QsensError: If there is none of this name, or nothing to be calibrated.

    """
    name = fields.optional_text("observer")
    if name is None:
        return ""
    found = canonical(name)
    if found is None:
        known = ", ".join(OBSERVERS)
        raise QsensError(f"{fields.at('observer')}: {as_text(name)} is not one of {known} (or percentile99.9, say)")
    if kind == "dynamic":
        raise QsensError(
            f"{fields.at('observer')}: dynamic scales come from the values at hand, {name!r} has nothing to observe. "
            "Leave it out, or write kind: static."
        )
    return found


def observed(scheme: OpScheme | Unknown | None, observer: str) -> OpScheme | Unknown | None:
    """Return a scheme whose static scales are found by this observer; others stay as they are."""
    if not isinstance(scheme, OpScheme) or scheme.activation is None or scheme.activation.kind != "static":
        return scheme
    return replace(scheme, activation=replace(scheme.activation, observer=observer))
