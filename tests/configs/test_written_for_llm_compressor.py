"""llm-compressor applies the recipes that are written for it, with the errors of our simulation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pytest_qsens.calibrated import calibrate
from pytest_qsens.configs.write import write_config
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.models.spec import ModelSpec
from pytest_qsens.ops import Op
from pytest_qsens.quant.op_scheme import named
from tests.configs.ops import says
from tests.configs.test_written_for_tools import nmse
from tests.installed import required

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")  # its own, of torch

IDS = torch.arange(16).reshape(2, 8)
AGREEMENT = {
    "w8a16": 0.05,
    "w4a16_g32": 0.01,
    "w8a8_dynamic": 0.05,
    "fp8_dynamic": 1e-3,
    "mxfp4_dynamic_even": 1e-3,
    "mxfp8_dynamic_rceil": 1e-3,
}
"""Schemes that need no data → how far its error may be from that of our simulation, relatively."""


def llama() -> LlamaForCausalLM:
    """Make a Llama of two layers, the same each time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=2, **sizes)).eval()


OPS = list_ops(llama())


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """Save the model with a tokenizer, without which it is not taken."""
    path = tmp_path / "llama"
    llama().save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a"))).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("scheme", AGREEMENT)
def test_oneshot(scheme: str, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``oneshot`` quantizes the ops of the recipe and no others."""
    compressor = required("llmcompressor")
    monkeypatch.chdir(tmp_path)  # it writes logs where it is
    names = {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"}
    schemes = {op.name: named(scheme, "here") if op.name in names else None for op in OPS}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(write_config(schemes, OPS, "llm-compressor"))
    assert {op for op, found in says(recipe, OPS).items() if found == scheme} == names
    model = compressor.oneshot(model=checkpoint, recipe=str(recipe))
    attached = {name for name, module in model.named_modules() if getattr(module, "quantization_scheme", None)}
    assert attached == names
    reference = llama()
    with torch.no_grad():
        found = nmse(model(IDS).logits, reference(IDS).logits)
    spec = ModelSpec(llama(), [{"input_ids": IDS}], [{"input_ids": IDS}], lambda output, _: output.logits)
    together = Op("together", "linear", tuple(op for op in OPS if op.name in names))
    expected = calibrate(spec, OPS, scheme).score(together, ["isolated"]).isolated
    assert expected is not None
    assert found == pytest.approx(expected["nmse"], rel=AGREEMENT[scheme])
