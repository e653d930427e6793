"""Batches for a loaded transformers model, made by the checkpoint's own tokenizer or processor."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qsens.errors import QsensError
from pytest_qsens.models import outputs, processors
from pytest_qsens.models.data import Data, Sample, default_calibration, default_evaluation
from pytest_qsens.models.tasks import TAKES_IMAGES, TAKES_SOUND, Task
from pytest_qsens.models.waveforms import FULL_SCALE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from pytest_qsens.models.data import Samples
    from pytest_qsens.models.spec import Batch
    from pytest_qsens.models.waveforms import Waveform

BATCH_SIZE = 8
MAX_TOKENS = 512
"""Longer texts are cut: every position costs in every op, and none measures what the first 512 do not."""


@dataclass(frozen=True)
class Batches:
    """The data part of a ``ModelSpec``."""

    calibration: Sequence[Batch]
    evaluation: Sequence[Batch]
    output: Callable[[Any, Batch], torch.Tensor]
    logits: bool


def make_batches(task: Task, model: PreTrainedModel, directory: Path, data: Data) -> Batches:
    """Make the batches of a model with what lies in its checkpoint's directory.

    Raises:
        QsensError: If the checkpoint's tokenizer or processor cannot be used, or the data does not suit the model.

    """
    if task in TAKES_SOUND:
        return _speech_batches(task, model, directory, data)
    calibration, evaluation = select_samples(task, data, type(model).__name__)
    make: Callable[[Samples], list[Batch]]
    if task is Task.IMAGE_TEXT:
        make = _ImageText(model, directory).batches
    elif task is Task.DUAL_ENCODER:
        make = _DualEncoder(model, directory).batches
    elif task in TAKES_IMAGES:
        make = _Images(model, directory).batches
    elif task is Task.SEQ2SEQ:
        make = _Seq2Seq(model, directory).batches
    else:
        make = _Texts(model, directory).batches
    output, logits = _OUTPUTS[task]
    with processors.explained("batches", directory):
        return Batches(make(calibration), make(evaluation), output, logits)


_OUTPUTS: dict[Task, tuple[Callable[[Any, Batch], torch.Tensor], bool]] = {
    Task.CAUSAL_LM: (outputs.token_logits, True),
    Task.MASKED_LM: (outputs.token_logits, True),
    Task.TOKEN_CLASSIFIER: (outputs.token_logits, True),
    Task.TEXT_ENCODER: (outputs.token_states, False),
    Task.SEQUENCE_CLASSIFIER: (outputs.logits, True),
    Task.SEQ2SEQ: (outputs.decoder_logits, True),
    Task.IMAGE_CLASSIFIER: (outputs.logits, True),
    Task.IMAGE_ENCODER: (outputs.states, False),
    Task.IMAGE_TEXT: (outputs.token_logits, True),
    Task.DUAL_ENCODER: (outputs.image_logits, True),
    Task.SPEECH_SEQ2SEQ: (outputs.decoder_logits, True),
    Task.SPEECH_CTC: (outputs.logits, True),
}


def select_samples(task: Task, data: Data, model: str) -> tuple[Samples, Samples]:
    """Choose calibration and evaluation samples for a task that takes text or images.

    Raises:
        QsensError: If the user's samples do not suit ``task``; ``model`` names the model in the message.

    """
    calibration, evaluation = default_calibration(), default_evaluation()
    if task is Task.IMAGE_TEXT:
        defaults = calibration.questioned(images=6, texts=3), evaluation.questioned(images=2, texts=1)
    elif task in TAKES_IMAGES:
        defaults = calibration.captioned, evaluation.captioned
    else:
        defaults = calibration.texts, evaluation.texts
    chosen = data.calibration(defaults[0]), data.evaluation(defaults[1])
    needs_text = task not in (Task.IMAGE_CLASSIFIER, Task.IMAGE_ENCODER)
    needs_image = task in TAKES_IMAGES and task is not Task.IMAGE_TEXT
    for samples, option, path in zip(chosen, ("--qsens-calib", "--qsens-eval"), (data.calib, data.eval), strict=True):
        for number, sample in enumerate(samples, start=1):
            where = f"{option}: {path}: sample {number}"
            if sample.image is not None and task not in TAKES_IMAGES:
                raise QsensError(f"{where} has an image ({sample.image}), but {model} is a {task} and takes text only.")
            if sample.image is None and needs_image:
                raise QsensError(f"{where} has no 'image', which {model} ({task}) needs. Use JSON Lines with 'image'.")
            if not sample.text and needs_text:
                raise QsensError(f"{where} has no 'text', which {model} ({task}) needs.")
    return chosen


def _groups(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


class _Forward:
    """What the forward method of a model accepts."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.parameters = frozenset(inspect.signature(model.forward).parameters)

    def batch(self, **values: object) -> Batch:
        """Keep the accepted arguments. The key-value cache is off: one forward needs none."""
        kept = {key: value for key, value in values.items() if key in self.parameters}
        return {**kept, "use_cache": False} if "use_cache" in self.parameters else kept


