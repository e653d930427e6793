"""Keys and values are found in a model as a cache would store them, and in a graph give what they gave without it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from pytest_qsens.graph.attention import list_states
from pytest_qsens.graph.capture import capture, run_model
from pytest_qsens.graph.intercept import OpInterceptor
from pytest_qsens.graph.marks import MARKS
from pytest_qsens.graph.replay import Run
from pytest_qsens.graph.serialize import from_builtin, to_builtin
from tests.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_qsens.graph.calls import Call

WITH_STATES = ("qwen2_5_vl", "llama", "gemma3", "mixtral", "bert", "whisper", "t5", "qwen3_vl")


class Attention(nn.Module):
    """A module that attends by itself, with positional or keyword arguments."""

    def __init__(self, *, keywords: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.keywords = keywords

    def forward(self, x: Tensor) -> Tensor:
        """Attend over ``(N, tokens, 8)``."""
        query, key, value = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self._attended(query, key, value).transpose(1, 2).flatten(2)

    def _attended(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.keywords:
            return functional.scaled_dot_product_attention(query, value=value, key=key, is_causal=True)
        return functional.scaled_dot_product_attention(query, key, value, None, 0.0, True)


class Encoder(transformers.PreTrainedModel):  # type: ignore[misc] # transformers' classes are untyped here
    """A model as a whole refers to the interface, too, in methods that it shares with all models."""


def states_of(name: str) -> list[str]:
    """Names of the queries, keys and values of an architecture."""
    return [op.name for op in list_states(ARCHITECTURES[name].build())]


def test_listed_are_modules_that_may_read_a_cache() -> None:
    """Decoders of language models have one, vision towers have none, and models without attention have nothing."""
    assert states_of("llama") == [f"model.layers.{i}.self_attn:{kind}" for i in range(2) for kind in "qkv"]
    assert not [name for name in states_of("qwen2_5_vl") if "visual" in name]
    assert len(states_of("whisper")) == 3 * 2 * 3  # encoder, and two in each decoder block
    for name in ("vit", "clip", "resnet", "mamba"):
        assert states_of(name) == []
    assert [op.name for op in list_states(Attention())] == [":q", ":k", ":v"]
    assert [(op.type, op.elements) for op in list_states(nn.ModuleDict({"a": Attention()}))] == [
        (kind, 0) for kind in "qkv"
    ]
    assert list_states(nn.MultiheadAttention(8, 2)) == ()
    assert list_states(Encoder(transformers.PretrainedConfig())) == ()


def test_listing_needs_no_weights() -> None:
    """Collection lists them from a model on the meta device."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(ARCHITECTURES["llama"].config())
    assert [op.name for op in list_states(model)] == states_of("llama")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl", "bert"])
