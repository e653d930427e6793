"""Check where a report is to go, and write it there."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from pytest_qsens.errors import QsensError
from pytest_qsens.files import check_writable, write_atomically
from pytest_qsens.report.directory.markdown import MARK, as_markdown
from pytest_qsens.report.directory.sheet import FIRST, as_csv
from pytest_qsens.result_files import dump, load

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_qsens.report.directory.contents import Report

GENERATOR = '<meta name="generator" content="pytest-qsens">'
"""In the head of the page, by which it is known as ours."""

_NEEDED = ("jinja2", "vl_convert")
_HEAD = 2000
"""Bytes in which a file of ours shows what it is."""


def check_directory(path: Path, origin: str) -> None:
    """Make sure that a report can be made and written, and takes the place of nothing but an older one.

    Args:
        path: The directory; it is made when the report is written.
        origin: Where it was given, for messages.

    Raises:
        QsensError: If a package is missing, the directory cannot be written, or files of others are in the way.

    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise QsensError(
            f"{origin} needs {' and '.join(missing)}, not installed here. Install them with: pip install "
            "'pytest-qsens[report]'"
        )
    if path.exists() and not path.is_dir():
        raise QsensError(f"{origin} {path} is a file, not a directory. Choose another name, or remove it.")
    above = next((parent for parent in path.parents if parent.exists()), None)
    if above is not None and not above.is_dir():
        raise QsensError(f"{origin} {path} cannot be made: {above} is a file. Choose another place.")
    check_writable(path)
    for name, own in _OWN.items():
        file = path / name
        if (file.is_symlink() or file.exists()) and not (file.is_file() and own(file)):
            raise QsensError(
                f"{origin} {path} has a {name} that no report of ours has written; it is left untouched. Choose "
                "another directory, or remove it."
            )


def _is_page(file: Path) -> bool:
    return GENERATOR.encode() in _beginning(file)


def _is_markdown(file: Path) -> bool:
    return _beginning(file).startswith(MARK.encode())


def _is_sheet(file: Path) -> bool:
    return _beginning(file).startswith(",".join(FIRST).encode())


def _is_result(file: Path) -> bool:
    try:
        load(file)
    except QsensError:
        return False
    return True


def _beginning(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(_HEAD)


_OWN: dict[str, Callable[[Path], bool]] = {
    "report.html": _is_page,
    "report.md": _is_markdown,
    "report.json": _is_result,
    "report.csv": _is_sheet,
}
"""Every file → whether one that is there is ours."""


def write_report(path: Path, report: Report) -> list[Path]:
    """Make all four files, then replace each in one step; other files in the directory stay.

    Raises:
        QsensError: If they cannot be written.

    """
    from pytest_qsens.report.directory.page import as_html

    made = {
        "report.json": dump(report.result),
        "report.csv": as_csv(report),
        "report.md": as_markdown(report),
        "report.html": as_html(report),
    }
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QsensError(f"{path} cannot be made: {error.strerror}") from error
    for name, text in made.items():
        write_atomically(path / name, text)
    return [path / name for name in made]
