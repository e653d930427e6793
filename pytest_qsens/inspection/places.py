"""Where an error is. Builtin values only; no torch needed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where in a batch something is.

    Attributes:
        batch: Number of the evaluation batch, from 1.
        row: Entry in the first dimension (with `token`: the sample), from 0.
        position: Of the token in its sample, from 0; ``None`` if rows are no tokens.
        token: Its id.
        text: What it stands for, if there is a tokenizer.

    """

    batch: int
    row: int
    position: int | None = None
    token: int | None = None
    text: str | None = None


@dataclass(frozen=True)
class Group:
    """Positions of one kind, and the part of the error that is at them.

    Attributes:
        name: ``text``, ``image``, ``video``, ``padding``; ``first`` for the first token of every sample, which is
            among the others, too.
        positions: How many.
        sse: Sum of squared errors.
        nmse: Relative to the reference there.

    """

    name: str
    positions: int
    sse: float
    nmse: float | None


@dataclass(frozen=True)
class Worst:
    """One position with a large error."""

    place: Place
    sse: float


@dataclass(frozen=True)
class Where:
    """Where an error is.

    Attributes:
        sse: All of it; in an op's own output without padding, which no score sees.
        positions: How many tokens (or rows, if they are no tokens) it is spread over, without padding.
        tokens: Whether the rows are tokens.
        groups: By kind; empty if rows are no tokens.
        worst: The positions with the largest error, padding left out.
        half: The least number of positions that half of the error is at.

    """

    sse: float
    positions: int
    tokens: bool
    groups: tuple[Group, ...]
    worst: tuple[Worst, ...]
    half: int
