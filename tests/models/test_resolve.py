"""Names after ``--qsens-model``: each form is understood, anything else is explained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_qsens import QsensError
from pytest_qsens.models.resolve import resolve
from pytest_qsens.models.source import ModelRequest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2_5_vl_3", r"no preset 'qwen2_5_vl_3' \(did you mean qwen2_5_vl_3b\?\). Known: minilm, tiny_qwen2_5_vl"),
        ("zebra", r"no preset 'zebra'\. Known: .* hub:org/name and package.module:factory"),
        ("org/name", r"did you mean hub:org/name\?"),
        ("./nowhere", r"no such directory: nowhere \(--qsens-model ./nowhere\)"),
        ("/nowhere/at/all", r"no such directory: /nowhere/at/all"),
        ("hub:name", r"hub:name is not of the form hub:org/name"),
        ("module:", r"no preset 'module:'"),
        ("", r"no preset ''"),
    ],
)
def test_unknown_names_are_explained(name: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that means nothing is quoted, with the nearest that does and every other form."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QsensError, match=expected):
        resolve(ModelRequest(name))


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    """A weight file given instead of its directory is told apart from an unknown name."""
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(QsensError, match="is a file, not a directory"):
        resolve(ModelRequest(str(file)))


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("minilm", "minilm"),
        ("tiny_qwen2_5_vl", "tiny_qwen2_5_vl"),
        ("qwen2_5_vl_3b", "qwen2_5_vl_3b"),
        ("hub:org/some.Name", "org--some.Name"),
        ("package.module:factory", "package.module.factory"),
    ],
)
def test_labels_are_fit_for_paths(name: str, label: str) -> None:
    """Snapshot paths and node ids are made of labels, so these are stable and free of separators."""
    assert resolve(ModelRequest(name)).label == label


def test_a_directory_is_labelled_by_its_name(tmp_path: Path) -> None:
    """A directory's odd characters never reach a path; inside the hub's cache the repository gives the name."""
    odd = tmp_path / "my model (v2)"
    cached = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    for directory in (odd, cached):
        directory.mkdir(parents=True)
    assert resolve(ModelRequest(str(odd))).label == "my_model__v2_"
    assert resolve(ModelRequest(str(cached))).label == "org--name"


@pytest.mark.parametrize("name", ["minilm", "tiny_qwen2_5_vl", "hub:org/name", "package.module:factory"])
def test_a_checkpoint_is_refused_where_it_has_no_meaning(name: str) -> None:
    """A checkpoint that would be ignored is an error: the user believes it is the one measured."""
    with pytest.raises(QsensError, match=f"--qsens-checkpoint /ckpt has no meaning with --qsens-model {name}"):
        resolve(ModelRequest(name, checkpoint="/ckpt"))


def test_a_checkpoint_is_refused_with_a_directory(tmp_path: Path) -> None:
    """Two directories leave open which one is meant."""
    with pytest.raises(QsensError, match="has no meaning"):
        resolve(ModelRequest(str(tmp_path), checkpoint="/ckpt"))


@pytest.mark.parametrize(
    "request_",
    [ModelRequest("m:f", calib="/c.txt"), ModelRequest("m:f", eval="/e.txt"), ModelRequest("m:f", calib_samples=3)],
)
def test_data_options_are_refused_with_a_factory(request_: ModelRequest) -> None:
    """A factory brings its batches; data that would be ignored is an error."""
    with pytest.raises(QsensError, match="the factory brings its own batches"):
        resolve(request_)
