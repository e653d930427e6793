"""Intel Neural Compressor: ``PostTrainingQuantConfig``, what its strategy chose, and ``qconfig.json`` of 3.x.

Semantics are those of neural-compressor 3.7.1 (``strategy/utils/tuning_space.py``). Keys of ``op_type_dict`` and of
``op_name_dict`` are regular expressions for the whole type or name. Types come before names, each in the order of the
file, and what comes later replaces what it says something about. Files that were written by a run name every op; names
of layers that were traced alone end with ``.module``, which is dropped here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qsens.configs.documents import as_text
from pytest_qsens.configs.neural_compressor_given import read_given
from pytest_qsens.configs.neural_compressor_saved import read_chosen, read_qconfig
from pytest_qsens.configs.neural_compressor_terms import FORMAT, KEY
from pytest_qsens.errors import QsensError
from pytest_qsens.files import typed

if TYPE_CHECKING:
    from pytest_qsens.configs.documents import Document
    from pytest_qsens.configs.rules import Config

NAME = FORMAT
TITLE = "Intel Neural Compressor ('op_name_dict', 'op_type_dict', 'recipes'; best_configure with 'op'; qconfig.json)"

_IPEX = "q_op_infos"
_PTQ_KEYS = ("op_name_dict", "op_type_dict", "recipes")


def detect(document: Document) -> bool:
    """Whether a file is of this format."""
    value = document.value
    if not isinstance(value, dict):
        return False
    return (
        any(isinstance(value.get(key), dict) for key in _PTQ_KEYS)
        or (isinstance(value.get("op"), dict) and "approach" in value)
        or _is_qconfig(value)
    )


def _is_qconfig(value: dict[Any, Any]) -> bool:
    return bool(value) and (
        all(isinstance(key, str) and KEY.fullmatch(key) for key in value) or (" " in value and _IPEX in as_text(value))
    )


def read(document: Document) -> Config:
    """Read a file.

    Raises:
        QsensError: If a value is of a wrong type, or is none that Neural Compressor has.

    """
    value: dict[Any, Any] = typed(document.value, dict, str(document.path))
    if any(key in value for key in _PTQ_KEYS) or ("approach" in value and "op" not in value):
        return read_given(document)
    if "op" in value:
        return read_chosen(document)
    if " " in value:
        raise QsensError(
            f"{document.path}: this is what Intel Extension for PyTorch writes; it numbers ops and does not name them "
            "all. Give the op_name_dict that the run was given."
        )
    return read_qconfig(document)
