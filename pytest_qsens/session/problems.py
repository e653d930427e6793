"""What went wrong after measuring, and what that means for the exit code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from pytest_qsens.errors import QsensError
from pytest_qsens.time_budget import NOT_MEASURED

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass
class Problems:
    """What fails a run although none of its tests did."""

    messages: list[str] = field(default_factory=list)
    """For the summary."""
    _unjudged: int = 0
    """Of these: nothing is known to be worse."""

    def add(self, message: str, *, unjudged: bool = False) -> None:
        """Take one; ``unjudged`` if it says that something could not be judged, and not that it is worse."""
        self.messages.append(message)
        self._unjudged += unjudged

    def guarded(self, write: Callable[[], None]) -> None:
        """Do one of several things at the end of a run, the others of which are done if it cannot be."""
        try:
            write()
        except QsensError as error:
            self.add(str(error))

    @property
    def exit_status(self) -> int:
        """Exit code of a run whose tests passed."""
        if not self.messages:
            return pytest.ExitCode.OK
        known = len(self.messages) > self._unjudged
        return pytest.ExitCode.TESTS_FAILED if known else NOT_MEASURED
