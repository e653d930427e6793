"""How far a long run has come: ops done, ops per second and time left, while it goes on."""

from __future__ import annotations

import os
import time
from collections import Counter
from typing import TYPE_CHECKING, cast

import pytest

from pytest_qsens.ops import TOTAL

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Mapping
    from typing import TextIO

    from pytest_qsens.collection.subjects import Case, Subject
    from pytest_qsens.ops import Op

INTERVAL = 30.0
"""Seconds between lines where none can be updated in place, and before the first."""

_TOGETHER = 1.0
"""Ops of a block that come at shorter intervals, in seconds, were measured together, with the first of them."""

_FREE = 0.01
"""An op that takes less of an unquantized forward than this has been measured before."""

_ERASE = "\x1b[J"
"""From the cursor to the end of the screen."""

_DRAW = "\x1bD\x1b[A\x1b7\n{}\x1b8"
"""Move down and up again, which scrolls if there is no row below; keep the place, write there, return (VT100)."""


class Tally:
    """What is known of one (model, scheme, granularity).

    Args:
        label: What to call it.
        noun: What to call several of what is measured.

    """

    def __init__(self, label: str, noun: str = "ops") -> None:
        self.label = label
        self._noun = noun
        self.ops: set[str] = set()
        """All that are going to be measured."""
        self._done: set[str] = set()
        self._timed: set[str] = set()
        self._spent = 0.0
        self._free: set[str] = set()
        """Blocks that calibrating the model has measured on the way, as engines do to check themselves."""
        self._running: dict[str, float] = {}
        """Seconds that tests in progress have taken in their phases so far."""
        self._parallel = 0

    def start(self, nodeid: str) -> None:
        """Note a test that starts."""
        self._running[nodeid] = 0.0
        # Not when a test ends: its worker starts the next one at once.
        self._parallel = len(self._running)

    def add(self, op: Op, report: pytest.TestReport) -> None:
        """Take one phase of the test of an op."""
        payload = getattr(report, "qsens", {})
        seconds = [record["spent"] for record in payload.get("records", ()) if record["spent"] is not None]
        measured = sum(seconds)  # without what came from the cache
        spent = self._running.get(report.nodeid, 0.0) + report.duration
        for facts in payload.get("facts", ()):  # the first test of its process, whose set-up has calibrated the model
            spent = measured
            if seconds and measured < _FREE * facts["reference_seconds"]:
                self._free.add(op.block)
        self._running[report.nodeid] = spent
        # An op that the data never reached takes no time either, and says nothing of the others.
        if measured > 0 and op.block not in self._free:
            self._timed.add(op.name)
        if report.when not in ("setup", "call"):  # the teardown, or xdist's report of a worker that died
            self._done.add(op.name)
            del self._running[report.nodeid]
            self._spent += spent if op.name in self._timed else 0.0

    @property
    def rate(self) -> float | None:
        """Ops per second: those in progress over the mean time that one takes (Little's law).

        Ops done per time passed would be too few by all that the workers have in progress.
        """
        finished = len(self._timed & self._done)
        return self._parallel * finished / self._spent if self._spent > 0 else None

    def __str__(self) -> str:
        """Say how far it is; empty before the first test has started and after the last op."""
        left = len(self.ops) - len(self._done)
        if not self._parallel or not left:
            return ""
        text = f"{self.label}: {len(self._done)}/{len(self.ops)} {self._noun}"
        if self.rate is not None:
            per_second = f"{self.rate:.2g}" if self.rate < 10 else f"{self.rate:.0f}"
            return f"{text}, {per_second} {self._noun}/s, {duration(left / self.rate)} left"
        return text if self._done else f"{text}, calibrating"


