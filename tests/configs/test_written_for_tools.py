"""The tools themselves take what is written for them, and do what it says."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pytest_qsens.calibrated import calibrate
from pytest_qsens.configs.compressed_tensors_arguments import MODES
from pytest_qsens.configs.simulated import EMBEDDING
from pytest_qsens.configs.write import write_config
from pytest_qsens.errors import QsensError
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.models.spec import ModelSpec
from pytest_qsens.ops import Op
from pytest_qsens.quant.op_scheme import FLOATS, INTEGERS, ActivationScheme, OpScheme, WeightScheme
from pytest_qsens.quant.schemes import SCHEMES
from tests.configs.ops import says, write
from tests.configs.test_real_matching import kind_of, tool
from tests.configs.test_write import assignments, scheme_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")  # the tools' own, of torch and of each other
_SETTINGS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Net(nn.Module):
    """An embedding, a convolution that is not called, three layers, a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 128)
        self.conv = nn.Conv2d(1, 1, 1)
        self.layers = nn.ModuleList([nn.Linear(128, 128) for _ in range(3)])
        self.lm_head = nn.Linear(128, 32, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Run it."""
        x = self.embed(ids)
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        found: Tensor = self.lm_head(x)
        return found


OPS = list_ops(Net())
IDS = torch.arange(64).reshape(4, 16) % 32


def assigned(scheme: OpScheme | None, names: Collection[str]) -> dict[str, OpScheme | None]:
    """Give these ops a scheme, and none to the rest."""
    return {op.name: scheme if op.name in names else None for op in OPS}


def nmse(found: Tensor, expected: Tensor) -> float:
    """Error of an output."""
    return float((found - expected).double().square().sum() / expected.double().square().sum())


def simulated(names: Collection[str], scheme: str) -> float:
    """Score of these ops quantized together, as a run measures it."""
    spec = ModelSpec(Net(), [{"ids": IDS}], [{"ids": IDS}], lambda output, _: output)
    members = tuple(op for op in OPS if op.name in names)
    measured = calibrate(spec, OPS, scheme).score(Op("together", "linear", members), ["isolated"])
    assert measured.isolated is not None
    found = measured.isolated["nmse"]
    assert found is not None
    return found


ON_CPU = {
    "w8a8_dynamic": 0.05,  # its integers are from -127 on
    "w8a16": 1e-3,
    "w4a16_g32": 1e-3,
    "w4a16_g128_asym": 1e-3,
    "w4a8_dynamic_g32_act_asym": 1e-3,
    "wfp8a16": 1e-3,
    "wnvfp4a16": 1e-3,
}
"""Schemes that torchao has on a CPU → how far its error may be from that of our simulation, relatively."""


@pytest.mark.parametrize("names", [["layers.1"], ["layers.0", "layers.2", "lm_head"]])
@pytest.mark.parametrize("scheme", [name for name in ON_CPU if name in SCHEMES])
def test_torchao_quantizes_what_it_is_told(scheme: str, names: list[str]) -> None:
    """What torchao makes of the file errs as the simulation does, in these ops alone; all others keep their weights."""
    core, quantization = tool("torchao.core.config"), tool("torchao.quantization")
    tool("torchao.prototype.mx_formats")
    text = write_config(assigned(scheme_of(scheme), names), OPS, "torchao")
    net, reference = Net().eval(), Net().eval()
    quantization.quantize_(net, core.config_from_dict(json.loads(text)), filter_fn=None)
    weights = {op.name: net.get_submodule(op.name).weight for op in OPS}
    assert {name for name, weight in weights.items() if kind_of(weight) != "Parameter"} == set(names)
    for name, weight in weights.items():
        assert name in names or torch.equal(weight, reference.get_submodule(name).weight)
    with torch.no_grad():
        found = nmse(net(IDS), reference(IDS))
    assert found == pytest.approx(simulated(names, scheme), rel=ON_CPU[scheme])


def test_torchao_quantizes_embeddings() -> None:
    """Rows of an embedding err as the simulation's do, though torchao's zero points are integers."""
    core, quantization = tool("torchao.core.config"), tool("torchao.quantization")
    text = write_config(assigned(EMBEDDING, ["embed"]), OPS, "torchao")
    net, reference = Net().eval(), Net().eval()
    quantization.quantize_(net, core.config_from_dict(json.loads(text)), filter_fn=None)
    assert type(net.embed.weight).__name__ == "IntxUnpackedToInt8Tensor"
    with torch.no_grad():
        found = nmse(net(IDS), reference(IDS))
    assert found == pytest.approx(simulated(["embed"], "w8a8_dynamic"), rel=0.1)


@_SETTINGS
@given(assignments("torchao"))
def test_torchao_parses_all_that_is_written(schemes: dict[Op, OpScheme | None]) -> None:
    """Whatever is assigned: torchao's own parser makes a config of it for each quantized op, and writes the same."""
    core = tool("torchao.core.config")
    tool("torchao.prototype.mx_formats")
    text = write_config({op.name: scheme for op, scheme in schemes.items()}, [*schemes], "torchao")
    config = core.config_from_dict(json.loads(text))
    assert {name for name, each in config.fqn_to_config.items() if each is not None} == {
        op.name for op, scheme in schemes.items() if scheme is not None
    }
    again = json.loads(json.dumps(core.config_to_dict(config)))["_data"]["fqn_to_config"]
    for name, each in json.loads(text)["_data"]["fqn_to_config"].items():
        if each is not None:
            assert (again[name]["_type"], again[name]["_version"]) == (each["_type"], each["_version"])
            assert again[name]["_data"].items() >= each["_data"].items()


class Any128(nn.Module):
    """Modules with the names of ops, of a size that all groups divide."""

    def __init__(self, ops: Collection[Op]) -> None:
        super().__init__()
        makers = {"linear": lambda: nn.Linear(128, 128), "embedding": lambda: nn.Embedding(128, 128)}
        for op in ops:
            *parents, last = op.name.split(".")
            module: nn.Module = self
            for name in parents:
                if not hasattr(module, name):
                    module.add_module(name, nn.Module())
                module = getattr(module, name)
            if not hasattr(module, last):
                module.add_module(last, makers.get(op.type, lambda: nn.Conv2d(1, 1, 1))())


def without_parents(schemes: Mapping[Op, OpScheme | None]) -> dict[Op, OpScheme | None]:
    """Ops of a real module tree: none is the parent of another."""
    return {
        op: scheme
        for op, scheme in schemes.items()
        if not any(other.name.startswith(f"{op.name}.") for other in schemes)
    }


@_SETTINGS
@given(assignments("compressed-tensors"))
def test_compressed_tensors_applies_what_is_written(tmp_path: Path, schemes: dict[Op, OpScheme | None]) -> None:
    """Whatever is assigned: compressed-tensors takes the file, and attaches to each module the scheme of its op."""
    real = tool("compressed_tensors.quantization")
    schemes = without_parents(schemes)
    text = write_config({op.name: scheme for op, scheme in schemes.items()}, [*schemes], "compressed-tensors")
    config = real.QuantizationConfig.model_validate(json.loads(text)["quantization_config"])
    net = Any128([*schemes])
    real.apply_quantization_config(net, config, show_progress=False)
    for op, scheme in schemes.items():
        attached = getattr(net.get_submodule(op.name), "quantization_scheme", None)
        assert _said(tmp_path, attached) == ("unquantized" if scheme is None else scheme.name)


_SIZES = st.sampled_from([1, 16, 32, 128])
_EXTENTS = st.one_of(
    st.tuples(st.sampled_from(["tensor", "channel", "token"]), st.just(())),
    st.tuples(st.just("group"), st.tuples(_SIZES)),
    st.tuples(st.just("block"), st.tuples(_SIZES, _SIZES)),
)
_DTYPES = st.sampled_from((*INTEGERS, *FLOATS))
_KINDS = st.sampled_from(["static", "dynamic", "local"])
_WEIGHTS = st.builds(
    lambda dtype, extent, sym: WeightScheme(dtype, *extent, sym, MODES.get(dtype, "")), _DTYPES, _EXTENTS, st.booleans()
)
_ACTIVATIONS = st.builds(
    lambda dtype, kind, extent, sym: ActivationScheme(dtype, kind, *extent, sym, scaling_mode=MODES.get(dtype, "")),
    *(_DTYPES, _KINDS, _EXTENTS, st.booleans()),
)


@settings(_SETTINGS, max_examples=200)
@given(st.builds(OpScheme, st.none() | _WEIGHTS, st.none() | _ACTIVATIONS, st.booleans()))
def test_compressed_tensors_has_every_scheme_that_is_written(tmp_path: Path, scheme: OpScheme) -> None:
    """Whatever scheme is not refused is one that compressed-tensors' own checks let through, and the same."""
    real = tool("compressed_tensors.quantization")
    try:
        text = write_config({"fc": scheme}, [Op("fc", "linear")], "compressed-tensors")
    except QsensError:
        return
    config = real.QuantizationConfig.model_validate(json.loads(text)["quantization_config"])
    net = Any128([Op("fc", "linear")])
    real.apply_quantization_config(net, config, show_progress=False)
    assert _said(tmp_path, net.get_submodule("fc").quantization_scheme) == scheme.name


def _said(tmp_path: Path, scheme: Any) -> str:  # noqa: ANN401 - compressed-tensors' own
    """Name of a scheme that compressed-tensors wrote out itself."""
    if scheme is None:
        return "unquantized"
    group = {**scheme.model_dump(mode="json"), "targets": ["Linear"]}
    path = write(tmp_path / "one.json", {"config_groups": {"a": group}})
    return says(path, [Op("fc", "linear")])["fc"]


def test_transformers_takes_the_files() -> None:
    """Transformers makes quantization configs of both: of the object in ``config.json``, and of torchao's file."""
    transformers = tool("transformers")
    tool("compressed_tensors")
    schemes = assigned(scheme_of("w8a8_dynamic"), ["layers.1"])
    value = json.loads(write_config(schemes, OPS, "compressed-tensors"))
    config = transformers.CompressedTensorsConfig.from_dict(value["quantization_config"])
    groups = config.quantization_config.config_groups
    assert [group.targets for group in groups.values()] == [["layers.1"]]
    assert config.quantization_config.ignore == ["embed", "layers.0", "layers.2", "lm_head"]
    torchao = tool("torchao.core.config").config_from_dict(json.loads(write_config(schemes, OPS, "torchao")))
    assert transformers.TorchAoConfig(torchao).quant_type.fqn_to_config.keys() == schemes.keys()


def test_the_recipes_groups_are_those_of_compressed_tensors() -> None:
    """A recipe's modifier has the groups and exclusions of the ``config.json`` that it makes."""
    import yaml

    schemes = assigned(scheme_of("w8a8_dynamic"), ["layers.1"]) | {"embed": EMBEDDING}
    recipe = yaml.safe_load(write_config(schemes, OPS, "llm-compressor"))
    config = json.loads(write_config(schemes, OPS, "compressed-tensors"))["quantization_config"]
    del config["quant_method"]
    assert recipe == {"quant_stage": {"quant_modifiers": {"QuantizationModifier": config}}}
