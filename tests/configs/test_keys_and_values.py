"""What configs say of the keys and values of attention: read, measured, written back, and nothing said of layers."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pytest_qsens
from pytest_qsens.configs.command import explain
from pytest_qsens.configs.documents import parse_document
from pytest_qsens.configs.gate import ConfigRequest, assign
from pytest_qsens.configs.read import config_of, read_config
from pytest_qsens.configs.write import TARGETS, write_config
from pytest_qsens.errors import QsensError
from pytest_qsens.ops import CACHED, STATES, Op
from pytest_qsens.quant.op_scheme import OpScheme, named
from tests.configs.ops import LLAMA, complaints, says, write
from tests.quant.test_cache_schemes import cache_schemes

KV = tuple(Op(f"model.layers.{layer}.self_attn:{kind}", kind, elements=0) for layer in range(2) for kind in CACHED)
QUERIES = tuple(Op(f"model.layers.{layer}.self_attn:q", "q", elements=0) for layer in range(2))
OPS = (*LLAMA, *KV, *QUERIES)
LINEARS = [op.name for op in LLAMA if op.type == "linear"]
_SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
OF_EXTREMES = FP8 | {"observer": "static_minmax"}
GROUPS = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}}


def of_states(path: Path, name: str | None = None) -> list[str]:
    """Return what a file says of the keys and values, in order."""
    found = says(path, OPS, name)
    return [found[op.name] for op in KV]


def follows_schema(content: dict[str, Any]) -> bool:
    """Whether the JSON schema for editors takes a file of our own format."""
    fastjsonschema = pytest.importorskip("fastjsonschema")
    schema = json.loads((Path(pytest_qsens.__file__).parent / "configs" / "schema.json").read_text())
    try:
        fastjsonschema.validate(schema, content)
    except fastjsonschema.JsonSchemaValueException:
        return False
    return True


def rules(path: Path, *listed: dict[str, Any], **rest: object) -> Path:
    """Write a file of our own format."""
    return write(path, {"schema": 1, "rules": listed, **rest})


def test_rules_mean_layers_or_keys_and_values(tmp_path: Path) -> None:
    """A scheme is of either; a glob for everything quantizes what its scheme is of; the first that matches holds."""
    path = rules(
        tmp_path / "a.json",
        {"ops": "*.0.self_attn:v", "scheme": "unquantized"},
        {"ops": "*", "scheme": "kv_fp8"},
        {"ops": "*", "scheme": "w8a8"},
    )
    assert of_states(path) == ["kv_fp8", "unquantized", "kv_fp8", "kv_fp8"]
    found = says(path, OPS)
    assert {found[name] for name in LINEARS} == {"w8a8"}
    assert complaints(path, OPS) == []


def test_types_and_schemes_of_ones_own(tmp_path: Path) -> None:
    """``types`` knows ``k`` and ``v``; a scheme can be an object, as the JSON schema says."""
    content = {
        "schema": 1,
        "schemes": {"mine": {"cache": {"dtype": "int4", "kind": "dynamic", "granularity": "group", "group_size": 32}}},
        "rules": [
            {"ops": "*", "types": ["k"], "scheme": "mine"},
            {"ops": "*:v", "scheme": {"cache": {"dtype": "fp8_e4m3", "kind": "static", "granularity": "head"}}},
        ],
    }
    assert follows_schema(content)
    path = write(tmp_path / "a.json", content)
    assert of_states(path) == ["kv_int4_dynamic_g32", "kv_fp8_head"] * 2
    assert complaints(path, OPS) == []


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"ops": "*:k", "scheme": "w8a8"}, "'rule 1: *:k' matches no op"),
        ({"ops": "*", "types": ["linear"], "scheme": "kv_fp8"}, "'rule 1: *' matches no op"),
        ({"ops": "*", "types": ["k"], "scheme": "w4a16_g32"}, "'rule 1: *' matches no op"),
        ({"ops": "*", "scheme": "kv_nvfp4"}, "4 ops (model.layers.0.self_attn:k, ...) are quantized as 'kv_nvfp4'"),
    ],
)
def test_a_rule_for_the_other_kind_matches_nothing(tmp_path: Path, rule: dict[str, Any], message: str) -> None:
    """It is told, as any other rule that does nothing, or nothing that can be simulated."""
    assert any(message in complaint for complaint in complaints(rules(tmp_path / "a.json", rule), OPS))


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (
            {"cache": {"dtype": "int8", "kind": "static"}, "weight": {"dtype": "int8"}},
            "cache goes with nothing else, but there is weight",
        ),
        ({"cache": {"dtype": "int8", "kind": "static", "granularity": "block", "block": [1, 1]}}, "not one of tensor"),
        ({"cache": {"dtype": "int8"}}, "kind"),
        ({"cache": {}}, "dtype"),
        ("kv_int9x", "is no scheme"),
    ],
)
def test_bad_schemes(tmp_path: Path, scheme: object, message: str) -> None:
    """The place is named; the JSON schema refuses the objects, too."""
    content = {"schema": 1, "rules": [{"ops": "*", "scheme": scheme}]}
    if isinstance(scheme, dict):
        assert not follows_schema(content)
    with pytest.raises(QsensError, match="entry 1, 'scheme'") as error:
        read_config(write(tmp_path / "a.json", content))
    assert message in str(error.value)


def compressed(**arguments: Any) -> dict[str, Any]:  # noqa: ANN401 - values of a file
    """Return a ``quantization_config`` with a scheme of the cache."""
    return {"quant_method": "compressed-tensors", "config_groups": GROUPS, "kv_cache_scheme": OF_EXTREMES | arguments}


@pytest.mark.parametrize(
    ("content", "scheme"),
    [
        (compressed(), "kv_fp8"),
        (compressed(type="int"), "kv_int8"),
        (compressed(observer=None), "kv_fp8_moving_average"),  # as llm-compressor does
        (compressed(observer="minmax", type="int", strategy="attn_head"), "kv_int8_head_moving_average"),
        (compressed(strategy="attn_head"), "kv_fp8_head"),
        (compressed(type="int", symmetric=False), "kv_int8_asym"),
        (compressed(dynamic=True), "kv_fp8_dynamic_tensor"),
        (compressed(dynamic=True, strategy="token"), "fp8_e4m3 token"),
        ({**compressed(), "kv_cache_scheme": None}, "unquantized"),
        ({"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}, "kv_fp8"),
        ({"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "INT8"}}, "kv_int8"),
        ({"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "NVFP4"}}, "kv_nvfp4_local"),
        ({"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "NVFP4_AFFINE"}}, "NVFP4_AFFINE"),
        ({"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "NONE"}}, "unquantized"),
        ({"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None}}, "unquantized"),
        ({"quantization_config": {"quant_algo": "FP8", "kv_cache_scheme": FP8}}, "kv_fp8"),
        (
            {"stage": 1, "q_stage": {"q_modifiers": {"QuantizationModifier": {"kv_cache_scheme": FP8}}}},
            "kv_fp8_moving_average",
        ),
        (
            {"q_stage": {"q_modifiers": {"QuantizationModifier": {"scheme": "W8A8", "kv_cache_scheme": OF_EXTREMES}}}},
            "kv_fp8",
        ),
    ],
)
def test_what_other_tools_say(tmp_path: Path, content: dict[str, Any], scheme: str) -> None:
    """All keys and values are quantized alike, whatever is said of layers."""
    assert of_states(write(tmp_path / "a.json", content)) == [scheme] * len(KV)


QUANTIZER = {"num_bits": [4, 3], "axis": None}
NVFP4 = {"num_bits": [2, 1], "block_sizes": {"-1": 16, "type": "dynamic", "scale_bits": [4, 3]}}
OFF = {"quantizer_name": "*", "enable": False}


@pytest.mark.parametrize(
    ("entries", "schemes"),
    [
        ([OFF, {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": QUANTIZER}], ["kv_fp8", "kv_fp8"]),
        ([OFF, {"quantizer_name": "*k_bmm_quantizer", "cfg": {"num_bits": 8}}], ["kv_int8", "unquantized"]),
        ([{"quantizer_name": "*_bmm_quantizer", "cfg": NVFP4}], ["kv_nvfp4_local"] * 2),
        ([{"quantizer_name": "*weight_quantizer", "cfg": QUANTIZER}], ["unquantized"] * 2),
        (
            [
                {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": QUANTIZER},
                {"quantizer_name": "*v_bmm_quantizer", "enable": False},
            ],
            ["kv_fp8", "unquantized"],
        ),
        ([{"quantizer_name": "*", "cfg": QUANTIZER, "parent_class": "nn.Linear"}], ["unquantized"] * 2),
    ],
)
def test_quantizers_of_modelopt(tmp_path: Path, entries: list[dict[str, Any]], schemes: list[str]) -> None:
    """The last entry that matches ``k_bmm_quantizer`` or ``v_bmm_quantizer`` holds."""
    assert of_states(write(tmp_path / "a.json", {"quant_cfg": entries, "algorithm": "max"})) == schemes * 2


@pytest.mark.parametrize(
    ("target", "schemes"),
    [
        ("re:.*self_attn$", ["attn_fp8", "kv_fp8", "kv_fp8"] * 2),
        ("LlamaAttention", ["attn_fp8", "kv_fp8", "kv_fp8"] * 2),
        ("model.layers.1.self_attn", ["unquantized", "kv_int8", "kv_int8", "attn_fp8", "kv_fp8", "kv_fp8"]),
        ("re:.*self_attn", ["unquantized", "kv_int8", "kv_int8"] * 2),  # its children, too: not the module
    ],
)
def test_attention_as_a_target(tmp_path: Path, target: str, schemes: list[str]) -> None:
    """A group without weights quantizes queries, keys and values of the modules that it means, before the cache's."""
    group = {"targets": [target], "input_activations": OF_EXTREMES}
    content = compressed(type="int") | {"config_groups": {**GROUPS, "attention": group}}
    found = says(write(tmp_path / "a.json", content), OPS)
    assert [found[f"model.layers.{layer}.self_attn:{kind}"] for layer in range(2) for kind in STATES] == schemes


