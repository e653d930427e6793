"""What all commands share. Importing this imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from pytest_qsens.thresholds import DEFAULT_FAIL

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001 - it has no public name


class GateFailed(Exception):  # noqa: N818 - the command has done its work
    """A gate does not hold; carries what the command prints."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__()
        self.lines = lines


def add_fail(command: argparse.ArgumentParser, about: str) -> None:
    """Declare ``--fail``, whose default is that of ``--qsens-fail``."""
    told = f"{about} (default: {DEFAULT_FAIL})".replace("%", "%%")
    command.add_argument("--fail", default=DEFAULT_FAIL, metavar="RULES", help=told)
