"""compressed-tensors: ``quantization_config`` of a ``config.json``.

Groups of exact names come first, the group of a whole class last: compressed-tensors takes names before classes, vLLM
what comes first in the file.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_qsens.configs.compressed_tensors import NAME, QUANTIZED
from pytest_qsens.configs.compressed_tensors_arguments import MODES
from pytest_qsens.configs.observers import COMPRESSED_TENSORS
from pytest_qsens.configs.rules import CLASS_OF
from pytest_qsens.configs.writers.assigned import (
    Inexpressible,
    by_scheme,
    most_common,
    names,
    obstacle_of_blocks,
    of_all,
    split,
)
from pytest_qsens.configs.writers.dump import Row
from pytest_qsens.ops import CACHED, STATES
from pytest_qsens.quant.op_scheme import INTEGERS, ActivationScheme, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_qsens.configs.writers.assigned import Assigned
    from pytest_qsens.quant.op_scheme import OpScheme

_FLOATS = {"fp8_e4m3": 8, "mxfp8": 8, "mxfp6": 6, "fp6_e2m3": 6, "fp4_e2m1": 4, "mxfp4": 4, "nvfp4": 4}
_OF_WEIGHTS = ("tensor", "channel", "group", "block")
_DYNAMIC = ("token", "tensor", "group")
_STATIC = ("tensor", "group")
_STRATEGIES = {"head": "attn_head"}
_OBSERVERS = {ours: theirs for theirs, ours in COMPRESSED_TENSORS.items()}


def write(assigned: Sequence[Assigned]) -> dict[str, object]:
    """Write a ``quantization_config``.

    Raises:
        Inexpressible: If compressed-tensors does not quantize a type of op, or has no terms for a scheme.

    """
    return {"quantization_config": {"quant_method": NAME, **groups(assigned)}}


def groups(assigned: Sequence[Assigned]) -> dict[str, object]:
    """Make ``config_groups``, ``kv_cache_scheme`` and ``ignore``, which llm-compressor has, too."""
    assigned, states = split(assigned)
    attention, states = _attention(states)
    cache = of_all(states)
    if cache is not None and (why := _obstacle_of_cache(cache)) is not None:
        raise Inexpressible(states[0], why)
    default = most_common([one for one in assigned if one.op.type == "linear"])
    named: list[tuple[OpScheme, list[str]]] = []
    for scheme, ops in by_scheme(assigned).items():
        if scheme is not None:
            exact = [one for one in ops if (one.op.type, scheme) != ("linear", default)]
            named += [(scheme, names(exact))] if exact else []
            _check(ops, scheme)
    named += [(default, [CLASS_OF["linear"]])] if default is not None else []
    ignored = [one for one in assigned if one.scheme is None and one.op.type in QUANTIZED]
    listed = [{"targets": targets, **_scheme(scheme)} for scheme, targets in named]
    listed += [{"targets": modules, "input_activations": Row(_of_cache(part))} for part, modules in attention.items()]
    config_groups = {f"group_{number}": group for number, group in enumerate(listed)}
    cached = {} if cache is None else {"kv_cache_scheme": Row(_of_cache(cache))}
    return {"config_groups": config_groups, **cached, "ignore": names(ignored)}


def _attention(states: Sequence[Assigned]) -> tuple[dict[ActivationScheme, list[str]], list[Assigned]]:
    """Find the attention modules whose queries are quantized, and as these their keys and values; and all others'."""
    modules: dict[str, list[Assigned]] = {}
    for one in states:
        modules.setdefault(one.op.name.rpartition(":")[0], []).append(one)
    found: dict[ActivationScheme, list[str]] = {}
    others: list[Assigned] = []
    for module, members in modules.items():
        queries = next((one for one in members if one.op.type not in CACHED and one.scheme is not None), None)
        if queries is None:
            others += members
            continue
        caches = {None if one.scheme is None else one.scheme.cache for one in members}
        part = caches.pop()
        if caches or part is None or len(members) < len(STATES):
            raise Inexpressible(queries, "it quantizes queries, keys and values of a module alike, or no queries")
        if (why := _obstacle_of_cache(part)) is not None:
            raise Inexpressible(queries, why)
        found.setdefault(part, []).append(module)
    return found, others


