"""Stand-ins: complete Hugging Face snapshots of a model's true sizes, with random weights.

A run on a stand-in takes the code path, the memory and the time of a run on the model; its scores say nothing about it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qsens.errors import QsensError
from pytest_qsens.files import check_writable, locked, temporary_prefix
from pytest_qsens.models import qwen2_5_vl, standin_weights
from pytest_qsens.models.checkpoint import Checkpoint
from pytest_qsens.models.data import Data
from pytest_qsens.models.directory import DirectorySource
from pytest_qsens.models.hub import FILES
from pytest_qsens.wording import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PRESETS: dict[str, Callable[[Path], None]] = {"qwen2_5_vl_3b": qwen2_5_vl.write_files}
"""What writes the small files of a preset into a directory."""

SMALL_FILES_BYTES = 20_000_000
"""More than tokenizer, config and index take."""

_README = """\
# A stand-in for {source}

All weights here are random (seed {seed}). They have the names, shapes and number format of the model's, so that a run
can be tried; scores measured on them say nothing about the model.

Made by `qsens standin {source} DIR --seed {seed}`.
"""


@dataclass(frozen=True)
class Written:
    """What was written: values in all weights, bytes in all files, seconds it took, and the run to try next."""

    directory: Path
    parameters: int
    nbytes: int
    seconds: float
    command: str


def write(
    source: str,
    directory: Path,
    seed: int = 0,
    *,
    shard_bytes: int = standin_weights.SHARD_BYTES,
    report: Callable[[str], None] = lambda _: None,
) -> Written:
    """Write a stand-in for ``source``, a name in ``PRESETS`` or a directory with config and tokenizer files.

    ``directory`` is there complete or not at all: it is written under a temporary name beside it. The same seed gives
    the same bytes on the same machine and version of torch. No more than a part of one tensor is held in memory.
    ``report`` is told a line for every file of weights.

    Raises:
        QsensError: If there is no such source, or the directory cannot be written there or holds something already.

    """
    start = time.monotonic()
    write_files, config_directory = _resolve(source)
    directory = Path(os.path.realpath(directory.expanduser()))  # a link to an empty directory is filled, not replaced
    with _temporary(directory) as temporary:
        write_files(temporary)
        checkpoint = Checkpoint(config_directory or temporary)  # messages name the user's own
        model: Any = DirectorySource(checkpoint, Data(None, None, None)).skeleton()
        tensors = standin_weights.plan(model)
        _check_space(directory, sum(tensor.nbytes for tensor in tensors) + SMALL_FILES_BYTES)

        def shard_written(name: str, nbytes: int) -> None:
            report(f"{name}: {_size(nbytes)}, {time.monotonic() - start:.0f} s")

        standin_weights.write(tensors, temporary, seed, shard_bytes, shard_written)
        (temporary / "README.md").write_text(_README.format(source=source, seed=seed), encoding="utf-8")
        Checkpoint(temporary).check()
        nbytes = sum(path.stat().st_size for path in temporary.iterdir())
    place = shlex.quote(str(directory))
    model_options = f"{source} --qsens-checkpoint {place}" if source in PRESETS else place
    return Written(
        directory,
        sum(tensor.values for tensor in tensors),
        nbytes,
        time.monotonic() - start,
        f"pytest --qsens-model {model_options}",
    )


def summary(written: Written) -> list[str]:
    """Lines for the user."""
    parameters, size = _short(written.parameters, "", "B"), _size(written.nbytes)
    return [
        f"wrote {written.directory}: {parameters} parameters, {size}, {written.seconds:.0f} s",
        "The weights are random: scores will say nothing about the model.",
        f"next: {written.command}",
    ]


def _short(number: int, unit: str, billions: str) -> str:
    """Give a number in billions, or in millions if it is smaller.

    >>> _short(3_754_622_976, "", "B"), _short(1_234_567, "B", "GB")
    ('3.75 B', '1.23 MB')
    """
    return f"{number / 1e9:.2f} {billions}" if number >= 1e8 else f"{number / 1e6:.2f} M{unit}"


def _size(nbytes: int) -> str:
    return _short(nbytes, "B", "GB")


def _resolve(source: str) -> tuple[Callable[[Path], None], Path | None]:
    """Find out what writes the small files, and the user's directory if it is one."""
    if source in PRESETS:
        return PRESETS[source], None
    path = Path(source).expanduser()
    if path.name == "config.json" and path.is_file():
        path = path.parent
    if path.is_dir():
        Checkpoint(path).check_config()
        return lambda directory: _copy_small_files(path, directory), path
    raise QsensError(
        f"no stand-in can be made for {source!r}{did_you_mean(source, PRESETS)}. Known: {', '.join(PRESETS)}. A "
        f"directory with config.json and the files of a tokenizer or processor also works."
    )


def _copy_small_files(source: Path, directory: Path) -> None:
    """Copy what is neither weights nor code."""
    for path in sorted(source.iterdir()):
        is_wanted = any(path.match(pattern) for pattern in FILES if pattern != "*.safetensors")
        if is_wanted and path.is_file() and not path.name.endswith(".index.json"):
            shutil.copyfile(path, directory / path.name)


@contextmanager
def _temporary(directory: Path) -> Iterator[Path]:
    """Give an empty directory that gets the name ``directory`` at the end, and is gone after an error.

    What a killed process left is removed. Its name is always the same: the lock tells who is alive.
    """
    parent = directory.parent
    if not parent.is_dir():
        raise QsensError(f"no such directory: {parent}. Make it with `mkdir -p {shlex.quote(str(parent))}`.")
    check_writable(parent)
    temporary = directory.with_name(f"{temporary_prefix(directory)}standin.tmp")
    with locked(directory):
        _check_free(directory)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            yield temporary
            temporary.replace(directory)
        except OSError as error:
            raise QsensError(
                f"cannot write {directory}: {error.strerror or error} ({error.filename or temporary}). Nothing of it "
                f"is kept. Free some space, or choose another directory."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _check_free(directory: Path) -> None:
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists():
        what = "is not empty" if directory.is_dir() else "is a file"
        raise QsensError(f"{directory} {what}, and nothing is replaced. Choose another name, or remove it first.")


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory.parent).free
    if free < needed:
        raise QsensError(
            f"{directory} needs {_size(needed)}, but only {_size(free)} are free in {directory.parent}. Free some "
            f"space, or choose a directory on another disk."
        )
