"""The command ``qsens diff``: tell what changed between two results or snapshots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qsens.commands.command import GateFailed, add_fail
from pytest_qsens.diff import diff, read_pair
from pytest_qsens.files import write_atomically
from pytest_qsens.thresholds import parse_fail

if TYPE_CHECKING:
    from argparse import Namespace

    from pytest_qsens.commands.command import Subparsers


def register(commands: Subparsers) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "diff",
        help="tell what changed between two results or snapshots",
        description="Tell which ops got worse or better, by how much, appeared or vanished, block by block, by the "
        "rules of the gate. OLD and NEW are result files of one model, snapshot files, or REVISION:PATH of one in git; "
        "OLD may be a revision alone.",
    )
    command.add_argument("old", metavar="OLD")
    command.add_argument("new", metavar="NEW")
    add_fail(command, "what counts as worse, as in --qsens-fail")
    command.add_argument("--all", action="store_true", help="list ops that are as before, too")
    command.add_argument("--format", choices=("text", "markdown", "html", "json"), default="text")
    command.add_argument("-o", "--output", type=Path, metavar="FILE", help="write it to FILE instead of printing it")
    command.add_argument("--exit-code", action="store_true", help="exit with 1 if an op got worse or lost its score")
    command.set_defaults(run=run)


def run(arguments: Namespace) -> list[str]:
    """Run it; returns the lines to print."""
    from pytest_qsens.report import diff as report_diff

    thresholds = parse_fail(arguments.fail, "--fail")
    found = diff(*read_pair(arguments.old, arguments.new), thresholds)
    if arguments.format == "json":
        lines = [report_diff.as_json(found)]
    else:
        render = {"text": report_diff.text, "markdown": report_diff.markdown, "html": report_diff.html}
        lines = list(render[arguments.format](found, thresholds, everything=arguments.all))
    if arguments.output is not None:
        write_atomically(arguments.output, "\n".join(lines) + "\n")
        lines = [f"wrote {arguments.output}"]
    if arguments.exit_code and any(change.kind in ("worse", "lost") for change in found.changes):
        raise GateFailed(lines)
    return lines
