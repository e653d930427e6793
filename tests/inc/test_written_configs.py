"""Intel Neural Compressor takes what is written for it, and does what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from neural_compressor import PostTrainingQuantConfig, quantization
from neural_compressor.common.base_config import ConfigRegistry
from neural_compressor.torch.quantization import RTNConfig, convert, prepare
from neural_compressor.torch.quantization import load as load_3x
from neural_compressor.utils.pytorch import load

from pytest_qsens.configs.documents import parse_document
from pytest_qsens.configs.simulated import EMBEDDING
from pytest_qsens.configs.write import write_config
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.quant.op_scheme import OpScheme, named
from tests.configs.files.make_neural_compressor import Net
from tests.configs.ops import says, write

if TYPE_CHECKING:
    from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore")  # its own, of torch

IDS = torch.arange(16)


def seeded() -> Net:
    """Build the same model each time."""
    torch.manual_seed(0)
    net: Net = Net().eval()
    return net


OPS = list_ops(seeded())


def assigned(scheme: str, names: set[str], embedding: OpScheme | None = None) -> dict[str, OpScheme | None]:
    """Give these ops a scheme, and none to the rest."""
    found = {op.name: named(scheme, "here") if op.name in names else None for op in OPS}
    return found | {"embed": embedding}


def fitted(assignment: dict[str, OpScheme | None]) -> nn.Module:
    """Give what is written to ``quantization.fit``."""
    config = PostTrainingQuantConfig(**json.loads(write_config(assignment, OPS, "neural-compressor")))
    loader = torch.utils.data.DataLoader([(IDS[:8], 0), (IDS[8:], 0)])
    model: nn.Module = quantization.fit(seeded(), config, calib_dataloader=loader)
    return model


@pytest.mark.parametrize(
    ("scheme", "names", "embedding"),
    [
        ("w8a8", {"fc1", "lm_head"}, EMBEDDING),
        ("w8a8_act_sym", {"fc1"}, None),
        ("w8a8_minmax", {"fc1", "lm_head"}, EMBEDDING),
        ("w8a8_dynamic_act_tensor_asym", {"fc2"}, EMBEDDING),
        ("w4a16_g32_asym", {"fc1", "fc2"}, None),
        ("w3a16", {"lm_head"}, None),
    ],
)
def test_a_run_quantizes_what_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, names: set[str], embedding: OpScheme | None
) -> None:
    """Its strategy chooses the schemes of the file; the other ops keep their class and, bit for bit, their weights."""
    monkeypatch.chdir(tmp_path)  # it writes logs where it is
    assignment = assigned(scheme, names, embedding)
    model = fitted(assignment)
    chosen = dict(model.q_config)
    chosen["op"] = {str(key): value for key, value in chosen["op"].items()}
    said = says(write(tmp_path / "chosen.json", json.dumps(chosen, default=str)), OPS)
    assert said == {op: "unquantized" if each is None else each.name for op, each in assignment.items()}
    before = seeded()
    for op, each in assignment.items():
        module, original = model._model.get_submodule(op), before.get_submodule(op)
        is_same = type(module) is type(original) and torch.equal(module.weight, original.weight)
        assert is_same == (each is None), op


class Branching(torch.nn.Module):
    """Not to be traced as a whole, so that its layers are traced alone and have other names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run it."""
        y: torch.Tensor = self.first(x)
        return self.second(y if y.sum() > 0 else -y)


def test_layers_that_are_traced_alone_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An op stays unquantized that Neural Compressor calls by another name than the model does."""
    monkeypatch.chdir(tmp_path)
    net = Branching().eval()
    text = write_config({"first": named("w8a8", "here"), "second": None}, list_ops(net), "neural-compressor")
    loader = torch.utils.data.DataLoader([(torch.randn(8), 0) for _ in range(2)])
    model = quantization.fit(net, PostTrainingQuantConfig(**json.loads(text)), calib_dataloader=loader)
    chosen = {name: config["weight"]["dtype"] for (name, _), config in model.q_config["op"].items()}
    assert chosen == {"first.module": "int8", "second.module": "fp32"}


def test_what_a_strategy_would_have_chosen_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``best_configure`` as it is written takes the place of Neural Compressor's own beside the weights of a run."""
    monkeypatch.chdir(tmp_path)
    assignment = assigned("w8a8", {"fc1", "lm_head"}, EMBEDDING)
    model = fitted(assignment)
    model.save("saved")
    saved = torch.load("saved/best_model.pt", weights_only=False)
    text = write_config(assignment, OPS, "neural-compressor-best-configure")
    saved["best_configure"] = parse_document(text, Path("best_configure.yaml"), "YAML").value
    loaded = load(saved, seeded())
    assert torch.equal(loaded(IDS), model(IDS))
    assert not torch.equal(loaded(IDS), seeded()(IDS))


def test_qconfig_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each entry of ``qconfig.json`` is a config of 3.x; those of weights quantize, and load what was saved."""
    monkeypatch.chdir(tmp_path)
    known = ConfigRegistry.get_all_configs()["torch"]
    for scheme in ("w8a8", "w4a16_g16_asym"):
        text = write_config(assigned(scheme, {"fc1", "fc2"}), OPS, "neural-compressor-qconfig")
        for value in json.loads(text).values():
            ((algorithm, fields),) = value.items()
            config = known[algorithm]["cls"].from_dict(fields)
            assert {key: getattr(config, key) for key in fields} == fields
    config = RTNConfig(dtype="fp32")
    for key, value in json.loads(text).items():
        config.set_local(key.split("'")[1], RTNConfig.from_dict(value["rtn"]))
    model = convert(prepare(seeded(), config))
    assert {op.name for op in OPS if "WeightOnly" in type(model.get_submodule(op.name)).__name__} == {"fc1", "fc2"}
    model.save("saved")
    Path("saved/qconfig.json").write_text(text)
    assert torch.equal(load_3x("saved", seeded())(IDS), model(IDS))
