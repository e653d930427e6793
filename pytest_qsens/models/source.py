"""Where a model comes from: the request a user makes, and the protocol every kind of source follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from pytest_qsens.models.data import Samples
    from pytest_qsens.models.spec import ModelSpec


@dataclass(frozen=True)
class ModelRequest:
    """Everything that decides which model is measured, on which data.

    ``model`` is a preset, a directory, ``hub:org/name`` or ``package.module:factory``; paths are absolute strings.
    ``root`` is a directory that a factory's module may lie in, besides the working directory.
    """

    model: str
    checkpoint: str | None = None
    calib: str | None = None
    eval: str | None = None
    calib_samples: int | None = None
    allow_pickle: bool = False
    root: str | None = None


class ModelSource(Protocol):
    """A resolved request. Nothing but ``skeleton`` and ``load`` imports torch."""

    @property
    def label(self) -> str:
        """Name for node ids and snapshot paths: letters, digits, ``.``, ``_`` and ``-`` only."""

    def check(self) -> None:
        """Find what is wrong with the checkpoint and the data files without loading weights.

        Raises:
            QsensError: With what, where, the value and the next step.

        """

    def fingerprint(self) -> str | None:
        """Key of everything ``skeleton`` depends on, or ``None`` if that cannot be told."""

    def identity(self, *, hash_weights: bool) -> str | None:
        """Key of everything that the loaded model depends on, weights included, or ``None`` if that cannot be told.

        Args:
            hash_weights: Whether weights count with their contents, in place of file sizes and times.

        """

    def data_fingerprint(self) -> str | None:
        """Short hash of the calibration and evaluation data, or ``None`` if that cannot be told."""

    def evaluation_fingerprint(self) -> str | None:
        """Short hash of the evaluation data alone, or ``None`` if that cannot be told."""

    def weights_digest(self) -> str | None:
        """Short hash of the checkpoint, equal for a copy of it, or ``None`` if that cannot be told."""

    def weight_bytes(self) -> int | None:
        """Size of the weights, or ``None`` if that cannot be told without loading them."""

    def skeleton(self) -> torch.nn.Module:
        """Build the module on the meta device where the source allows it; no weights are loaded."""

    def samples(self) -> tuple[Samples, Samples] | None:
        """Return the samples for calibration and evaluation; ``None`` where batches are not made of texts or images.

        Raises:
            QsensError: If they cannot be read.

        """

    def load(self) -> ModelSpec:
        """Load the weights as they are stored, and build the batches.

        Raises:
            QsensError: If weights are missing, damaged or do not fit.

        """
