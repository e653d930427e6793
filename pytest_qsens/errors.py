"""The one error type for input that a user can correct, and how exceptions of the user's code are told in it."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path


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
