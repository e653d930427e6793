"""The one error type for input that a user can correct, and words for it: of exceptions, of names that do not exist."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qsens.wording import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Collection


class QsensError(Exception):
    """Something the user gave cannot be used.

    The message says what is wrong, where, the offending value and the next step. Under pytest it ends the run
    with exit code 4 (usage error) before anything is written.
    """


_NOT_THEIRS = (f"{Path(__file__).parent}/", f"{sysconfig.get_path('stdlib')}/", "<frozen ")
_INSTALLED = (f"{sysconfig.get_path('purelib')}/", f"{sysconfig.get_path('platlib')}/")


def told(error: BaseException) -> str:
    """Give type and message of an exception, and the line that the user can mend: the last of their own code."""
    files = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_NOT_THEIRS)]
    own = [frame for frame in files if not frame.filename.startswith(_INSTALLED)]
    where = "".join(f" ({frame.filename}:{frame.lineno})" for frame in (own or files)[-1:])
    return f"{type(error).__name__}{f': {error}' if str(error) else ''}{where}"


def first_line(error: Exception) -> str:
    """Give type and message of an exception in one line, without place."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def unknown(what: str, value: object, known: Collection[str]) -> str:
    """Say that a name does not exist, what was probably meant and what there is."""
    return f"no {what} {value!r}{did_you_mean(str(value), known)}. Known: {', '.join(known)}"
