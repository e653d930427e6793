"""SmoothQuant of recipes: the layers and the numbers of llm-compressor's own modifier."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaForCausalLM

from pytest_qsens.cli import main
from pytest_qsens.configs.decisions import decide, scheme_name
from pytest_qsens.configs.gate import ConfigRequest, assign
from pytest_qsens.configs.llm_compressor_mappings import BY_ARCHITECTURE, DEFAULT, Mapping, mappings_of
from pytest_qsens.configs.llm_compressor_smoothing import Smoother, smoothed_in
from pytest_qsens.configs.read import read_config
from pytest_qsens.configs.write import write_config
from pytest_qsens.errors import QsensError
from pytest_qsens.graph.calls import Call
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.graph.tree import module_tree
from pytest_qsens.models.spec import ModelSpec
from pytest_qsens.module_tree import ModuleTree
from pytest_qsens.quant.op_scheme import SmoothQuant, named
from pytest_qsens.quant.smoothing import range_scale
from tests.architectures import ARCHITECTURES
from tests.configs.ops import LLAMA, complaints, says, write
from tests.configs.test_written_for_llm_compressor import IDS, checkpoint, llama
from tests.installed import required
from tests.quant.test_smoothing import calibrated, scale_of

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_qsens.configs.rules import Config
    from pytest_qsens.quant.op_scheme import OpScheme

__all__ = ["checkpoint"]

pytestmark = pytest.mark.filterwarnings("ignore")  # its own, of torch

TREE = module_tree(llama())
BALANCED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def recipe(smoother: str, quantizer: str = "scheme: W8A8, ignore: [lm_head]", more: str = "") -> str:
    """Return a recipe of both modifiers, with their options."""
    return (
        f"quant_stage:\n  quant_modifiers:\n    SmoothQuantModifier: {{{smoother}}}\n{more}"
        f"    QuantizationModifier: {{targets: [Linear], {quantizer}}}\n"
    )


def found(path: Path, text: str, tree: ModuleTree | None = TREE) -> tuple[dict[str, str], list[str]]:
    """Schemes of the ops of a Llama, and what is wrong."""
    config: Config = read_config(write(path / "recipe.yaml", text))
    decisions, problems = decide(config, LLAMA, None if tree is None else lambda: tree)
    return {one.op.name: scheme_name(one.scheme) for one in decisions}, [problem.message for problem in problems]


def test_mappings_of_a_llama(tmp_path: Path) -> None:
    """By default what reads the norms is smoothed, with what a recipe says of it, and nothing else."""
    schemes, problems = found(tmp_path, recipe("smoothing_strength: 0.8"))
    smoothed = {op for op, scheme in schemes.items() if scheme == "w8a8_dynamic_smoothquant0.8_range"}
    assert smoothed == {op.name for op in LLAMA if op.name.endswith(BALANCED)}
    plain = {op for op, scheme in schemes.items() if scheme == "w8a8_dynamic"}
    assert plain == {op.name for op in LLAMA if op.name.endswith(("o_proj", "down_proj"))}
    assert problems == []


@pytest.mark.parametrize(
    ("text", "scheme", "problem"),
    [
        (recipe(""), "w8a8_dynamic_smoothquant_range", None),
        (
            recipe('mappings: [[["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"]]'),
            "w8a8_dynamic_smoothquant_range",
            None,
        ),
        (
            recipe("smoothing_strength: 0.5", "scheme: W4A16"),
            "w4a16_g128_smoothquant_range",
            "cannot be simulated: inputs are smoothed",
        ),
        (recipe("smoothing_strength: 0.5", "scheme: FP8_DYNAMIC"), "fp8_dynamic_smoothquant_range", "inputs are smoo"),
        (recipe("algorithm: log_equalization"), "w8a8_dynamic", "'log_equalization' changes numbers"),
        (recipe('mappings: [[["re:.*v_proj"], "re:.*k_proj"]]'), "w8a8_dynamic", "takes the scales up and is rounded"),
        (recipe('mappings: [[["re:.*q_proj"], "re:.*norm9"]]'), "w8a8_dynamic", "and nothing that 're:.*norm9' ma"),
        (recipe('mappings: [[["fc9"], "norm9"]]'), "w8a8_dynamic", "smooths no layer"),
        (
            recipe('mappings: [[["re:.*q_proj", "re:.*k_proj"], "re:.*input_layernorm"]]'),
            "w8a8_dynamic_smoothquant_range",
            "model.layers.0.self_attn.v_proj reads what model.layers.0.self_attn.q_proj reads, and no mapping has it",
        ),
        (recipe('mappings: [[["re:.*q_proj"], "re:.*norm"]]'), "w8a8_dynamic", "are both a layer before model.layers"),
        (recipe('mappings: [[["re:.*q_proj", "Linear"], "model.norm"]]'), "w8a8_dynamic", "is matched by re:.*q_proj"),
        (
            recipe("smoothing_strength: 0.5", more="    SmoothQuantModifier2: {}\n"),
            "w8a8_dynamic_smoothquant_range",
            "SmoothQuantModifier2 changes numbers and is not simulated: no options",
        ),
    ],
)
def test_what_is_smoothed_and_what_is_told(tmp_path: Path, text: str, scheme: str, problem: str | None) -> None:
    """Whatever is not simulated is told; layers that it is about are not smoothed, or cannot be simulated."""
    schemes, problems = found(tmp_path, text)
    assert schemes["model.layers.0.self_attn.q_proj"] == scheme
    assert bool(problems) == (problem is not None)
    assert problem is None or problem in problems[0]


def test_a_modifier_after_the_quantizing_one_is_told(tmp_path: Path) -> None:
    """Weights would be rounded with scales of what they were before."""
    text = (
        "quant_stage:\n  quant_modifiers:\n    QuantizationModifier: {targets: [Linear], scheme: W8A8}\n"
        "    SmoothQuantModifier: {smoothing_strength: 0.8}\n"
    )
    schemes, problems = found(tmp_path, text)
    assert {scheme for op, scheme in schemes.items() if op != "model.embed_tokens"} == {"w8a8_dynamic"}
    assert problems == ["SmoothQuantModifier comes after a modifier that quantizes, and is left out. Put it before"]


def test_without_a_model(tmp_path: Path) -> None:
    """What is written in a recipe is matched with the ops; what depends on the class of a model is asked for."""
    schemes, problems = found(tmp_path, recipe("smoothing_strength: 0.8"), None)
    assert schemes["model.layers.0.self_attn.q_proj"] == "w8a8_dynamic"
    assert len(problems) == 1
    assert "Give the model (--model), or write the mappings" in problems[0]
    path = write(tmp_path / "explicit.yaml", recipe('mappings: [[["re:.*q_proj"], "re:.*input_layernorm"]]'))
    assert says(path)["model.layers.1.self_attn.q_proj"] == "w8a8_dynamic_smoothquant_range"
    assert says(path)["model.layers.1.self_attn.k_proj"] == "w8a8_dynamic"
    assert complaints(path) == []


@pytest.mark.parametrize(
    ("smoother", "message"),
    [
        ("smoothing_strength: 2", "'smoothing_strength': 2 is not possible"),
        ("mappings: [[norm]]", "'mappings', entry 1: .* is needed"),
        ("mappings: [[[1], norm]]", "'mappings', entry 1: .* is needed"),
        ('mappings: [[["re:["], norm]]', r"entry 1: '\[' is no regular expression"),
        ('ignore: ["re:["]', r"'ignore': '\[' is no regular expression"),
    ],
)
def test_bad_values(tmp_path: Path, smoother: str, message: str) -> None:
    """With the place and the value."""
    with pytest.raises(QsensError, match=message):
        read_config(write(tmp_path / "recipe.yaml", recipe(smoother)))


def test_experts_are_told() -> None:
    """llm-compressor finds one scale for all; here each expert has its own."""
    names = ["norm", "experts.0.up_proj", "experts.1.up_proj"]
    tree = ModuleTree("Net", (("", ("Net",)), *((name, ("Linear" if "." in name else "Norm",)) for name in names)))
    smoother = Smoother(SmoothQuant(statistic="range"), (Mapping(("re:.*up_proj",), "norm"),), (), "here")
    smoothed, problems = smoothed_in([smoother], tree)
    assert smoothed == {}
    assert "experts.0.up_proj, experts.1.up_proj: smoothed in a way" in problems[0].message
    assert problems[0].ops == ("experts.0.up_proj", "experts.1.up_proj")


def test_default_mappings_are_its_own() -> None:
    """Of every architecture that it knows, and of those that it does not."""
    real = required("llmcompressor.modifiers.transform.smoothquant.utils")
    for architecture, mappings in real.MAPPINGS_REGISTRY.items():
        expected = [(tuple(one.balance_layers), one.smooth_layers) for one in mappings]
        assert [*BY_ARCHITECTURE.get(architecture, DEFAULT)] == expected, architecture
    assert BY_ARCHITECTURE.keys() <= real.MAPPINGS_REGISTRY.keys()


def test_default_mappings_of_layers_without_queries() -> None:
    """Qwen3.5 has some, and its builder leaves them out."""
    real = required("llmcompressor.modifiers.transform.smoothquant.dynamic_mappings")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "vocab_size": 16}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    with torch.device("meta"):
        model = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**sizes))
    expected = [(tuple(one.balance_layers), one.smooth_layers) for one in real.get_layer_mappings_from_model(model)]
    assert [*mappings_of(module_tree(model))] == expected
    moe = real.SMOOTHQUANT_DYNAMIC_MAPPING_REGISTRY["Qwen3_5MoeForCausalLM"](model)
    tree = ModuleTree("Qwen3_5MoeForCausalLM", module_tree(model).modules)
    assert [*mappings_of(tree)] == [(tuple(one.balance_layers), one.smooth_layers) for one in moe]


class Layer(nn.Module):
    """A norm and two layers that read it, beside one that stands for an expert."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q_proj = nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))


