"""Engine fx on real architectures, and what it leaves behind: nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization.observer import FixedQParamsObserver, HistogramObserver
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.fx import GraphModule

from pytest_qsens.calibrated import CalibratedModel, calibrate
from pytest_qsens.engines.fx import FxEngine
from pytest_qsens.errors import QsensError
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.models.spec import ModelSpec
from pytest_qsens.quant import switchable
from pytest_qsens.quant.kernels import _qconfigs, _quiet
from pytest_qsens.quant.observers import QParams
from tests.architectures import ARCHITECTURES
from tests.inc import models

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_qsens.results import OpResult


def scored(spec: ModelSpec, engine: str) -> tuple[CalibratedModel, dict[str, OpResult]]:
    """Score every op in both modes."""
    assert isinstance(spec.model, nn.Module)
    ops = list_ops(spec.model)
    model = calibrate(spec, ops, "w8a8", engine=engine)
    return model, {op.name: model.score(op, ["isolated", "fallback"]) for op in ops}


EXCEPT = {
    "gemma3": "its embedding is a class of its own, for which torch has no kernel",
    "gpt2": "its linears are a class of their own",
    "resnet": "batch norms and relus are fused into convolutions",
    "t5": "relus are fused into linears",
}
"""Architectures whose scores are not those of the simulation, and why."""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str) -> None:
    """Every op is measured or has a reason; scores are the simulation's wherever the same things are quantized."""
    _, kernels = scored(ARCHITECTURES[name].spec(), "fx")
    _, simulated = scored(ARCHITECTURES[name].spec(), "replay")
    assert all(result.status == "measured" or result.reason for result in kernels.values())
    assert not any(result.status == "failed" for result in kernels.values())
    found = {op: (r.status, r.isolated, r.fallback) for op, r in kernels.items()}
    expected = {op: (r.status, r.isolated, r.fallback) for op, r in simulated.items()}
    if name not in EXCEPT:
        assert found == expected
        return
    assert found != expected
    if name in ("gemma3", "gpt2"):
        refused = {op for op, result in kernels.items() if result.status == "unquantizable"}
        assert refused
        assert all("no kernel for it" in (kernels[op].reason or "") for op in refused)
        # alone, every other op is quantized alike
        assert all(kernels[op].isolated == simulated[op].isolated for op in kernels.keys() - refused)
    elif name == "t5":
        assert {op for op in found if found[op][1] != expected[op][1]} == {op for op in found if op.endswith(".wi")}


def spec_of(model: nn.Module) -> ModelSpec:
    """Score a model's output on seeded data of 4 features."""
    batches = [{"x": models.randn(8, 4, seed=seed)} for seed in (0, 1)]
    return ModelSpec(model.eval(), batches[:1], batches[1:], lambda out, _: out)


class Twice(nn.Module):
    """Calls one of its linears twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        out: Tensor = self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))
        return out


def test_linear_called_twice() -> None:
    """A module that torch gives one scale for two calls has no score and says why; the others have theirs."""
    torch.manual_seed(0)
    model, results = scored(spec_of(Twice()), "fx")
    assert results["a"].status == "unquantizable"
    assert "sees 2 calls; where other ops are measured, it is quantized with the rest" in (results["a"].reason or "")
    assert results["b"].status == "measured"
    assert model.total().status == "measured"


def test_tied_weights() -> None:
    """An embedding and a head with one weight are scored apart, as in the simulation, and stay tied."""
    spec = ARCHITECTURES["qwen2_5_vl"].spec()
    model: Any = spec.model
    _, results = scored(spec, "fx")
    assert results["lm_head"].isolated != results["model.language_model.embed_tokens"].isolated
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def state(model: nn.Module) -> list[Any]:
    """Everything on a model that can be left changed."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [
        [(name, id(tensor), tensor._version) for name, tensor in tensors],
        [tensor.tolist() for _, tensor in tensors],
        [
            (name, id(module), sorted(vars(module)), list(module._forward_hooks), list(module._modules))
            for name, module in model.named_modules()
        ],
    ]


SPECS: dict[str, Callable[[], ModelSpec]] = {
    "mlp": models.mlp,
    "resnet": models.resnet,
    "edges": models.edges,
    "llama": ARCHITECTURES["llama"].spec,
    "qwen2_5_vl": ARCHITECTURES["qwen2_5_vl"].spec,
}


@pytest.mark.parametrize("name", SPECS)
def test_nothing_is_left_on_the_model(name: str) -> None:
    """Modules, their attributes and parameters are as before, and the model computes what it did."""
    spec = SPECS[name]()
    assert isinstance(spec.model, nn.Module)
    spec.model.requires_grad_(requires_grad=False)
    before, output = state(spec.model), spec.output(spec.model(**spec.evaluation[0]), spec.evaluation[0])
    _, results = scored(spec, "fx")
    assert any(result.status == "measured" for result in results.values())
    assert state(spec.model) == before
    assert torch.equal(spec.output(spec.model(**spec.evaluation[0]), spec.evaluation[0]), output)


