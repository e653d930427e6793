"""Groups of ops by their names: what belongs together, what groups are called, and what is no pattern."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_qsens import QsensError
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.groups import FUSED, GRANULARITIES, Fused, grouped
from pytest_qsens.ops import Op
from tests.architectures import ARCHITECTURES

PARTS = st.sampled_from(["layers", "0", "1", "q", "k", "gate_proj", "experts"])
NAMES = st.lists(st.lists(PARTS, min_size=1, max_size=5).map(".".join), unique=True)


def linear(*names: str) -> list[Op]:
    """Return linear ops of these names."""
    return [Op(name, "linear") for name in names]


def members(units: tuple[Op, ...]) -> dict[str, tuple[str, ...]]:
    """Return groups and their members, without what stays single."""
    return {unit.name: unit.member_names for unit in units if unit.members}


def of(architecture: str, granularity: str) -> dict[str, tuple[str, ...]]:
    """Return groups of a true architecture."""
    return members(grouped(list_ops(ARCHITECTURES[architecture].build()), granularity))


@given(names=NAMES, granularity=st.sampled_from(GRANULARITIES))
def test_every_op_is_in_one_group(names: list[str], granularity: str) -> None:
    """Whatever the names: none is lost or there twice, and one by itself stays what it was."""
    ops = linear(*names)
    units = grouped(ops, granularity)
    assert Counter(op for unit in units for op in unit.ops) == Counter(ops)
    assert all(unit in ops or len(unit.members) > 1 for unit in units)
    assert len({unit.name for unit in units}) == len(units)
    firsts = [ops.index(unit.ops[0]) for unit in units]
    assert firsts == sorted(firsts)
    if granularity == "op":
        assert units == tuple(ops)


def test_query_key_and_value() -> None:
    """They are one product in engines, but not where keys and values come from the encoder and the query does not."""
    assert of("bert", "fused") == {
        f"encoder.layer.{i}.attention.self.query+key+value": tuple(
            f"encoder.layer.{i}.attention.self.{name}" for name in ("query", "key", "value")
        )
        for i in range(2)
    }
    whisper = of("whisper", "fused")
    assert "model.decoder.layers.0.self_attn.k_proj+v_proj+q_proj" in whisper
    assert whisper["model.decoder.layers.1.encoder_attn.k_proj+v_proj"] == (
        "model.decoder.layers.1.encoder_attn.k_proj",
        "model.decoder.layers.1.encoder_attn.v_proj",
    )
    assert not any("encoder_attn.q_proj" in name for group in whisper.values() for name in group)
    assert "decoder.block.1.layer.1.EncDecAttention.k+v" in of("t5", "fused")
    assert of("gpt2", "fused") == {}


def test_gate_and_up() -> None:
    """Both projections of a gated layer, in the language model and in the vision tower."""
    found = of("qwen2_5_vl", "fused")
    for prefix in ("model.visual.blocks.0.mlp", "model.language_model.layers.1.mlp"):
        assert found[f"{prefix}.gate_proj+up_proj"] == (f"{prefix}.gate_proj", f"{prefix}.up_proj")
    assert not any(name.endswith(("down_proj", "o_proj", "qkv")) for group in found.values() for name in group)


def test_experts() -> None:
    """All experts of a layer with the same role are one group; the shared one and the router are not among them."""
    mlp = "model.layers.{}.mlp"
    names = [
        f"{mlp.format(layer)}.{rest}"
        for layer in range(2)
        for rest in (
            "gate",
            *(f"experts.{i}.{leaf}" for i in range(3) for leaf in ("gate_proj", "up_proj", "down_proj")),
            *(f"shared_expert.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")),
        )
    ]
    units = grouped(linear(*names), "fused")
    assert [unit.name for unit in units] == [
        f"{mlp.format(layer)}.{rest}"
        for layer in range(2)
        for rest in (
            "gate",
            "experts.*.gate_proj+up_proj",
            "experts.*.down_proj",
            "shared_expert.gate_proj+up_proj",
            "shared_expert.down_proj",
        )
    ]
    assert [len(unit.ops) for unit in units] == [1, 6, 3, 2, 1] * 2
    assert {unit.block for unit in units} == {"model.layers.0", "model.layers.1"}
    mixtral = grouped(linear(*(f"experts.{i}.w{n}" for i in range(2) for n in (1, 2, 3))), "fused")
    assert members(mixtral).keys() == {"experts.*.w1+w3", "experts.*.w2"}


def test_blocks() -> None:
    """Numbered blocks are groups of the name that their ops share; embeddings, poolers and heads stay single."""
    units = grouped(list_ops(ARCHITECTURES["bert"].build()), "block")
    assert [unit.name for unit in units] == [
        "embeddings.word_embeddings",
        "embeddings.position_embeddings",
        "embeddings.token_type_embeddings",
        "encoder.layer.0",
        "encoder.layer.1",
        "pooler.dense",
    ]
    assert [len(unit.ops) for unit in units] == [1, 1, 1, 6, 6, 1]
    assert [unit.block for unit in units][3:5] == ["encoder.layer.0", "encoder.layer.1"]
    assert of("t5", "block").keys() == {f"{part}.block.{i}" for part in ("encoder", "decoder") for i in range(2)}
    assert next(u.type for u in grouped(list_ops(ARCHITECTURES["t5"].build()), "block") if u.members) == (
        "embedding+linear"
    )


def test_types() -> None:
    """Layers' indices do not count, but the last part of a name says what an op is, even as a number."""
    units = grouped(
        linear("patch", "blocks.0.mlp.0", "blocks.0.mlp.2", "blocks.1.mlp.0", "blocks.1.mlp.2", "merger.0", "merger.2"),
        "type",
    )
    assert [(unit.name, unit.block, unit.spans_blocks) for unit in units] == [
        ("patch", "", False),
        ("blocks.*.mlp.0", "blocks.*.mlp.0", True),
        ("blocks.*.mlp.2", "blocks.*.mlp.2", True),
        ("merger.0", "merger.0", False),
        ("merger.2", "merger.2", False),
    ]


