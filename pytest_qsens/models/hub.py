"""Models from the Hugging Face cache or hub."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qsens.errors import QsensError
from pytest_qsens.models.checkpoint import Checkpoint, check_weight_names
from pytest_qsens.models.directory import DirectorySource

if TYPE_CHECKING:
    from torch import nn

    from pytest_qsens.models.data import Data, Samples
    from pytest_qsens.models.spec import ModelSpec

TIMEOUT = 5.0
"""Seconds the hub has to answer; the hub client alone retries for half a minute where there is no network."""

FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")


class HubSource:
    """A repository on the hub, taken from the local cache if it is there; follows ``ModelSource``.

    ``check`` downloads no more than ``config.json``; the weights come with ``load``. ``missing`` starts the error
    message and ``advice`` ends it when the repository can be found nowhere.
    """

    def __init__(
        self, repository: str, data: Data, *, allow_pickle: bool, label: str, missing: str, advice: str
    ) -> None:
        self.repository = repository
        self.data = data
        self.allow_pickle = allow_pickle
        self.label = label
        self.missing = missing
        self.advice = advice

    @cached_property
    def cached(self) -> DirectorySource | None:
        """The repository in the local cache, if config and weights are there."""
        from huggingface_hub import snapshot_download

        try:
            directory = snapshot_download(self.repository, local_files_only=True)
        except OSError:
            return None
        source = self._source(directory)
        names = {path.name for path in source.checkpoint.directory.iterdir()}
        has_weights = any(name.endswith((".safetensors", ".bin")) for name in names)
        return source if "config.json" in names and has_weights else None

    @cached_property
    def _remote_config(self) -> DirectorySource:
        """The directory in the cache that ``config.json`` was downloaded to; it has no weights yet.

        Raises:
            QsensError: If the hub cannot be reached, or has no such repository or nothing in it that can be loaded.

        """
        from huggingface_hub import HfApi, constants, hf_hub_download

        url = f"{constants.ENDPOINT}/{self.repository}"
        try:
            names = [entry.rfilename for entry in HfApi().model_info(self.repository, timeout=TIMEOUT).siblings or ()]
            check_weight_names(names, url, self.allow_pickle)
            config = hf_hub_download(self.repository, "config.json", etag_timeout=TIMEOUT)
        except QsensError:
            raise
        except Exception as error:
            # The client's transport, and with it what is raised without a network, differs between its versions.
            reason = str(error).strip().partition("\n")[0]
            raise QsensError(
                f"{self.missing} the Hugging Face cache {constants.HF_HUB_CACHE} (not there, or without weights); "
                f"{url} ({type(error).__name__}: {reason}). {self.advice}"
            ) from error
        return self._source(str(Path(config).parent))

    def _source(self, directory: str) -> DirectorySource:
        return DirectorySource(Checkpoint(Path(directory), self.allow_pickle), self.data, self.label)

    def check(self) -> None:
        """Check the cached files, or that the hub has what is needed; then the data."""
        if self.cached is not None:
            self.cached.check()
        else:
            _ = self._remote_config.checkpoint.architecture
            self._remote_config.check_data()

    def fingerprint(self) -> str:
        """Hash of the config."""
        return (self.cached or self._remote_config).fingerprint()

    def identity(self, *, hash_weights: bool) -> str | None:
        """Hash of the files in the cache; ``None`` before they are downloaded."""
        return None if self.cached is None else self.cached.identity(hash_weights=hash_weights)

    def data_fingerprint(self) -> str:
        """Short hash of the data."""
        return self.data.fingerprint()

    def evaluation_fingerprint(self) -> str:
        """Short hash of the evaluation data."""
        return self.data.evaluation_fingerprint()

    def weights_digest(self) -> str | None:
        """Short hash of config and weights in the local cache; ``None`` if they are yet to be downloaded."""
        return None if self.cached is None else self.cached.weights_digest()

    def weight_bytes(self) -> int | None:
        """Size of the weights' files, once they are in the cache."""
        return None if self.cached is None else self.cached.weight_bytes()

    def skeleton(self) -> nn.Module:
        """Build the model on the meta device."""
        return (self.cached or self._remote_config).skeleton()

    def samples(self) -> tuple[Samples, Samples] | None:
        """Return what the model is given; its config is enough to tell."""
        return (self.cached or self._remote_config).samples()

    def load(self) -> ModelSpec:
        """Download what is missing, load the weights and make the batches."""
        if self.cached is not None:
            return self.cached.load()
        _ = self._remote_config  # says clearly what is wrong before a long download
        from huggingface_hub import snapshot_download

        patterns = [*FILES, "*.bin"] if self.allow_pickle else list(FILES)
        self.cached = self._source(snapshot_download(self.repository, allow_patterns=patterns))
        return self.cached.load()
