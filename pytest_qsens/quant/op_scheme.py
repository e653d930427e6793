"""How one op is quantized, in the terms of the field, with one canonical name for each way."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal, cast

from pytest_qsens.errors import QsensError
from pytest_qsens.quant import observer_names
from pytest_qsens.quant.scaling_modes import POWERS_OF_TWO, SCALING_MODES, canonical_mode

Granularity = Literal["tensor", "channel", "token", "group", "block", "head"]
Kind = Literal["static", "dynamic", "local"]
Statistic = Literal["magnitude", "range"]

INTEGERS = tuple(f"int{bits}" for bits in range(1, 17))
FLOATS = (
    "fp8_e4m3",
    "fp8_e5m2",
    "fp6_e2m3",
    "fp6_e3m2",
    "fp4_e2m1",
    "nf4",
    "mxfp8",
    "mxfp6",
    "mxfp4",
    "mxint8",
    "nvfp4",
)
BLOCK_OF = {"mxfp8": 32, "mxfp6": 32, "mxfp4": 32, "mxint8": 32, "nvfp4": 16}
"""Elements that share a scale, in the formats whose standard says how many."""


@dataclass(frozen=True)
class WeightScheme:
    """How a weight is rounded.

    ``dtype`` is one of `INTEGERS` and `FLOATS`. An integer's sign does not matter: ``uint8`` with a zero point is
    ``int8`` with another one, so both are ``int8``, not symmetric. ``granularity`` is what shares a scale; ``channel``
    is the output channel. ``size`` is that of a group, ``(n,)``, or of a block, ``(rows, columns)``, else empty.
    ``scaling_mode`` is one of `SCALING_MODES` where scales are `POWERS_OF_TWO`, empty for the usual one.

    Raises:
        ValueError: If the mode is unknown, or scales of the format have none.

    """

    dtype: str
    granularity: Granularity = "channel"
    size: tuple[int, ...] = ()
    symmetric: bool = True
    scaling_mode: str = ""

    def __post_init__(self) -> None:
        """Let one mode have one name."""
        object.__setattr__(self, "scaling_mode", canonical_mode(self.dtype, self.scaling_mode))


@dataclass(frozen=True)
class ActivationScheme:
    """How an input is rounded; fields as of `WeightScheme`.

    ``kind``: ``static``, scales from calibration; ``dynamic``, from the values at hand; ``local``, those of groups
    from the values at hand and one of the whole tensor from calibration. ``observer`` finds those of calibration, also
    of a requantized output: one of `observer_names.OBSERVERS`, empty for the usual one of the dtype.

    Raises:
        ValueError: If the observer is unknown, or there are no scales from calibration; or as of `WeightScheme`.

    """

    dtype: str
    kind: Kind
    granularity: Granularity
    size: tuple[int, ...] = ()
    symmetric: bool = True
    observer: str = ""
    scaling_mode: str = ""

    def __post_init__(self) -> None:
        """Let one observer and one mode have one name."""
        object.__setattr__(self, "scaling_mode", canonical_mode(self.dtype, self.scaling_mode))
        name = observer_names.canonical(self.observer) if self.observer else ""
        if name is None or (name and self.kind == "dynamic"):
            raise ValueError(f"{self.kind} activations have no observer {self.observer!r}")
        object.__setattr__(self, "observer", "" if name == observer_names.usual_observer(self.dtype) else name)

    @property
    def observed_by(self) -> str:
        """Name of the observer, the usual one included."""
        return self.observer or observer_names.usual_observer(self.dtype)


@dataclass(frozen=True)
class SmoothQuant:
    """Channels of an input are divided, and those of the weight multiplied, by one scale each, before both are rounded.

    Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML 2023,
    arXiv:2211.10438, equation 4: ``max|X_j|^alpha / max|W_j|^(1 - alpha)``.

    ``shared``: linear layers that read the same tensor have the same scales, with the largest of their weights, as when
    the norm before them takes the scales up. Otherwise each has its own, as when inputs are multiplied in front of it.
    ``statistic``: ``magnitude``, the paper's; ``range``, that of llm-compressor's ``SmoothQuantModifier``, which takes
    the difference of a channel's extremes for ``max|X_j|``, and twice the magnitude for ``max|W_j|``.

    Raises:
        ValueError: If ``alpha`` is not between 0 and 1.

    """

    alpha: float = 0.5
    shared: bool = True
    statistic: Statistic = "magnitude"

    def __post_init__(self) -> None:
        """Keep as many digits as names have."""
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is from 0 to 1, not {self.alpha}")
        object.__setattr__(self, "alpha", round(float(self.alpha), 9))

    @property
    def name(self) -> str:
        """Part of a scheme's name."""
        alpha = "" if self.alpha == SmoothQuant.alpha else f"{self.alpha:.9f}".rstrip("0").rstrip(".")
        return f"smoothquant{alpha}" + "_range" * (self.statistic == "range") + "_unshared" * (not self.shared)


