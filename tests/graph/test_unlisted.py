"""Attention that no listing has told of is seen while the model runs, and told by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from pytest_qsens.calibrated import calibrate
from pytest_qsens.graph.attention import list_states
from pytest_qsens.graph.products import list_products
from pytest_qsens.graph.unlisted import BY_HAND, BY_PRODUCT, AttentionWatch, told
from pytest_qsens.models.spec import ModelSpec
from tests.architectures import ARCHITECTURES
from tests.graph.attending import CAUGHT, ByEinsum, ByHand, ByHelper, Gated, Hidden
from tests.test_artifact import artifact

if TYPE_CHECKING:
    from pathlib import Path


def seen(model: nn.Module, **batch: Any) -> dict[str, str]:  # noqa: ANN401 - what the model takes
    """Run a model, and tell what was seen."""
    with torch.no_grad(), AttentionWatch(model, [op.name for op in list_states(model)]) as watch:
        model(**batch)
    return watch.found


def test_what_is_not_listed_is_seen() -> None:
    """Attention by hand, in two notations, or by a name that no code tells; neither what is listed, nor softmaxes."""
    model = nn.Sequential(ByHand(), ByEinsum(), Hidden(), ByHelper(), Gated()).eval()
    assert seen(model, input=torch.randn(2, 5, 8)) == {"0": BY_HAND, "1": BY_HAND, "2": BY_PRODUCT}


def test_products_that_are_ops_are_no_keys_and_values() -> None:
    """Attention by hand whose products are ops is seen where keys and values of others are, and only there."""
    model = nn.Sequential(ByHand(), ByHelper()).eval()
    products = [op.name for op in list_products(model)]
    for states, expected in (([op.name for op in list_states(model)], {"0": BY_HAND}), ([], {})):
        with torch.no_grad(), AttentionWatch(model, [*products, *states]) as watch:
            model(torch.randn(2, 5, 8))
        assert watch.found == expected


@pytest.mark.parametrize("name", CAUGHT)
def test_what_is_listed_is_not_told(name: str) -> None:
    """Whatever way it attends."""
    assert seen(nn.Sequential(CAUGHT[name]()).eval(), input=torch.randn(2, 5, 8)) == {}


@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl", "mixtral", "bert", "whisper", "vit", "clip"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_models_of_transformers_say_nothing(name: str, implementation: str) -> None:
    """Their attention is listed, or stores nothing, as in vision towers; a router's softmax is no attention."""
    spec = ARCHITECTURES[name].spec()
    model: Any = spec.model
    model.set_attn_implementation(implementation)
    assert seen(model, **spec.evaluation[0]) == {}


def test_torchs_attention_says_nothing() -> None:
    """It takes no cache, and neither do the layers made of it."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).train()
    assert seen(layer, src=torch.randn(2, 5, 8)) == {}


def test_names_are_told_and_the_rest_counted() -> None:
    """A warning names the first modules, and what to do."""
    many, one = told({f"blocks.{i}": BY_HAND for i in range(5)} | {"": BY_PRODUCT})
    assert "scaled_dot_product_attention was called in the model itself, whose keys and values are not" in many
    assert "by hand in blocks.0, blocks.1, blocks.2 and 2 more, whose" in one
    assert "call torch.nn.functional.scaled_dot_product_attention there" in one
    assert told({}) == []


def test_other_processes_know(tmp_path: Path) -> None:
    """One that takes over what another has calibrated tells the same."""
    torch.manual_seed(0)
    model = nn.Sequential(ByHelper(), ByHand()).eval()
    batches = [{"input": torch.randn(2, 5, 8)} for _ in range(2)]
    spec = ModelSpec(model, batches[:1], batches[1:], lambda out, _: out, logits=False)
    ops = [op for op in list_states(model) if op.type != "q"]
    found = [
        calibrate(spec, ops, "kv_fp8", engine=engine, artifact=kept).unlisted_attention
        for engine, kept in (("eager", None), ("delta", artifact(tmp_path)), ("delta", artifact(tmp_path)))
    ]
    assert found[0] == found[1] == found[2] == told({"1": BY_HAND})
    assert calibrate(spec, ops, "kv_fp8", engine="delta").score(ops[0], ["isolated"]).status == "measured"
