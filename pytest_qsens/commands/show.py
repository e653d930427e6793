"""The command ``qsens show``: print the ops of a result file as a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qsens.report.scores import table
from pytest_qsens.result_files import load

if TYPE_CHECKING:
    from argparse import Namespace

    from pytest_qsens.commands.command import Subparsers


def register(commands: Subparsers) -> None:
    """Declare the command."""
    show = commands.add_parser("show", help="print the ops of a result file as a table")
    show.add_argument("result", type=Path, metavar="RESULT.json", help="written by `pytest --qsens-json`")
    show.add_argument("--sort", choices=("nmse", "op"), help="worst first, or by name; default: model order")
    show.set_defaults(run=run)


def run(arguments: Namespace) -> list[str]:
    """Run it; returns the lines to print."""
    return table(load(arguments.result), arguments.sort)
