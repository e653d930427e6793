"""``package.module:factory``: the user's own code gives the model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
import torch

from pytest_qsens import ModelSpec, QsensError
from pytest_qsens.models.resolve import resolve
from pytest_qsens.models.source import ModelRequest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_qsens.models.source import ModelSource

GOOD = """
import torch
from pytest_qsens import ModelSpec

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(4, 8)
        self.down = torch.nn.Linear(8, 2)
    def forward(self, x):
        return self.down(torch.relu(self.up(x)))

BATCHES = [{"x": torch.ones(3, 4)}]

def spec(**changes):
    fields = dict(model=Net, calibration=BATCHES, evaluation=BATCHES, output=lambda out, batch: out)
    return ModelSpec(**{**fields, **changes})

def good():
    return spec()

def instance():
    return spec(model=Net().train())
"""


@pytest.fixture
def source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Callable[..., ModelSource]:
    """Write a module to a new working directory, and name a factory in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    module = f"my_model_{abs(hash(request.node.nodeid))}"
    monkeypatch.delitem(sys.modules, module, raising=False)

    def make(extra: str = "", name: str = "good") -> ModelSource:
        (tmp_path / f"{module}.py").write_text(GOOD + extra)
        return resolve(ModelRequest(f"{module}:{name}"))

    return make


@pytest.mark.parametrize("name", ["good", "instance"])
def test_a_factory_gives_the_model_and_its_batches(name: str, source: Callable[..., ModelSource]) -> None:
    """A module in the working directory is found; the model comes frozen, in evaluation mode, ready to run."""
    found = source(name=name)
    found.check()
    assert found.fingerprint() is None
    assert found.data_fingerprint() is None
    assert [name for name, _ in found.skeleton().named_modules()] == ["", "up", "down"]
    spec = found.load()
    assert isinstance(spec, ModelSpec)
    assert isinstance(spec.model, torch.nn.Module)
    assert not spec.model.training
    assert not any(p.requires_grad for p in spec.model.parameters())
    batch = spec.evaluation[0]
    assert spec.output(spec.model(**batch), batch).shape == (3, 2)


def test_a_callable_model_costs_nothing_to_collect(source: Callable[..., ModelSource]) -> None:
    """The skeleton is on the meta device and the loaded model has real weights."""
    found = source()
    assert {p.device.type for p in found.skeleton().parameters()} == {"meta"}
    model = found.load().model
    assert isinstance(model, torch.nn.Module)
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_a_model_that_cannot_be_built_without_values_is_built_really(source: Callable[..., ModelSource]) -> None:
    """Code that reads a tensor back works, and draws from its own random state only."""
    extra = """
class Reader(Net):
    def __init__(self):
        super().__init__()
        self.scale = torch.rand(1).item()

def reader():
    return spec(model=Reader)
"""
    found = source(extra, "reader")
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    assert {p.device.type for p in found.skeleton().parameters()} == {"cpu"}
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("def bad(): return Net()", "returned Net, not a ModelSpec"),
        ("def bad(): return None", "returned NoneType, not a ModelSpec"),
        ("def bad(): return spec(model='net')", "`model` is str, neither"),
        ("def bad(): return spec(model=lambda: 3)", "`model` returned int, not a torch.nn.Module"),
        ("def bad(): return spec(output='logits')", "`output` is 'logits', not a callable"),
        ("def bad(): return spec(calibration=[])", "`calibration` is empty"),
        ("def bad(): return spec(evaluation=[])", "`evaluation` is empty"),
        ("def bad(): return spec(evaluation=iter(BATCHES))", "`evaluation` is list_iterator, not a list"),
        ("def bad(): return spec(calibration=[BATCHES[0], torch.ones(3)])", r"`calibration\[1\]` is Tensor"),
    ],
)
def test_what_a_factory_returns_is_checked(body: str, expected: str, source: Callable[..., ModelSource]) -> None:
    """The field and what stands in it are named at collection, not by a crash in the first forward."""
    with pytest.raises(QsensError, match=expected):
        source(body, "bad").skeleton()


@pytest.mark.parametrize(
    ("extra", "name", "expected"),
    [
        ("", "goood", r"has no 'goood' \(did you mean good\?\)"),
        ("bad = 3", "bad", "is int, not a function"),
        ("import no_such_thing", "good", "No module named 'no_such_thing'"),
        ("raise RuntimeError('no license')", "good", r"RuntimeError: no license \(.*/my_model_\d+\.py:24\)"),
        ("import sys; sys.exit('no license')", "good", r"SystemExit: no license \(.*/my_model_\d+\.py:24\)"),
        ("def", "good", r"SyntaxError: .* \(my_model_\d+\.py, line 24\)$"),
    ],
)
def test_a_factory_that_cannot_be_reached(
    extra: str, name: str, expected: str, source: Callable[..., ModelSource]
) -> None:
    """A missing name, a failing import and a mistake in the module are told apart."""
    with pytest.raises(QsensError, match=expected):
        source(extra, name).check()


@pytest.mark.parametrize("name", ["no_such_module:f", "no_such_package.models:f", "pytest_qsens.no_such:f"])
def test_a_module_that_does_not_exist(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part of the path that is missing is named, and where it was looked for."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QsensError, match=f"no module .* for --qsens-model {name}. Looked in {tmp_path}"):
        resolve(ModelRequest(name)).check()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("def bad(): return 1 / 0", r"it raised ZeroDivisionError: division by zero \(.*/my_model_\d+\.py:24\)$"),
        ("def bad(): return torch.ones(2) @ torch.ones(3)", r"it raised RuntimeError: .* \(.*/my_model_\d+\.py:24\)$"),
        ("def bad(): import json; json.loads('')", r"it raised JSONDecodeError: .* \(.*/my_model_\d+\.py:24\)$"),
        ("def bad(): return spec(model=lambda: 1 / 0)", r"`model` raised ZeroDivisionError: .*/my_model_\d+\.py:24\)$"),
        ("def bad(): return Net(3)", r"it raised TypeError: .* \(.*/my_model_\d+\.py:24\)$"),
        ("def bad(size): return spec()", r"it raised TypeError: bad\(\) missing 1 required .* argument: 'size'$"),
        ("def bad(): raise SystemExit(3)", r"it raised SystemExit: 3 \(.*/my_model_\d+\.py:24\)$"),
        ("import sys\ndef bad(): sys.exit()", r"it raised SystemExit \(.*/my_model_\d+\.py:25\)$"),
    ],
)
def test_what_a_factory_raises_is_told_with_the_line(
    body: str, expected: str, source: Callable[..., ModelSource]
) -> None:
    """A bug in the user's code is named where they can mend it, and never ends the run as if all was well."""
    with pytest.raises(QsensError, match=expected):
        source(body, "bad").skeleton()


def test_a_module_in_the_root_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name from an ini file means the same in every directory that pytest is called in; the nearer module wins."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    below = tmp_path / "below"
    below.mkdir()
    monkeypatch.chdir(below)
    (tmp_path / "my_rooted_model.py").write_text(GOOD)
    (tmp_path / "my_near_model.py").write_text("")
    (below / "my_near_model.py").write_text(GOOD)
    for name in ("my_rooted_model", "my_near_model"):
        resolve(ModelRequest(f"{name}:good", root=str(tmp_path))).check()
    with pytest.raises(QsensError, match=f"Looked in {below}, {tmp_path} and the installed packages"):
        resolve(ModelRequest("my_missing_model:good", root=str(tmp_path))).check()
