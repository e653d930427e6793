"""Calibration and evaluation samples: the default set, the user's files, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from pytest_qsens import QsensError
from pytest_qsens.models import pictures, waveforms
from pytest_qsens.models.data import Data, Sample, default_calibration, default_evaluation, read_samples
from pytest_qsens.models.resolve import resolve
from pytest_qsens.models.source import ModelRequest

if TYPE_CHECKING:
    from tests.models.conftest import WriteFile


def png(directory: Path, name: str = "photo.png", size: tuple[int, int] = (60, 40)) -> Path:
    """Save a picture as a file."""
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures.EVALUATION[0].draw().resize(size).save(path)
    return path


def test_default_calibration_and_evaluation_differ() -> None:
    """Scores on the data that the ranges were fitted to would flatter."""
    calibration, evaluation = default_calibration(), default_evaluation()
    assert (len(calibration.texts), len(evaluation.texts)) == (24, 8)
    texts = [sample.text for split in (calibration, evaluation) for sample in split.texts]
    drawings = [picture.draw().tobytes() for split in (calibration, evaluation) for picture in split.pictures]
    sounds = [sound.samples(16000).tobytes() for split in (calibration, evaluation) for sound in split.sounds]
    for values in (texts, drawings, sounds):
        assert len(set(values)) == len(values)


@pytest.mark.parametrize("picture", [*pictures.CALIBRATION, *pictures.EVALUATION], ids=lambda p: p.caption)
def test_pictures_are_drawn_alike_every_time(picture: pictures.Picture) -> None:
    """A picture of one color would exercise nothing; one that changes would change committed scores."""
    image = picture.draw()
    assert (image.mode, image.size) == ("RGB", picture.size)
    assert picture.draw().tobytes() == image.tobytes()
    colors = image.getcolors(maxcolors=image.width * image.height)
    assert colors is not None
    assert len(colors) >= 2
    assert max(count for count, _ in colors) < 0.9 * image.width * image.height


def test_sounds_fill_the_range_without_clipping() -> None:
    """Sounds have the length asked for, are loud enough to be heard and never overflow 16 bits."""
    for sound in (*waveforms.CALIBRATION, *waveforms.EVALUATION):
        samples = sound.samples(8000)
        assert len(samples) == 8000
        assert 8000 < max(map(abs, samples)) < waveforms.FULL_SCALE


def test_a_text_file_holds_one_sample_a_line(write: WriteFile) -> None:
    """Blank lines and a byte order mark are no samples; separators inside a text do not split it."""
    path = write("texts.txt", "\ufeffone\r\n\r\n  two\u2028still two  \n\n[3]\n")
    assert read_samples(Path(path), "--qsens-eval") == (Sample("one"), Sample("two\u2028still two"), Sample("[3]"))


@pytest.mark.parametrize("name", ["data.jsonl", "data.txt", "DATA.JSONL"])
def test_json_lines_are_told_by_name_or_content(name: str, write: WriteFile, tmp_path: Path) -> None:
    """Image paths are relative to the data file, not to the working directory."""
    content = '\n{"text": "what?", "image": "sub/photo.png"}\n{"text": "plain"}\n{"image": "photo.png"}\n'
    path = write(name, content)
    assert read_samples(Path(path), "--qsens-calib") == (
        Sample("what?", tmp_path / "sub/photo.png"),
        Sample("plain"),
        Sample("", tmp_path / "photo.png"),
    )


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("d.txt", "", r"d\.txt is empty"),
        ("d.txt", "\n \n\t\n", r"d\.txt is empty"),
        ("d.txt", b"caf\xe9\n", r"d\.txt is not UTF-8 text \(byte 3\)"),
        ("d.jsonl", '{"text": "a"}\n\n{"text": \n', r"d\.jsonl:3: not JSON"),
        ("d.txt", '{"text": "a"}\nplain\n', r"d\.txt:2: not JSON .*'plain'"),
        ("d.jsonl", "[1]\n", r"d\.jsonl:1: not a JSON object"),
        ("d.jsonl", '{"txt": "a"}\n', r"d\.jsonl:1: unknown key 'txt'"),
        ("d.jsonl", "{}\n", r"d\.jsonl:1: neither 'text' nor 'image'"),
        ("d.jsonl", '{"text": 3}\n', r"d\.jsonl:1: 'text' must be a non-empty string, not 3"),
        ("d.jsonl", '{"text": " "}\n', r"d\.jsonl:1: 'text' must be a non-empty string"),
        ("d.jsonl", '{"image": ["a"]}\n', r"d\.jsonl:1: 'image' must be"),
    ],
)
@pytest.mark.parametrize("option", ["calib", "eval"])
def test_bad_files_are_refused_by_line(
    name: str, content: str | bytes, expected: str, option: str, write: WriteFile
) -> None:
    """The option, the file, the line and the offending value are named, before any model is loaded."""
    source = resolve(ModelRequest("tiny_qwen2_5_vl", **{option: write(name, content)}))
    with pytest.raises(QsensError, match=f"--qsens-{option}: .*{expected}"):
        source.check()


def test_a_missing_or_unreadable_file_is_refused(tmp_path: Path) -> None:
    """A typing error in a path and a directory in place of a file are told apart."""
    for path, expected in ((tmp_path / "typo.txt", "no such file: .*typo"), (tmp_path, "cannot read .*: Is a direct")):
        with pytest.raises(QsensError, match=expected):
            Data(None, path, None).check()


@pytest.mark.parametrize("damage", ["missing", "text", "truncated"])
def test_images_that_do_not_decode_are_refused(damage: str, write: WriteFile, tmp_path: Path) -> None:
    """A damaged image is found at the start, also one cut off after its header."""
    image = png(tmp_path)
    if damage == "missing":
        image.unlink()
    elif damage == "text":
        image.write_text("not a picture")
    else:
        image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    path = write("d.jsonl", '{"text": "what?", "image": "photo.png"}\n')
    with pytest.raises(QsensError, match="photo.png" if damage == "missing" else "cannot decode image .*photo.png"):
        Data(Path(path), None, None).check()


def test_images_of_the_user_reach_the_model(write: WriteFile, tmp_path: Path, snapshots: dict[str, Path]) -> None:
    """Whatever its mode and format, the user's image gives pixels; the file is not held open."""
    png(tmp_path, "a/photo.png")
    Image.new("LA", (80, 60), (90, 128)).save(tmp_path / "gray.png")
    path = write("d.jsonl", '{"text": "what?", "image": "a/photo.png"}\n{"text": "how?", "image": "gray.png"}\n')
    for model in ("tiny_qwen2_5_vl", str(snapshots["qwen2_5_vl"]), str(snapshots["clip"]), str(snapshots["vit"])):
        source = resolve(ModelRequest(model, calib=path, eval=path))
        source.check()
        assert all("pixel_values" in batch for batch in source.load().evaluation)


