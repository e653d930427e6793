"""The command ``qsens plan``: choose a scheme for every op under a budget of size or error."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.plans.arguments import add_arguments
from pytest_qsens.report.columns import aligned

if TYPE_CHECKING:
    from argparse import Namespace

    from pytest_qsens.commands.command import Subparsers


def register(commands: Subparsers) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "plan",
        help="choose a scheme for every op under a budget of size or error",
        description="Choose from measured scores which op gets which scheme, or none: with the lowest error within a "
        "budget of bits, the smallest within a budget of error, or the lowest error with a share of the ops kept. "
        "Exactly one of these, or a whole spectrum, is asked for.",
    )
    add_arguments(command)
    command.set_defaults(run=run)


def run(arguments: Namespace) -> list[str]:
    """Run it; returns the lines to print."""
    from pytest_qsens.plans.command import make_plans
    from pytest_qsens.report import plan

    found = make_plans(arguments)
    lines = list(plan.report(found))
    if len(found.plans) > 1:
        lines += ["", *aligned(plan.table(found.problem, found.plans, "saved"))]
    elif found.frontier:
        lines += ["", *aligned(plan.table(found.problem, found.frontier, "saved"))]
    written = [*(made.path for made in found.plans), *filter(None, [arguments.plot])]
    return [*lines, "", *(f"wrote {path}" for path in written)]
