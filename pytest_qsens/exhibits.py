"""Samples of the data that a run uses, as a report shows them: excerpts and thumbnails."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_flatten_with_path

from pytest_qsens.details import DataSet, Sample

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from PIL.Image import Image
    from torch import Tensor

    from pytest_qsens.details import Purpose
    from pytest_qsens.models.data import Samples
    from pytest_qsens.models.spec import Batch, ModelSpec

SHOWN = 8
"""Samples of each purpose; the others are counted."""

EXCERPT = 160
"""Characters of a text."""

EDGE = 112
"""Pixels of the longer edge of a thumbnail."""


def exhibits(samples: tuple[Samples, Samples] | None, spec: ModelSpec) -> tuple[DataSet, ...]:
    """Show data for calibration and for evaluation.

    Args:
        samples: Of both, where they are texts and pictures.
        spec: Otherwise its batches are described.

    """
    purposes: tuple[Purpose, Purpose] = ("calibration", "evaluation")
    if samples is not None:
        return tuple(_of_samples(purpose, found) for purpose, found in zip(purposes, samples, strict=True))
    batches = (spec.calibration, spec.evaluation)
    return tuple(_of_batches(purpose, found) for purpose, found in zip(purposes, batches, strict=True))


def _of_samples(purpose: Purpose, samples: Samples) -> DataSet:
    shown = []
    for sample in samples[:SHOWN]:
        image = None if sample.image is None else sample.open_image()
        picture = None if image is None else thumbnail(image)
        shown.append(Sample(excerpt(sample.text), picture, None if image is None else image.size))
    return DataSet(purpose, len(samples), "samples", tuple(shown))


def _of_batches(purpose: Purpose, batches: Sequence[Batch]) -> DataSet:
    shown: list[Sample] = []
    for batch in batches[:SHOWN]:
        tensors = dict(_tensors(batch))
        told = ", ".join(f"{name}: {_told(tensor)}" for name, tensor in tensors.items())
        image = next((found for tensor in tensors.values() if (found := _image(tensor)) is not None), None)
        picture = None if image is None else thumbnail(image)
        shown.append(Sample(excerpt(told or "no tensors"), picture, None if image is None else image.size))
    return DataSet(purpose, len(batches), "batches", tuple(shown))


def _tensors(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    leaves, _ = tree_flatten_with_path(dict(batch))
    for path, leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            yield ".".join(str(_key(key)) for key in path), leaf


def _key(key: Any) -> object:  # noqa: ANN401  # one of torch's kinds of keys
    return getattr(key, "key", getattr(key, "idx", key))


def _told(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {' x '.join(map(str, tensor.shape)) or 'scalar'}"


def _image(tensor: Tensor) -> Image | None:
    """Draw the first image of a batch ``(N, C, H, W)`` of 1 or 3 channels, from its least to its largest value."""
    if tensor.dim() != 4 or not tensor.is_floating_point() or tensor.shape[1] not in (1, 3) or not tensor.numel():
        return None
    from PIL import Image

    values = tensor[0].detach().float().cpu()
    low, high = torch.aminmax(values)
    if not bool(torch.isfinite(high - low)):
        return None
    bytes_ = ((values - low) / (high - low).clamp_min(1e-12) * 255).round().to(torch.uint8)
    pixels = bytes_.permute(1, 2, 0).contiguous()
    mode = "L" if tensor.shape[1] == 1 else "RGB"
    return Image.frombytes(mode, (values.shape[2], values.shape[1]), pixels.numpy().tobytes())


def excerpt(text: str) -> str:
    """Cut a text after `EXCERPT` characters, and say so."""
    return text if len(text) <= EXCERPT else f"{text[: EXCERPT - 1]}…"


def thumbnail(image: Image) -> str:
    """Make a small JPEG of an image, as a data URL; equal images make equal ones."""
    small = image.convert("RGB")
    small.thumbnail((EDGE, EDGE))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
