"""The command of this run once more: the same, or the one that accepts what it measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_qsens.options import Options

_ESTIMATING = ("--qsens-engine", "--qsens-representatives")


def accept_command(arguments: Sequence[str], options: Options) -> str:
    """Build the command that accepts what a run measured: the same one, with ``--snapshot-update``.

    Of a run that estimates, and is not allowed to record, it is the one that measures instead.
    """
    if options.recording:
        return same_command(arguments, ["--snapshot-update"])
    kept: list[str] = []
    values = 0
    for argument in arguments:
        if argument in _ESTIMATING:  # its value comes next
            values = 1
        elif values:
            values = 0
        elif argument.partition("=")[0] not in (*_ESTIMATING, "--qsens-gate-estimates"):
            kept.append(argument)
    return same_command(kept, ["--qsens-engine=auto", "--snapshot-update"])


def same_command(arguments: Sequence[str], added: Sequence[str]) -> str:
    """Build the command of a run without updating, and with more arguments."""
    import shlex

    kept = [argument for argument in arguments if not argument.startswith("--snapshot-update")]
    return shlex.join(["pytest", *kept, *added])
