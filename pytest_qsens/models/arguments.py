"""Arguments of commands that say which model on which data. Importing this costs nothing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qsens.errors import QsensError
from pytest_qsens.models.presets import PRESETS
from pytest_qsens.models.resolve import resolve
from pytest_qsens.models.source import ModelRequest

if TYPE_CHECKING:
    from pytest_qsens.models.source import ModelSource
    from pytest_qsens.results import RunInfo


def add_model_arguments(command: argparse.ArgumentParser) -> None:
    """Declare them."""
    command.add_argument("--model", help="as --qsens-model (default: the preset that the result is of)")
    command.add_argument("--checkpoint", type=Path, metavar="DIR", help="as --qsens-checkpoint")
    command.add_argument("--calib", type=Path, metavar="FILE", help="as --qsens-calib")
    command.add_argument("--calib-samples", type=positive, metavar="N", help="as --qsens-calib-samples")
    command.add_argument("--eval", type=Path, metavar="FILE", help="as --qsens-eval")
    command.add_argument("--allow-pickle", action="store_true", help="as --qsens-allow-pickle")


def given_model_arguments(given: argparse.Namespace) -> list[str]:
    """List those that were given."""
    names = ("model", "checkpoint", "calib", "calib_samples", "eval", "allow_pickle")
    return [f"--{name.replace('_', '-')}" for name in names if getattr(given, name)]


def positive(text: str) -> int:
    """Read a count from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on is needed, not {text!r}")
    return int(text)


def find_model(given: argparse.Namespace, run: RunInfo | None, path: Path | None) -> ModelSource:
    """Find the model; what is not given is that of a result.

    Args:
        given: Arguments of the command line.
        run: Of the result, if there is one.
        path: Of the result.

    Raises:
        QsensError: If there is no such model, or nothing says which.

    """
    return resolve(
        ModelRequest(
            model=_model(given.model, run, path),
            checkpoint=_absolute(given.checkpoint),
            calib=_absolute(given.calib),
            eval=_absolute(given.eval),
            calib_samples=given.calib_samples,
            allow_pickle=given.allow_pickle,
            root=str(Path.cwd()),
        )
    )


def check_same(path: Path, run: RunInfo, source: ModelSource) -> None:
    """Check that a result is of this model on these data.

    Raises:
        QsensError: If it is of another model, checkpoint or other data.

    """
    if run.model != source.label:
        raise QsensError(
            f"{path} is a result of model {run.model!r}, not {source.label!r}. Give the model with --model."
        )
    for what, advice, recorded, present in (
        ("another checkpoint", "Give the same weights", run.checkpoint, source.weights_digest()),
        ("other data", "Give the same --calib, --calib-samples and --eval", run.data, source.data_fingerprint()),
    ):
        if None not in (recorded, present) and recorded != present:
            raise QsensError(f"{path} was measured with {what} (hash {recorded}, not {present}). {advice}.")


def _model(given: str | None, run: RunInfo | None, path: Path | None) -> str:
    if given is not None:
        return given
    if run is None:
        raise QsensError("give a model with --model, a result file of a preset, or both")
    if run.model not in PRESETS:
        raise QsensError(
            f"{path} is a result of {run.model!r}, which is no preset: give with --model what --qsens-model was. "
            f"Presets: {', '.join(PRESETS)}."
        )
    return run.model


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.expanduser().absolute())