@dataclass(frozen=True)
class OpScheme:
    """How one op is quantized; ``None`` is what is not rounded, and not all of it is.

    ``output``: the output is requantized, too, with scales of its own from calibration. ``smoothing``: what is done to
    input and weight before. ``cache``: how keys and values of attention are rounded, as they are stored in a cache,
    its static scales those of the extremes of all batches unless its observer is ``moving_average``;
    ``queries``: these are rounded alike, too, so that attention multiplies what is of low precision. ``products``: how
    both factors of products of two activations are rounded, a ``token`` being what runs along the dimension that is
    summed over: a row of the left factor, a column of the right one. A scheme that has one of these has nothing else.
    """

    weight: WeightScheme | None
    activation: ActivationScheme | None = None
    output: bool = False
    smoothing: SmoothQuant | None = None
    cache: ActivationScheme | None = None
    queries: bool = False
    products: ActivationScheme | None = None

    @property
    def of_layers(self) -> bool:
        """Whether it is of layers, and neither of keys and values nor of products of two activations."""
        return self.cache is None and self.products is None

    @property
    def name(self) -> str:
        """Canonical name: equal for equal schemes only, and read back by `parse`.

        >>> OpScheme(WeightScheme("int4", "group", (128,))).name
        'w4a16_g128'
        >>> OpScheme(WeightScheme("fp8_e4m3"), ActivationScheme("fp8_e4m3", "dynamic", "token")).name
        'fp8_dynamic'
        """
        if self.cache is not None:
            return f"{_ATTENTION if self.queries else _CACHE}{_cache_name(self.cache)}"
        if self.products is not None:
            return f"{_BMM}{_cache_name(self.products)}"
        weight, activation = self.weight, self.activation
        parts = [_base(weight, activation)]
        named_by_base = _is_torchs(weight, activation) and self.output
        if activation is not None and not named_by_base:
            parts.append(activation.kind)
        if weight is not None:
            if (weight.granularity, weight.size) != usual_weight(weight.dtype):
                parts.append(_extent(weight.granularity, weight.size))
            parts += [] if weight.symmetric else ["asym"]
            parts += [weight.scaling_mode] if weight.scaling_mode else []
        if activation is not None:
            parts += _unusual(activation, _usual_mode(weight))
        parts += ["requant"] if self.output and not named_by_base else []
        parts += [activation.observer] if activation is not None and activation.observer else []
        parts += [self.smoothing.name] if self.smoothing is not None else []
        return "_".join(parts)


