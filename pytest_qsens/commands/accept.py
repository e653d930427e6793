"""The command ``qsens accept``: write a result file's scores into the snapshot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qsens.accept import accept
from pytest_qsens.gates import parse_gates
from pytest_qsens.result_files import load
from pytest_qsens.thresholds import DEFAULT_FAIL
from pytest_qsens.wording import count

if TYPE_CHECKING:
    from argparse import Namespace

    from pytest_qsens.commands.command import Subparsers


def register(commands: Subparsers) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "accept",
        help="write a result file's scores into the snapshot",
        description="Write the scores of a result file into the snapshot of its model and scheme, as `pytest "
        "--snapshot-update` does after a run.",
    )
    command.add_argument("result", type=Path, metavar="RESULT.json", help="of a whole run, or merged")
    command.add_argument("--snapshot-dir", type=Path, default=Path("qsens_snapshots"), metavar="DIR")
    command.add_argument(
        "--fail",
        default=DEFAULT_FAIL,
        metavar="RULES",
        help=f"as --qsens-fail (default: {DEFAULT_FAIL}): lines that moved by less stay as they are".replace("%", "%%"),
    )
    command.add_argument("--allow-ci-update", action="store_true", help="write although CI is set")
    command.set_defaults(run=run)


def run(arguments: Namespace) -> list[str]:
    """Run it; returns the lines to print."""
    gates = parse_gates(arguments.fail, "--fail")
    path, news = accept(load(arguments.result), arguments.snapshot_dir, gates, allow_ci=arguments.allow_ci_update)
    return [f"{path}: {count(len(news), 'line')} new or changed"]
