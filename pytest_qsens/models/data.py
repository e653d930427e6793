"""Calibration and evaluation samples: the user's files, or the default set that ships with the package."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qsens.errors import QsensError
from pytest_qsens.models import pictures, waveforms

if TYPE_CHECKING:
    from collections.abc import Iterable

    from PIL.Image import Image

    from pytest_qsens.models.source import ModelRequest


@dataclass(frozen=True)
class Sample:
    """One text, one image, or both. ``text`` is empty for a bare image."""

    text: str
    image: Path | pictures.Picture | None = None

    def open_image(self) -> Image:
        """Return the image as RGB; only for samples that have one."""
        from PIL import Image

        if isinstance(self.image, pictures.Picture):
            return self.image.draw()
        if self.image is None:
            raise ValueError(f"sample {self.text!r} has no image")
        with Image.open(self.image) as image:
            return image.convert("RGB")


Samples = tuple[Sample, ...]


@dataclass(frozen=True)
class Split:
    """The default samples of one purpose, as every kind of model needs them."""

    texts: Samples
    pictures: tuple[pictures.Picture, ...]
    sounds: tuple[waveforms.Waveform, ...]

    @property
    def captioned(self) -> Samples:
        """Pictures with their captions."""
        return tuple(Sample(picture.caption, picture) for picture in self.pictures)

    def questioned(self, images: int, texts: int) -> Samples:
        """Return some pictures with a question about each, then some plain texts."""
        asked = tuple(Sample(picture.question, picture) for picture in self.pictures[:images])
        return asked + self.texts[:texts]


def default_calibration() -> Split:
    """Return the samples for the observers."""
    return Split(_shipped_texts("calibration.txt"), pictures.CALIBRATION, waveforms.CALIBRATION)


def default_evaluation() -> Split:
    """Return the samples for the scores; none of them is a calibration sample."""
    return Split(_shipped_texts("evaluation.txt"), pictures.EVALUATION, waveforms.EVALUATION)


def _shipped_texts(name: str) -> Samples:
    text = (files("pytest_qsens") / "data" / name).read_text(encoding="utf-8")
    return tuple(Sample(line) for line in text.splitlines())


@dataclass(frozen=True)
class Data:
    """What the user chose: ``calib`` and ``eval`` are files, or ``None`` for the default set."""

    calib: Path | None
    eval: Path | None
    calib_samples: int | None

    @classmethod
    def from_request(cls, request: ModelRequest) -> Data:
        """Take the data options of a request."""
        return cls(
            calib=Path(request.calib) if request.calib is not None else None,
            eval=Path(request.eval) if request.eval is not None else None,
            calib_samples=request.calib_samples,
        )

    @property
    def given(self) -> tuple[tuple[str, Path], ...]:
        """The user's files with the option each came from."""
        pairs = (("--qsens-calib", self.calib), ("--qsens-eval", self.eval))
        return tuple((option, path) for option, path in pairs if path is not None)

    def calibration(self, default: Samples) -> Samples:
        """Return the user's calibration samples or ``default``, no more than ``calib_samples``."""
        samples = read_samples(self.calib, "--qsens-calib") if self.calib is not None else default
        return samples[: self.calib_samples]

    def evaluation(self, default: Samples) -> Samples:
        """Return the user's evaluation samples or ``default``."""
        return read_samples(self.eval, "--qsens-eval") if self.eval is not None else default

    def check(self) -> bool:
        """Read the user's files and decode their images; tell whether there is any image.

        Raises:
            QsensError: As ``read_samples``; and if an image is missing or does not decode.

        """
        images = False
        for option, path in self.given:
            for sample in read_samples(path, option):
                if isinstance(sample.image, Path):
                    images = True
                    _check_image(sample.image, f"{path} ({option})")
        return images

    def fingerprint(self) -> str:
        """Short hash over every text, pixel and sound of both sets, and the cap on calibration samples."""
        digest = hashlib.sha256(repr(self.calib_samples).encode())
        _hash_set(digest, self.calib, "--qsens-calib", default_calibration())
        _hash_set(digest, self.eval, "--qsens-eval", default_evaluation())
        return digest.hexdigest()[:16]

    def evaluation_fingerprint(self) -> str:
        """Short hash over the evaluation set alone."""
        digest = hashlib.sha256()
        _hash_set(digest, self.eval, "--qsens-eval", default_evaluation())
        return digest.hexdigest()[:16]