def test_own_modules_come_back_after_an_exception() -> None:
    """A forward that raises while the kernels are installed leaves the model's own modules in their places."""
    spec = ARCHITECTURES["llama"].spec()
    assert isinstance(spec.model, nn.Module)
    before = state(spec.model)
    engine = calibrate(spec, list_ops(spec.model), "w8a8", engine="fx")._engine
    assert isinstance(engine, FxEngine)
    root = spec.model

    def fail() -> None:
        assert state(root) != before
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), engine._kernels.installed():
        fail()
    assert state(spec.model) == before


@pytest.mark.parametrize("name", ["resnet", "llama"])
def test_prepared_and_packed_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part is prepared and converted once and each weight packed once, however many ops are scored."""
    counts: dict[str, int] = {"prepare": 0, "convert": 0, "pack": 0}

    def counted(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as the function
            counts[what] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(switchable, "prepare_fx", counted("prepare", prepare_fx))
    monkeypatch.setattr(switchable, "convert_fx", counted("convert", convert_fx))
    for kernel in ("linear_prepack", "conv2d_prepack", "embedding_bag_prepack"):
        monkeypatch.setattr(torch.ops.quantized, kernel, counted("pack", getattr(torch.ops.quantized, kernel)))
    spec = SPECS[name]()
    assert isinstance(spec.model, nn.Module)
    ops = list_ops(spec.model)
    model = calibrate(spec, ops, "w8a8", engine="fx")
    assert isinstance(model._engine, FxEngine)
    parts = len(model._engine._kernels._parts)
    assert counts["prepare"] == counts["convert"] == parts
    packed = counts["pack"]
    assert packed >= len(ops)
    for op in ops:
        assert model.score(op, ["isolated", "fallback"]).status == "measured"
    assert counts == {"prepare": parts, "convert": parts, "pack": packed}


def test_private_names_of_torch() -> None:
    """What is taken from inside of torch.ao.quantization is as it is relied on; a new torch has to pass this first.

    The configuration of every node is in the prepared graph, by the node's name; one observer stands before an op and
    one behind it, of the class asked for; conversion puts a kernel with one scale in the place of each op.
    """
    x = models.randn(8, 4, seed=0)
    original = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).eval()
    with torch.no_grad(), _quiet():
        part = switchable.Part(original, {"0": "a", "2": "b"}, _qconfigs(original, {"0": "a", "2": "b"}, whole=True))
        graph = part.prepared
        assert isinstance(graph, GraphModule)
        by_node = graph.meta["_observed_graph_module_attrs"].node_name_to_qconfig
        nodes = {node.target: node for node in graph.graph.nodes if node.op == "call_module"}
        assert isinstance(by_node[nodes["1"].name].activation(), FixedQParamsObserver)
        for target in part.ops:
            assert by_node[nodes[target].name] is not None
            (behind,) = nodes[target].users
            assert type(graph.get_submodule(behind.target)) is HistogramObserver
        before: Any = graph.get_submodule(nodes["0"].args[0].target)
        part(x)
        histogram, low, high = before.histogram.clone(), before.min_val.clone(), before.max_val.clone()
        assert (float(low), float(high)) == (float(x.min()), float(x.max()))
        assert histogram.sum() == x.numel()
        part.pack()
    assert part.packed.keys() == part.inputs.keys() == part.outputs.keys() == part.ops.keys()
    assert not any(isinstance(module, nn.Linear) for module in part.packed.values())
    # the tanh has a fixed scale for its output, and takes what comes in fp32 by the same
    assert part._int8._readers["0"][nodes["1"].name] == QParams(2 / 256, 128)


class Chunked(nn.Module):
    """Splits an op's output, to which torch puts an observer that expects a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Swap the halves."""
        halves = self.first(x).chunk(2, -1)
        out: Tensor = self.second(torch.cat(halves[::-1], -1))
        return out


def test_model_that_cannot_be_prepared() -> None:
    """What torch's quantization raises is told as a usage error, with what to do; nothing is left on the model."""
    model = Chunked().eval().requires_grad_(requires_grad=False)
    before = state(model)
    with pytest.raises(QsensError, match=r"cannot prepare this model: AttributeError.* Use engine auto"):
        calibrate(spec_of(model), list_ops(model), "w8a8", engine="fx")
    assert state(model) == before


