"""ModelOpt: ``quant_cfg``, which ``mtq.quantize`` is given: each quantizer by its name, after all are switched off.

Sizes of blocks have numbers as keys, which JSON has not, so it is YAML.
"""

from __future__ import annotations

from glob import escape
from typing import TYPE_CHECKING

from pytest_qsens.configs.writers.assigned import Assigned, Inexpressible, obstacle_of_blocks
from pytest_qsens.configs.writers.dump import Row
from pytest_qsens.quant.op_scheme import BLOCK_OF, INTEGERS, ActivationScheme, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_qsens.quant.op_scheme import OpScheme

_FLOATS = {"fp8_e4m3": [4, 3], "mxfp8": [4, 3], "mxfp4": [2, 1], "nvfp4": [2, 1]}
_SCALES = {"mxfp8": [8, 0], "mxfp4": [8, 0], "nvfp4": [4, 3]}


def write(assigned: Sequence[Assigned]) -> dict[str, object]:
    """Write the quantizers of all ops that are quantized.

    Raises:
        Inexpressible: If ModelOpt's quantizers have no attributes for a scheme.

    """
    entries = [Row(quantizer_name="*", enable=False)]
    for one in assigned:
        if one.scheme is not None:
            entries += [Row(entry) for entry in _quantizers(one, one.scheme)]
    return {"quant_cfg": entries, **_algorithm(assigned)}


def _algorithm(assigned: Sequence[Assigned]) -> dict[str, object]:
    """Say how scales and smoothing are found: of all that are smoothed alike, or none."""
    smoothed = {one.scheme.smoothing for one in assigned if one.scheme is not None and _can_be_smoothed(one)}
    known = [smoothing for smoothing in smoothed if smoothing is not None]
    if len(smoothed) == 1 and known and not known[0].shared:
        return {"algorithm": Row(method="smoothquant", alpha=known[0].alpha)}
    return {"algorithm": "max"}


def _can_be_smoothed(one: Assigned) -> bool:
    weight, activation = (None, None) if one.scheme is None else (one.scheme.weight, one.scheme.activation)
    if one.op.type != "linear" or weight is None or activation is None or activation.kind != "static":
        return False
    return weight.dtype == activation.dtype == "int8"


def _quantizers(one: Assigned, scheme: OpScheme) -> Iterator[dict[str, object]]:
    if scheme.cache is not None:
        if (why := _obstacle(scheme.cache, one.op.type)) is not None:
            raise Inexpressible(one, why)
        module, _, kind = one.op.name.rpartition(":")
        name = f"{escape(module)}.{kind}_bmm_quantizer" if module else f"{kind}_bmm_quantizer"
        yield {"quantizer_name": name, "cfg": _attributes(scheme.cache)}
        return
    if scheme.output and scheme.activation is None:
        raise Inexpressible(one, "outputs have quantizers like those of inputs, and there are none")
    parts = {"weight": scheme.weight, "input": scheme.activation}
    parts |= {"output": scheme.activation} if scheme.output else {}
    for name, part in parts.items():
        if part is not None:
            why = _obstacle(part, one.op.type)
            if why is not None:
                raise Inexpressible(one, why)
            yield {"quantizer_name": f"{escape(one.op.name)}.{name}_quantizer", "cfg": _attributes(part)}


def _obstacle(part: WeightScheme | ActivationScheme, op_type: str) -> str | None:
    """Why a quantizer cannot round like this."""
    what = "weights" if isinstance(part, WeightScheme) else "activations"
    if part.dtype not in INTEGERS and part.dtype not in _FLOATS:
        return f"its quantizers have no {part.dtype}"
    if not part.symmetric:
        return f"{what} have zero points, and its quantizers have none"
    if op_type.startswith("conv") and part.granularity not in ("tensor", "channel"):
        return f"a scale per {part.granularity} is along the last axis of a kernel or an image"
    if (why := obstacle_of_blocks(part)) is not None:
        return why
    return None if isinstance(part, WeightScheme) else _obstacle_of_activation(part)


def _obstacle_of_activation(part: ActivationScheme) -> str | None:
    known: tuple[tuple[str, str], ...] = (("static", "tensor"), ("dynamic", "tensor"), ("dynamic", "token"))
    if part.dtype in BLOCK_OF:
        known = (("local" if part.dtype == "nvfp4" else "dynamic", "group"),)
    if (part.kind, part.granularity) in known:
        return None
    ways = ", ".join(f"{kind} per {granularity}" for kind, granularity in known)
    return f"activations of {part.dtype} are {part.kind} per {part.granularity}, not {ways}"


def _attributes(part: WeightScheme | ActivationScheme) -> dict[str, object]:
    found: dict[str, object] = {
        "num_bits": int(part.dtype.removeprefix("int")) if part.dtype in INTEGERS else _FLOATS[part.dtype]
    }
    if part.dtype in _SCALES:
        return found | {"block_sizes": {-1: part.size[0], "type": "dynamic", "scale_bits": _SCALES[part.dtype]}}
    if isinstance(part, ActivationScheme) and part.kind == "dynamic":
        found["type"] = "dynamic"
    if part.granularity in ("tensor", "channel"):
        return found | {"axis": 0 if part.granularity == "channel" else None}
    sizes = {-1: part.size[-1] if part.size else None}  # a token is a block without end
    return found | {"block_sizes": sizes | ({-2: part.size[0]} if part.granularity == "block" else {})}
