"""From a file to a config: which format it is, and its reader."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from pytest_qsens.configs import (
    compressed_tensors,
    llm_compressor,
    modelopt,
    neural_compressor,
    onnx_runtime,
    ours,
    torchao,
)
from pytest_qsens.configs.documents import as_text, read_document
from pytest_qsens.errors import QsensError
from pytest_qsens.wording import first_of

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_qsens.configs.documents import Document
    from pytest_qsens.configs.rules import Config


class Format(Protocol):
    """What a module that reads one format has."""

    NAME: str
    TITLE: str

    def detect(self, document: Document) -> bool:
        """Whether a file is of this format."""

    def read(self, document: Document) -> Config:
        """Read a file of it.

        Raises:
            QsensError: If it cannot be used; with the place.

        """


FORMATS: dict[str, Format] = {
    module.NAME: module
    for module in (ours, neural_compressor, torchao, compressed_tensors, llm_compressor, modelopt, onnx_runtime)
}
"""By name, as in `names.FORMATS`."""

_SENSITIVITIES = ("layer_sensitivity", "fp32_fallback_sensitivity", "int8_requant_sensitivity")
_KEYS_SHOWN = 8


def read_config(path: Path, name: str | None = None) -> Config:
    """Read a quantization config.

    Args:
        path: The file.
        name: Its format, one of `FORMATS`; found out from what is in the file if it is not given.

    Raises:
        QsensError: If the file cannot be used, or is of none or of several formats; with the place in it.

    """
    return config_of(read_document(path), name)


def config_of(document: Document, name: str | None = None) -> Config:
    """Read a quantization config that is a document already; as `read_config`."""
    try:
        return _format(document, name).read(document)
    except RecursionError as error:
        raise QsensError(f"{document.path}: values are nested too deeply for any quantization config") from error


def _format(document: Document, name: str | None) -> Format:
    if name is not None:
        return FORMATS[name]
    found = [known for known in FORMATS.values() if known.detect(document)]
    if len(found) == 1:
        return found[0]
    if found:
        names = " and ".join(known.NAME for known in found)
        raise QsensError(f"{document.path} can be {names}. Choose with --format (pytest: --qsens-config-format).")
    value = document.value
    if isinstance(value, dict):
        for key in _SENSITIVITIES:
            if key in value:
                raise QsensError(
                    f"{document.path} is a list of sensitivities ({key!r}), which says of no op how it is quantized. "
                    "`qsens compare` reads it."
                )
    known = "; ".join(known.TITLE for known in FORMATS.values())
    raise QsensError(f"{document.path} ({document.syntax}): unknown format, found {_found(value)}. Known are {known}.")


def _found(value: object) -> str:
    if not isinstance(value, dict):
        return as_text(value)
    keys = [as_text(key) for key in value]
    return f"keys {first_of(keys, _KEYS_SHOWN)}" if keys else "an object without keys"
