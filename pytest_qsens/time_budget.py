"""How long a run may take, and how much of that is left in this process. Knows nothing of torch."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qsens.errors import QsensError

if TYPE_CHECKING:
    from pytest_qsens.options import Options

LEFT = "qsens_left"
"""Key of ``workerinput``: seconds of the time budget that were left when the controller started the worker."""

LATE = "qsens_late"
"""Key of ``workerinput``: whether the worker takes the place of one that died, and others have measured already."""

NOT_MEASURED = 10
"""Exit code of a run whose time budget ended before there was anything to tell; pytest uses 0 to 6."""

_STARTED = pytest.StashKey[float]()
_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", re.ASCII)


def parse_duration(text: str, where: str) -> float:
    """Read ``120s``, ``5m``, ``1h30m`` or a number of seconds.

    Raises:
        QsensError: If it is anything else, or no time at all.

    """
    match = _DURATION.fullmatch(text.strip().lower())
    hours, minutes, seconds = (float(part or 0) for part in match.groups()) if match and match[0] else (0.0, 0.0, 0.0)
    found = 3600 * hours + 60 * minutes + seconds
    if not 0 < found < float("inf"):
        raise QsensError(f"{where} takes a time above 0, such as 120s, 5m or 1h30m, not {text!r}")
    return found


def told(seconds: float) -> str:
    """Write seconds for people."""
    return f"{seconds:.3g} s"


def start(config: pytest.Config) -> None:
    """Note when this process began: its clock runs from there, as those of other machines may differ."""
    config.stash[_STARTED] = time.monotonic()


def spent(config: pytest.Config) -> float:
    """Seconds since this process began."""
    return time.monotonic() - config.stash[_STARTED]


def left(config: pytest.Config, options: Options) -> float:
    """Seconds of the budget that are left; infinitely many without one."""
    if options.time_budget is None:
        return float("inf")
    given: dict[str, Any] = getattr(config, "workerinput", {})
    whole = parse_duration(options.time_budget, options.origins["time_budget"])
    return float(given.get(LEFT, whole)) - spent(config)