def _check(ops: Sequence[Assigned], scheme: OpScheme) -> None:
    for one in ops:
        if one.op.type not in QUANTIZED:
            raise Inexpressible(one, f"it quantizes linear layers and embeddings, and no {one.op.type}")
    for part in (scheme.weight, scheme.activation):
        why = None if part is None else _obstacle(part)
        if why is not None:
            raise Inexpressible(ops[0], why)
    if scheme.output and (scheme.activation is None or scheme.activation.kind != "static"):
        raise Inexpressible(ops[0], "outputs have an observer like that of static inputs, and there are none")


def _obstacle(part: WeightScheme | ActivationScheme) -> str | None:
    """Why ``QuantizationArgs`` has no terms for this, or they do not go together."""
    why = _obstacle_of_dtype(part, "weights" if isinstance(part, WeightScheme) else "activations")
    if why is not None:
        return why
    if isinstance(part, WeightScheme):
        return None if part.granularity in _OF_WEIGHTS else f"weights have no scale per {part.granularity}"
    if (part.kind == "local") != (part.dtype == "nvfp4" and part.kind != "static"):
        return "scales of two kinds, local and of the tensor, are those of dynamic nvfp4"
    known = _DYNAMIC if part.kind != "static" else _STATIC
    return None if part.granularity in known else f"{part.kind} activations have no scale per {part.granularity}"


def _obstacle_of_dtype(part: WeightScheme | ActivationScheme, what: str) -> str | None:
    if part.dtype in INTEGERS:
        return None
    if part.dtype not in _FLOATS:
        return f"it has no {part.dtype}"
    if not part.symmetric:
        return f"{what} of {part.dtype} have no zero points"
    mode = MODES.get(part.dtype, "")
    if part.scaling_mode != mode:
        return f"it finds scales of {part.dtype} in mode {mode} (measure that to write it)"
    return obstacle_of_blocks(part)


def _obstacle_of_cache(cache: ActivationScheme) -> str | None:
    """Why ``kv_cache_scheme`` cannot say this."""
    known = ("tensor", "head") if cache.kind == "static" else ("tensor",)
    if cache.dtype == "nvfp4":
        return _obstacle(cache)
    if cache.dtype not in (*INTEGERS, "fp8_e4m3"):
        return f"keys and values of {cache.dtype} are none of what it has for a cache"
    if cache.granularity not in known:
        return f"{cache.kind} keys and values have no scale per {cache.granularity}"
    return None


def _of_cache(cache: ActivationScheme) -> dict[str, object]:
    if cache.kind == "dynamic":
        return _arguments(cache)
    return _arguments(replace(cache, observer=cache.observer or "minmax"))


def _scheme(scheme: OpScheme) -> dict[str, object]:
    parts = {"weights": scheme.weight, "input_activations": scheme.activation}
    parts |= {"output_activations": scheme.activation} if scheme.output else {}
    return {key: Row(_arguments(part)) for key, part in parts.items() if part is not None}


def _arguments(part: WeightScheme | ActivationScheme) -> dict[str, object]:
    is_integer = part.dtype in INTEGERS
    found: dict[str, object] = {
        "num_bits": int(part.dtype.removeprefix("int")) if is_integer else _FLOATS[part.dtype],
        "type": "int" if is_integer else "float",
        "symmetric": part.symmetric,
        "strategy": "tensor_group" if part.dtype == "nvfp4" else _STRATEGIES.get(part.granularity, part.granularity),
    }
    if part.granularity == "group":
        found["group_size"] = part.size[0]
    if part.granularity == "block":
        found["block_structure"] = [*part.size]
    if part.dtype.startswith("mx"):
        found["scale_dtype"] = "torch.uint8"
    if isinstance(part, ActivationScheme):
        found["dynamic"] = "local" if part.kind == "local" else part.kind == "dynamic"
        # without a name it would be a moving average
        found |= {} if part.kind == "dynamic" else {"observer": _OBSERVERS[part.observed_by]}
    return found
