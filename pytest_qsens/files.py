"""Strict reading and atomic writing of the small JSON files that users review and keep."""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qsens.errors import QsensError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LOCK_TIMEOUT_SECONDS = 60.0
"""A writer holds a lock for milliseconds; one that does not let go is stuck."""

_POLL_SECONDS = 0.02
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})


def read_text(path: Path) -> str | None:
    """Text of a UTF-8 file; ``None`` if there is no such file.

    Raises:
        QsensError: If it exists and cannot be read as text.

    """
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise QsensError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise QsensError(f"{path} cannot be read: {error.strerror}") from error


def parse_json(text: str, path: Path, *, constants: bool = False) -> Any:  # noqa: ANN401  # JSON is whatever it is; `Fields` narrows it
    """Parse strict JSON: no NaN or Infinity, no key given twice (what a badly resolved merge leaves).

    With ``constants`` NaN and Infinity are let through, for a caller that refuses them with their place (`finite`).

    Raises:
        QsensError: With the path, and the line if the text is malformed.

    """

    def constant(name: str) -> float:
        if constants:
            return float(name)
        raise QsensError(f"{path}: {name} is not a score. Restore the file from version control.")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise QsensError(f"{path}: {key!r} is there twice. Keep one of the two entries.")
            result[key] = value
        return result

    try:
        return json.loads(text, parse_constant=constant, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise QsensError(
            f"{path}, line {error.lineno}: malformed JSON ({error.msg}). "
            "Resolve merge conflicts, or restore the file from version control."
        ) from error
    except (RecursionError, ValueError) as error:  # nested or a number longer than Python converts
        raise QsensError(f"{path}: malformed JSON ({error})") from error


class Fields:
    """One JSON object, read key by key; every complaint names the file and the place in it."""

    __slots__ = ("_rest", "where")

    def __init__(self, value: object, where: str) -> None:
        """Take ``value`` if it is an object.

        Raises:
            QsensError: If it is not.

        """
        self.where = where
        self._rest: dict[str, object] = dict(typed(value, dict, where))

    def take(self, key: str) -> object:
        """Value of ``key``, whatever its type; ``None`` if absent."""
        return self._rest.pop(key, None)

    def at(self, key: str) -> str:
        """Name of the place ``key`` for messages."""
        return f"{self.where}, {key!r}"

    def text(self, key: str) -> str:
        """Value of ``key``, which must be a string."""
        value: str = typed(self.take(key), str, self.at(key))
        return value

    def optional_text(self, key: str) -> str | None:
        """Value of ``key``, a string or absent."""
        value = self.take(key)
        return None if value is None else typed(value, str, self.at(key))

    def number(self, key: str) -> float:
        """Value of ``key``, which must be a finite number."""
        return finite(self.take(key), self.at(key))

    def optional_number(self, key: str) -> float | None:
        """Value of ``key``, a finite number or absent."""
        value = self.take(key)
        return None if value is None else finite(value, self.at(key))

    def choice(self, key: str, known: tuple[str, ...]) -> str:
        """Value of ``key``, which must be one of ``known``."""
        value = self.text(key)
        if value not in known:
            raise QsensError(f"{self.at(key)}: {value!r} is not one of {', '.join(known)}")
        return value

    def texts(self, key: str) -> dict[str, str]:
        """Value of ``key``, which must be an object of strings."""
        table = typed(self.take(key), dict, self.at(key))
        return {name: typed(value, str, f"{self.at(key)}, {name!r}") for name, value in table.items()}

    def numbers(self, key: str) -> dict[str, float]:
        """Value of ``key``, which must be an object of finite numbers."""
        table = typed(self.take(key), dict, self.at(key))
        return {name: finite(value, f"{self.at(key)}, {name!r}") for name, value in table.items()}

    def schema(self, current: int, *, by_hand: bool = False) -> None:
        """Check that ``schema`` is one this version reads. ``by_hand``: whether people write such files."""
        value = self.take("schema")
        if type(value) is int and value > current:
            raise QsensError(
                f"{self.where}: schema {value} is newer than {current}, the newest this version reads. "
                "Upgrade pytest-qsens."
            )
        if type(value) is not int or value != current:
            advice = f". Write schema: {current}" if by_hand else ""
            raise QsensError(f"{self.where}: schema is {value!r}, not {current}{advice}")

    def end(self) -> None:
        """Complain about keys that were not read: they would be lost when the file is written again."""
        if self._rest:
            raise QsensError(f"{self.where}: unknown key {next(iter(self._rest))!r}")


def typed(value: object, kind: type, where: str) -> Any:  # noqa: ANN401  # narrowed by `kind`, which mypy cannot follow
    """``value`` if it is exactly a ``kind``.

    Raises:
        QsensError: With the place and the offending value.

    """
    if type(value) is not kind:
        raise QsensError(f"{where}: {_KINDS[kind]} is needed, found {_short(value)}")
    return value


_KINDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a whole number",
    bool: "true or false",
}