class Net(nn.Module):
    """Three layers, of which one lies deeper, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.tower = nn.ModuleDict({"inner": Layer()})
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 8)


NET = Net()
TARGETS = ["re:.*norm", "re:.*q_proj", "norm", "head", "Linear", "LayerNorm", "re:.*mlp.1", r"re:.*mlp\.0", "re:layers"]
TARGETS += ["layers.0.norm", "layers.1.q_proj", r"re:layers\.\d\.norm", r"re:.*\d\.q_proj", "Sequential"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example((["re:.*q_proj"], "re:.*norm"), [])
@example((["re:.*mlp.1"], r"re:.*mlp\.0"), ["re:layers.0"])
@example((["re:.*mlp.1", "re:.*q_proj"], r"re:layers\.\d\.norm"), ["Linear", "LayerNorm"])
@example(([r"re:.*\d\.q_proj"], r"re:layers\.\d\.norm"), ["layers.1.q_proj", "layers.1.norm"])
@given(
    st.tuples(st.lists(st.sampled_from(TARGETS), min_size=1, max_size=2, unique=True), st.sampled_from(TARGETS)).filter(
        lambda mapping: mapping[1] not in mapping[0]
    ),
    st.lists(st.sampled_from(TARGETS), max_size=3),
)
def test_sets_are_its_own(mapping: tuple[list[str], str], ignore: list[str]) -> None:
    """Whatever is mapped and ignored: the same layers are smoothed, or it fails where we say that it does."""
    base = required("llmcompressor.modifiers.transform.smoothquant.base")
    modifier = base.SmoothQuantModifier(mappings=[[mapping[0], mapping[1]]], ignore=ignore)
    try:
        sets = modifier._resolve_mappings(NET)
    except RuntimeError:
        sets = None
    names = {module: name for name, module in NET.named_modules()}
    smoother = Smoother(SmoothQuant(statistic="range"), (Mapping((*mapping[0],), mapping[1]),), (*ignore,), "here")
    smoothed, problems = smoothed_in([smoother], module_tree(NET))
    if sets is None:
        assert smoothed == {}
        assert "cannot be applied by llm-compressor" in problems[0].message
        return
    expected = {names[layer] for one in sets for layer in one.balance_layers}
    told = {name for problem in problems for name in problem.ops}
    assert smoothed.keys() | told == expected
    assert bool(expected) or "smooths no layer" in problems[0].message


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2_5_vl", "whisper", "qwen3_moe", "bert", "gpt2"])
def test_defaults_of_real_models_are_its_own(name: str) -> None:
    """The layers that it smooths without being told; of some it fails, and that is told."""
    base = required("llmcompressor.modifiers.transform.smoothquant.base")
    model = ARCHITECTURES[name].build()
    modifier = base.SmoothQuantModifier()
    modifier.mappings = modifier._infer_mappings_from_model(model)
    names = {module: name for name, module in model.named_modules()}
    smoothed, problems = smoothed_in([Smoother(SmoothQuant(statistic="range"), None, (), "here")], module_tree(model))
    try:
        sets = modifier._resolve_mappings(model)
    except RuntimeError:
        assert any("cannot be applied by llm-compressor to" in problem.message for problem in problems)
        assert name in ("qwen2_5_vl", "whisper")  # what reads other norms is matched, too
        return
    assert smoothed.keys() == {names[layer] for one in sets for layer in one.balance_layers}
    assert len(problems) == (not smoothed)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_scales_are_its_own(alpha: float) -> None:
    """Also of channels that never fire, that are constant, that have no weights or next to none."""
    base = required("llmcompressor.modifiers.transform.smoothquant.base")
    generator = torch.Generator().manual_seed(0)
    layers = [nn.Linear(32, 16), nn.Linear(32, 48)]
    low = torch.rand(32, generator=generator) * 30 - 20
    high = low + torch.rand(32, generator=generator) * 9
    high[5] = low[5]
    low[6] = high[6] = 0
    with torch.no_grad():
        for layer in layers:
            layer.weight[:, 9] = 0
            layer.weight[:, 10] = 1e-9
        found = base.SmoothQuantModifier(smoothing_strength=alpha)._calculate_smoothing_scales(layers, high - low)
        weights = torch.cat([layer.weight for layer in layers]).abs().amax(0)
    expected = found.clamp(min=base.MINIMUM_SMOOTHING_SCALE)
    torch.testing.assert_close(range_scale(high - low, weights, alpha), expected, rtol=1e-5, atol=0)


STATIC = (
    "ignore: [lm_head], config_groups: {a: {targets: [Linear], weights: {num_bits: 8, strategy: channel}, "
    "input_activations: {num_bits: 8, strategy: tensor, observer: static_minmax}}}"
)


def stretched(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Let a few channels of what the norms give be thirty times as large."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter[[3, 40, 77]] *= 30
    return model


def inputs_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the inputs of the linear layers of a model."""
    found: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, given, name=name: found.update({name: given[0]}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(IDS)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(
    ("quantizer", "alpha", "near"),
    # steps of dynamic inputs are 127.5 to a side there, and 127 here
    [("scheme: W8A8, ignore: [lm_head]", 0.8, 0.8), (STATIC, 0.3, 0.05)],
    ids=["dynamic", "static"],
)
def test_oneshot(
    quantizer: str, alpha: float, near: float, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``oneshot`` scales the weights of the same layers as we do, and what these then give is what ours give."""
    compressor, datasets = required("llmcompressor"), required("datasets")
    monkeypatch.chdir(tmp_path)  # it writes logs where it is
    path = write(tmp_path / "smoothed.yaml", recipe(f"smoothing_strength: {alpha}", quantizer))
    data = datasets.Dataset.from_dict({"input_ids": IDS.tolist(), "attention_mask": torch.ones_like(IDS).tolist()})
    stretched(llama()).save_pretrained(checkpoint)
    model = compressor.oneshot(
        model=checkpoint, recipe=str(path), dataset=data, num_calibration_samples=2, max_seq_length=8
    )
    reference = stretched(llama()).requires_grad_(requires_grad=False)
    spec = ModelSpec(reference, [{"input_ids": IDS}], [{"input_ids": IDS}], lambda output, _: output.logits)
    assignment = assign(ConfigRequest(str(path)), list_ops(reference), lambda: module_tree(reference)).assignment
    names = {op: scheme.name for op, scheme in assignment.schemes.items()}
    ours, simulator = calibrated(names, spec)
    assert {op for op in names if ours.smoothing(op) is not None} == {op for op in names if op.endswith(BALANCED)}
    assert len(names) == 14
    inputs = inputs_of(reference)
    for name in names:
        theirs, exact = model.get_submodule(name), reference.get_submodule(name)
        x, scale = inputs[name], ours.smoothing(name)
        scale = torch.ones(x.shape[-1]) if scale is None else scale
        torch.testing.assert_close(theirs.weight / exact.weight, scale.expand_as(exact.weight), rtol=1e-4, atol=0)
        if quantizer == STATIC:
            assert ours.input_qparams(name).scale == pytest.approx(float(theirs.input_scale), rel=1e-4)
        with torch.no_grad():
            results = theirs(x / scale), simulator.output(name, Call("linear", x, exact.weight, None))
            errors = [float((result - exact(x)).square().sum()) for result in results]
        assert errors[0] == pytest.approx(errors[1], rel=0.15)
        assert float((results[0] - results[1]).square().sum()) < near * errors[0]
    plain, _ = calibrated({op: name.replace("_range", "") for op, name in names.items()}, spec)
    first = next(iter(names))
    assert not torch.allclose(scale_of(plain, first), scale_of(ours, first), rtol=0.05)  # it is not the paper's


SETS = {
    f"model.layers.{layer}.{norm}": [f"model.layers.{layer}.{name}" for name in names]
    for layer in range(2)
    for norm, names in (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    )
}
OPS = list_ops(llama())
STRENGTHS = st.sampled_from([None, "", "0.8", "0.123456789", "1"])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.fixed_dictionaries(dict.fromkeys(SETS, STRENGTHS)),
    st.fixed_dictionaries({op.name: st.sampled_from([None, "w8a8_dynamic", "w4a16_g128", "w8a8"]) for op in OPS}),
)
def test_what_is_written_is_read_back(
    tmp_path: Path, strengths: dict[str, str | None], schemes: dict[str, str | None]
) -> None:
    """Whatever is smoothed together, and however it is rounded: the recipe says the same of every op."""
    assignment: dict[str, OpScheme | None] = {}
    for op in OPS:
        norm = next((norm for norm, names in SETS.items() if op.name in names), None)
        strength = None if norm is None else strengths[norm]
        name = None if op.type == "embedding" or schemes[op.name] == "w8a8" else schemes[op.name]
        smoothed = "" if strength is None else f"_smoothquant{strength}_range"
        assignment[op.name] = None if name is None else named(f"{name}{smoothed}", "here")
    if not any(assignment.values()):
        assignment["lm_head"] = named("w8a8_dynamic", "here")
    path = write(tmp_path / "recipe.yaml", write_config(assignment, OPS, "llm-compressor", tree=lambda: TREE))
    decisions, problems = decide(read_config(path), OPS, lambda: TREE)
    assert {one.op.name: one.scheme for one in decisions} == assignment
    assert all("cannot be simulated" in problem.message for problem in problems)
    assert says(path, OPS) == {one.op.name: scheme_name(one.scheme) for one in decisions}  # by its names alone, too


Q, K, V = SETS["model.layers.0.input_layernorm"]


@pytest.mark.parametrize(
    ("schemes", "message"),
    [
        ({Q: "w8a8_dynamic_smoothquant_range", K: "w8a8_dynamic"}, "model.layers.0.input_layernorm smooths "),
        (
            {Q: "w8a8_dynamic_smoothquant_range", K: "w8a8_dynamic_smoothquant0.8_range"},
            "model.layers.0.input_layernorm smooths ",
        ),
        ({Q: "w8a8_dynamic_smoothquant_range_unshared"}, "k_proj, model.layers.0.self_attn.v_proj are shared there"),
        ({Q: "w8a8_dynamic_smoothquant"}, "by the range of channels (measure 'w8a8_dynamic_smoothquant_range' to writ"),
        (
            {"lm_head": "w8a8_dynamic_smoothquant_range"},
            "no mapping of llm-compressor for LlamaForCausalLM smooths its",
        ),
    ],
)
def test_what_a_recipe_cannot_say(schemes: dict[str, str], message: str) -> None:
    """Layers that it smooths alike, and others; each time with the op, and with who can say it."""
    assignment = {op.name: named(schemes[op.name], "x") if op.name in schemes else None for op in OPS}
    with pytest.raises(QsensError) as error:
        write_config(assignment, OPS, "llm-compressor", tree=lambda: TREE)
    first = next(iter(schemes))
    assert str(error.value).startswith(f"{first} (linear): llm-compressor cannot say '{schemes[first]}': ")
    assert message in str(error.value)
    assert "qsens can say all that is asked for" in str(error.value)


def test_a_recipe_takes_the_model() -> None:
    """The layer before those that are smoothed is no op."""
    assignment = {op.name: named("w8a8_dynamic_smoothquant_range", "x") if op.name == Q else None for op in OPS}
    with pytest.raises(
        QsensError, match="the layer before those that are smoothed, which `qsens config` finds with --model"
    ):
        write_config(assignment, OPS, "llm-compressor")


def test_oneshot_takes_what_is_written(checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two strengths, and a layer beside them that is not smoothed: weights are scaled so, and the others are not."""
    compressor, datasets = required("llmcompressor"), required("datasets")
    monkeypatch.chdir(tmp_path)
    names = dict.fromkeys(SETS["model.layers.0.input_layernorm"], "w8a8_dynamic_smoothquant0.8_range")
    names |= dict.fromkeys(SETS["model.layers.1.post_attention_layernorm"], "w8a8_dynamic_smoothquant_range")
    names |= {"model.layers.0.mlp.down_proj": "w8a8_dynamic"}
    assignment = {op.name: named(names[op.name], "x") if op.name in names else None for op in OPS}
    path = write(tmp_path / "written.yaml", write_config(assignment, OPS, "llm-compressor", tree=lambda: TREE))
    data = datasets.Dataset.from_dict({"input_ids": IDS.tolist(), "attention_mask": torch.ones_like(IDS).tolist()})
    model = compressor.oneshot(
        model=checkpoint, recipe=str(path), dataset=data, num_calibration_samples=2, max_seq_length=8
    )
    attached = {name for name, module in model.named_modules() if getattr(module, "quantization_scheme", None)}
    assert attached == names.keys()
    reference = llama().requires_grad_(requires_grad=False)
    spec = ModelSpec(reference, [{"input_ids": IDS}], [{"input_ids": IDS}], lambda output, _: output.logits)
    ours, _ = calibrated(names, spec)
    for op in OPS:
        if op.type == "linear":
            ratio = model.get_submodule(op.name).weight / reference.get_submodule(op.name).weight
            scale = ours.smoothing(op.name)
            assert (scale is None) == ("smoothquant" not in names.get(op.name, ""))
            expected = torch.ones_like(ratio) if scale is None else scale.expand_as(ratio)
            torch.testing.assert_close(ratio, expected, rtol=1e-4, atol=0)


def test_the_command_knows_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Defaults of its class hold, and what a mapping smooths is written for the tool again."""
    text = recipe("smoothing_strength: 0.8", "scheme: W8A8, ignore: ['re:.*visual.*', lm_head]")
    path = write(tmp_path / "recipe.yaml", text)
    assert main(["config", str(path), "--model", "tiny_qwen2_5_vl"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("w8a8_dynamic_smoothquant0.8_range  W8A8: Linear") == 6
    assert "cannot be applied by llm-compressor to Qwen2_5_VLForConditionalGeneration" in printed
    ours = write(
        tmp_path / "ours.yaml",
        "schema: 1\nrules: [{ops: '*language_model*.[qkv]_proj', scheme: w8a8_dynamic_smoothquant0.8_range}]",
    )
    out = tmp_path / "written.yaml"
    arguments = ["config", str(ours), "--model", "tiny_qwen2_5_vl", "--to", "llm-compressor", "--out", str(out)]
    assert main(arguments) == 0
    assert out.read_text().count("input_layernorm") == 2
