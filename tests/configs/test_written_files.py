"""Files that the tools themselves wrote (``files/``, with the scripts), read as the tools mean them."""

from __future__ import annotations

import pytest

from pytest_qsens.configs import names
from pytest_qsens.configs.read import FORMATS, read_config
from pytest_qsens.ops import Op
from tests.configs.ops import FILES, LLAMA, NET, complaints, says

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
LAYERS = [op.name for op in LLAMA[1:-1]]


def llama(layers: str, head: str = "unquantized", **others: str) -> dict[str, str]:
    """Make what is said about a Llama; keys of ``others`` are parts of names, with ``__`` for dots."""
    expected = {EMBEDDING: "unquantized", **dict.fromkeys(LAYERS, layers), HEAD: head}
    for part, scheme in others.items():
        expected |= {name: scheme for name in LAYERS if part.replace("__", ".") in name}
    return expected


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("compressed_tensors_w8a8.json", llama("w8a8_dynamic")),
        ("compressed_tensors_mixed.json", llama("w4a16_g128", self_attn="fp8_dynamic", layers__1="unquantized")),
        ("llm_compressor_fp8.yaml", llama("fp8_dynamic")),
        ("llm_compressor_recipe.yaml", llama("w4a16_g128")),  # what it smooths depends on the class of the model
        ("modelopt_fp8_hf_quant_config.json", llama("fp8_static_tensor")),
        ("modelopt_fp8_quant_cfg.json", llama("fp8_static_tensor")),
        ("modelopt_nvfp4_hf_quant_config.json", llama("nvfp4_local")),
        ("modelopt_nvfp4_config.json", llama("nvfp4_local")),
        ("modelopt_int8_hf_quant_config.json", llama("w8a8_static_act_sym_minmax")),
        (
            "modelopt_mixed_hf_quant_config.json",
            llama("w4a16_g128", o_proj="fp8_static_tensor", layers__1__mlp__down_proj="unquantized"),
        ),
        (
            "torchao_fqn_to_config.json",
            llama("w8a8_dynamic", mlp="w4a16_g128_asym", layers__0__self_attn__q_proj="w4a16_g64"),
        ),
    ],
)
def test_files_for_a_llama(file: str, expected: dict[str, str]) -> None:
    """Op by op, the scheme that the tool gave it; and every rule of its own file matches."""
    assert says(FILES / file) == expected
    assert [text for text in complaints(FILES / file) if "matches no op" in text] == []


def test_model_opt_says_the_same_in_two_ways() -> None:
    """What AutoQuantize chose, as quantizers, is what the exported checkpoint says."""
    assert says(FILES / "modelopt_auto_quant_cfg.json") == says(FILES / "modelopt_mixed_hf_quant_config.json")


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("neural_compressor_ptq.json", ["w8a16_asym", "w8a8", "unquantized", "w8a8"]),
        ("neural_compressor_best_configure.yaml", ["w8a16_asym", "w8a8", "unquantized", "w8a8"]),
        ("neural_compressor_best_configure.json", ["w8a16_asym", "w8a8", "unquantized", "w8a8"]),
        ("neural_compressor_qconfig.json", ["unquantized", "w8a16", "unquantized", "unquantized"]),
    ],
)
def test_files_of_neural_compressor(file: str, expected: list[str]) -> None:
    """What it was told and what it chose for the same model are one thing; W8A8 is the W8A8 that is simulated."""
    assert list(says(FILES / file, NET).values()) == expected
    assert [text for text in complaints(FILES / file, NET) if "matches no op" in text] == []


@pytest.mark.parametrize("file", ["neural_compressor_best_configure.yaml", "neural_compressor_best_configure.json"])
def test_neural_compressors_w8a8_is_simulated_whole(file: str) -> None:
    """Nothing is wrong with what its strategy chose."""
    assert complaints(FILES / file, NET) == []


def test_files_of_onnx_runtime() -> None:
    """Nodes are named after modules; the rest is told only by a file with arguments."""
    ops = [*(Op(f"layers.{layer}.{name}", "linear") for layer in range(2) for name in ("fc1", "fc2")), NET[0], NET[3]]
    named = says(FILES / "onnxruntime_nodes.txt", ops)
    full = says(FILES / "onnxruntime_static.json", ops)
    left_out = {"layers.1.fc2", "lm_head"}
    assert {op for op, scheme in named.items() if scheme == "unquantized"} == left_out
    assert set(named.values()) == {"unquantized", "not told"}
    assert full == {op: "unquantized" if op in left_out else "w8a8_minmax" for op in named} | {"embed": "w8a16_tensor"}
    assert complaints(FILES / "onnxruntime_static.json", ops) == []
    assert "says what is not quantized, and not how the rest is" in complaints(FILES / "onnxruntime_nodes.txt", ops)[0]


@pytest.mark.parametrize("file", sorted(path for path in FILES.iterdir() if path.suffix in (".json", ".yaml", ".txt")))
def test_the_format_is_found_out(file: object) -> None:
    """One format only takes itself to be that of a file, and the same as its name says."""
    prefix = str(getattr(file, "name", "")).replace("_", "-")
    assert prefix.startswith(read_config(FILES / str(getattr(file, "name", ""))).format)


def test_smooth_quant_and_gptq_are_told() -> None:
    """What changes numbers beside rounding is told, and so is what cannot be known without the model."""
    gptq, smooth = complaints(FILES / "llm_compressor_recipe.yaml")
    assert "SmoothQuantModifier has no mappings, which depend on the class of the model" in smooth
    assert "weights are rounded by GPTQ, not to the nearest" in gptq


def test_formats_are_listed_once() -> None:
    """The command line takes the formats that there are."""
    assert tuple(FORMATS) == names.FORMATS