class Positions(nn.Module):
    """Looks up expanded indices, which are not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(8, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Add an embedding of the position to ``(N, 4, 4)``."""
        out: Tensor = self.head(x + self.table(torch.arange(x.shape[1])[None].expand(len(x), -1)))
        return out


def test_expanded_indices() -> None:
    """An embedding of expanded indices is measured, as in the simulation, although the kernel wants them laid out."""
    torch.manual_seed(0)
    batches = [{"x": models.randn(2, 4, 4, seed=seed)} for seed in (0, 1)]
    spec = ModelSpec(Positions().eval(), batches[:1], batches[1:], lambda out, _: out)
    _, kernels = scored(spec, "fx")
    _, simulated = scored(spec, "replay")
    assert kernels["table"].status == "measured"
    assert kernels["table"].isolated == simulated["table"].isolated


@pytest.mark.parametrize("between", models.BETWEEN)
def test_neighbours_are_measured(between: str) -> None:
    """Whatever stands between two ops, both are measured, and noise is drawn."""
    _, results = scored(models.neighbours(between), "fx")
    for result in results.values():
        assert result.status == "measured"
        assert result.fallback is not None
        assert "noise" in result.fallback


def test_reshape_leaves_the_next_op_quantized() -> None:
    """Behind an op in fp32 and a `Tensor.reshape`, torch forgets to quantize; here every op but the one is quantized.

    With a function that reshapes, for which torch has no such rule, scores are those of the method.
    """
    torch.manual_seed(0)
    method = models.spec_of(models.Neighbours(lambda x: x.reshape(-1, 8, 4, 16)).eval(), 2, 3, 8, 8)
    torch.manual_seed(0)
    function = models.spec_of(models.Neighbours(lambda x: torch.reshape(x, (-1, 8, 4, 16))).eval(), 2, 3, 8, 8)
    by_method, by_function = (
        [(result.fallback or {})["sse"] for result in scored(spec, "fx")[1].values()] for spec in (method, function)
    )
    assert by_method == by_function


class Hookable(nn.Module):
    """Two linears in a block, between them a norm, and a head; traced as a whole, or part by part."""

    def __init__(self, *, whole: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 3)
        self.whole = whole

    def forward(self, x: Tensor) -> Tensor:
        """Run all."""
        if not self.whole and x.isnan().any():  # which a tracer cannot follow
            raise ValueError("NaN")
        out: Tensor = self.head(self.block(x))
        return out


def after(_: nn.Module, __: object, output: Tensor) -> Tensor:
    """Change what a module gives."""
    return torch.sin(output)


def before(
    _: nn.Module, args: tuple[Tensor], kwargs: dict[str, Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Change what a module takes."""
    return tuple(map(torch.sin, args)), {name: torch.sin(value) for name, value in kwargs.items()}


HOOKS: list[Callable[[nn.Module], object]] = [
    lambda module: module.register_forward_hook(after),
    lambda module: module.register_forward_pre_hook(before, with_kwargs=True),
]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(
    ("hooked", "whole", "part"),
    [
        ("", True, False),
        ("block.0", True, True),
        ("block.1", True, False),
        ("block", False, True),
        ("head", True, True),
    ],
)
def test_hooks_that_conversion_drops(
    hooked: str, hook: Callable[[nn.Module], object], *, whole: bool, part: bool
) -> None:
    """A hook on an op, or on what is traced, is no part of the quantized model: that model is refused by name.

    Whether conversion replaces the module depends on what is traced; where it does not, hooks are run, in both modes.
    """
    for as_whole, dropped in ((True, whole), (False, part)):
        model = Hookable(whole=as_whole).eval()
        hook(model.get_submodule(hooked))
        if dropped:
            known = state(model)
            with pytest.raises(QsensError, match=f"drops the forward hooks of {hooked or 'the model itself'}, so"):
                scored(spec_of(model), "fx")
            assert state(model) == known
            continue
        _, kernels = scored(spec_of(model), "fx")
        _, simulated = scored(spec_of(model), "replay")
        _, without = scored(spec_of(Hookable(whole=as_whole)), "fx")
        for op, result in kernels.items():
            assert result.isolated == simulated[op].isolated != without[op].isolated, op
            # in a whole model torch quantizes what is beside the ops, too
            assert as_whole or result.fallback == simulated[op].fallback != without[op].fallback, op


def test_hooks_of_many_ops_are_counted() -> None:
    """The message stays short."""
    spec = ARCHITECTURES["llama"].spec()
    assert isinstance(spec.model, nn.Module)
    for op in list_ops(spec.model):
        spec.model.get_submodule(op.name).register_forward_hook(lambda *_: None)
    with pytest.raises(QsensError, match=r"of lm_head, model\.embed_tokens, \S+ and 13 more, so"):
        scored(spec, "fx")