def _hash_set(digest: hashlib._Hash, path: Path | None, option: str, default: Split) -> None:
    digest.update(b"\0file\0" if path is not None else b"\0default\0")
    if path is not None:
        _hash_samples(digest, read_samples(path, option))
        return
    _hash_samples(digest, default.texts + default.captioned)
    digest.update(repr([picture.question for picture in default.pictures]).encode())
    for sound in default.sounds:
        digest.update(sound.text.encode() + sound.samples(16000).tobytes())


def _hash_samples(digest: hashlib._Hash, samples: Iterable[Sample]) -> None:
    for sample in samples:
        digest.update(b"\0text\0" + sample.text.encode())
        if isinstance(sample.image, Path):
            digest.update(b"\0image\0" + sample.image.read_bytes())
        elif sample.image is not None:
            image = sample.image.draw()
            digest.update(b"\0image\0" + repr(image.size).encode() + image.tobytes())


def read_samples(path: Path, option: str) -> Samples:
    """Read a data file: JSON Lines if it is named so or starts with a JSON object, else one text a line.

    Image paths are relative to the file. Blank lines are skipped.

    Raises:
        QsensError: If the file is missing, unreadable, not UTF-8 or empty, or a line is not a sample.

    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise QsensError(f"{option}: no such file: {path}") from None
    except UnicodeDecodeError as error:
        raise QsensError(
            f"{option}: {path} is not UTF-8 text (byte {error.start}). Convert it, for example with "
            f"`iconv -t UTF-8`; a file of samples holds one text per line, or JSON Lines."
        ) from None
    except OSError as error:
        raise QsensError(f"{option}: cannot read {path}: {error.strerror}") from None
    # Not splitlines(): it also splits at characters that a text may contain, such as U+2028.
    lines = [(number, line.strip()) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]
    if not lines:
        raise QsensError(f"{option}: {path} is empty. Give one text per line, or JSON Lines with `text` and `image`.")
    if path.suffix.lower() != ".jsonl" and not _is_json_object(lines[0][1]):
        return tuple(Sample(line) for _, line in lines)
    return tuple(_parse_record(line, path, f"{option}: {path}:{number}") for number, line in lines)


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _parse_record(line: str, path: Path, where: str) -> Sample:
    expected = 'Each line looks like {"text": "What is this?", "image": "photo.png"}, either key alone is enough.'
    try:
        record = json.loads(line)
    except ValueError as error:
        raise QsensError(f"{where}: not JSON ({error}): {line[:80]!r}. {expected}") from None
    if not isinstance(record, dict):
        raise QsensError(f"{where}: not a JSON object: {line[:80]!r}. {expected}")
    if unknown := sorted(record.keys() - {"text", "image"}):
        raise QsensError(f"{where}: unknown key {unknown[0]!r}. {expected}")
    text, image = record.get("text"), record.get("image")
    for key, value in (("text", text), ("image", image)):
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise QsensError(f"{where}: {key!r} must be a non-empty string, not {value!r}. {expected}")
    if text is None and image is None:
        raise QsensError(f"{where}: neither 'text' nor 'image'. {expected}")
    return Sample(text or "", path.parent / image if image is not None else None)


def _check_image(image: Path, where: str) -> None:
    from PIL import Image

    try:
        with Image.open(image) as opened:
            opened.load()  # verify() misses truncated pixel data
    except FileNotFoundError:
        raise QsensError(f"{where}: no such image: {image}. Paths are relative to the data file.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise QsensError(f"{where}: cannot decode image {image}: {error}") from None
