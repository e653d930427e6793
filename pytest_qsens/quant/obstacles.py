"""What keeps a scheme from being simulated, property by property."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.quant.observer_names import OBSERVERS, percentile_of
from pytest_qsens.quant.op_scheme import BLOCK_OF

if TYPE_CHECKING:
    from pytest_qsens.quant.op_scheme import ActivationScheme, OpScheme, WeightScheme

INTEGERS = tuple(f"int{bits}" for bits in range(2, 9))
FLOATS = ("fp8_e4m3", "mxfp8", "mxfp4", "nvfp4")
_DTYPES = f"int2 to int8, {', '.join(FLOATS)}"

_STATIC = ("int8", "fp8_e4m3")

OBSERVERS_OF_FLOATS = ("minmax", "moving_average", "percentile", "mse")
"""Without those that reckon with steps of one size: torch's histogram and the entropy of integers."""


def obstacles(scheme: OpScheme) -> list[str]:
    """Name every property that cannot be simulated, and what of its kind can; empty if all can.

    >>> from pytest_qsens.quant.op_scheme import OpScheme, WeightScheme
    >>> obstacles(OpScheme(WeightScheme("nf4")))
    ['weights are nf4 (simulated: int2 to int8, fp8_e4m3, mxfp8, mxfp4, nvfp4)']
    """
    if scheme.cache is not None:
        return _of_cache(scheme.cache)
    if scheme.products is not None:
        return _of_products(scheme.products)
    parts = [*_of_weight(scheme.weight), *_of_activation(scheme.activation), *_of_output(scheme)]
    return parts + _of_smoothing(scheme)


def _of_weight(weight: WeightScheme | None) -> list[str]:
    if weight is None:
        return ["weights are not quantized (simulated: with weights only)"]
    if weight.dtype not in (*INTEGERS, *FLOATS):
        return [f"weights are {weight.dtype} (simulated: {_DTYPES})"]
    usual: tuple[str, ...] = ("tensor", "channel", "group")
    usual += ("block",) if weight.dtype == "fp8_e4m3" else ()
    return [*_of_extent("weights", weight, usual), *_of_zero_points("weights", weight)]


def _of_activation(activation: ActivationScheme | None) -> list[str]:
    if activation is None:
        return []
    kind, dtype = activation.kind, activation.dtype
    if dtype not in (*INTEGERS, *FLOATS):
        return [f"activations are {dtype} (simulated: {_DTYPES})"]
    if kind == "static" and dtype not in _STATIC:
        return [f"static activations are {dtype} (simulated: {', '.join(_STATIC)})"]
    if kind == "local" and dtype != "nvfp4":
        return [f"{dtype} activations have scales of two kinds, static and dynamic (simulated: of nvfp4)"]
    usual = ("tensor",) if kind == "static" else ("tensor", "token", "group")
    what = f"{kind} activations"
    found = [*_of_extent(what, activation, usual), *_of_zero_points(what, activation)]
    return found + _of_observer(what, activation)


def _of_observer(what: str, activation: ActivationScheme) -> list[str]:
    known: tuple[str, ...] = OBSERVERS if activation.dtype in INTEGERS else OBSERVERS_OF_FLOATS
    known = known if activation.kind == "static" else ("minmax",)
    if (
        not activation.observer
        or activation.observer in known
        or ("percentile" in known and _is_percentile(activation))
    ):
        return []
    return [
        f"scales of {what} of {activation.dtype} are found by {activation.observer} (simulated: by {', '.join(known)})"
    ]


def _is_percentile(activation: ActivationScheme) -> bool:
    return percentile_of(activation.observer) is not None


def _of_smoothing(scheme: OpScheme) -> list[str]:
    if scheme.smoothing is None:
        return []
    weight, activation = scheme.weight, scheme.activation
    of_integers = (
        weight is not None and weight.dtype in INTEGERS and activation is not None and activation.dtype in INTEGERS
    )
    if of_integers and weight is not None and weight.granularity in ("channel", "group"):
        return []
    return ["inputs are smoothed (simulated: with integers, and weights that have a scale per channel or group)"]


def _of_cache(cache: ActivationScheme) -> list[str]:
    kind, dtype = cache.kind, cache.dtype
    if dtype not in (*INTEGERS, *FLOATS):
        return [f"keys and values are {dtype} (simulated: {_DTYPES})"]
    if kind == "static" and dtype in BLOCK_OF:
        scales = "dynamic or local" if dtype == "nvfp4" else "dynamic"
        return [f"static keys and values are {dtype} (simulated for {dtype}: {scales})"]
    if kind == "local" and dtype != "nvfp4":
        return [f"{dtype} keys and values have scales of two kinds, static and dynamic (simulated: of nvfp4)"]
    usual = ("tensor", "head", "channel") if kind == "static" else ("tensor", "token", "group")
    what = f"{kind} keys and values"
    if cache.observer and (kind, cache.observer) != ("static", "moving_average"):
        known = "minmax and moving_average" if kind == "static" else "minmax"
        return [f"scales of {what} are found by {cache.observer} (simulated: by {known})"]
    return [*_of_extent(what, cache, usual), *_of_zero_points(what, cache)]


def _of_products(factors: ActivationScheme) -> list[str]:
    kind, dtype, what = factors.kind, factors.dtype, f"{factors.kind} factors of products"
    known = (*INTEGERS, "fp8_e4m3")
    if dtype not in known:
        return [f"factors of products are {dtype} (simulated: int2 to int8, fp8_e4m3)"]
    if kind == "local":
        return ["factors of products have scales of two kinds, static and dynamic (simulated: of one kind)"]
    if factors.observer and factors.observer != "moving_average":
        return [f"scales of {what} are found by {factors.observer} (simulated: by minmax and moving_average)"]
    usual = ("tensor",) if kind == "static" else ("tensor", "token")
    return [*_of_extent(what, factors, usual), *_of_zero_points(what, factors)]


def _of_output(scheme: OpScheme) -> list[str]:
    activation = scheme.activation
    if scheme.output and (activation is None or (activation.dtype, activation.kind) != ("int8", "static")):
        return ["outputs are requantized (simulated: with static int8 activations only)"]
    return []


def _of_extent(what: str, part: WeightScheme | ActivationScheme, usual: tuple[str, ...]) -> list[str]:
    if part.dtype in BLOCK_OF:
        fits, known = part.size == (BLOCK_OF[part.dtype],), f"group of {BLOCK_OF[part.dtype]}"
    else:
        fits, known = part.granularity in usual, " or ".join(filter(None, (", ".join(usual[:-1]), usual[-1])))
    if fits:
        return []
    return [f"{what} have a scale per {_per(part)} (simulated for {part.dtype}: per {known})"]


def _of_zero_points(what: str, part: WeightScheme | ActivationScheme) -> list[str]:
    if part.symmetric or part.dtype in INTEGERS:
        return []
    return [f"{what} have zero points (simulated for {part.dtype}: symmetric)"]


def _per(part: WeightScheme | ActivationScheme) -> str:
    if part.granularity == "group":
        return f"group of {part.size[0]}"
    return f"block of {part.size[0]} x {part.size[1]}" if part.granularity == "block" else part.granularity
