"""What kind of input a model takes and which output is scored, told from its transformers class."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from pytest_qsens.errors import QsensError
from pytest_qsens.models.checkpoint import FACTORY_HINT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PretrainedConfig, PreTrainedModel


class Task(StrEnum):
    """Kinds of models that batches can be made for; the values are shown in messages."""

    CAUSAL_LM = "causal LM"
    MASKED_LM = "masked LM"
    TEXT_ENCODER = "text encoder"
    SEQUENCE_CLASSIFIER = "sequence classifier"
    TOKEN_CLASSIFIER = "token classifier"  # noqa: S105 - not a password
    SEQ2SEQ = "seq2seq"
    IMAGE_CLASSIFIER = "image classifier"
    IMAGE_ENCODER = "image encoder"
    IMAGE_TEXT = "image-text-to-text"
    DUAL_ENCODER = "image-text dual encoder"
    SPEECH_SEQ2SEQ = "speech seq2seq"
    SPEECH_CTC = "speech CTC"


TAKES_IMAGES = frozenset({Task.IMAGE_CLASSIFIER, Task.IMAGE_ENCODER, Task.IMAGE_TEXT, Task.DUAL_ENCODER})
TAKES_SOUND = frozenset({Task.SPEECH_SEQ2SEQ, Task.SPEECH_CTC})
_ENCODER_DECODER = frozenset({Task.SEQ2SEQ, Task.SPEECH_SEQ2SEQ})

# Names of mappings in transformers.models.auto.modeling_auto. A class may be in several: the first one wins.
_MAPPINGS = (
    ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", Task.IMAGE_TEXT),
    ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", Task.SPEECH_SEQ2SEQ),
    ("MODEL_FOR_CTC_MAPPING_NAMES", Task.SPEECH_CTC),
    ("MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES", Task.DUAL_ENCODER),
    ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", Task.SEQ2SEQ),
    ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", Task.CAUSAL_LM),
    ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", Task.MASKED_LM),
    ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", Task.SEQUENCE_CLASSIFIER),
    ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", Task.TOKEN_CLASSIFIER),
    ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", Task.IMAGE_CLASSIFIER),
)
_BASE_TASKS = {"input_ids": Task.TEXT_ENCODER, "pixel_values": Task.IMAGE_ENCODER}


def task_of(model_class: type[PreTrainedModel], config: PretrainedConfig) -> Task:
    """Tell the task of a model class.

    Raises:
        QsensError: If it is none of ``Task``.

    """
    from transformers.models.auto import modeling_auto

    name = model_class.__name__
    task = next((task for mapping, task in _MAPPINGS if _contains(getattr(modeling_auto, mapping), name)), None)
    if task is None and _contains(modeling_auto.MODEL_MAPPING_NAMES, name) and not hasattr(config, "vision_config"):
        task = _BASE_TASKS.get(model_class.main_input_name)
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    if task is None or encoder_decoder != (task in _ENCODER_DECODER):
        raise QsensError(
            f"{name} ({config.model_type}) is none of the kinds of models that batches can be made for: "
            f"{', '.join(Task)}. For any other, {FACTORY_HINT}."
        )
    return task


def _contains(mapping: Mapping[str, str | Sequence[str]], name: str) -> bool:
    return any(name == value if isinstance(value, str) else name in value for value in mapping.values())
