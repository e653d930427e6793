"""What token ids stand for, if the model comes with a tokenizer."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from pytest_qsens.errors import QsensError
from pytest_qsens.models.directory import DirectorySource
from pytest_qsens.models.hub import HubSource

if TYPE_CHECKING:
    from pytest_qsens.inspection.positions import Tokens
    from pytest_qsens.models.source import ModelSource


def tokens_of(source: ModelSource) -> Tokens:
    """Give what turns a token id into its text; it gives ``None`` where there is no tokenizer."""
    local = source.cached if isinstance(source, HubSource) else source
    if isinstance(local, DirectorySource):
        from pytest_qsens.models.processors import load_tokenizer

        with suppress(QsensError):  # a model of images has none
            tokenizer = load_tokenizer(local.checkpoint.directory)
            return lambda token: str(tokenizer.decode([token]))
    return lambda _: None
