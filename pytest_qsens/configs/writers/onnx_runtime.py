"""ONNX Runtime: arguments of ``quantize_static``, with the nodes that are to be left out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_qsens.configs.writers.assigned import Assigned, Inexpressible
from pytest_qsens.configs.writers.dump import Row
from pytest_qsens.quant.observer_names import percentile_of
from pytest_qsens.quant.op_scheme import ActivationScheme, OpScheme, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Sequence

_KINDS = {
    "linear": ("MatMul", "Gemm"),
    "conv1d": ("Conv",),
    "conv2d": ("Conv",),
    "conv3d": ("Conv",),
    "embedding": ("Gather",),
}
"""Nodes that torch.onnx makes of a type of op. Of those of a linear layer a model has one; the other is no node."""

_TYPES = {"int4": "Int4", "int8": "Int8", "int16": "Int16"}


def write(assigned: Sequence[Assigned]) -> dict[str, object]:
    """Write one scheme for the whole model, and the nodes of ops that are not quantized.

    Raises:
        Inexpressible: If there are several schemes, or one that ``quantize_static`` has not.

    """
    quantized = [(one, one.scheme) for one in assigned if one.scheme is not None]
    first = next(((one, scheme) for one, scheme in quantized if one.op.type != "embedding"), None)
    if first is None:
        scheme = _for_embeddings(quantized)
    else:
        scheme = first[1]
        _check(*first)
    of_embedding = OpScheme(None if scheme.weight is None else replace(scheme.weight, granularity="tensor"))
    for one, own in quantized:
        expected = of_embedding if one.op.type == "embedding" else scheme
        if own != expected:
            raise Inexpressible(one, f"a file has one scheme for all, which makes {expected.name!r} of it")
    nodes = [name for one in assigned if one.scheme is None for name in _nodes(one)]
    return {"nodes_to_exclude": nodes, **_arguments(scheme)}


def _for_embeddings(quantized: Sequence[tuple[Assigned, OpScheme]]) -> OpScheme:
    """Scheme of the ops that there are none of, which fits those of embeddings."""
    weight = next((scheme.weight for _, scheme in quantized), None) or WeightScheme("int8")
    found = OpScheme(
        replace(weight, granularity="channel"),
        ActivationScheme("int8", "static", "tensor", symmetric=False, observer="minmax"),
        output=True,
    )
    for one, _ in quantized[:1]:
        _check(one, found)
    return found


def _check(one: Assigned, scheme: OpScheme) -> None:
    weight, activation = scheme.weight, scheme.activation
    if weight is None or activation is None:
        raise Inexpressible(one, "quantize_static rounds weights and activations both")
    if activation.kind != "static" or activation.granularity != "tensor":
        raise Inexpressible(one, "quantize_static has one static scale for an activation")
    if not scheme.output:
        raise Inexpressible(one, "outputs are not requantized, which quantize_static does")
    for what, part, dtypes in (("weights", weight, tuple(_TYPES)), ("activations", activation, ("int8", "int16"))):
        if part.dtype not in dtypes:
            raise Inexpressible(one, f"{what} are {part.dtype}, not one of {', '.join(dtypes)}")
    if weight.granularity not in ("channel", "tensor"):
        raise Inexpressible(one, f"weights have a scale per {weight.granularity}, not per channel or tensor")


def _arguments(scheme: OpScheme) -> dict[str, object]:
    weight, activation = scheme.weight, scheme.activation
    assert weight is not None and activation is not None  # noqa: PT018, S101  # for mypy: checked above
    found: dict[str, object] = {
        "per_channel": weight.granularity == "channel",
        "weight_type": f"Q{_TYPES[weight.dtype]}" if weight.symmetric else f"QU{_TYPES[weight.dtype]}",
        "activation_type": f"QU{_TYPES[activation.dtype]}",
    }
    options = Row(WeightSymmetric=weight.symmetric, ActivationSymmetric=activation.symmetric)
    percentile = percentile_of(activation.observer)
    found["calibrate_method"] = "MinMax" if percentile is None else "Percentile"
    if percentile is not None:
        options["CalibPercentile"] = percentile
    return {**found, "extra_options": options}


def _nodes(one: Assigned) -> list[str]:
    """Names that an op's product can have; those that the graph has not exclude nothing."""
    return [f"/{'/'.join(scopes)}/{kind}" for scopes in _scopes(one.op.name) for kind in _KINDS[one.op.type]]


def _scopes(name: str) -> list[list[str]]:
    """Scopes in which torch.onnx can put an op.

    Those of a child with a number begin with its container's: ``layers.0``. The container's own comes before only if it
    is called, as a Sequential is and a ModuleList is not, which a name does not tell.
    """
    found: list[list[str]] = [[]]
    for part in name.split("."):
        if part.isdecimal() and found[0]:
            numbered = [[*scopes, f"{scopes[-1]}.{part}"] for scopes in found]
            found = [way for scopes in numbered for way in ([*scopes[:-2], scopes[-1]], scopes)]
        else:
            found = [[*scopes, part] for scopes in found]
    return found
