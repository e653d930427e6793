"""Random weights that behave like trained ones, written tensor by tensor as a sharded safetensors checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from pytest_qsens.errors import QsensError
from pytest_qsens.models.checkpoint import SAFE_INDEX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    import torch
    from transformers import PretrainedConfig, PreTrainedModel

SHARD_BYTES = 4_000_000_000
"""Upper limit on a shard's data, unless a single tensor is larger; Qwen2.5-VL-3B comes in two shards like this."""

CHUNK = 1 << 24
"""Values drawn at a time, 64 MiB in fp32. Part of what a seed means: other chunks give other values."""

NORM_SPREAD = 0.1
"""Standard deviation of the norms' weights around 1."""

OUTLIERS = 6
OUTLIER_SCALE = 20.0
WIDTH_PER_OUTLIER = 64
"""Small models get fewer outliers: one for so many channels, at least one."""

Kind = Literal["normal", "norm", "zeros", "ones"]
_BUFFERS: dict[str, Kind] = {"running_mean": "zeros", "running_var": "ones", "num_batches_tracked": "zeros"}
_DTYPES = {2: "BF16", 8: "I64"}


@dataclass(frozen=True)
class Planned:
    """A tensor of the checkpoint under the name that it has there. ``size`` is bytes a value: 2 is bf16, 8 int64."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    std: float
    outliers: int = 0
    size: int = 2

    @property
    def values(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.values * self.size


def plan(model: PreTrainedModel) -> list[Planned]:
    """List what a checkpoint of ``model`` holds, with the names that ``save_pretrained`` would give.

    These are the names of the checkpoints on the hub where transformers' own differ, such as ``visual.…`` for
    ``model.visual.…``. Tied weights are there once. The model may be on the meta device.

    Weights, biases and embeddings are normal with the config's ``initializer_range`` (0.02 if it has none), norms
    normal around 1 with a standard deviation of 0.1. In all norms as wide as the hidden states the same 6 channels
    (for widths below 384, one of 64) are 20 times larger, so that the activations behind them have outliers:
    LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339) finds them in about 6 fixed hidden dimensions through all
    layers, up to 20 times larger than others; that the norms' weights amplify them is in Outlier Suppression (Wei et
    al. 2022, arXiv:2209.13325).

    Raises:
        QsensError: If the model has a buffer whose values cannot be drawn.

    """
    from transformers.core_model_loading import revert_weight_conversion

    tied: dict[str, str] = model.all_tied_weights_keys
    tensors = {name: t for name, t in model.state_dict(keep_vars=True).items() if name not in tied}
    buffers = {id(buffer): name for name, buffer in model.named_buffers()}
    norms = {
        id(module.weight)
        for module in model.modules()
        if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None
    }
    std = _std(model.config)
    widths = _hidden_sizes(model.config)
    restore: Callable[[PreTrainedModel, dict[str, torch.Tensor]], dict[str, torch.Tensor]] = revert_weight_conversion
    planned = []
    for name, tensor in restore(model, tensors).items():
        shape = tuple(tensor.shape)
        if id(tensor) in buffers:
            kind = _buffer_kind(buffers[id(tensor)], type(model).__name__)
            planned.append(Planned(name, shape, kind, std, size=2 if tensor.is_floating_point() else 8))
        elif id(tensor) in norms and len(shape) == 1:
            outliers = min(OUTLIERS, max(1, shape[0] // WIDTH_PER_OUTLIER)) if shape[0] in widths else 0
            planned.append(Planned(name, shape, "norm", NORM_SPREAD, outliers))
        else:
            planned.append(Planned(name, shape, "normal", std))
    # Large values first: readers map a file, and want every tensor at a multiple of its values' size.
    return sorted(planned, key=lambda tensor: -tensor.size)


def _buffer_kind(name: str, model: str) -> Kind:
    kind = _BUFFERS.get(name.rpartition(".")[2])
    if kind is None:
        raise QsensError(
            f"no stand-in can be made for {model}: its checkpoints hold the buffer {name!r}, whose values are computed "
            f"and cannot be drawn. Save a model of random weights with `save_pretrained` instead."
        )
    return kind


def _configs(config: PretrainedConfig) -> list[PretrainedConfig]:
    parts = (getattr(config, name, None) for name in config.sub_configs)
    return [config, *(part for part in parts if part is not None)]


def _std(config: PretrainedConfig) -> float:
    given = (getattr(part, "initializer_range", None) for part in _configs(config))
    return float(next((std for std in given if std), 0.02))


def _hidden_sizes(config: PretrainedConfig) -> set[int]:
    return {getattr(part, "hidden_size", 0) for part in _configs(config)}


def draw(tensor: Planned, seed: int) -> Iterator[torch.Tensor]:
    """Draw the values, flat, a chunk at a time; they depend on the seed, the tensor's name and its shape only."""
    import torch

    if tensor.kind in ("zeros", "ones"):
        dtype = torch.bfloat16 if tensor.size == 2 else torch.int64
        yield torch.full((tensor.values,), int(tensor.kind == "ones"), dtype=dtype)
        return
    generator = _generator(seed, tensor.name)
    for start in range(0, tensor.values, CHUNK):
        values = torch.randn(min(CHUNK, tensor.values - start), generator=generator).mul_(tensor.std)
        if tensor.kind == "norm":
            values += 1
            values[outlier_channels(tensor.values, tensor.outliers, seed)] *= OUTLIER_SCALE
        yield values.bfloat16()


def outlier_channels(width: int, count: int, seed: int) -> torch.Tensor:
    """Choose ``count`` of ``width`` channels: the same ones in all norms, as one stream of hidden states runs there."""
    import torch

    return torch.randperm(width, generator=_generator(seed, f"outlier channels of {width}"))[:count]


def _generator(seed: int, name: str) -> torch.Generator:
    import torch

    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    # torch's generator on the CPU takes no more than 32 bits of a seed.
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def write(
    tensors: Sequence[Planned], directory: Path, seed: int, shard_bytes: int, report: Callable[[str, int], None]
) -> None:
    """Write shards and index. ``report`` is told the name and the bytes of every shard when it is on disk.

    Raises:
        OSError: If the disk is full, and the like.

    """
    shards = list(_shards(tensors, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = directory / f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(shard, file, seed)
        weight_map |= {tensor.name: file.name for tensor in shard}
        report(file.name, file.stat().st_size)
    total = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / SAFE_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Iterable[Planned], shard_bytes: int) -> Iterator[list[Planned]]:
    shard: list[Planned] = []
    for tensor in tensors:
        if shard and sum(other.nbytes for other in shard) + tensor.nbytes > shard_bytes:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def _write_shard(tensors: Sequence[Planned], path: Path, seed: int) -> None:
    """Write one file of the safetensors format.

    Not with the library, which takes all tensors of a file at once. The format is the length of the header in 8 bytes,
    little-endian; the header, JSON padded with spaces to a multiple of 8 bytes; the data without gaps
    (https://github.com/huggingface/safetensors#format).
    """
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": _DTYPES[tensor.size],
            "shape": tensor.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for chunk in chain.from_iterable(draw(tensor, seed) for tensor in tensors):
            file.write(chunk.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())  # some file systems tell of a full disk only now