@dataclass(frozen=True)
class Unknown:
    """An op that is quantized in a way that a file does not tell, or `OpScheme` has no terms for; and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class NotTold(Unknown):
    """An op of which a file only says that it is quantized: it lists what is not."""


def parse(name: str) -> OpScheme | None:
    """Scheme with this canonical name; ``None`` if there is none.

    >>> parse("w4a16_g128").weight
    WeightScheme(dtype='int4', granularity='group', size=(128,), symmetric=True)
    """
    if name.startswith((_CACHE, _ATTENTION, _BMM)):
        return _parse_cache(name)
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    both, w, a = match["both"], match["w"], match["a"]
    weight_dtype = _LONG.get(both or w)
    activation_dtype = _LONG.get(both or a)
    kind = cast("Kind", match["kind"] or "static")
    weight = activation = None
    if weight_dtype is not None:
        extent = _parse_extent(match["wextent"]) or usual_weight(weight_dtype)
        if match["wmode"] is not None and weight_dtype not in POWERS_OF_TWO:
            return None
        weight = WeightScheme(
            weight_dtype, *extent, symmetric=match["wasym"] is None, scaling_mode=match["wmode"] or ""
        )
    if activation_dtype is not None:
        granularity, size, symmetric = usual_activation(activation_dtype, kind)
        granularity, size = _parse_extent(match["aextent"]) or (granularity, size)
        symmetric = symmetric if match["asym"] is None else match["asym"] == "sym"
        has_mode = activation_dtype in POWERS_OF_TWO
        if (match["observer"] is not None and kind == "dynamic") or (match["amode"] is not None and not has_mode):
            return None
        mode = (match["amode"] or _usual_mode(weight)) if has_mode else ""
        activation = ActivationScheme(
            activation_dtype, kind, granularity, size, symmetric, match["observer"] or "", mode
        )
    smoothing = None
    if match["smoothquant"] is not None:
        statistic: Statistic = "magnitude" if match["range"] is None else "range"
        smoothing = SmoothQuant(float(match["alpha"] or SmoothQuant.alpha), match["unshared"] is None, statistic)
    output = match["requant"] is not None or (_is_torchs(weight, activation) and match["kind"] is None)
    scheme = OpScheme(weight, activation, output, smoothing)
    if (
        replace(scheme, smoothing=None) == OpScheme(None) or scheme.name != name
    ):  # nothing quantized, or a longer way to say the same
        return None
    return scheme


def named(name: str, where: str) -> OpScheme:
    """Scheme with this canonical name.

    Raises:
        QsensError: If there is none.

    """
    scheme = parse(name)
    if scheme is None:
        raise QsensError(
            f"{where}: {name!r} is no scheme. Write w8a8, w8a8_static, w8a8_dynamic, w4a16_g128, fp8_dynamic, kv_fp8, "
            "bmm_fp8, unquantized, or what docs/configs.md says names are made of."
        )
    return scheme


_SHORT = {name: name.removeprefix("int") for name in INTEGERS} | {
    "int16": "int16",  # a16 is an activation that is not quantized
    "fp8_e4m3": "fp8",
    "fp8_e5m2": "fp8e5m2",
    "fp6_e2m3": "fp6e2m3",
    "fp6_e3m2": "fp6e3m2",
    "fp4_e2m1": "fp4",
}
_LONG = {_SHORT.get(dtype, dtype): dtype for dtype in (*INTEGERS, *FLOATS)}
_UNROUNDED = "16"
_EXTENT = r"tensor|channel|token|g[1-9]\d{0,8}|block[1-9]\d{0,8}x[1-9]\d{0,8}"
_MODE = "|".join(SCALING_MODES)
_ANY = "|".join(sorted((*_LONG, _UNROUNDED), key=len, reverse=True))
_NAME = re.compile(
    rf"(?:(?P<both>{'|'.join(sorted((_SHORT.get(name, name) for name in FLOATS), key=len, reverse=True))})"
    rf"|w(?P<w>{_ANY})a(?P<a>{_ANY}))(?:_(?P<kind>static|dynamic|local))?"
    rf"(?:_(?P<wextent>{_EXTENT}))?(?P<wasym>_asym)?(?:_(?P<wmode>{_MODE}))?"
    rf"(?:_act(?:_(?P<aextent>{_EXTENT}))?(?:_(?P<asym>sym|asym))?(?:_(?P<amode>{_MODE}))?)?(?P<requant>_requant)?"
    rf"(?:_(?P<observer>{observer_names.PATTERN}))?"
    r"(?:_(?P<smoothquant>smoothquant)(?P<alpha>1|0(?:\.\d{1,9})?)?(?P<range>_range)?(?P<unshared>_unshared)?)?",
    re.ASCII,
)


def _is_torchs(weight: WeightScheme | None, activation: ActivationScheme | None) -> bool:
    """Whether both are integers and scales are static: torch's kernels then requantize, and a short name says so."""
    return (
        weight is not None
        and activation is not None
        and activation.kind == "static"
        and {weight.dtype, activation.dtype} <= set(INTEGERS)
    )


def _base(weight: WeightScheme | None, activation: ActivationScheme | None) -> str:
    dtypes = [None if part is None else part.dtype for part in (weight, activation)]
    shorts = [_UNROUNDED if dtype is None else _SHORT.get(dtype, dtype) for dtype in dtypes]
    if dtypes[0] == dtypes[1] and dtypes[0] in FLOATS:
        return shorts[0]
    return f"w{shorts[0]}a{shorts[1]}"


def usual_weight(dtype: str) -> tuple[Granularity, tuple[int, ...]]:
    """Granularity and size of weights where nothing else is said."""
    return ("group", (BLOCK_OF[dtype],)) if dtype in BLOCK_OF else ("channel", ())


