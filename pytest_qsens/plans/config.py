"""The config file of a plan, in the format of this project."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import yaml

from pytest_qsens.configs.documents import read_document
from pytest_qsens.configs.ours import SCHEMA, UNQUANTIZED, read
from pytest_qsens.errors import QsensError
from pytest_qsens.files import check_replaceable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_SUFFIXES = (".yaml", ".yml", ".json")


def check_output(path: Path) -> None:
    """Make sure that a config can go to ``path`` and takes the place of nothing but an older one.

    Raises:
        QsensError: If it cannot.

    """
    if path.suffix not in _SUFFIXES:
        raise QsensError(f"--out {path}: a plan is written as {', '.join(_SUFFIXES)}. Choose a name that ends in one")
    check_replaceable(path, _check_config)


def _check_config(path: Path) -> None:
    try:
        read(read_document(path))
    except QsensError as error:
        raise QsensError(
            f"{path} exists and is no config of this project; it is left untouched ({error}). Choose another name or "
            "remove it."
        ) from error


def config_text(assignment: Mapping[str, str | None], path: Path) -> str:
    """Write one rule for each scheme, and one for all other ops.

    Args:
        assignment: Op → name of its scheme, ``None`` for those that are not quantized.
        path: Its suffix says whether YAML or JSON is written.

    """
    schemes = dict.fromkeys(scheme for scheme in assignment.values() if scheme is not None)
    rules: list[dict[str, object]] = [
        {"scheme": scheme, "ops": [op for op, given in assignment.items() if given == scheme]} for scheme in schemes
    ]
    document = {"schema": SCHEMA, "rules": [*rules, {"scheme": UNQUANTIZED, "ops": "*"}]}
    if path.suffix == ".json":
        return json.dumps(document, ensure_ascii=False, indent=2) + "\n"
    text: str = yaml.safe_dump(document, allow_unicode=True, sort_keys=False, width=2**16)
    return text
