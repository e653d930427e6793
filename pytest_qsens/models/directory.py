"""Models from a directory with a Hugging Face snapshot."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING

from pytest_qsens.models.batches import make_batches, select_samples
from pytest_qsens.models.identity import checkpoint_identity
from pytest_qsens.models.outputs import ROWS
from pytest_qsens.models.processors import explained
from pytest_qsens.models.spec import ModelSpec
from pytest_qsens.models.tasks import TAKES_IMAGES, TAKES_SOUND, task_of
from pytest_qsens.models.transformers_model import load_class, load_model, on_meta
from pytest_qsens.models.weights import checkpoint_digest, weight_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from pytest_qsens.models.checkpoint import Checkpoint
    from pytest_qsens.models.data import Data, Samples


class DirectorySource:
    """A checkpoint on disk; follows ``ModelSource``."""

    def __init__(self, checkpoint: Checkpoint, data: Data, label: str | None = None) -> None:
        self.checkpoint = checkpoint
        self.data = data
        self.label = label or label_of(checkpoint.directory)

    def check(self) -> None:
        """Check files, headers and data. No torch, unless it must be found out whether the model takes images."""
        self.checkpoint.check()
        self.check_data()

    def check_data(self) -> None:
        """Check the user's data files, and if there are images, that the model takes them."""
        if self.data.check():
            model_class, config = load_class(self.checkpoint)
            task = task_of(model_class, config)
            if task not in TAKES_IMAGES:
                select_samples(task, self.data, model_class.__name__)

    def fingerprint(self) -> str:
        """Hash of the config: it decides the modules."""
        content = json.dumps(self.checkpoint.config, sort_keys=True)
        return "transformers:" + hashlib.sha256(content.encode()).hexdigest()

    def identity(self, *, hash_weights: bool) -> str | None:
        """Hash of the files."""
        found = checkpoint_identity(self.checkpoint.directory, hash_weights=hash_weights)
        return None if found is None else f"transformers:{found}"

    def data_fingerprint(self) -> str:
        """Short hash of the data."""
        return self.data.fingerprint()

    def evaluation_fingerprint(self) -> str:
        """Short hash of the evaluation data."""
        return self.data.evaluation_fingerprint()

    def weights_digest(self) -> str | None:
        """Short hash of config and weights."""
        return checkpoint_digest(self.checkpoint.directory)

    def weight_bytes(self) -> int:
        """Size of the weights' files."""
        return weight_bytes(self.checkpoint.directory)

    def skeleton(self) -> nn.Module:
        """Build the model on the meta device; refuses models that batches cannot be made for."""
        model_class, config = load_class(self.checkpoint)
        task_of(model_class, config)
        with explained("model", self.checkpoint.directory):
            return on_meta(lambda: model_class(config))

    def samples(self) -> tuple[Samples, Samples] | None:
        """Return the user's samples, or those for the model's task; ``None`` for one that takes sound."""
        model_class, config = load_class(self.checkpoint)
        task = task_of(model_class, config)
        return None if task in TAKES_SOUND else select_samples(task, self.data, model_class.__name__)

    def load(self) -> ModelSpec:
        """Load the weights as they are stored, and make the batches."""
        self.checkpoint.check()
        model = load_model(self.checkpoint)
        task = task_of(type(model), model.config)
        batches = make_batches(task, model, self.checkpoint.directory, self.data)
        return ModelSpec(
            model, batches.calibration, batches.evaluation, batches.output, batches.logits, ROWS.get(batches.output)
        )


def label_of(directory: Path) -> str:
    """Name a directory; a snapshot inside the Hugging Face cache is named after its repository.

    >>> from pathlib import Path
    >>> label_of(Path("/models/My model"))
    'My_model'
    >>> label_of(Path("/hub/models--org--name/snapshots/0a1b"))
    'org--name'
    """
    name = directory.name
    if directory.parent.name == "snapshots":
        name = directory.parent.parent.name.removeprefix("models--")
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)
