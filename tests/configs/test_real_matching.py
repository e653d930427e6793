"""Our matching beside that of the tools themselves, where they are installed."""

from __future__ import annotations

import json
import warnings
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pytest_qsens.configs.compressed_tensors import PRESETS
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.ops import STATES
from tests.configs.ops import says, write
from tests.configs.test_keys_and_values import KV, OF_EXTREMES, QUERIES, small_llama

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

pytestmark = pytest.mark.filterwarnings("ignore")  # the tools' own, of torch and of each other

_SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def tool(name: str) -> ModuleType:
    """Import a tool, or skip."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: ModuleType = pytest.importorskip(name)
    return module


class Block(torch.nn.Module):
    """Three layers of a size that all groups divide."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(128, 128)
        self.up_proj = torch.nn.Linear(128, 128, bias=False)


class Net(torch.nn.Module):
    """Two blocks, an embedding, a convolution, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(8, 128)
        self.conv = torch.nn.Conv2d(128, 128, 1)
        self.layers = torch.nn.ModuleList([Block(), Block()])
        self.lm_head = torch.nn.Linear(128, 8, bias=False)


NAMES = [op.name for op in list_ops(Net())]
EXPRESSIONS = [
    r".*q_proj",
    r"layers\.0\..*",
    r"layers\.[01]\.up",
    r".*",
    r".*proj$",
    r"lm",
    r"lm_head",
    r"q_proj",
    r"(embed|conv)",
]
TARGETS = st.lists(
    st.sampled_from(
        [*NAMES, *(f"re:{text}" for text in EXPRESSIONS), "Linear", "Embedding", "Conv2d", "Module", "linear"]
    ),
    max_size=3,
)


@_SETTINGS
@example([("W4A16", ["re:layers.*"]), ("W8A8", ["re:.*q_proj"])], [])  # the alphabet decides, not the file
@example([("W4A16", ["Module"]), ("W8A8", ["Linear"]), ("FP8", ["Embedding"])], ["lm_head"])
@example([("W4A16", ["Linear"]), ("W8A8", ["re:.*q_proj"]), ("FP8", ["layers.0.q_proj"])], [])
@example([("W4A16", ["Linear"]), ("W8A8", ["Linear"])], ["Embedding"])
@given(st.lists(st.tuples(st.sampled_from(sorted(PRESETS.keys() - {"UNQUANTIZED"})), TARGETS), max_size=3), TARGETS)
def test_compressed_tensors(tmp_path: Path, groups: list[tuple[str, list[str]]], ignore: list[str]) -> None:
    """Whatever is targeted and ignored, every op has the scheme that compressed-tensors itself attaches to it."""
    real = tool("compressed_tensors.quantization")
    net = Net()
    config = {
        "config_groups": {
            f"group_{number}": real.preset_name_to_scheme(name, targets).model_dump(mode="json")
            for number, (name, targets) in enumerate(groups)
        },
        "ignore": ignore,
    }
    found = says(write(tmp_path / "a.json", config), list_ops(net))
    real.apply_quantization_config(net, real.QuantizationConfig(**config), show_progress=False)
    expected = {}
    for name in NAMES:
        scheme = getattr(net.get_submodule(name), "quantization_scheme", None)
        attached = None if scheme is None else scheme.model_dump(mode="json")
        expected[name] = "unquantized" if attached is None else _name(tmp_path, attached)
    assert found == expected


OF_ATTENTION = [
    *("re:.*self_attn$", "re:.*layers.0.self_attn$", "re:model.layers.[01].self_attn$", "LlamaAttention"),
    *("model.layers.0.self_attn", "model.layers.1.self_attn"),
]
WIDER = ["re:.*self_attn", "re:.*layers.0.*", "model.layers.0.mlp.up_proj", "re:.*q_proj", "Linear", "lm_head"]
ATTENTION = {"fp8": {"input_activations": OF_EXTREMES}, "int8": {"input_activations": OF_EXTREMES | {"type": "int"}}}
LAYERS = {"layers": {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}}


@_SETTINGS
@example(groups=[("fp8", ["re:.*self_attn$"])], ignore=["re:.*layers.0.self_attn$"], cached=False)
@example(groups=[("fp8", ["re:.*self_attn$"])], ignore=["re:.*layers.0.self_attn$"], cached=True)
@example(groups=[("fp8", ["re:.*self_attn$"]), ("int8", ["model.layers.0.self_attn"])], ignore=[], cached=False)
@example(
    groups=[("fp8", ["LlamaAttention"]), ("int8", ["re:.*layers.0.self_attn$"])], ignore=["LlamaAttention"], cached=True
)
@example(groups=[("fp8", ["LlamaAttention"]), ("layers", ["re:.*layers.0.*"])], ignore=[], cached=True)
@example(groups=[("fp8", ["re:.*self_attn", "re:.*self_attn$"])], ignore=[], cached=False)  # a broad and a narrow one
@example(groups=[("fp8", ["re:.*self_attn", "re:.*layers.0.self_attn$"])], ignore=[], cached=True)
@example(groups=[("fp8", ["re:.*self_attn", "LlamaAttention"]), ("int8", ["re:.*attn"])], ignore=[], cached=False)
@example(groups=[("int8", ["re:.*self_attn", "lm_head"]), ("fp8", ["re:model.*", "lm_head"])], ignore=[], cached=False)
@given(
    groups=st.lists(
        st.tuples(
            st.sampled_from(["fp8", "int8"]),
            st.lists(
                st.sampled_from([*OF_ATTENTION, "re:.*self_attn", "re:.*layers.0.self_attn", "re:model.layers.1"]),
                min_size=1,
                max_size=3,
                unique=True,
            ),
        )
        | st.tuples(st.just("layers"), st.lists(st.sampled_from(WIDER), min_size=1, max_size=2, unique=True)),
        min_size=1,
        max_size=4,
    ),
    ignore=st.lists(st.sampled_from([*OF_ATTENTION, *WIDER]), max_size=2),
    cached=st.booleans(),
)
def test_attention_of_compressed_tensors(
    tmp_path: Path, groups: list[tuple[str, list[str]]], ignore: list[str], cached: bool
) -> None:
    """Whatever is a target and ignored: queries, keys and values are quantized as the module's own scheme says."""
    real = tool("compressed_tensors.quantization")
    config: dict[str, Any] = {
        "config_groups": {
            f"group_{number}": {"targets": targets, **(ATTENTION | LAYERS)[kind]}
            for number, (kind, targets) in enumerate(groups)
        },
        "ignore": ignore,
    }
    config |= {"kv_cache_scheme": OF_EXTREMES | {"strategy": "attn_head"}} if cached else {}
    model = small_llama()
    real.apply_quantization_config(model, real.QuantizationConfig(**config), show_progress=False)
    expected = {}
    for layer, module in enumerate(layer.self_attn for layer in model.model.layers):
        arguments = getattr(getattr(module, "quantization_scheme", None), "input_activations", None)
        name = "unquantized" if arguments is None else "fp8" if arguments.type == "float" else "int8"
        name += "_head" if arguments is not None and arguments.strategy == "attn_head" else ""
        for kind in STATES:
            is_quantized = arguments is not None and hasattr(module, f"{kind}_scale")
            prefix = "attn_" if kind == "q" else "kv_"
            expected[f"model.layers.{layer}.self_attn:{kind}"] = prefix + name if is_quantized else "unquantized"
    found = says(write(tmp_path / "a.json", config), [*KV, *QUERIES])
    assert found == expected