@pytest.mark.parametrize(
    ("model", "record", "expected"),
    [
        ("bert", {"text": "a", "image": "photo.png"}, r"sample 1 has an image .*BertModel is a text encoder and takes"),
        ("llama", {"image": "photo.png"}, r"LlamaForCausalLM is a causal LM and takes text only"),
        ("vit", {"text": "a"}, r"sample 1 has no 'image', which ViTForImageClassification"),
        ("clip", {"image": "photo.png"}, r"sample 1 has no 'text', which CLIPModel"),
        ("qwen2_5_vl", {"image": "photo.png"}, r"sample 1 has no 'text'"),
        ("whisper", {"text": "a"}, r"WhisperForConditionalGeneration takes sound"),
    ],
)
def test_data_that_does_not_suit_the_model_is_refused(
    model: str, record: dict[str, str], expected: str, write: WriteFile, tmp_path: Path, snapshots: dict[str, Path]
) -> None:
    """An image is not silently dropped, nor a missing one replaced."""
    png(tmp_path)
    source = resolve(ModelRequest(str(snapshots[model]), calib=write("d.jsonl", json.dumps(record))))
    with pytest.raises(QsensError, match=f"--qsens-calib: .*{expected}"):
        source.load()


def test_images_for_a_text_model_are_refused_before_loading(
    write: WriteFile, tmp_path: Path, snapshots: dict[str, Path]
) -> None:
    """The check at the start of a run finds it already."""
    png(tmp_path)
    path = write("d.jsonl", '{"text": "a", "image": "photo.png"}')
    with pytest.raises(QsensError, match="takes text only"):
        resolve(ModelRequest(str(snapshots["bert"]), eval=path)).check()


def test_the_fingerprint_follows_the_data(write: WriteFile, tmp_path: Path) -> None:
    """Equal data gives equal fingerprints wherever it lies; any change of text, pixel, order or role another one."""
    first, same = write("a.txt", "one\ntwo\n"), write("b.txt", "one\n\ntwo")
    other = write("c.txt", "two\none\n")
    image = png(tmp_path)
    picture = write("d.jsonl", '{"text": "what?", "image": "photo.png"}')

    def fingerprint(**options: object) -> str | None:
        request = ModelRequest("tiny_qwen2_5_vl", **options)  # type: ignore[arg-type] # spelled out by each call
        return resolve(request).data_fingerprint()

    assert fingerprint(calib=first) == fingerprint(calib=same)
    with_picture = fingerprint(calib=picture)
    png(tmp_path, size=(61, 40))
    distinct = [
        fingerprint(),
        fingerprint(calib_samples=3),
        fingerprint(calib=first),
        fingerprint(eval=first),
        fingerprint(calib=other),
        fingerprint(calib=picture),
        with_picture,
    ]
    assert len(set(distinct)) == len(distinct)
    assert image.exists()
