"""The one error type for input that a user can correct."""

from __future__ import annotations


class QsensError(Exception):
    """Something the user gave cannot be used.

    The message says what is wrong, where, the offending value and the next step. Under pytest it ends the run
    with exit code 4 (usage error) before anything is written.
    """