def finite(value: object, where: str) -> float:
    """``value`` as a float if it is a finite number (``true`` is none).

    Raises:
        QsensError: With the place and the offending value.

    """
    if type(value) is int or type(value) is float:
        with suppress(OverflowError):
            if math.isfinite(value):
                return float(value)
    raise QsensError(f"{where}: a finite number is needed, found {_short(value)}")


def _short(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file in one step: readers and a crash at any moment see the old content or the new, never a part.

    Text is written as UTF-8. The file gets the mode a freshly created one has (umask). A symbolic link is followed.

    Raises:
        QsensError: If the place cannot be written; the old file is untouched.

    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f"{temporary_prefix(target)}{os.getpid()}.tmp")
    try:
        # Not tempfile: its files are 0600 whatever the umask, and the replaced file would keep that.
        with temporary.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise QsensError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, timeout: float | None = None) -> Iterator[None]:
    """Keep every other process from writing a file, whoever runs it and, on a shared disk, wherever it runs.

    The lock is a file beside ``path``, so that it can be had wherever ``path`` can be written, and that all who can
    write ``path`` meet at it: neither is true of a cache or of a directory for temporary files. It is removed while it
    is still held, so nothing of it is left to commit; filelock 4 takes no lock on a file that is gone, so those who
    waited start over. A process that is killed lets go of it, and the next one removes it. A symbolic link is followed.
    The directory must exist.

    Args:
        path: The file.
        timeout: Seconds to wait for another process, `LOCK_TIMEOUT_SECONDS` if it is not given; -1 without an end.

    Raises:
        QsensError: If another process does not let go of it, or the directory cannot be written.

    """
    from filelock import FileLock, Timeout

    target = Path(os.path.realpath(path))
    place = target.with_name(f".{target.name}.lock")
    lock = FileLock(
        place,
        timeout=LOCK_TIMEOUT_SECONDS if timeout is None else timeout,
        poll_interval=_POLL_SECONDS,
        mode=0o666,
        fallback_to_soft=False,
    )
    try:
        lock.acquire()
    except Timeout as error:
        raise QsensError(
            f"{path} is locked by another process for more than {LOCK_TIMEOUT_SECONDS:.0f} s ({place}). "
            "Wait for the other run to end, or end it."
        ) from error
    except OSError as error:
        # A file system without locks: the scores of a whole run are worth more than this guard.
        if error.errno not in _NO_LOCKS:
            what = f" with {place}: {error.strerror}"
            if error.filename is not None:  # it could not even be opened
                what = f": {place.parent} is not writable ({error.strerror})"
            raise QsensError(f"cannot lock {path}{what}") from error
    try:
        yield
    finally:
        with suppress(OSError):  # the directory may be gone; the lock is let go of all the same
            place.unlink()
        lock.release()


def temporary_prefix(target: Path) -> str:
    """How the names of ``target``'s temporary files begin."""
    return f".{target.name}."


def check_replaceable(path: Path, check_own: Callable[[Path], object]) -> None:
    """Make sure that a file can be written and takes the place of nothing but an older one of its kind.

    Args:
        path: The file.
        check_own: Called if there is one; raises unless it is of that kind.

    Raises:
        QsensError: If the directory is missing or read-only, or what is there is no file.

    """
    if not path.parent.is_dir():
        raise QsensError(f"cannot write {path}: there is no directory {path.parent}. Create it first.")
    if path.exists():
        if not path.is_file():  # reading a device or a pipe may have no end
            raise QsensError(f"cannot write {path}: it is not a file. Choose another name.")
        check_own(path)
    check_writable(path.parent)


def check_json_output(path: Path, key: str, command: str) -> None:
    """Make sure that a command can write its JSON, and replaces none but its own.

    Args:
        path: The file.
        key: Of the document, which no other command's has.
        command: Such as ``qsens inspect``.

    Raises:
        QsensError: As `check_replaceable`, or if what is there is something else.

    """

    def check_own(path: Path) -> None:
        try:
            known = key in json.loads(path.read_bytes())
        except (OSError, ValueError, TypeError):
            known = False
        if not known:
            raise QsensError(f"{path} exists and was not written by `{command}`. Choose another name or remove it.")

    check_replaceable(path, check_own)


def check_writable(directory: Path) -> None:
    """Try that files can be created in ``directory``, or where it would be made.

    Permission bits do not tell (root, read-only mounts, quotas), so a file is really created and removed.

    Raises:
        QsensError: Naming the directory.

    """
    ancestor = directory
    while not ancestor.exists() and ancestor != ancestor.parent:
        ancestor = ancestor.parent
    try:
        with tempfile.TemporaryFile(dir=ancestor):
            pass
    except OSError as error:
        place = f" ({ancestor})" if ancestor != directory else ""
        raise QsensError(
            f"{directory} is not writable: {error.strerror}{place}. Choose another directory, or make it writable."
        ) from error
