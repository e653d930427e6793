"""What a report shows beside scores: ranges of channels, and samples of the data. Plain values, no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from pytest_qsens.errors import QsensError
from pytest_qsens.files import Fields, finite, typed

if TYPE_CHECKING:
    from collections.abc import Iterable

Purpose = Literal["calibration", "evaluation"]

OUTLIER = 5.0
"""A channel is an outlier whose largest magnitude is more than so many times that of the median channel. LLM.int8()
(Dettmers et al., NeurIPS 2022, arXiv:2208.07339) takes a fixed magnitude of 6, which suits inputs of a unit scale only.
"""

_PICTURE = re.compile(r"data:image/(jpeg|png);base64,[A-Za-z0-9+/]+=*", re.ASCII)


@dataclass(frozen=True)
class Channels:
    """How far the values of each channel reach.

    Attributes:
        count: Number of channels.
        largest: Largest magnitudes in the order of channels; where there are many, each is the largest of some
            channels that follow each other, as many in all but the last.
        median: Of the channels' largest magnitudes, without channels of nothing but zeros; 0 if there are no others.
        outliers: The channels that reach furthest, furthest first: number and largest magnitude of each.

    """

    count: int
    largest: tuple[float, ...]
    median: float
    outliers: tuple[tuple[int, float], ...]

    @property
    def ratio(self) -> float | None:
        """Largest magnitude of all by the median channel's; ``None`` if that is zero."""
        return self.outliers[0][1] / self.median if self.median and self.outliers else None

    def is_outlier(self, largest: float) -> bool:
        """Whether a channel of this largest magnitude is more than `OUTLIER` times the median."""
        return self.median > 0 and largest > OUTLIER * self.median


@dataclass(frozen=True)
class OpRanges:
    """Ranges of one op: inputs by input channel (none of an embedding), the weight by output channel.

    Queries, keys and values have no weight; their channels are those of all heads, ``head_dim`` of each.
    """

    op: str
    type: str
    weight: Channels | None
    inputs: Channels | None = None
    head_dim: int | None = None


@dataclass(frozen=True)
class Sample:
    """One sample: an excerpt of its text, and a thumbnail as a data URL, with the size of the picture in pixels."""

    text: str
    picture: str | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class DataSet:
    """Samples of one purpose: how many there are, of what kind, and the first of them."""

    purpose: Purpose
    count: int
    unit: str
    """``samples`` or ``batches``."""
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Details:
    """What is collected only for a report; ``notes`` say what could not be, and why."""

    ranges: tuple[OpRanges, ...] = ()
    data: tuple[DataSet, ...] = ()
    notes: tuple[str, ...] = ()


def read_details(value: object, where: str) -> Details:
    """Details from parsed JSON, of what `dataclasses.asdict` makes of them.

    Raises:
        QsensError: If something in it is missing, unknown or of a wrong type; names ``where``.

    """
    fields = Fields(value, where)
    found = Details(
        ranges=tuple(_ranges(item, fields.at("ranges")) for item in _list(fields, "ranges")),
        data=tuple(_data_set(item, fields.at("data")) for item in _list(fields, "data")),
        notes=tuple(typed(item, str, fields.at("notes")) for item in _list(fields, "notes")),
    )
    fields.end()
    return found


def joined(parts: Iterable[Details | None]) -> Details | None:
    """Put the details of several files together: ranges of all ops, and the data of the first that has some."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    ranges = {item.op: item for part in reversed(known) for item in part.ranges}
    data = next((part.data for part in known if part.data), ())
    return Details(tuple(ranges.values()), data, tuple(dict.fromkeys(note for part in known for note in part.notes)))


def _list(fields: Fields, key: str) -> list[Any]:
    where = fields.at(key)
    found: list[Any] = typed(fields.take(key), list, where)
    return found


def _ranges(value: object, where: str) -> OpRanges:
    fields = Fields(value, where)
    found = OpRanges(
        op=fields.text("op"),
        type=fields.text("type"),
        weight=None if (weight := fields.take("weight")) is None else _channels(weight, fields.at("weight")),
        inputs=None if (inputs := fields.take("inputs")) is None else _channels(inputs, fields.at("inputs")),
        head_dim=_head_dim(fields),
    )
    fields.end()
    return found


def _head_dim(fields: Fields) -> int | None:
    value, where = fields.take("head_dim"), fields.at("head_dim")
    if value is None:
        return None
    found: int = typed(value, int, where)
    if found < 1:
        raise QsensError(f"{where}: {found!r} is not possible, a head has channels")
    return found


def _channels(value: object, where: str) -> Channels:
    fields = Fields(value, where)
    found = Channels(
        count=_count(fields, "count"),
        largest=tuple(_magnitude(number, fields.at("largest")) for number in _list(fields, "largest")),
        median=_magnitude(fields.take("median"), fields.at("median")),
        outliers=tuple(_outlier(pair, fields.at("outliers")) for pair in _list(fields, "outliers")),
    )
    fields.end()
    return found


def _count(fields: Fields, key: str) -> int:
    where = fields.at(key)
    count: int = typed(fields.take(key), int, where)
    if count < 0:
        raise QsensError(f"{where}: {count!r} is not possible, it is never negative")
    return count


def _magnitude(value: object, where: str) -> float:
    found = finite(value, where)
    if found < 0:
        raise QsensError(f"{where}: {value!r} is not possible, it is never negative")
    return found


def _outlier(value: object, where: str) -> tuple[int, float]:
    pair = typed(value, list, where)
    if len(pair) != 2:
        raise QsensError(f"{where}: {value!r} is not a channel and its largest magnitude")
    return typed(pair[0], int, where), _magnitude(pair[1], where)


def _data_set(value: object, where: str) -> DataSet:
    fields = Fields(value, where)
    found = DataSet(
        purpose=cast("Purpose", fields.choice("purpose", get_args(Purpose))),
        count=_count(fields, "count"),
        unit=fields.choice("unit", ("samples", "batches")),
        samples=tuple(_sample(item, fields.at("samples")) for item in _list(fields, "samples")),
    )
    fields.end()
    return found


def _sample(value: object, where: str) -> Sample:
    fields = Fields(value, where)
    text, picture = fields.text("text"), fields.optional_text("picture")
    if picture is not None and not _PICTURE.fullmatch(picture):
        raise QsensError(f"{fields.at('picture')}: a PNG or JPEG data URL is needed, found {picture[:40]!r}")
    size = fields.take("size")
    if size is not None:
        size = [typed(number, int, fields.at("size")) for number in typed(size, list, fields.at("size"))]
        if len(size) != 2:
            raise QsensError(f"{fields.at('size')}: {size!r} is not a width and a height")
    fields.end()
    return Sample(text, picture, None if size is None else (size[0], size[1]))
