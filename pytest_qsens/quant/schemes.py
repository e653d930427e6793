"""The schemes that can be simulated. Importing this costs nothing, so that options can be checked early."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pytest_qsens.errors import QsensError
from pytest_qsens.ops import CACHED, PRODUCTS, STATES, WEIGHTLESS
from pytest_qsens.quant.obstacles import obstacles
from pytest_qsens.quant.op_scheme import ActivationScheme, OpScheme, WeightScheme, parse

_EXACT = OpScheme(WeightScheme("int8"), ActivationScheme("int8", "static", "tensor", symmetric=False), output=True)
PER_TOKEN = ActivationScheme("int8", "dynamic", "token")
"""What torch has a primitive for."""

_WITH_HEADS = 4
"""Dimensions of keys and values that are held apart by heads."""

HELD_IN_BF16 = ("fp8_e4m3", "mxfp8")
"""Formats of weights whose numbers are held in bf16; those of others are held as int8."""


@dataclass(frozen=True)
class Scheme:
    """How ops are quantized, of what can be simulated: `simulated` makes one of a scheme that can be.

    Attributes:
        parts: What is rounded, and how.
        rows: Whether it is of an embedding, whose rows are rounded as those of weights. Others round these to uint8.

    """

    parts: OpScheme
    rows: bool = False

    @property
    def name(self) -> str:
        """Canonical name, as on the command line and in file names."""
        return self.parts.name

    @property
    def is_integer(self) -> bool:
        """Whether products are of integers, with the bits of torch's int8 kernels: the three schemes that these have.

        Others multiply what low precision stands for, in fp32.
        """
        activation = self.parts.activation
        if activation is not None and activation.observer:  # how a scale was found does not matter to a kernel
            activation = replace(activation, observer="")
        return self.parts.weight == _EXACT.weight and activation in (_EXACT.activation, PER_TOKEN)

    @property
    def needs_ranges(self) -> bool:
        """Whether scales come from the calibration data."""
        parts = (self.parts.activation, self.parts.cache, self.parts.products)
        return any(part is not None and part.kind != "dynamic" for part in parts)

    @property
    def smooths(self) -> bool:
        """Whether channels are scaled by what the calibration data show, before they are rounded."""
        return self.parts.smoothing is not None

    @property
    def bytes_kept(self) -> int:
        """Bytes in which a simulation holds each number of a weight."""
        return 2 if self.parts.weight is not None and self.parts.weight.dtype in HELD_IN_BF16 else 1

    @property
    def is_row_wise(self) -> bool:
        """Whether every row of an input is rounded by itself, so that rows of several inputs can go together."""
        activation = self.parts.activation
        if activation is None or activation.kind != "dynamic":
            return True
        return activation.granularity != "tensor" and activation.dtype != "nvfp4"

    def means(self, op_type: str) -> bool:
        """Whether this is said of ops of a type at all.

        Of layers, of keys and values, of these and queries, or of products of two activations.
        """
        if self.parts.products is not None:
            return op_type in PRODUCTS
        if self.parts.cache is None:
            return op_type not in WEIGHTLESS
        return op_type in (STATES if self.parts.queries else CACHED)

    def refusal(self, op_type: str, features: int | None = None) -> str | None:
        """Why an op of this type, with so many input features, cannot be quantized; ``None`` if it can be.

        Where the features are not known, nothing is in their way.
        """
        weight = self.parts.weight
        if not self.means(op_type):
            return f"{self.name} leaves {self._others(op_type)} as they are"
        if op_type == "embedding" and not self.rows:
            integers = weight is not None and weight.dtype == "int8"
            return None if integers else f"{self.name} leaves embeddings as they are: they are int8, or not quantized"
        if op_type in ("linear", "embedding") and features is not None:
            return self.refusal_of_features(features)
        return self._refusal_of_convolution(op_type) if op_type.startswith("conv") else None

    def _others(self, op_type: str) -> str:
        """Name what a type that is not meant belongs to."""
        if op_type in PRODUCTS:
            return "products of two activations"
        if self.parts.cache is None:
            return "queries, keys and values of attention" if op_type in STATES else "layers"
        return "layers" if self.parts.queries else "layers and queries"

    def _refusal_of_convolution(self, op_type: str) -> str | None:
        weight, activation = self.parts.weight, self.parts.activation
        if self.smooths:
            return f"{self.name} scales the input features of linear layers, and a {op_type} is none"
        if activation is not None and activation.granularity == "token":
            return f"{self.name} quantizes activations per token, and the input of a {op_type} has no tokens"
        if "group" in {part.granularity for part in (weight, activation) if part is not None}:
            return f"{self.name} quantizes groups along the features of a linear layer, which a {op_type} has not"
        if weight is not None and weight.granularity == "block":
            return f"{self.name} quantizes blocks of a matrix, which the weight of a {op_type} is not"
        return None

    def refusal_of_features(self, features: int) -> str | None:
        """Why a linear layer of so many input features, or rows of so many, cannot be quantized; ``None`` if it can."""
        for what, part in (("weights", self.parts.weight), ("activations", self.parts.activation)):
            if part is not None and part.size and features % part.size[-1]:
                return (
                    f"{self.name} gives {what} a scale per {part.size[-1]} {'' if self.rows else 'input '}features, "
                    f"and {features} of them cannot be divided by {part.size[-1]}"
                )
        return None

    def refusal_of_state(self, shape: Sequence[int]) -> str | None:
        """Why keys or values of this shape, ``(N, heads, tokens, dim)``, cannot be quantized; ``None`` if they can."""
        cache = self.parts.cache
        if cache is None:
            return None
        if cache.granularity in ("head", "channel") and len(shape) != _WITH_HEADS:
            return f"{self.name} has a scale per {cache.granularity}, and a tensor of shape {tuple(shape)} has no heads"
        if cache.size and shape[-1] % cache.size[-1]:
            return (
                f"{self.name} has a scale per {cache.size[-1]} features of a head, and {shape[-1]} of them cannot be "
                f"divided by {cache.size[-1]}"
            )
        return None


def simulated(parts: OpScheme) -> Scheme | None:
    """Make what simulates a scheme; ``None`` if nothing does, `obstacles` says why."""
    return None if obstacles(parts) else Scheme(parts)


def _usual(name: str) -> Scheme:
    parts = parse(name)
    assert parts is not None, name  # noqa: S101 - a name below
    found = simulated(parts)
    assert found is not None, name  # noqa: S101
    return found


SCHEMES: dict[str, Scheme] = {
    name: _usual(name)
    for name in (
        *("w8a8", "w8a8_static", "w8a8_dynamic", "w8a16"),
        *("w8a8_minmax", "w8a8_percentile", "w8a8_mse", "w8a8_entropy"),
        *("w8a8_smoothquant", "w8a8_dynamic_smoothquant"),
        *("w4a16_g32", "w4a16_g64", "w4a16_g128", "w4a16_g32_asym", "w4a16_g64_asym", "w4a16_g128_asym"),
        *("w4a8_dynamic_g128", "w4a8_dynamic_g32_act_asym", "w4afp8_dynamic_g128"),
        *("fp8_static_tensor", "fp8_static", "fp8_dynamic_tensor_act_tensor", "fp8_dynamic"),
        *("fp8_dynamic_block128x128_act_g128", "wfp8a16"),
        *("mxfp8_dynamic", "mxfp4_dynamic", "wmxfp4a16"),
        *("nvfp4_local", "nvfp4_dynamic", "wnvfp4a16"),
    )
}
"""The usual ones of layers by name; `scheme_named` knows all."""

CACHE_SCHEMES: dict[str, Scheme] = {
    name: _usual(name)
    for name in (
        *("kv_fp8", "kv_fp8_head", "kv_fp8_dynamic", "kv_int8", "kv_int8_head", "kv_int8_channel", "kv_int8_dynamic"),
        *("kv_int4_dynamic_g32_asym", "kv_nvfp4_local", "attn_fp8", "attn_fp8_head", "attn_int8_dynamic"),
    )
}
"""The usual ones of keys and values, and of these and queries."""

PRODUCT_SCHEMES: dict[str, Scheme] = {
    name: _usual(name)
    for name in (
        *("bmm_fp8", "bmm_fp8_dynamic", "bmm_fp8_dynamic_tensor"),
        *("bmm_int8", "bmm_int8_dynamic", "bmm_int8_dynamic_tensor"),
    )
}
"""The usual ones of products of two activations."""

USUAL = SCHEMES | CACHE_SCHEMES | PRODUCT_SCHEMES
"""All of these."""


def noun(label: str) -> str:
    """Tell what a label in results and snapshots is of: a ``scheme``, or a ``config``, which is never called as one."""
    return "scheme" if label in SCHEMES or parse(label) is not None else "config"


def scheme_named(name: str, where: str) -> Scheme:
    """Scheme with this canonical name.

    Args:
        name: What a user wrote.
        where: What it is a value for.

    Raises:
        QsensError: If there is none, or it cannot be simulated; what is in the way is named.

    """
    every = USUAL
    if name in every:
        return every[name]
    parts = parse(name)
    if parts is None:
        longer = [known for known in every if known.startswith(f"{name}_")]
        near = longer or difflib.get_close_matches(name, every, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise QsensError(
            f"no {where} {name!r}{hint}. Known: {', '.join(every)}, and others by the names of docs/configs.md"
        )
    found = simulated(parts)
    if found is None:
        alike = SCHEMES if parts.of_layers else CACHE_SCHEMES if parts.cache is not None else PRODUCT_SCHEMES
        why = "; ".join(obstacles(parts))
        raise QsensError(f"no {where} {name!r}, which cannot be simulated: {why}. Try {', '.join(alike)}")
    return found


Schemes = Scheme | Mapping[str, Scheme]
"""One scheme for all ops, or op → its own."""


def scheme_of(schemes: Schemes, op: str) -> Scheme | None:
    """Return what quantizes an op; ``None`` if nothing does."""
    return schemes if isinstance(schemes, Scheme) else schemes.get(op)


def all_of(schemes: Schemes) -> list[Scheme]:
    """List the schemes in use."""
    return [schemes] if isinstance(schemes, Scheme) else list(dict.fromkeys(schemes.values()))
