"""The checkpoint's own tokenizer, image processor, feature extractor or processor."""

from __future__ import annotations

import textwrap
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from pytest_qsens.errors import QsensError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PretrainedConfig

# What transformers annotates of these classes is neither complete nor right: their calls cannot be checked.
Processor: TypeAlias = Any

REASON_WIDTH = 400
"""Characters of other people's messages that are passed on."""

_SPEAKING = (ValueError, OSError, ImportError, RuntimeError)
"""Exceptions with messages that say what is wrong: that of a ``KeyError`` is the key."""


@contextmanager
def explained(what: str, directory: Path) -> Iterator[None]:
    """Turn what transformers raises on a checkpoint it cannot use into a ``QsensError``."""
    try:
        yield
    except QsensError:
        raise
    except Exception as error:
        raise QsensError(
            f"cannot make the {what} of {directory}: {_reason(error)}. Check that the checkpoint is complete and that "
            f"what its {what} needs is installed."
        ) from error


def _reason(error: Exception) -> str:
    """Give an exception's message on one line: validators say what is wrong on the second, under a headline."""
    text = textwrap.shorten(str(error), REASON_WIDTH, placeholder=" …").removesuffix(".")
    if isinstance(error, _SPEAKING) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def load_tokenizer(directory: Path) -> Processor:
    """Load the tokenizer; ``pad_token`` is set to the end-of-sequence token if there is none but that."""
    from transformers import AutoTokenizer

    with explained("tokenizer", directory):
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        # Where the files are missing, transformers makes a tokenizer that knows nothing.
        if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
            raise QsensError(
                f"cannot make the tokenizer of {directory}: there is no vocabulary. Finish the download: "
                f"tokenizer.json, or the vocabulary files of a {type(tokenizer).__name__}."
            )
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_image_processor(directory: Path) -> Processor:
    """Load the image processor.

    The Pillow variant even where torchvision is installed: the two resize differently, and a score must not depend on
    what else is installed.
    """
    from transformers import AutoImageProcessor

    with explained("image processor", directory):
        loader: Processor = AutoImageProcessor
        return loader.from_pretrained(directory, backend="pil", local_files_only=True)


def load_feature_extractor(directory: Path) -> Processor:
    """Load the feature extractor of a speech model."""
    from transformers import AutoFeatureExtractor

    with explained("feature extractor", directory):
        loader: Processor = AutoFeatureExtractor
        return loader.from_pretrained(directory, local_files_only=True)


def load_processor(directory: Path, config: PretrainedConfig) -> Processor:
    """Load the processor that joins tokenizer and image processor.

    Video processors need torchvision, which nothing here does: they are left out.
    """
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    with explained("processor", directory):
        if type(config) not in PROCESSOR_MAPPING:
            raise QsensError(f"transformers has no processor for {config.model_type} models, as {directory} is one.")
        processor = _without_video(PROCESSOR_MAPPING[type(config)]).from_pretrained(directory, local_files_only=True)
    processor.image_processor = load_image_processor(directory)
    return processor


def _without_video(processor_class: Processor) -> Processor:
    if "video_processor" not in processor_class.get_attributes():
        return processor_class

    class WithoutVideo(processor_class):  # type: ignore[misc] # the base is only known at run time
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

    return WithoutVideo
