"""The command ``qsens report``: write a report of a result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qsens.commands.command import add_fail
from pytest_qsens.gates import parse_gates
from pytest_qsens.result_files import load

if TYPE_CHECKING:
    from argparse import Namespace

    from pytest_qsens.commands.command import Subparsers


def register(commands: Subparsers) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "report",
        help="write a report with charts: a page, Markdown, JSON and CSV",
        description="Write report.html, report.md, report.json and report.csv of a result to DIR, as `pytest "
        "--qsens-report DIR` does. Ranges of channels and samples of the data are there if RESULT.json is a "
        "report.json.",
    )
    command.add_argument("result", type=Path, metavar="RESULT.json")
    command.add_argument("directory", type=Path, metavar="DIR", help="made if it is not there")
    command.add_argument(
        "--against", metavar="OLD", help="tell what changed since OLD: a result, a snapshot, or REVISION:PATH of one"
    )
    add_fail(command, "what counts as worse, as in --qsens-fail")
    command.set_defaults(run=run)


def run(arguments: Namespace) -> list[str]:
    """Run it; returns the lines to print."""
    from pytest_qsens.report.directory.of_result import report_of
    from pytest_qsens.report.directory.write import check_directory, write_report

    check_directory(arguments.directory, "DIR")
    found = report_of(
        load(arguments.result), arguments.against, parse_gates(arguments.fail, "--fail"), arguments.directory
    )
    return [f"wrote {path}" for path in write_report(arguments.directory, found)]
