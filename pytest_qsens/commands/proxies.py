"""The command ``qsens proxies``: tell which proxies rank the ops of a model as exact scores do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qsens.files import write_atomically
from pytest_qsens.models.arguments import add_model_arguments, positive

if TYPE_CHECKING:
    from argparse import Namespace

    from pytest_qsens.commands.command import Subparsers


def register(commands: Subparsers) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "proxies",
        help="tell which proxies rank the ops of a model as exact scores do",
        description="Compute proxies of sensitivity on a model and its evaluation data, and print how well each ranks "
        "the ops: the rank correlation with exact scores, and what it costs.",
    )
    command.add_argument(
        "result",
        type=Path,
        nargs="?",
        metavar="RESULT.json",
        help="exact scores, written by `pytest --qsens-json`; without it they are measured first",
    )
    add_model_arguments(command)
    command.add_argument("--scheme", help="as --qsens-scheme (default: the result's, or w8a8)")
    command.add_argument("--only", action="append", default=[], metavar="PROXY", help="only this one; repeatable")
    command.add_argument(
        "--draws", type=positive, default=2, metavar="N", help="random vectors a batch for gradients, default 2"
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write all values and correlations to FILE")
    command.set_defaults(run=run)


def run(arguments: Namespace) -> list[str]:
    """Run it; returns the lines to print."""
    from pytest_qsens.proxies.request import check_names, check_output, find

    check_names(arguments.only)
    check_output(arguments.json, arguments.result)
    source, scheme = find(arguments)

    from pytest_qsens.proxies.command import compare_proxies  # torch, once all that is given can be
    from pytest_qsens.report import proxies

    found = compare_proxies(source, scheme, arguments.result, arguments.only, draws=arguments.draws)
    lines = list(proxies.report(found))
    if arguments.json is not None:
        write_atomically(arguments.json, proxies.as_json(found))
        lines.append(f"wrote {arguments.json}")
    return lines
