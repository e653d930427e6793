"""Which token of which sample the rows of an output belong to, and where among them an error is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pytest_qsens.inspection.places import Group, Place, Where, Worst
from pytest_qsens.ops import STATES
from pytest_qsens.parts import rows_within

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from pytest_qsens.models.spec import Batch

_WORST = 5
"""Positions that are named."""

_CHUNK = 2**18
"""Values taken to float64 at a time."""

_TOKENS = (("decoder_input_ids", "decoder_attention_mask"), ("input_ids", "attention_mask"))
"""Keys of token ids in a batch, and of the mask that marks padding."""

_PIXELS = ("pixel_values", "pixel_values_videos")

Tokens = Callable[[int], str | None]
"""Token id → what it stands for, if that is known."""


@dataclass(frozen=True)
class Sites:
    """What the rows of an output are.

    Attributes:
        rows: How many, in the order of memory.
        sample: Of each row; with ``position`` a token's, else the entry in the first dimension.
        position: Of each row in its sample; ``None`` if rows are no tokens.
        tokens: Ids.
        real: Whether each row is no padding.

    """

    rows: int
    sample: Tensor
    position: Tensor | None = None
    tokens: Tensor | None = None
    real: Tensor | None = None


def sites_of(shape: Sequence[int], batch: Batch, *, flat: bool) -> Sites:
    """Find out what the rows of an output are.

    Args:
        shape: Of the output. It has a row per token if its first two dimensions are those of the token ids; or, if
            that may be so (``flat``), if its first has as many entries as there are tokens, with or without padding.
        batch: That it comes from.
        flat: Whether the first dimension alone can be that of tokens.

    """
    fits = [found for keys in _TOKENS if (found := _fitting(shape, batch, *keys, flat=flat)) is not None]
    if len(fits) == 1:
        return fits[0]
    rows = shape[0] if shape else 1  # no tokens, or nobody can tell which
    return Sites(rows, torch.arange(rows))


def _fitting(shape: Sequence[int], batch: Batch, ids_key: str, mask_key: str, *, flat: bool) -> Sites | None:
    ids, mask = batch.get(ids_key), batch.get(mask_key)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        return None
    fits = isinstance(mask, Tensor) and mask.shape == ids.shape
    real = mask.bool() if isinstance(mask, Tensor) and fits else torch.ones_like(ids, dtype=torch.bool)
    ids, real = ids.cpu(), real.cpu()
    sample, position = (grid.reshape(-1) for grid in torch.meshgrid(*map(torch.arange, ids.shape), indexing="ij"))
    every = Sites(ids.numel(), sample, position, ids.reshape(-1), real.reshape(-1))
    if len(shape) >= 3 and tuple(shape[:2]) == tuple(ids.shape):
        return every
    if not flat or len(shape) != 2:
        return None
    if shape[0] == ids.numel():
        return every
    if shape[0] == int(real.sum()):
        kept = real.reshape(-1)
        return Sites(shape[0], sample[kept], position[kept], ids.reshape(-1)[kept], torch.ones(shape[0]).bool())
    return None


def whole_shape(kind: str, shape: Sequence[int]) -> Sequence[int]:
    """Give the shape of an op's input or output a first dimension, if it is that of a single row or sample."""
    if kind in STATES:
        return shape
    single = 1 if kind == "linear" else int(kind[4]) + 1 if kind != "embedding" else 0
    return (1, *shape) if len(shape) == single else shape


def has_pixels(batch: Batch) -> bool:
    """Whether there are images, whose patches may be as many as tokens by chance."""
    return any(batch.get(key) is not None for key in _PIXELS)


def row_sums(values: Iterator[Tensor] | Sequence[Tensor]) -> Tensor:
    """Put the sums of parts together: float64, ``(rows,)``."""
    return torch.cat(list(values))


def row_errors(reference: Tensor, output: Tensor, rows: int) -> Tensor:
    """Sum of squared differences of every row: float64, ``(rows,)``."""
    left, right = reference.reshape(rows, -1), output.reshape(rows, -1)
    step = rows_within(_CHUNK, left)
    pairs = zip(torch.split(left, step), torch.split(right, step), strict=True)
    return row_sums([(b.double() - a.double()).square().sum(1).cpu() for a, b in pairs])


def row_energies(reference: Tensor, rows: int) -> Tensor:
    """Sum of squares of every row: float64, ``(rows,)``."""
    flat = reference.reshape(rows, -1)
    return row_sums([part.double().square().sum(1).cpu() for part in torch.split(flat, rows_within(_CHUNK, flat))])


