"""One plain sentence or two about why an op is sensitive, of nothing but what was measured."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pytest_qsens.inspection.found import NAMES
from pytest_qsens.quant.op_scheme import parse

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_qsens.inspection.found import Alternative, ChannelSummary, Flip, Inspection

_MOST = 0.75
"""A part with at least this share is named alone."""

_SOME = 0.1
"""Parts with less are not named."""

_MISSED = 0.2
"""What the parts leave open, relative to the whole, is told from here on."""

_CLIPPED, _AWAY = 0.001, 0.1
"""Shares of values from which on they are told."""

_CROWDED = 1.5
"""Tokens of a kind are named that have so many times their part of the error."""

_BETTER = 1.1
"""A scheme is better from this factor on."""

_WHAT = {"weight": "the weight", "input": "the input", "output": "the output, which is requantized"}


def channel_name(index: int, head_dim: int | None) -> str:
    """Name a channel; of keys and values with the number of its head before that in it.

    >>> channel_name(70, None), channel_name(70, 64)
    ('70', '1:6')
    """
    return str(index) if head_dim is None else f"{index // head_dim}:{index % head_dim}"


def unit_of_bits(op_type: str) -> str:
    """Say what bits are those of: a weight, a value of a cache, or one of queries, which are in none."""
    return {"k": "cached value", "v": "cached value", "q": "value"}.get(op_type, "weight")


def percent(share: float) -> str:
    """Write a share; what is not all of it is not called so.

    >>> percent(0.94321), percent(0.99996), percent(1.0), percent(2.4e-5)
    ('94.3 %', '>99.9 %', '100 %', '0.0024 %')
    """
    return ">99.9 %" if 0.9995 <= share < 1 else f"{100 * share:.3g} %"


def verdict(found: Inspection) -> str:
    """Say what the error comes from, what is seen there, and what would be better."""
    whole = found.whole
    if whole.failure is not None:
        failing = [part.name for part in found.parts if part.failure is not None]
        alone = f" The {' and the '.join(failing)} alone does so, too." if failing else " No part alone does so."
        alone = alone if found.parts else ""
        return f"{whole.failure} when the op is quantized as {found.scheme} says.{alone}{_remedy(found)}"
    if found.mode == "fallback" and (whole.added or 0.0) <= 0:
        return "With everything else quantized, it adds no error. Ask with --mode isolated what it does alone."
    if not whole.added:
        return "Quantizing it changes no bit of the model's output."
    return f"{_cause(found)}{_place(found)}{_remedy(found)}"


def _place(found: Inspection) -> str:
    """Say where the error is, if one kind of tokens has more than its part of it."""
    where = found.at_output
    groups = [] if where is None else [g for g in where.groups if g.name not in ("first", "padding")]
    if where is None or len(groups) < 2:
        return ""
    tokens, sse = sum(group.positions for group in groups), sum(group.sse for group in groups)
    for group in groups:
        share, expected = group.sse / sse if sse else 0.0, group.positions / tokens
        if share > 0.5 and share > _CROWDED * expected:
            return f" {percent(share)} of the error is at the {group.name} tokens, {percent(expected)} of all."
    return ""


def _cause(found: Inspection) -> str:
    if found.shape.type in NAMES:
        told = ", ".join(_stands_out(found, NAMES[found.shape.type]))
        return f"Nothing but {NAMES[found.shape.type]} of attention is rounded{f': {told}' if told else ''}."
    shares = {part.name: share for part in found.parts if (share := found.share(part)) is not None}
    if len(found.parts) == 1:
        (only,) = found.parts
        told = _seen(found, only)
        return f"Nothing but {_WHAT[only.name].partition(',')[0]} is quantized{f': {told}' if told else ''}."
    if not shares:
        if any(part.failure for part in found.parts):
            return "What the error comes from cannot be told: a part of it cannot be measured."
        ask = " Ask with --mode isolated." if found.mode == "fallback" else ""
        return f"What the error comes from cannot be told: a part of it, quantized alone, lowers the error.{ask}"
    ranked = sorted(found.parts, key=lambda part: -shares[part.name])
    if shares[ranked[0].name] >= _MOST:
        seen = _seen(found, ranked[0])
        told = f"{percent(shares[ranked[0].name])} of the error comes from {_WHAT[ranked[0].name]}"
        told += f": {seen}" if seen else ""
    else:
        listed = [
            f"{_WHAT[part.name]} ({'; '.join(filter(None, (percent(shares[part.name]), _seen(found, part))))})"
            for part in ranked
            if shares[part.name] >= _SOME
        ]
        told = f"The error comes from {', '.join(listed[:-1])} and {listed[-1]}"
    left = found.interaction
    missed = "" if left is None or abs(left) < _MISSED else f"; the parts alone add up to {percent(1 - left)} of it"
    return f"{told}{missed}."


def _seen(found: Inspection, part: Flip) -> str:
    """Say what stands out in the part that most of the error comes from."""
    return ", ".join(_stands_out(found, part.name))


def _stands_out(found: Inspection, part: str) -> Iterator[str]:
    # a weight's scales are of its output channels: what is large in one of its input channels widens all of them
    channels = {
        "weight": found.weight_inputs,
        "input": None if found.inputs is None else found.inputs.evaluation_channels,
        "output": found.outputs,
    }.get(part, None if found.inputs is None else found.inputs.evaluation_channels)
    unit = "column" if found.shape.type == "embedding" else "input channel" if part == "weight" else "channel"
    if channels is not None and channels.worst:
        yield _outlier(channels, unit, found.shape.head_dim)
    for lost in found.lost:
        if lost.part == part:
            if lost.rounded_away >= _AWAY:
                yield f"{percent(lost.rounded_away)} of its values that are not zero become zero"
            if (lost.clipped or 0.0) >= _CLIPPED:
                yield f"{percent(lost.clipped or 0.0)} of its values are clipped"


def _outlier(channels: ChannelSummary, unit: str, head_dim: int | None) -> str:
    worst = channels.worst[0]
    which = f"its {unit} {worst.index}" if head_dim is None else f"channel {channel_name(worst.index, head_dim)}"
    return f"{which} reaches {worst.times:.3g} times the median one"


def _remedy(found: Inspection) -> str:
    like, best, unit = _like(found), _best(found, at_most=found.bits), unit_of_bits(found.shape.type)
    told = []
    if like is not None:
        told.append(f"{like.scheme}, in the same number formats, lowers the error {_times(like)}")
    if best is not None and best != like and (like is None or _factor(best) > _BETTER * _factor(like)):
        lowers = "" if told else "lowers the error "
        told.append(f"{best.scheme} {lowers}{_times(best)} at {best.bits:.4g} bits a {unit}")
    if not told:
        larger = _best(found, at_most=None)
        if larger is None:
            measured = any(other.flip is not None for other in found.alternatives)
            return " No scheme that was measured beside it is better." if measured else ""
        unrounded = _formats(larger.scheme)[1] is None and _formats(found.scheme)[1] is not None
        how = ", with the input as it is" if unrounded else ""
        told.append(f"{larger.scheme} lowers the error {_times(larger)} at {larger.bits:.4g} bits a {unit}{how}")
    return f" {'; '.join(told)} (measured)."


def _times(other: Alternative) -> str:
    if other.factor is not None:
        return f"{other.factor:.3g} times"
    return "to a finite one" if other.flip is None or (other.flip.added or 0.0) > 0 else "to none"


def _best(found: Inspection, *, at_most: float | None) -> Alternative | None:
    able = [other for other in found.alternatives if _is_better(found, other)]
    if at_most is not None:  # what leaves the input as it is saves no time where products are of narrow numbers
        rounds = _formats(found.scheme)[1] is not None
        able = [o for o in able if o.bits <= at_most and (_formats(o.scheme)[1] is not None) == rounds]
    return max(able, key=_factor, default=None)


def _like(found: Inspection) -> Alternative | None:
    """Find the best scheme that rounds to the same formats: nothing but scales is different.

    In a cache these can take more room than what they are better than, which another one may have.
    """
    formats, room = _formats(found.scheme), found.bits if found.shape.type in NAMES else math.inf
    able = [o for o in found.alternatives if _is_better(found, o) and _formats(o.scheme) == formats and o.bits <= room]
    return max(able, key=_factor, default=None)


def _is_better(found: Inspection, other: Alternative) -> bool:
    if other.flip is None or other.flip.added is None:
        return False
    return found.whole.added is None or other.flip.added <= found.whole.added / _BETTER


def _factor(other: Alternative) -> float:
    """Key by which the best is the largest: of those without a factor, the one that adds least."""
    if other.factor is not None:
        return other.factor
    added = 0.0 if other.flip is None else other.flip.added or 0.0
    return 1 / added if added > 0 else math.inf


def _formats(name: str) -> tuple[str | None, str | None]:
    parts = parse(name)
    if parts is None:
        return None, None
    weight, activation = parts.cache or parts.weight, parts.activation
    return None if weight is None else weight.dtype, None if activation is None else activation.dtype
