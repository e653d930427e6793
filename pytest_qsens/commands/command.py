"""What all commands share. Importing this costs nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001 - it has no public name


class GateFailed(Exception):  # noqa: N818 - the command has done its work
    """A gate does not hold; carries what the command prints."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__()
        self.lines = lines