def test_rules_for_queries(tmp_path: Path) -> None:
    """A scheme of attention is one of queries, and for keys and values the same as that of a cache."""
    path = rules(
        tmp_path / "a.json",
        {"ops": "*.0.*", "scheme": "attn_fp8"},
        {"ops": "*", "types": ["q", "v"], "scheme": {"attention": {"dtype": "int8", "kind": "dynamic"}}},
    )
    found = says(path, OPS)
    schemes = [found[f"model.layers.{layer}.self_attn:{kind}"] for layer in range(2) for kind in STATES]
    assert schemes == ["attn_fp8", "kv_fp8", "kv_fp8", "attn_int8_dynamic", "unquantized", "kv_int8_dynamic"]
    assert complaints(path, OPS) == []
    assert follows_schema(json.loads(path.read_text()))


def test_an_unknown_algorithm_is_refused(tmp_path: Path) -> None:
    """The message names those that there are."""
    path = write(tmp_path / "a.json", {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP7"}})
    with pytest.raises(QsensError, match=r"'FP7' is no algorithm of ModelOpt for a cache\. Known: FP8, INT8"):
        read_config(path)


def test_models_without_any_are_told(tmp_path: Path) -> None:
    """A scheme of the cache that nothing is quantized with is a rule that matches no op."""
    path = write(tmp_path / "a.json", compressed())
    (complaint,) = complaints(path, LLAMA)
    assert complaint.endswith("'kv_cache_scheme' matches no op of the model. Correct it, or take it out.")
    assert complaints(path, OPS) == []


@st.composite
def assignments(draw: st.DrawFn) -> dict[str, OpScheme | None]:
    """Give layers and states schemes: all states alike or not, queries with the others of their module or not."""
    layer = draw(st.sampled_from([None, "w8a8_dynamic", "fp8_static_tensor", "w8a8_static_act_sym_minmax"]))
    usual = st.sampled_from(
        [None, *(named(name, "test") for name in ("kv_fp8", "kv_int8", "kv_fp8_moving_average", "kv_nvfp4_local"))]
    )
    one = draw(st.one_of(usual, cache_schemes()))
    one = None if one is None else replace(one, queries=False)
    found = {op.name: named(layer, "test") if layer and op.type == "linear" else None for op in LLAMA}
    for op in KV:
        found[op.name] = one if draw(st.integers(0, 9)) else draw(usual)
    for op in QUERIES:
        queries = draw(st.sampled_from([None, None, found[op.name.replace(":q", ":k")]]))
        found[op.name] = None if queries is None else replace(queries, queries=True)
    return found


@pytest.mark.parametrize(("target", "syntax"), [(t, s) for t, kind in TARGETS.items() for s in kind.syntaxes])
@_SETTINGS
@given(assignment=assignments())
def test_what_is_written_is_read_back(
    target: str,
    syntax: Any,  # noqa: ANN401 - a literal
    assignment: dict[str, OpScheme | None],
    tmp_path: Path,
) -> None:
    """A file says of each layer, and of each key and value, what it was written from, or is not written."""
    cached = [assignment[op.name] for op in (*KV, *QUERIES)]
    try:
        text = write_config(assignment, OPS, target, syntax)
    except QsensError as error:
        assert "cannot say" in str(error)  # noqa: PT017 - one of two ways
        return
    assert TARGETS[target].states or not any(cached)
    if TARGETS[target].exclusions:
        return
    config = config_of(parse_document(text, tmp_path / "a", syntax))
    assert {op.name: config.decide(op).scheme for op in OPS} == assignment


def test_what_no_tool_can_say() -> None:
    """A target that quantizes layers alone, or all caches alike, refuses the op by name and tells who can say it."""
    one: dict[str, OpScheme | None] = dict.fromkeys([op.name for op in OPS], None) | {
        KV[1].name: named("kv_fp8", "test")
    }
    with pytest.raises(
        QsensError, match=r"self_attn:v \(v\): torchao cannot say 'kv_fp8': it quantizes layers"
    ) as error:
        write_config(one, OPS, "torchao")
    assert "qsens, modelopt-quant-cfg can say all" in str(error.value)
    with pytest.raises(QsensError, match=r"compressed-tensors cannot say .*one thing of the keys and values of all"):
        write_config(one, OPS, "compressed-tensors")


def test_compressed_tensors_takes_attention() -> None:
    """Modules with queries are targets by name; it quantizes those, and the caches of the others by their scheme."""
    assignment = all_alike("w8a8_dynamic", "kv_int8")
    for op in (*KV[:2], QUERIES[0]):
        assignment[op.name] = named("attn_fp8" if op.type == "q" else "kv_fp8", "test")
    text = json.loads(write_config(assignment, OPS, "compressed-tensors"))
    model = small_llama()
    config = QuantizationConfig.model_validate(text["quantization_config"])
    apply_quantization_config(model, config, show_progress=False)
    first, second = (layer.self_attn for layer in model.model.layers)
    assert hasattr(first, "q_scale")
    assert not hasattr(second, "q_scale")
    kinds = [str(module.quantization_scheme.input_activations.type) for module in (first, second)]
    assert [kind.rpartition(".")[2].lower() for kind in kinds] == ["float", "int"]


def small_llama() -> transformers.LlamaForCausalLM:
    """Build a model whose ops are `OPS`."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, intermediate_size=64, vocab_size=64))


def all_alike(layer: str, cache: str) -> dict[str, OpScheme | None]:
    """Quantize linear layers, keys and values."""
    found = {op.name: named(layer, "test") if op.type == "linear" else None for op in LLAMA}
    return found | {op.name: named(cache, "test") for op in KV} | {op.name: None for op in QUERIES}


@pytest.mark.parametrize(
    "cache", ["kv_fp8", "kv_int8", "kv_fp8_head", "kv_int8_asym", "kv_int8_moving_average", "kv_int8_dynamic_tensor"]
)
def test_compressed_tensors_takes_what_is_written(cache: str) -> None:
    """It parses the file, and puts quantizers before the caches of a model's attention modules."""
    text = json.loads(write_config(all_alike("w8a8_dynamic", cache), OPS, "compressed-tensors"))
    config = QuantizationConfig.model_validate(text["quantization_config"])
    model = small_llama()
    apply_quantization_config(model, config, show_progress=False)
    for op in KV:
        module = model.get_submodule(op.name.partition(":")[0])
        args = module.quantization_scheme.input_activations
        assert args.num_bits == 8
        assert args.type == ("float" if "fp8" in cache else "int")
        if not args.dynamic:
            assert args.observer == ("minmax" if cache.endswith("_moving_average") else "static_minmax")
            assert getattr(module, f"{op.type}_scale").numel() == (2 if cache.endswith("_head") else 1)


def test_without_a_word_of_them_they_are_no_ops(tmp_path: Path) -> None:
    """A config of layers has the ops, names and total that it had; one that quantizes some of them has these, too."""
    plain = assign(ConfigRequest(str(rules(tmp_path / "a.json", {"ops": "*", "scheme": "w8a8"}))), OPS).assignment
    assert set(plain.names) == {op.name for op in LLAMA}
    assert plain == assign(ConfigRequest(str(tmp_path / "a.json")), LLAMA).assignment
    path = rules(tmp_path / "b.json", {"ops": "*:k", "scheme": "kv_fp8"}, {"ops": "*", "scheme": "w8a8"})
    some = assign(ConfigRequest(str(path)), OPS).assignment
    assert set(some.names) - set(plain.names) == {op.name for op in KV if op.type == "k"}
    down = assign(ConfigRequest(str(tmp_path / "a.json"), down="kv_int8"), OPS).assignment
    assert down.added == {op.name for op in KV}
    assert {down.schemes[op.name].name for op in KV} == {"kv_int8"}


def test_what_is_left_alone_stays_so_in_another_format(tmp_path: Path) -> None:
    """A key that no rule means is no op to be shown, and is not quantized by what is written either."""
    path = rules(
        tmp_path / "a.json", {"ops": "*.0.self_attn:k", "scheme": "unquantized"}, {"ops": "*", "scheme": "kv_fp8"}
    )
    arguments = {"format": None, "model": "tiny_qwen2_5_vl", "checkpoint": None, "ops_from": None, "strict": False}
    given = Namespace(file=path, to="qsens", out=tmp_path / "b.yaml", **arguments)
    _, decisions, _ = explain(given)
    assert len([decision for decision in decisions if decision.op.type in STATES]) == 3
    _, again, _ = explain(Namespace(**vars(given) | {"file": given.out, "out": None, "to": None}))
    assert {str(one.op): one.scheme for one in again} == {str(one.op): one.scheme for one in decisions}


def test_the_command_lists_them(tmp_path: Path) -> None:
    """``qsens config`` shows those that the file says something of, and writes them for other tools."""
    path = rules(
        tmp_path / "a.json",
        {"ops": "*", "scheme": "kv_fp8"},
        {"ops": "*", "types": "linear", "scheme": "fp8_static_tensor"},
    )
    given = Namespace(
        file=path,
        format=None,
        model="tiny_qwen2_5_vl",
        checkpoint=None,
        ops_from=None,
        strict=False,
        to="modelopt",
        out=tmp_path / "hf_quant_config.json",
    )
    _, decisions, problems = explain(given)
    listed = [str(decision.op) for decision in decisions if decision.op.type in STATES]
    assert listed == [f"model.language_model.layers.{i}.self_attn:{kind}" for i in range(2) for kind in CACHED]
    assert problems == []
    written = json.loads(given.out.read_text())["quantization"]
    assert (written["quant_algo"], written["kv_cache_quant_algo"]) == ("FP8", "FP8")
    order = [decision.op.name for decision in decisions]
    assert order.index(listed[0]) == 1 + order.index("model.language_model.layers.0.self_attn.o_proj")
