"""The console script ``qsens``: its commands, and how each ends."""

from __future__ import annotations

import argparse
import signal
import sys
from typing import TYPE_CHECKING

from pytest_qsens.commands import (
    accept,
    cache,
    compare,
    config,
    diff,
    inspect,
    merge,
    plan,
    proxies,
    report,
    show,
    standin,
)
from pytest_qsens.commands.command import GateFailed
from pytest_qsens.errors import QsensError

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = (show, compare, standin, merge, accept, cache, proxies, config, diff, plan, inspect, report)
"""Modules with a ``register`` each, in the order of the help. None of them imports torch before it runs."""

FAILED = 1
"""Exit code for a gate that does not hold, as pytest's for a failed test."""

BAD_INPUT = 4
"""Exit code for a file that cannot be used, as pytest's for a usage error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="qsens", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for command in COMMANDS:
        command.register(commands)
    arguments = parser.parse_args(argv)
    code = 0
    try:
        lines = arguments.run(arguments)
    except GateFailed as failed:
        lines, code = failed.lines, FAILED
    except QsensError as error:
        sys.stderr.write(f"qsens: {error}\n")
        return BAD_INPUT
    except KeyboardInterrupt:
        sys.stderr.write("qsens: interrupted\n")
        return 128 + signal.SIGINT
    sys.stdout.write("\n".join(lines) + "\n")
    return code