def _name(tmp_path: Path, scheme: dict[str, Any]) -> str:
    path = write(tmp_path / "one.json", {"config_groups": {"a": {**scheme, "targets": ["Linear"]}}})
    return says(path, list_ops(Net()))["lm_head"]


def test_every_preset_of_compressed_tensors_is_known(tmp_path: Path) -> None:
    """Its schemes by name are those of our table, all of them, and mean the same as written out."""
    real = tool("compressed_tensors.quantization.quant_scheme")
    assert set(PRESETS) == set(real.PRESET_SCHEMES)
    for name, own in PRESETS.items():
        written = real.preset_name_to_scheme(name, ["Linear"]).model_dump(mode="json")
        assert _name(tmp_path, written) == (own or "unquantized"), name


KEYS = st.sampled_from(
    [
        *NAMES,
        *(f"{name}.weight" for name in NAMES),
        r"re:.*q_proj",
        r"re:layers\.\d\.(q|up)_proj",
        r"re:.*up_proj\.weight",
        r"re:.*_proj\.weight",
        r"re:lm_head\.weight",
        r"re:lm",
        "_default",
    ]
)


@_SETTINGS
@example({r"re:lm_head\.weight": None, r"re:.*\.weight": "int8"})  # the `None` has no effect
@example({"lm_head.weight": None, r"re:.*\.weight": "int8"})
@example({r"re:lm": None, "re:.*q_proj": "int8", "_default": "float8"})
@example({"lm_head": None, r"re:lm_head\.weight": "int8"})
@example({"re:.*q_proj": "int8", r"re:layers\.\d\.(q|up)_proj": "float8"})
@given(st.dictionaries(KEYS, st.sampled_from(["int8", "float8", None]), min_size=1, max_size=5))
def test_torchao(tmp_path: Path, keys: dict[str, str | None]) -> None:
    """Whatever keys there are, in whatever order: the weights that torchao quantizes, and as what, are those we say.

    A weight that two expressions for parameters match cannot be quantized by torchao, and is told as a contradiction.
    """
    torchao = tool("torchao.quantization")
    configs = {"int8": torchao.Int8WeightOnlyConfig(), "float8": torchao.Float8WeightOnlyConfig(), None: None}
    config = torchao.FqnToConfig(OrderedDict((key, configs[value]) for key, value in keys.items()))
    net = Net()
    path = write(tmp_path / "a.json", _to_dict(config))
    ours = [op for op in list_ops(net) if op.name != "conv"]  # torchao's tensors have no four dimensions
    del net.conv
    found = says(path, ours)
    try:
        torchao.quantize_(net, config, filter_fn=None)
    except NotImplementedError:  # quantized twice
        from pytest_qsens.configs.read import read_config

        read = read_config(path)
        assert any(read.decide(op).rivals for op in ours)
        return
    kinds = {"Int8Tensor": "w8a16", "Float8Tensor": "wfp8a16", "Parameter": "unquantized"}
    assert found == {op.name: kinds[kind_of(net.get_submodule(op.name).weight)] for op in ours}