def duration(seconds: float) -> str:
    """Write a time as a clock does.

    >>> duration(59.6), duration(116), duration(7390)
    ('1:00', '1:56', '2:03:10')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class LiveLine:
    """A line below the cursor that goes before anything else is written.

    It stands between the terminal writer and its file, as xdist, live logs and debuggers write outside of any hook.

    Args:
        terminal: Pytest's.

    """

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._writer = terminal._tw  # noqa: SLF001  # all that pytest and its plugins print goes through it
        self._file = self._writer._file  # noqa: SLF001  # where it writes to
        self._writer._file = cast("TextIO", self)  # noqa: SLF001  # as above
        self._shown = ""

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        """Write what others print, in place of the line."""
        if self._shown:
            self._file.write(_ERASE)
            self._shown = ""
        return self._file.write(text)

    def show(self, text: str) -> None:
        """Draw the line, or erase it if there is no text."""
        text = text[: self._writer.fullwidth - 1]  # the last column would begin another row
        if text != self._shown:
            self.write(_DRAW.format(text) if text else "")
            self._shown = text
            self._file.flush()

    def close(self) -> None:
        """Erase the line and leave the terminal as it was."""
        self.show("")
        if self._writer._file is self:  # noqa: SLF001  # put there above
            self._writer._file = self._file  # noqa: SLF001  # as above


class Progress:
    """Follows the tests of ops from start to end, in the process that prints.

    On a terminal one line is updated in place. Elsewhere, and where tests may print beside pytest, whole lines are
    written, with `INTERVAL` between them. Nothing happens but when a test starts or reports: a thread would write
    into the output that is captured of a test.

    Args:
        terminal: Pytest's.
        cases: What each test measures, by node id.
        clock: Seconds, from any start.

    """

    def __init__(
        self, terminal: pytest.TerminalReporter, cases: Mapping[str, Case], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._terminal = terminal
        self._cases = {nodeid: case for nodeid, case in cases.items() if case.op != TOTAL}
        self._clock = clock
        self._tallies = _tallies(self._cases.values())
        self._starts: dict[tuple[Subject, str], list[float]] = {}
        """When the tests of each block started."""
        self._last = clock()
        self._live = LiveLine(terminal) if _updatable(terminal) else None

    def __str__(self) -> str:
        """Say how far the models in progress are."""
        told = "; ".join(filter(None, map(str, self._tallies.values())))
        return told.encode("ascii", "backslashreplace").decode("ascii")  # any terminal, and a column for a character

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_logstart(self, nodeid: str) -> Generator[None, object, object]:
        """Note a test that starts."""
        line = ""
        case = self._cases.get(nodeid)
        if case is not None:
            self._tallies[case.subject].start(nodeid)
            line = self._due(case)
        if line:  # before pytest starts a line for the file of the test
            self._terminal.ensure_newline()
            if self._width:  # dots of xdist or of -q, which pytest does not know to be a line
                self._terminal.line("")
            self._terminal.write(line, flush=True)
        result = yield
        if line and self._width == len(line):  # pytest does not always start one
            self._terminal.line("")
        self._draw()
        return result

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> Generator[None, object, object]:
        """Take what a test reports."""
        result = yield
        case = self._cases.get(report.nodeid)
        if case is not None:
            self._tallies[case.subject].add(case.unit, report)
        self._draw()
        return result

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_logfinish(self) -> Generator[None, object, object]:
        """Draw the line again, as pytest may have written."""
        result = yield
        self._draw()
        return result

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        """Take the line away."""
        if self._live is not None:
            self._live.close()

    @property
    def _width(self) -> int:
        return self._terminal._tw.width_of_current_line  # noqa: SLF001  # what pytest's own progress goes by

    def _draw(self) -> None:
        if self._live is not None:
            self._live.show(str(self))

    def _due(self, case: Case) -> str:
        """Return the line to write before a test of ``case`` starts, empty if there is none.

        In between the ops of a block that were measured together, the first has taken all the time and the others
        are not done: that would give a wrong rate, and the end of the block is near.
        """
        now = self._clock()
        starts = self._starts.setdefault((case.subject, case.unit.block), [])
        starts.append(now)
        between = len(starts) == 2 or (len(starts) > 2 and starts[-1] - starts[-2] < _TOGETHER)
        if self._live is not None or between or now - self._last < INTERVAL:
            return ""
        self._last = now
        return str(self)


def _tallies(cases: Collection[Case]) -> dict[Subject, Tally]:
    """Ops or groups to be measured, by what they are of; the scheme is named where a model has several."""
    schemes = Counter(model for model, _ in {(case.model, case.scheme) for case in cases})
    found: dict[Subject, Tally] = {}
    for case in cases:
        label = f"{case.model} {case.scheme}" if schemes[case.model] > 1 else case.model
        noun = "ops" if case.granularity == "op" else "groups"
        found.setdefault(case.subject, Tally(label, noun)).ops.add(case.op)
    return found


def _updatable(terminal: pytest.TerminalReporter) -> bool:
    """Whether a line can be updated in place: on a terminal that moves its cursor and shows what pytest prints alone.

    A terminal of a CI service is a log.
    """
    capture = terminal.config.getoption("capture", "no")
    dumb = os.environ.get("TERM", "dumb") == "dumb" or bool(os.environ.get("CI"))
    return terminal._tw._file.isatty() and not dumb and capture in ("fd", "sys")  # noqa: SLF001  # a flag in old pytest
