"""The command ``qsens compare``: tell whether two files agree on which ops are sensitive."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qsens.compare import compare
from pytest_qsens.models.arguments import positive
from pytest_qsens.report.comparison import as_json, report
from pytest_qsens.results import MODES
from pytest_qsens.sensitivity_files import read_pair

if TYPE_CHECKING:
    from argparse import Namespace

    from pytest_qsens.commands.command import Subparsers


def register(commands: Subparsers) -> None:
    """Declare the command."""
    comparison = commands.add_parser(
        "compare",
        help="tell whether two files agree on which ops are sensitive",
        description="Compare the ops' sensitivity in two files: results of `pytest --qsens-json`, Intel Neural "
        "Compressor's fp32_fallback_sensitivity, ModelOpt's layer_sensitivity, in any combination.",
    )
    comparison.add_argument("a", type=Path, metavar="A.json")
    comparison.add_argument("b", type=Path, metavar="B.json")
    comparison.add_argument("--mode", choices=MODES, help="of our result files; default: what both files have")
    comparison.add_argument("--metric", help="of our result files; default: nmse, or the other tool's if ours has it")
    comparison.add_argument("--top", type=positive, default=10, metavar="K", help="length of lists, default 10")
    comparison.add_argument("--all", action="store_true", help="shorten no list")
    comparison.add_argument("--json", action="store_true", help="print the same for machines")
    comparison.set_defaults(run=run)


def run(arguments: Namespace) -> list[str]:
    """Run it; returns the lines to print."""
    a, b = read_pair(arguments.a, arguments.b, arguments.mode, arguments.metric)
    found = compare(a, b, arguments.top)
    return [as_json(found)] if arguments.json else list(report(found, None if arguments.all else arguments.top))