def kind_of(weight: Any) -> str:  # noqa: ANN401 - a tensor of torchao's own classes
    """Name of the class of a weight: ``Parameter`` if it is not quantized."""
    name = type(weight).__name__
    return type(weight.data).__name__ if name == "Parameter" and type(weight.data) is not torch.Tensor else name


def _to_dict(config: object) -> Any:  # noqa: ANN401 - JSON
    from torchao.core.config import config_to_dict

    return json.loads(json.dumps(config_to_dict(config)))


def test_every_config_of_torchao_is_known(tmp_path: Path) -> None:
    """Each workflow with its own defaults has a name, and one that has none says so."""
    torchao = tool("torchao.quantization")
    expected = {
        "Int8WeightOnlyConfig": "w8a16",
        "Int4WeightOnlyConfig": "w4a16_g128_asym",
        "IntxWeightOnlyConfig": "w8a16",
        "Int8DynamicActivationInt8WeightConfig": "w8a8_dynamic",
        "Int8DynamicActivationIntxWeightConfig": "w8a8_dynamic_g32_act_asym",
        "Int8StaticActivationInt8WeightConfig": "w8a8_static_act_token_sym",
        "Float8WeightOnlyConfig": "wfp8a16",
        "Float8DynamicActivationFloat8WeightConfig": "fp8_dynamic_tensor_act_tensor",
        "Float8DynamicActivationInt4WeightConfig": "w4afp8_dynamic_g128",
    }
    for name, scheme in expected.items():
        path = write(tmp_path / "a.json", _to_dict(getattr(torchao, name)()))
        assert says(path, list_ops(Net()))["lm_head"] == scheme, name


def test_torchao_of_transformers(tmp_path: Path) -> None:
    """In a ``config.json`` transformers decides first what is left out."""
    torchao = tool("torchao.quantization")
    from transformers import TorchAoConfig
    from transformers.quantizers.quantizers_utils import should_convert_module

    left_out = ["layers.0", "up_proj.weight"]
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig(), modules_to_not_convert=left_out)
    path = write(tmp_path / "config.json", {"quantization_config": config.to_dict()})
    expected = {
        op.name: "w8a16"
        if op.type == "linear" and should_convert_module(f"{op.name}.weight", left_out)
        else "unquantized"
        for op in list_ops(Net())
    }
    assert says(path, list_ops(Net())) == expected
    assert set(expected.values()) == {"w8a16", "unquantized"}
