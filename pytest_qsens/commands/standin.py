"""The command ``qsens standin``: write a model of true sizes with random weights."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qsens.models import standin

if TYPE_CHECKING:
    from argparse import Namespace

    from pytest_qsens.commands.command import Subparsers


def register(commands: Subparsers) -> None:
    """Declare the command."""
    random = commands.add_parser(
        "standin",
        help="write a model of true sizes with random weights, for a dry run",
        description="Write a complete Hugging Face snapshot with random weights: a run on it takes the code path, time "
        "and memory of a run on the model, and its scores say nothing about the model.",
    )
    random.add_argument(
        "source",
        metavar="MODEL",
        help=f"{', '.join(standin.PRESETS)}, or a directory with config.json and tokenizer files",
    )
    random.add_argument("directory", type=Path, metavar="DIR", help="to write; new or empty")
    random.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights, default 0")
    random.set_defaults(run=run)


def run(arguments: Namespace) -> list[str]:
    """Run it; returns the lines to print."""

    def report(line: str) -> None:
        sys.stderr.write(f"qsens: {line}\n")

    # A terminated process would leave gigabytes behind: as an exception, the signal runs what cleans up.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        written = standin.write(arguments.source, arguments.directory, arguments.seed, report=report)
    finally:
        signal.signal(signal.SIGTERM, before)
    return standin.summary(written)
