"""From what the user writes after ``--qsens-model`` to a model source."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qsens.errors import QsensError
from pytest_qsens.models.checkpoint import Checkpoint
from pytest_qsens.models.data import Data
from pytest_qsens.models.directory import DirectorySource
from pytest_qsens.models.factory import FactorySource
from pytest_qsens.models.hub import HubSource
from pytest_qsens.models.presets import PRESETS, refuse_checkpoint

if TYPE_CHECKING:
    from pytest_qsens.models.source import ModelRequest, ModelSource

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def resolve(request: ModelRequest) -> ModelSource:
    """Find out what kind of model is meant; nothing of it is read yet.

    Raises:
        QsensError: If it is none of the known kinds, or comes with options that it does not take.

    """
    name, data = request.model, Data.from_request(request)
    if name in PRESETS:
        return PRESETS[name](request, data)
    path = Path(name).expanduser()
    if name.startswith("hub:"):
        refuse_checkpoint(request)
        return _hub(name.removeprefix("hub:"), request, data)
    if name and path.is_dir():
        refuse_checkpoint(request)
        return DirectorySource(Checkpoint(path.resolve(), request.allow_pickle), data)
    if _FACTORY.fullmatch(name):
        refuse_checkpoint(request)
        if data.given or request.calib_samples is not None:
            option = data.given[0][0] if data.given else "--qsens-calib-samples"
            raise QsensError(f"{option} has no meaning with --qsens-model {name}: the factory brings its own batches.")
        return FactorySource(name, request.root)
    raise QsensError(_unknown(name, path))


def _hub(repository: str, request: ModelRequest, data: Data) -> ModelSource:
    if not _REPOSITORY.fullmatch(repository):
        raise QsensError(f"--qsens-model hub:{repository} is not of the form hub:org/name.")
    return HubSource(
        repository,
        data,
        allow_pickle=request.allow_pickle,
        label=repository.replace("/", "--"),
        missing=f"cannot find hub:{repository}. Looked at:",
        advice=(
            f"Where there is a network, `hf download {repository} --local-dir DIR` makes a directory for "
            f"`--qsens-model DIR`."
        ),
    )


def _unknown(name: str, path: Path) -> str:
    other = (
        "A directory with a Hugging Face snapshot, hub:org/name and package.module:factory (returning a ModelSpec) "
        "also work."
    )
    if name and path.exists():
        return f"--qsens-model {name} is a file, not a directory with a Hugging Face snapshot."
    if name.startswith((".", "/", "~")) or name.endswith("/"):
        return f"no such directory: {path} (--qsens-model {name})."
    hints = [*get_close_matches(name, PRESETS, n=1), *([f"hub:{name}"] if _REPOSITORY.fullmatch(name) else [])]
    suggestion = f" (did you mean {' or '.join(hints)}?)" if hints else ""
    return f"no preset {name!r}{suggestion}. Known: {', '.join(PRESETS)}. {other}"
