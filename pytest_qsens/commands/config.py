"""The command ``qsens config``: tell op by op what a quantization config says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qsens.configs.names import FORMATS, WRITTEN
from pytest_qsens.report.columns import aligned

if TYPE_CHECKING:
    from argparse import Namespace

    from pytest_qsens.commands.command import Subparsers


def register(commands: Subparsers) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "config",
        help="tell op by op what a quantization config says",
        description="Read a quantization config of this or of another tool, and print for every op how it is "
        "quantized, which rule of the file says so, and what is wrong with it. Without a model its rules are printed. "
        "Formats are in docs/configs.md.",
    )
    command.add_argument("file", type=Path, metavar="FILE")
    command.add_argument("--model", help="as --qsens-model: the model whose ops are meant; no weights are loaded")
    command.add_argument("--checkpoint", type=Path, metavar="DIR", help="as --qsens-checkpoint")
    command.add_argument(
        "--ops-from", type=Path, metavar="RESULT.json", help="the ops of a result of `pytest --qsens-json` are meant"
    )
    command.add_argument(
        "--format",
        choices=FORMATS,
        metavar="FORMAT",
        help=f"{', '.join(FORMATS)} (default: found out from what is in the file)",
    )
    command.add_argument("--strict", action="store_true", help="everything that is wrong is an error: exit code 4")
    command.add_argument(
        "--to",
        choices=WRITTEN,
        metavar="TARGET",
        help=f"write the same for all ops to --out, as one of {', '.join(WRITTEN)}",
    )
    command.add_argument("--out", type=Path, metavar="FILE", help="file to write with --to; there must be none yet")
    command.set_defaults(run=run)


def run(arguments: Namespace) -> list[str]:
    """Run it; returns the lines to print."""
    from pytest_qsens.configs.command import explain
    from pytest_qsens.report import config as report_config

    found, decisions, problems = explain(arguments)
    return [
        *report_config.heading(found, decisions),
        "",
        *aligned(report_config.rows(found, decisions)),
        "",
        *report_config.trouble(problems),
        *report_config.written(arguments.to, arguments.out),
    ]
