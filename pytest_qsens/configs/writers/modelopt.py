"""ModelOpt: ``hf_quant_config.json`` of an exported checkpoint, and what AutoQuantize is to leave out."""

from __future__ import annotations

from glob import escape
from typing import TYPE_CHECKING

from pytest_qsens.configs.modelopt import ALGORITHMS, CACHE_ALGORITHMS
from pytest_qsens.configs.writers.assigned import Inexpressible, by_scheme, names, of_all, split
from pytest_qsens.configs.writers.dump import Row
from pytest_qsens.quant.op_scheme import OpScheme, WeightScheme, parse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_qsens.configs.writers.assigned import Assigned

_BY_SCHEME = {
    parse(template): name
    for name, template in reversed(ALGORITHMS.items())
    if template is not None and "{}" not in template
}
"""Scheme → ``quant_algo``, the first of several that mean the same."""

_BY_CACHE = {
    scheme: name
    for name, template in CACHE_ALGORITHMS.items()
    if template is not None and (scheme := parse(template)) is not None
}

_PLAIN: dict[str, dict[str, object]] = {"W8A8_SQ_PER_CHANNEL": {"pre_quant_scale": False}}
"""What makes clear that nothing is done beside rounding, where an algorithm's name says more."""


def write_exported(assigned: Sequence[Assigned]) -> dict[str, object]:
    """Write ``hf_quant_config.json``: one algorithm for all linear layers, or each layer by its name.

    Raises:
        Inexpressible: If it is no linear layer, or ModelOpt has no algorithm for a scheme.

    """
    assigned, states = split(assigned)
    cache = of_all(states)
    cached = None if cache is None else _BY_CACHE.get(OpScheme(None, cache=cache))
    if cache is not None and cached is None:
        known = ", ".join(scheme.name for scheme in _BY_CACHE)
        raise Inexpressible(states[0], f"there is no kv_cache_quant_algo for it; there are some for {known}")
    quantized = [one for one in assigned if one.scheme is not None]
    excluded = [escape(one.op.name) for one in assigned if one.scheme is None and one.op.type == "linear"]
    algorithms = {scheme: _algorithm(ops) for scheme, ops in by_scheme(quantized).items()}
    inside: dict[str, object]
    if len(algorithms) == 1:
        inside = {**next(iter(algorithms.values())), "kv_cache_quant_algo": cached}
    else:
        layers = {one.op.name: Row(algorithms[one.scheme]) for one in quantized}
        inside = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": cached, "quantized_layers": layers}
    return {"producer": Row(name="pytest-qsens"), "quantization": {**inside, "exclude_modules": excluded}}


def _algorithm(ops: Sequence[Assigned]) -> dict[str, object]:
    scheme = ops[0].scheme
    for one in ops:
        if one.op.type != "linear":
            raise Inexpressible(one, f"it says how linear layers are quantized, and no {one.op.type}")
    weight = None if scheme is None else scheme.weight
    if scheme in _BY_SCHEME:
        size = weight.size if weight is not None and weight.granularity == "group" else ()
        algorithm: dict[str, object] = {"quant_algo": _BY_SCHEME[scheme]}
        return algorithm | ({"group_size": size[0]} if size else {}) | _PLAIN.get(_BY_SCHEME[scheme], {})
    if (
        weight is not None
        and weight.granularity == "group"
        and scheme == OpScheme(WeightScheme("int4", "group", weight.size))
    ):
        return {
            "quant_algo": "W4A16_AWQ",
            "group_size": weight.size[0],
            "has_zero_point": False,
            "pre_quant_scale": False,
        }
    known = ", ".join([*(known.name for known in _BY_SCHEME if known is not None), "w4a16 with groups"])
    raise Inexpressible(ops[0], f"there is no quant_algo for it; there are some for {known}")


def write_disabled(assigned: Sequence[Assigned]) -> dict[str, object]:
    """Write what AutoQuantize is to leave out; how it quantizes the rest it chooses itself."""
    left_out = [escape(name) for name in names(one for one in assigned if one.scheme is None)]
    for one in assigned:
        if one.op.type == "embedding" and one.scheme is not None:
            raise Inexpressible(one, "AutoQuantize does not search embeddings")
    return {"disabled_layers": left_out}
