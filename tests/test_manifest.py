"""The cached op list: right, rebuilt when it must be, and free of torch when it is there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from pytest_qsens import ModelSpec, QsensError
from pytest_qsens.cache import default_cache_dir
from pytest_qsens.manifest import load_manifest
from pytest_qsens.models.resolve import resolve
from pytest_qsens.models.source import ModelRequest
from pytest_qsens.ops import Op
from pytest_qsens.result_cache import digest

if TYPE_CHECKING:
    from pytest_qsens.models.source import ModelSource


class Source:
    """A model source over a module, which counts how often it is built."""

    label = "net"

    def __init__(self, net: torch.nn.Module, fingerprint: str | None = "net-1") -> None:
        self.net = net
        self.key = fingerprint
        self.built = 0

    def check(self) -> None:
        """Accept."""

    def fingerprint(self) -> str | None:
        """Return the given key."""
        return self.key

    def identity(self, *, hash_weights: bool) -> str | None:
        """Return the given key."""
        return None if hash_weights else self.key

    def data_fingerprint(self) -> str | None:
        """Return nothing."""

    def skeleton(self) -> torch.nn.Module:
        """Return the module."""
        self.built += 1
        return self.net

    def load(self) -> ModelSpec:
        """Return the module without batches."""
        return ModelSpec(self.net, [], [], lambda out, _: out)


def small() -> Source:
    """Make a source with two ops."""
    return Source(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU(), torch.nn.Linear(4, 2)))


OPS = (Op("0", "conv2d"), Op("2", "linear"))


def test_the_list_is_made_once(tmp_path: Path) -> None:
    """A second collection reads the file, and gets the same ops in the same order."""
    source: Source = small()
    assert load_manifest(source, tmp_path) == OPS
    assert load_manifest(source, tmp_path) == OPS
    assert source.built == 1


@pytest.mark.parametrize("what", ["no directory", "no fingerprint"])
def test_nothing_is_cached_without_a_place_or_a_key(what: str, tmp_path: Path) -> None:
    """A factory may return another model at any time; its list is never kept."""
    source = small()
    if what == "no fingerprint":
        source.key = None
    for _ in range(2):
        assert load_manifest(source, None if what == "no directory" else tmp_path) == OPS
    assert source.built == 2
    assert list(tmp_path.iterdir()) == []


def test_another_fingerprint_is_another_list(tmp_path: Path) -> None:
    """Models do not get each other's ops."""
    load_manifest(small(), tmp_path)
    other = Source(torch.nn.Sequential(torch.nn.Embedding(3, 4)), "net-2")
    assert load_manifest(other, tmp_path) == (Op("0", "embedding"),)


def test_another_version_is_another_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an upgrade of transformers, which may rename modules, the list is made again."""
    load_manifest(small(), tmp_path)
    monkeypatch.setattr("pytest_qsens.manifest.version", lambda package: f"{package}-99")
    upgraded = small()
    load_manifest(upgraded, tmp_path)
    assert upgraded.built == 1


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "null",
        "[]",
        "{}",
        '{"schema": 1, "ops": [["a", "linear"]]}',
        f'{{"schema": 1, "sum": "{digest([["a"]])}", "ops": [["a"]]}}',
        f'{{"schema": 1, "sum": "{digest(3)}", "ops": 3}}',
        f'{{"schema": 1, "sum": "{digest([["a", "linear"]])}", "ops": [["b", "linear"]]}}',
        f'{{"schema": 5, "sum": "{digest([["a", "linear"]])}", "ops": [["a", "linear"]]}}',
    ],
)
def test_a_damaged_file_is_replaced(content: str, tmp_path: Path) -> None:
    """A file that is half-written, foreign, or has one letter changed never decides what is tested."""
    load_manifest(small(), tmp_path)
    [file] = (tmp_path / "manifests").iterdir()
    good = file.read_text()
    file.write_text(content)
    assert load_manifest(small(), tmp_path) == OPS
    assert file.read_text() == good


def test_an_unwritable_cache_only_costs_time(tmp_path: Path) -> None:
    """Collecting works where nothing can be written."""
    (tmp_path / "cache").write_text("a file where the directory should be")
    assert load_manifest(small(), tmp_path / "cache") == OPS


def test_nothing_but_the_list_is_left_behind(tmp_path: Path) -> None:
    """The file appears under its name only when it is whole."""
    load_manifest(small(), tmp_path)
    [file] = [path for path in tmp_path.rglob("*") if path.is_file()]
    ops = [["0", "conv2d", [], 12, None], ["2", "linear", [], 8, 4]]
    assert json.loads(file.read_text()) == {"schema": 5, "sum": digest(ops), "ops": ops}


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (torch.nn.Sequential(torch.nn.ReLU()), "net has no op that could be quantized"),
        (torch.nn.ModuleDict({"total": torch.nn.Linear(2, 2)}), "net has a module called 'total', a name reserved"),
    ],
)
def test_models_that_cannot_be_listed(net: torch.nn.Module, expected: str, tmp_path: Path) -> None:
    """Refused with the reason, and not remembered."""
    with pytest.raises(QsensError, match=expected):
        load_manifest(Source(net), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", ["minilm", "tiny_qwen2_5_vl"])
def test_a_cached_list_needs_no_torch(model: str, tmp_path: Path) -> None:
    """Every xdist worker and every ``--collect-only`` resolves, checks and lists: none should pay for torch."""
    source: ModelSource = resolve(ModelRequest(model))
    ops = load_manifest(source, tmp_path)
    code = f"""
import sys
from pathlib import Path
from pytest_qsens.manifest import load_manifest
from pytest_qsens.models.resolve import resolve
from pytest_qsens.models.source import ModelRequest
source = resolve(ModelRequest({model!r}))
source.check()
source.data_fingerprint()
print(len(load_manifest(source, Path({str(tmp_path)!r}))))
print([name for name in ("torch", "tokenizers") if name in sys.modules])
"""
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.split("\n")[:2] == [str(len(ops)), "[]"]


def test_the_default_cache_is_outside_the_project() -> None:
    """Nothing lands in the user's repository unasked."""
    assert Path.cwd() not in default_cache_dir().parents
    assert default_cache_dir().name == "pytest-qsens"