class _Texts:
    """Padded batches of texts."""

    def __init__(self, model: PreTrainedModel, directory: Path) -> None:
        self.forward = _Forward(model)
        self.tokenizer = processors.load_tokenizer(directory)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = min(self.tokenizer.model_max_length, positions or MAX_TOKENS, MAX_TOKENS)
        # Without a pad token, or with a model that cannot be told where the padding is, every text goes alone.
        # Causal sequence classifiers find the last token by the config's pad token.
        can_pad = self.tokenizer.pad_token is not None and "attention_mask" in self.forward.parameters
        if _classifies_last_token(model) and model.config.get_text_config().pad_token_id is None:
            can_pad = False
        self.size = BATCH_SIZE if can_pad else 1

    def encode(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Tokenize to tensors of (texts, longest), padded on the right."""
        encoded = self.tokenizer(
            list(texts),
            padding=len(texts) > 1,
            padding_side="right",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        return dict(encoded)

    def batches(self, samples: Samples) -> list[Batch]:
        return [self.forward.batch(**self.encode([s.text for s in group])) for group in _groups(samples, self.size)]


def _classifies_last_token(model: PreTrainedModel) -> bool:
    return type(model).__name__.endswith("ForSequenceClassification")


class _Seq2Seq(_Texts):
    """Padded batches of texts for the encoder; the decoder is given the same text."""

    def __init__(self, model: PreTrainedModel, directory: Path) -> None:
        super().__init__(model, directory)
        self.start = decoder_start(model)

    def batches(self, samples: Samples) -> list[Batch]:
        batches = []
        for group in _groups(samples, self.size):
            encoded = self.encode([sample.text for sample in group])
            lengths = encoded["attention_mask"].sum(dim=1).tolist()
            ids = [row[:length] for row, length in zip(encoded["input_ids"].tolist(), lengths, strict=True)]
            batches.append(self.forward.batch(**encoded, **teacher_forced(ids, self.start)))
        return batches


def decoder_start(model: PreTrainedModel) -> int:
    """Return the token a decoder starts from.

    Raises:
        QsensError: If the config tells none.

    """
    for holder in (model.config, model.generation_config):
        for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
            if isinstance(value := getattr(holder, name, None), int):
                return value
    raise QsensError(
        f"the config of {type(model).__name__} has no decoder_start_token_id, so its decoder cannot be started. "
        f"Add it to config.json."
    )


def teacher_forced(targets: Sequence[Sequence[int]], start: int) -> dict[str, torch.Tensor]:
    """Make the decoder inputs that predict ``targets``: shifted behind ``start``, padded to (targets, longest)."""
    import torch

    # Tokenizers such as Whisper's put the start token there themselves.
    rows = [list(ids[:-1]) if ids[0] == start else [start, *ids[:-1]] for ids in targets]
    longest = max(len(row) for row in rows)
    return {
        "decoder_input_ids": torch.tensor([row + [start] * (longest - len(row)) for row in rows]),
        "decoder_attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
    }


class _Images:
    """Batches of images."""

    def __init__(self, model: PreTrainedModel, directory: Path) -> None:
        self.forward = _Forward(model)
        self.processor = processors.load_image_processor(directory)

    def batches(self, samples: Samples) -> list[Batch]:
        return [
            self.forward.batch(**self.processor([sample.open_image() for sample in group], return_tensors="pt"))
            for group in _groups(samples, BATCH_SIZE)
        ]


class _DualEncoder:
    """Batches of images with as many texts; every image is compared with every text."""

    def __init__(self, model: PreTrainedModel, directory: Path) -> None:
        self.forward = _Forward(model)
        self.processor = processors.load_processor(directory, model.config)
        # SigLIP's tokenizers make no mask: these models are trained on texts padded to full length.
        self.padding = True if "attention_mask" in self.processor.tokenizer.model_input_names else "max_length"

    def batches(self, samples: Samples) -> list[Batch]:
        return [
            self.forward.batch(
                **self.processor(
                    text=[sample.text for sample in group],
                    images=[sample.open_image() for sample in group],
                    padding=self.padding,
                    truncation=True,
                    return_tensors="pt",
                )
            )
            for group in _groups(samples, BATCH_SIZE)
        ]


class _ImageText:
    """One prompt a batch, with or without an image, in the checkpoint's chat format if it has one."""

    def __init__(self, model: PreTrainedModel, directory: Path) -> None:
        self.forward = _Forward(model)
        self.processor = processors.load_processor(directory, model.config)

    def batches(self, samples: Samples) -> list[Batch]:
        return [self.forward.batch(**self._encode(sample)) for sample in samples]

    def _encode(self, sample: Sample) -> dict[str, torch.Tensor]:
        image = sample.open_image() if sample.image is not None else None
        if self.processor.chat_template or self.processor.tokenizer.chat_template:
            content: list[dict[str, Any]] = [{"type": "text", "text": sample.text}]
            if image is not None:
                content.insert(0, {"type": "image", "image": image})
            return dict(
                self.processor.apply_chat_template(
                    [{"role": "user", "content": content}],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                )
            )
        if image is None:
            return dict(self.processor(text=sample.text, return_tensors="pt"))
        prompt = getattr(self.processor, "image_token", "") + sample.text
        return dict(self.processor(text=prompt, images=image, return_tensors="pt"))


def _speech_batches(task: Task, model: PreTrainedModel, directory: Path, data: Data) -> Batches:
    """Make one batch of sounds of equal length for each purpose; for a decoder, with what to transcribe them as."""
    import numpy as np

    if data.given:
        option, path = data.given[0]
        raise QsensError(
            f"{option}: {path} holds texts and images, but {type(model).__name__} takes sound. Leave the option out to "
            f"use the built-in sounds, or write a factory for your own."
        )
    forward = _Forward(model)
    extractor = processors.load_feature_extractor(directory)
    tokenizer = processors.load_tokenizer(directory) if task is Task.SPEECH_SEQ2SEQ else None

    def make(sounds: Sequence[Waveform]) -> list[Batch]:
        rate = extractor.sampling_rate
        audio = [np.array(sound.samples(rate), dtype=np.float32) / FULL_SCALE for sound in sounds]
        values = dict(extractor(audio, sampling_rate=rate, return_tensors="pt"))
        if tokenizer is not None:
            values |= teacher_forced(tokenizer([sound.text for sound in sounds]).input_ids, decoder_start(model))
        return [forward.batch(**values)]

    output, logits = _OUTPUTS[task]
    calibration = default_calibration().sounds[: data.calib_samples]
    with processors.explained("batches", directory):
        return Batches(make(calibration), make(default_evaluation().sounds), output, logits)