def test_what_is_caught_is_what_the_cache_is_given(
    name: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys come after rotary embeddings and before their heads are repeated, whatever computes the attention."""
    spec = ARCHITECTURES[name].spec()
    model: Any = spec.model
    model.set_attn_implementation(implementation)
    stored: list[Tensor] = []
    caught: dict[str, Tensor] = {}
    update = transformers.DynamicLayer.update

    def remembered(layer: transformers.DynamicLayer, keys: Tensor, values: Tensor, *rest: object) -> object:
        stored.extend((keys.clone(), values.clone()))
        return update(layer, keys, values, *rest)

    def handler(op: str, call: Call, run: Callable[[], Tensor]) -> Tensor:
        if call.kind in MARKS:
            caught[op] = call.x.clone()
        return run()

    batch = dict(spec.evaluation[0]) | {"use_cache": True}
    if name == "bert":  # an encoder is given no cache
        batch["past_key_values"] = transformers.DynamicCache()
    states = states_of(name)
    monkeypatch.setattr(transformers.DynamicLayer, "update", remembered)
    with torch.no_grad():
        if name == "bert":
            model.config.is_decoder = True
        with OpInterceptor(model, handler, states):
            run_model(model, batch, spec.output)
    assert list(caught) == states
    cached = [state for op, state in caught.items() if not op.endswith(":q")]
    assert len(stored) == len(cached)
    for one, other in zip(cached, stored, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", WITH_STATES)
def test_a_graph_with_them_is_the_model(name: str) -> None:
    """Marked or not, the graph computes the same bits; each state is one call, also for another process."""
    spec = ARCHITECTURES[name].spec()
    model: Any = spec.model
    states, batch = states_of(name), spec.evaluation[0]
    with torch.no_grad():
        graph, plain = capture(model, batch, spec.output, states), capture(model, batch, spec.output)
        assert torch.equal(Run(graph).output, run_model(model, batch, spec.output))
        assert set(graph.calls) - set(plain.calls) == set(states)
        assert all(op not in graph.out_of_reach for op in states)
        again = from_builtin(*to_builtin(graph, model), model, batch)
    assert [len(graph.calls[op]) for op in states] == [1] * len(states)
    for op in states:
        assert [node.target for node in again.calls[op]] == [MARKS[op[-1]]]
    assert not [node for node in plain.nodes if node.target in MARKS.values()]


@pytest.mark.parametrize("keywords", [False, True])
def test_modules_that_attend_by_themselves(keywords: bool) -> None:
    """The keys and values that torch's product is given can be replaced, in a graph and while Python runs."""
    torch.manual_seed(0)
    model = nn.Sequential(Attention(keywords=keywords), nn.Linear(8, 3)).eval().requires_grad_(requires_grad=False)
    batch, states = {"input": torch.randn(2, 5, 8)}, ["0:q", "0:k", "0:v"]

    def halved(op: str, call: Call, run: Callable[[], Tensor]) -> Tensor:
        return call.x / 2 if op == "0:v" else run()

    with torch.no_grad():
        run = Run(capture(model, batch, lambda out, _: out, states))
        replayed = run.replay({run.graph.calls["0:v"][0]: lambda value: value / 2})
        with OpInterceptor(model, halved, states):
            expected = model(**batch)
        assert torch.equal(replayed, expected)
        bias = model[1].bias
        assert torch.allclose(expected - bias, (model(**batch) - bias) / 2)
    assert ("0:qk", "qk") in run.graph.functional  # the products stay what they are


class Deaf(nn.Module):
    """Looks like attention, and multiplies otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor, *, fused: bool = False) -> Tensor:
        """Attend over ``(N, tokens, 8)``."""
        query, key, value = self.qkv(x).chunk(3, -1)
        if fused:
            return functional.scaled_dot_product_attention(query, key, value)
        return (query @ key.mT).softmax(-1) @ value


def test_those_that_cannot_be_caught_say_so() -> None:
    """What is listed and then not seen, although its module ran, is out of reach, and why."""
    model = Deaf().eval().requires_grad_(requires_grad=False)
    batch, states = {"x": torch.randn(2, 5, 8)}, [op.name for op in list_states(model)]
    assert states == [":q", ":k", ":v"]
    graph = capture(model, batch, lambda out, _: out, states)
    with OpInterceptor(model, lambda _, __, run: run(), states) as interceptor:
        model(**batch)
    assert graph.out_of_reach == interceptor.out_of_reach()
    assert set(graph.out_of_reach) == set(states)
    assert "attention interface" in graph.out_of_reach[":k"]


def test_nothing_is_left_behind() -> None:
    """Afterwards, also of a run that fails, transformers has its own functions again."""
    interface = transformers.AttentionInterface
    modeling = transformers.models.llama.modeling_llama
    before = {**vars(interface)}, modeling.eager_attention_forward, interface.__getitem__
    model = ARCHITECTURES["llama"].build()

    def fails(op: str, call: Call, run: Callable[[], Tensor]) -> Tensor:
        if call.kind in MARKS:
            raise ValueError(op)
        return run()

    with pytest.raises(ValueError, match=r"layers.0.self_attn:q"), OpInterceptor(model, fails, states_of("llama")):
        model(input_ids=torch.zeros(1, 3, dtype=torch.int64))
    assert ({**vars(interface)}, modeling.eager_attention_forward, interface.__getitem__) == before
