"""Why an op is sensitive, for people and for machines."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from pytest_qsens.details import OUTLIER
from pytest_qsens.inspection.found import NAMES
from pytest_qsens.inspection.verdict import channel_name, percent, unit_of_bits, verdict
from pytest_qsens.report.columns import aligned

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_qsens.inspection.found import Alternative, ChannelSummary, Flip, Head, Inspection
    from pytest_qsens.inspection.places import Group, Place, Where
    from pytest_qsens.results import Payload

SCHEMA = 1

_LEAST_WIDTH = 40

_HEADS = 8
"""Heads that are listed."""

_SCHEMES = 12
"""Other schemes that are listed."""

_BEFORE_PERCENT = "\N{NO-BREAK SPACE}%"

_GROUPS = {
    "text": "text tokens",
    "image": "image tokens",
    "video": "video tokens",
    "padding": "padding",
    "first": "first tokens",
}


def report(found: Inspection, width: int, encoding: str | None, *, everything: bool = False) -> Iterator[str]:
    """Lines for a terminal.

    Args:
        found: What was found out.
        width: Of the terminal: prose is wrapped, and what is too wide in tables is cut off.
        encoding: Of the terminal; what it has no letters for is escaped.
        everything: Whether to list all schemes.

    """
    yield from _lines(found, _Terminal(max(_LEAST_WIDTH, width), encoding or "ascii"), everything=everything)


@dataclass(frozen=True)
class _Terminal:
    """What lines have to fit into."""

    width: int
    encoding: str

    def plain(self, text: str) -> str:
        """Escape what it has no letters for, and what would move the cursor."""
        printable = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
        return printable.encode(self.encoding, "backslashreplace").decode(self.encoding)

    def wrapped(self, text: str, indent: str = "") -> list[str]:
        """Lines of prose."""
        lines = textwrap.wrap(
            self.plain(text).replace(" %", _BEFORE_PERCENT),  # a number stays with its sign
            self.width,
            initial_indent=indent,
            subsequent_indent=f"{indent}  ",
            break_on_hyphens=False,
        )
        return [line.replace(_BEFORE_PERCENT, " %") for line in lines]

    def table(self, rows: Sequence[Sequence[str]]) -> Iterator[str]:
        """Lines of a table; the end of what is too wide is cut off."""
        for line in aligned([[self.plain(cell) for cell in row] for row in rows]):
            yield f"  {line}" if len(line) + 2 <= self.width else f"  {line[: self.width - 4]}.."


def _lines(found: Inspection, terminal: _Terminal, *, everything: bool) -> Iterator[str]:
    yield from terminal.wrapped(f"{found.op}: {verdict(found)}")
    yield ""
    yield from _about(found, terminal)
    yield ""
    yield from _ranges(found, terminal)
    yield ""
    yield from _parts(found, terminal)
    for where, title in ((found.at_output, "model's output"), (found.at_op, "op's own output")):
        if where is not None and where.sse:
            yield ""
            yield from _where(where, title, terminal)
    yield ""
    yield from _alternatives(found, terminal, everything=everything)
    yield ""
    yield from terminal.wrapped(f"{found.forwards} forwards of the evaluation data, {found.seconds:.3g} s each")


def _about(found: Inspection, terminal: _Terminal) -> Iterator[str]:
    shape = found.shape
    bias = ", bias" if shape.bias else ""
    inputs = ", ".join(map(_size, shape.inputs))
    what = f"{shape.type}, weight {_size(shape.weight)} {shape.dtype}{bias}; input {inputs}"
    if shape.type in NAMES:
        what = f"{NAMES[shape.type]} of attention; {inputs}{' (batch x heads x tokens x channels)' * bool(found.heads)}"
    yield from terminal.wrapped(f"{what}; op {shape.number} of {shape.ops} of {found.model}")
    unit = unit_of_bits(shape.type)
    yield from terminal.wrapped(f"scheme {found.scheme}: {found.about}; {found.bits:.4g} bits a {unit}")
    yield from terminal.wrapped(_score(found))
    yield from terminal.wrapped(_record(found))


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _score(found: Inspection) -> str:
    if found.scores is None:
        return f"mode {found.mode}: no score, {found.whole.failure}"
    sqnr = found.scores["sqnr_db"]
    decibels = "no error at all" if sqnr is None else f"{sqnr:.3g} dB"
    told = [f"nmse {found.scores['nmse']:.4g} ({decibels})"]
    told += [f"{name} {found.scores[name]:.4g}" for name in ("kl", "top1") if name in found.scores]
    if found.mode == "fallback":
        told.append(f"{found.base:.4g} with the op unquantized")
    quantized = "only this op is quantized" if found.mode == "isolated" else "all ops are quantized"
    return f"mode {found.mode}: {', '.join(told)} when {quantized}"


def _record(found: Inspection) -> str:
    recorded = found.recorded
    if recorded.scores is None:
        why = f" ({recorded.reason})" if recorded.reason else ""
        return f"{recorded.path} has no score of it in mode {found.mode}: {recorded.status}{why}"
    value = recorded.scores["nmse"] or 0.0
    rank = "" if recorded.rank is None else f", rank {recorded.rank} of {recorded.ranked} (1: most sensitive)"
    estimated = " an estimated" if recorded.status == "estimated" else ""
    told = f"{recorded.path} says{estimated} {value:.4g} under {recorded.scheme}, engine {recorded.engine}{rank}"
    if found.differs:
        told += (
            f". THAT IS NOT WHAT IS MEASURED NOW ({found.now:.4g}): the model, its data or the machine are others, or "
            "the engine measures something else"
        )
    return told


def _ranges(found: Inspection, terminal: _Terminal) -> Iterator[str]:
    of_embedding, head_dim = found.shape.type == "embedding", found.shape.head_dim
    name = NAMES.get(found.shape.type, "input")
    rows = [["channels by magnitude", "least", "median", "largest", f"more than {OUTLIER:g} x median"]]
    if found.weight_outputs is not None:
        rows.append([f"weight, {'rows' if of_embedding else 'output'}", *_channels(found.weight_outputs)])
    if found.weight_inputs is not None:
        rows.append([f"weight, {'columns' if of_embedding else 'input'}", *_channels(found.weight_inputs)])
    if found.inputs is not None:
        rows.append([f"{name}, calibration", *_channels(found.inputs.calibration_channels, head_dim)])
        rows.append([f"{name}, evaluation", *_channels(found.inputs.evaluation_channels, head_dim)])
    if found.outputs is not None:
        rows.append(["output, evaluation", *_channels(found.outputs)])
    yield from terminal.table(rows)
    inputs = found.inputs
    if inputs is not None:
        (low, high), (least, most) = inputs.calibration, inputs.evaluation
        beyond = f"{percent(inputs.outside)} of them outside" if inputs.outside else "none outside"
        yield from terminal.wrapped(
            f"{'input values' if name == 'input' else name}: {low:.4g} to {high:.4g} in the calibration data, "
            f"{least:.4g} to {most:.4g} in the "
            f"evaluation data ({beyond}); the largest is {inputs.peak_value:.4g}, channel "
            f"{channel_name(inputs.peak_channel, head_dim)}, {_place(inputs.peak)}",
            "  ",
        )
    yield ""
    losses = [["rounding", "values", "clipped", "become zero (of those that are not)"]]
    for lost in found.lost:
        clipped = "not known" if lost.clipped is None else percent(lost.clipped)
        losses.append([lost.part, str(lost.values), clipped, percent(lost.rounded_away)])
    yield from terminal.table(losses)
    if len(found.heads) > 1:
        yield ""
        yield from terminal.table([*_heads(found.heads)])


def _heads(heads: Sequence[Head]) -> Iterator[list[str]]:
    yield ["head", "largest", "of the error that rounding makes in all heads"]
    for head in heads if len(heads) <= _HEADS else sorted(heads, key=lambda each: -each.error)[:_HEADS]:
        yield [str(head.index), f"{head.largest:.3g}", percent(head.error)]
    if len(heads) > _HEADS:
        yield [f"and {len(heads) - _HEADS} with less", "", ""]


def _channels(channels: ChannelSummary, head_dim: int | None = None) -> list[str]:
    worst = " ".join(f"{channel_name(c.index, head_dim)} ({c.times:.3g}x)" for c in channels.worst[:3])
    listed = f"{channels.outliers} of {channels.count}{': ' if worst else ''}{worst}"
    more = ", .." if channels.outliers > 3 else ""
    dead = f"; {channels.zeros} zero" if channels.zeros else ""
    return [*(f"{v:.3g}" for v in (channels.least, channels.median, channels.most)), f"{listed}{more}{dead}"]


def _place(place: Place) -> str:
    if place.position is None:
        return f"row {place.row} of batch {place.batch}"
    return f"token {_token(place)}at position {place.position} of sample {place.row} of batch {place.batch}"


def _token(place: Place) -> str:
    return f"{place.text!r} " if place.text is not None else f"id {place.token} "


def _parts(found: Inspection, terminal: _Terminal) -> Iterator[str]:
    gain = found.mode == "fallback"
    rows = [["quantized", "added nmse" if gain else "nmse", "share", "nmse in its own output"]]
    rows += [_part(f"the {part.name} alone", part, found.share(part)) for part in found.parts]
    if len(found.parts) > 1 and found.explained is not None:
        rows.append(["sum of these", f"{found.explained:.4g}", "", ""])
    rows.append(_part("the op", found.whole, None))
    yield from terminal.table(rows)
    if len(found.parts) > 1 and found.interaction is not None:
        left = found.interaction
        way = "more" if left > 0 else "less"
        yield from terminal.wrapped(
            f"together they add {percent(abs(left))} {way} than one by one, relative to the whole: what they do to "
            "each other",
            "  ",
        )


def _part(name: str, flip: Flip, share: float | None) -> list[str]:
    if flip.added is None:
        return [name, "none", "", flip.failure or ""]
    local = "" if flip.local_nmse is None else f"{flip.local_nmse:.4g}"
    return [name, f"{flip.added:.4g}", "" if share is None else percent(share), local]


def _where(where: Where, title: str, terminal: _Terminal) -> Iterator[str]:
    groups = [group for group in where.groups if group.name != "first"]
    if len(groups) > 1:
        rows = [[f"error at the {title}", "tokens", "of all", "error", "of all", "nmse there"]]
        rows += [_group(group, where, sum(g.positions for g in groups)) for group in where.groups]
        yield from terminal.table(rows)
    else:
        yield f"  error at the {title}"
    unit = "tokens" if where.tokens else "rows, which are no tokens"
    told = [f"half of it is at {where.half} of {where.positions} {unit}"]
    first = [group for group in where.groups if group.name == "first"]
    if first and len(groups) == 1:
        told.append(f"{percent(first[0].sse / where.sse)} at the {first[0].positions} first tokens")
    yield from terminal.wrapped(", ".join(told), "  ")
    listed = [f"{_spot(worst.place)} {percent(worst.sse / where.sse)}" for worst in where.worst]
    how = "batch:sample:position" if where.tokens else "batch:row"
    yield from terminal.wrapped(f"worst ({how}): {', '.join(listed)}", "  ")


def _group(group: Group, where: Where, real: int) -> list[str]:
    nmse = "" if group.nmse is None else f"{group.nmse:.4g}"
    name, share = _GROUPS[group.name], percent(group.sse / where.sse)
    return [name, str(group.positions), percent(group.positions / real), f"{group.sse:.4g}", share, nmse]


def _spot(place: Place) -> str:
    """Name a position in short."""
    if place.position is None:
        return f"{place.batch}:{place.row}"
    return f"{place.batch}:{place.row}:{place.position} {_token(place).rstrip()}"


def _alternatives(found: Inspection, terminal: _Terminal, *, everything: bool) -> Iterator[str]:
    able = [other for other in found.alternatives if other.flip is not None and other.flip.added is not None]
    left_out = 0 if everything else max(0, len(able) - _SCHEMES)
    able = able[: len(able) - left_out]
    error = "added nmse" if found.mode == "fallback" else "nmse"
    rows = [["scheme, measured", error, "better", "bits", ""]]
    now = [f"{found.scheme} (now)", _number(found.whole.added), "1 x", f"{found.bits:.4g}", found.about]
    placed = False
    for other in able:
        flip = other.flip
        assert flip is not None  # noqa: S101 - as above
        if not placed and found.whole.added is not None and (flip.added or 0.0) >= found.whole.added:
            rows.append(now)
            placed = True
        rows.append([other.scheme, _number(flip.added), _factor(other), f"{other.bits:.4g}", other.about])
    rows += [] if placed else [now]
    yield from terminal.table(rows)
    if left_out:
        yield f"  and {left_out} more (--all)"
    for other in found.alternatives:
        if other.flip is not None and other.flip.failure is not None:
            yield from terminal.wrapped(f"{other.scheme}: {other.flip.failure}", "  ")
    reasons: dict[str, list[str]] = {}
    for other in found.alternatives:
        if other.reason is not None:
            reasons.setdefault(other.reason.removeprefix(f"{other.scheme} "), []).append(other.scheme)
    for reason, names in reasons.items():
        yield from terminal.wrapped(f"not measured: {', '.join(names)}: {reason}", "  ")


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _factor(other: Alternative) -> str:
    return "" if other.factor is None else f"{other.factor:.3g} x"


def as_json(found: Inspection) -> str:
    """Everything, as JSON."""
    document: Payload = {
        "schema": SCHEMA,
        "inspection": {
            **asdict(found),
            "verdict": verdict(found),
            "shares": {part.name: found.share(part) for part in found.parts},
            "explained": found.explained,
            "interaction": found.interaction,
        },
    }
    return json.dumps(document, ensure_ascii=False, allow_nan=False, indent=2) + "\n"
