"""The command ``qsens inspect``: tell why an op is sensitive."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qsens.files import write_atomically
from pytest_qsens.models.arguments import add_model_arguments, find_model

if TYPE_CHECKING:
    from argparse import Namespace

    from pytest_qsens.commands.command import Subparsers


def register(commands: Subparsers) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "inspect",
        help="tell why an op is sensitive",
        description="Measure what makes an op of a result sensitive: its ranges and outlier channels, what rounding "
        "loses, the error of its weight, input and output alone, where the error is, and under other schemes.",
    )
    command.add_argument("result", type=Path, metavar="RESULT.json", help="written by `pytest --qsens-json`")
    command.add_argument("op", metavar="OP", help="as `qsens show RESULT.json` lists it")
    add_model_arguments(command)
    command.add_argument("--scheme", help="as --qsens-scheme (default: the op's in the result)")
    command.add_argument(
        "--mode", choices=("isolated", "fallback"), help="default: what the result has of the op, isolated first"
    )
    command.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="SCHEME",
        help="measure only this scheme beside the op's own; repeatable (default: all usual ones for an op of its kind)",
    )
    command.add_argument("--all", action="store_true", help="shorten no list")
    command.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE")
    command.set_defaults(run=run)


def run(arguments: Namespace) -> list[str]:
    """Run it; returns the lines to print."""
    from pytest_qsens.inspection.request import read_request

    request = read_request(arguments)
    source = find_model(arguments, request.run, arguments.result)

    from pytest_qsens.inspection.command import inspect_op  # torch, once all that is given can be
    from pytest_qsens.report import inspection

    def tell(line: str) -> None:
        sys.stderr.write(f"qsens: {line}\n")

    found = inspect_op(request, source, tell)
    width = shutil.get_terminal_size((100, 24)).columns
    lines = list(inspection.report(found, width, sys.stdout.encoding, everything=arguments.all))
    if arguments.json is not None:
        write_atomically(arguments.json, inspection.as_json(found))
        lines.append(f"wrote {arguments.json}")
    return lines