def test_patterns_of_the_user_go_first() -> None:
    """They group what is not known, and take apart what is."""
    ops = linear("a.attn.wqa", "a.attn.wkv", "a.self_attn.q_proj", "a.self_attn.k_proj", "a.self_attn.v_proj")
    fused = [Fused.parse(text, "here") for text in ("*.attn.{wqa,wkv}", "*.self_attn.{q_proj}")]
    assert members(grouped(ops, "fused", fused)) == {
        "a.attn.wqa+wkv": ("a.attn.wqa", "a.attn.wkv"),
        "a.self_attn.k_proj+v_proj": ("a.self_attn.k_proj", "a.self_attn.v_proj"),
    }
    assert members(grouped(linear("q", "k", "x"), "fused")) == {"q+k": ("q", "k")}  # modules of the model itself


@pytest.mark.parametrize("text", ["*.q_proj", "*.{}", "*.{q,}", "*.{q", "q}", "{a{b}}", ""])
def test_what_is_no_pattern(text: str) -> None:
    """The place and the text are named, and what a pattern looks like."""
    with pytest.raises(QsensError, match=r"^here '.*' is no pattern of ops .*, such as '\*\.self_attn\.\{"):
        Fused.parse(text, "here")


def test_own_patterns_can_be_read() -> None:
    """Those of the package are written as the user's are."""
    assert [Fused.parse(text, "here").text for text in FUSED] == list(FUSED)


def test_a_name_that_is_taken() -> None:
    """Two of one name could not be told apart: that is refused."""
    with pytest.raises(QsensError, match=r"of q, k, \.\.\. would be called 'q\+k', which is the name of"):
        grouped(linear("q", "k", "q+k"), "fused")