def usual_activation(dtype: str, kind: str) -> tuple[Granularity, tuple[int, ...], bool]:
    """Granularity, size and symmetry of activations where nothing else is said."""
    if dtype in BLOCK_OF:
        return "group", (BLOCK_OF[dtype],), True
    return ("tensor", (), dtype not in INTEGERS) if kind == "static" else ("token", (), True)


def _extent(granularity: str, size: tuple[int, ...]) -> str:
    if granularity == "group":
        return f"g{size[0]}"
    return f"block{size[0]}x{size[1]}" if granularity == "block" else granularity


def _parse_extent(text: str | None) -> tuple[Granularity, tuple[int, ...]] | None:
    if text is None:
        return None
    sizes = tuple(int(digits) for digits in re.findall(r"\d+", text))
    kind = "block" if len(sizes) == 2 else "group" if sizes else text
    return cast("Granularity", kind), sizes


def _usual_mode(weight: WeightScheme | None) -> str:
    """Mode of the scales of activations where nothing else is said: that of the weight's."""
    return "" if weight is None else weight.scaling_mode


def _unusual(activation: ActivationScheme, mode: str) -> list[str]:
    granularity, size, symmetric = usual_activation(activation.dtype, activation.kind)
    found = []
    if (activation.granularity, activation.size) != (granularity, size):
        found.append(_extent(activation.granularity, activation.size))
    if activation.symmetric != symmetric:
        found.append("sym" if activation.symmetric else "asym")
    if activation.dtype in POWERS_OF_TWO and activation.scaling_mode != mode:
        found.append(activation.scaling_mode or SCALING_MODES[0])
    return ["act", *found] if found else []


_CACHE, _ATTENTION, _BMM = "kv_", "attn_", "bmm_"
_CACHED = {dtype if dtype in INTEGERS else _SHORT.get(dtype, dtype): dtype for dtype in (*INTEGERS, *FLOATS)}
_CACHE_NAME = re.compile(
    rf"(?:{_CACHE}|{_ATTENTION}|{_BMM})(?P<dtype>{'|'.join(sorted(_CACHED, key=len, reverse=True))})"
    rf"(?:_(?P<kind>dynamic|local))?(?:_(?P<extent>{_EXTENT}|head))?(?P<asym>_asym)?"
    rf"(?:_(?P<mode>{_MODE}))?(?:_(?P<observer>moving_average))?",
    re.ASCII,
)


def usual_cache(dtype: str, kind: str) -> tuple[Granularity, tuple[int, ...]]:
    """Granularity and size of keys and values, and of factors, where nothing else is said.

    A token is one of one head, of factors what runs along the dimension that is summed over.
    """
    if dtype in BLOCK_OF:
        return "group", (BLOCK_OF[dtype],)
    return ("tensor" if kind == "static" else "token"), ()


def _cache_name(cache: ActivationScheme) -> str:
    """Name how keys and values, or factors, are rounded.

    >>> _cache_name(ActivationScheme("fp8_e4m3", "static", "head"))
    'fp8_head'
    """
    parts = [next(short for short, dtype in _CACHED.items() if dtype == cache.dtype)]
    parts += [] if cache.kind == "static" else [cache.kind]
    if (cache.granularity, cache.size) != usual_cache(cache.dtype, cache.kind):
        parts.append(_extent(cache.granularity, cache.size))
    parts += [] if cache.symmetric else ["asym"]
    parts += [cache.scaling_mode] if cache.scaling_mode else []
    parts += [cache.observer] if cache.observer else []
    return "_".join(parts)


def _parse_cache(name: str) -> OpScheme | None:
    match = _CACHE_NAME.fullmatch(name)
    if match is None:
        return None
    dtype, kind = _CACHED[match["dtype"]], cast("Kind", match["kind"] or "static")
    granularity, size = _parse_extent(match["extent"]) or usual_cache(dtype, kind)
    if (match["observer"] is not None and kind == "dynamic") or (match["mode"] and dtype not in POWERS_OF_TWO):
        return None
    cache = ActivationScheme(
        dtype, kind, granularity, size, match["asym"] is None, match["observer"] or "", match["mode"] or ""
    )
    if name.startswith(_BMM):
        found = OpScheme(None, products=cache)
    else:
        found = OpScheme(None, cache=cache, queries=name.startswith(_ATTENTION))
    return found if found.name == name else None
