"""What ``qsens proxies`` is asked for, checked before torch is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.errors import QsensError, unknown
from pytest_qsens.files import check_json_output
from pytest_qsens.models.arguments import find_model
from pytest_qsens.proxies.functions import PROXIES
from pytest_qsens.quant.schemes import scheme_named
from pytest_qsens.result_files import load

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterable
    from pathlib import Path

    from pytest_qsens.models.source import ModelSource


def check_names(names: Iterable[str]) -> None:
    """Check names of proxies.

    Raises:
        QsensError: If there is none of a name.

    """
    for name in names:
        if name not in PROXIES:
            raise QsensError(f"{unknown('proxy', name, PROXIES)}.")


def check_output(path: Path | None, result: Path | None) -> None:
    """Check that a file can be written and destroys nothing but an older one of its kind.

    Raises:
        QsensError: If it cannot, or would.

    """
    if path is None:
        return
    if result is not None and path.resolve() == result.resolve():
        raise QsensError(f"--json {path} would overwrite the result that the exact scores come from. Choose another.")
    check_json_output(path, "proxies", "qsens proxies")


def find(given: Namespace) -> tuple[ModelSource, str]:
    """Find the model and the scheme; what is not given is that of the result.

    Args:
        given: Arguments of the command line.

    Raises:
        QsensError: If there is no such model or scheme, or nothing says which model.

    """
    run = None if given.result is None else load(given.result).run
    if run is not None and run.config is not None:
        raise QsensError(
            f"{given.result} is a result of the config {run.scheme}, whose ops have schemes of their own. Give a "
            "result of --qsens-scheme"
        )
    scheme = given.scheme or ("w8a8" if run is None else run.scheme)
    scheme_named(scheme, "scheme")
    return find_model(given, run, given.result), scheme