class Located:
    """Adds up an error by place, batch after batch.

    Args:
        kinds: Token id → ``image`` or ``video``.
        text_of: What tokens stand for.
        padding: Whether errors at padded positions count.

    """

    def __init__(self, kinds: Mapping[int, str], text_of: Tokens, *, padding: bool = True) -> None:
        self._padding = padding
        self._kinds = kinds
        self._text_of = text_of
        self._batches: list[tuple[int, Sites, Tensor, Tensor]] = []

    def add(self, number: int, sites: Sites, errors: Tensor, energies: Tensor) -> None:
        """Add what is in one batch, by row."""
        if not self._padding:
            errors = errors.masked_fill(~real_rows(sites), 0)
        self._batches.append((number, sites, errors, energies))

    @property
    def found(self) -> Where | None:
        """All of it; ``None`` if there is nothing, or an error is not finite."""
        if not self._batches:
            return None
        errors = torch.cat([errors for *_, errors, _ in self._batches])
        if not bool(torch.isfinite(errors).all()):
            return None
        tokens = all(sites.tokens is not None for _, sites, *_ in self._batches)
        real = torch.cat([real_rows(sites) for _, sites, *_ in self._batches])
        alive = torch.where(real, errors, 0.0)
        ordered = alive.sort(descending=True).values
        within = ordered.cumsum(0) < 0.5 * ordered.sum()
        return Where(
            float(errors.sum()),
            int(real.sum()),
            tokens,
            tuple(self._groups()) if tokens else (),
            tuple(self._worst(alive)),
            int(within.sum()) + 1 if float(ordered.sum()) else 0,
        )

    def _groups(self) -> Iterator[Group]:
        found: dict[str, list[float]] = {}
        for _, sites, errors, energies in self._batches:
            for name, chosen in self._members(sites):
                sums = found.setdefault(name, [0, 0.0, 0.0])
                sums[0] += int(chosen.sum())
                sums[1] += float(errors[chosen].sum())
                sums[2] += float(energies[chosen].sum())
        order = ("text", "image", "video", "padding", "first")
        for name in sorted((name for name, sums in found.items() if sums[0]), key=order.index):
            positions, sse, energy = found[name]
            yield Group(name, int(positions), sse, sse / energy if energy else None)

    def _members(self, sites: Sites) -> Iterator[tuple[str, Tensor]]:
        assert sites.tokens is not None  # noqa: S101 - asked of tokens only
        real, rest = real_rows(sites), real_rows(sites)
        for name in dict.fromkeys(self._kinds.values()):
            ids = torch.tensor([token for token, kind in self._kinds.items() if kind == name])
            chosen = real & torch.isin(sites.tokens, ids)
            rest = rest & ~chosen
            yield name, chosen
        yield "text", rest
        if self._padding:
            yield "padding", ~real
        first = torch.zeros_like(real)
        for sample in dict.fromkeys(sites.sample.tolist()):
            first[int((real & (sites.sample == sample)).int().argmax())] = True
        yield "first", first & real

    def _worst(self, errors: Tensor) -> Iterator[Worst]:
        starts = torch.tensor([sites.rows for _, sites, *_ in self._batches]).cumsum(0)
        for index in errors.argsort(descending=True, stable=True)[:_WORST].tolist():
            if float(errors[index]) <= 0:
                return
            which = int((starts <= index).sum())
            number, sites, *_ = self._batches[which]
            row = index - (int(starts[which - 1]) if which else 0)
            yield Worst(place(number, sites, row, self._text_of), float(errors[index]))


def place(number: int, sites: Sites, row: int, text_of: Tokens) -> Place:
    """Say where a row of a batch is."""
    if sites.position is None or sites.tokens is None:
        return Place(number, int(sites.sample[row]))
    token = int(sites.tokens[row])
    return Place(number, int(sites.sample[row]), int(sites.position[row]), token, text_of(token))


def real_rows(sites: Sites) -> Tensor:
    """Tell which rows are no padding."""
    return torch.ones(sites.rows, dtype=torch.bool) if sites.real is None else sites.real


def kinds_of(model: nn.Module) -> dict[int, str]:
    """Token id → ``image`` or ``video``, as the config of a transformers model says."""
    config: Any = getattr(model, "config", None)
    found: dict[int, str] = {}
    for kind in ("image", "video"):
        for key in (f"{kind}_token_id", f"{kind}_token_index"):
            token = getattr(config, key, None)
            if isinstance(token, int):
                found[token] = kind
    return found
