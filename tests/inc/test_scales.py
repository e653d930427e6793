"""Scales, zero points and integers of weights are those of Intel Neural Compressor."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pytest_qsens.engines.inc import IncEngine
from pytest_qsens.quant.integers import quantize_weight
from tests.inc.engines import Both, build, network
from tests.inc.models import minilm, resnet, vl_image

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_qsens.models.spec import ModelSpec


class Found(NamedTuple):
    """How one op is quantized."""

    input: tuple[float, int] | None
    output: tuple[float, int]
    integers: Tensor
    scales: Tensor


def converted(engine: IncEngine, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Return the fully quantized model that it makes and throws away."""
    seen: list[nn.Module] = []
    evaluate = IncEngine.evaluate

    def keeping(self: IncEngine, model: nn.Module) -> list[Tensor]:
        seen.append(model)
        return evaluate(self, model)

    monkeypatch.setattr(IncEngine, "evaluate", keeping)
    list(engine.joint())
    monkeypatch.undo()
    return seen[-1]


def quantized_ops(model: nn.Module) -> dict[str, Found]:
    """Op → what its module and the node before it in the graph say; embeddings are left out."""
    found = {}
    for prefix, graph in model.named_modules():
        if not isinstance(graph, GraphModule):
            continue
        for node in graph.graph.nodes:
            module: Any = graph.get_submodule(node.target) if node.op == "call_module" else None
            if not (hasattr(module, "scale") and hasattr(module, "weight") and callable(module.weight)):
                continue
            name = ".".join(part for part in (prefix, node.target) if part).removesuffix(".module")
            weight = module.weight()
            before = node.args[0]
            at_input = None
            if before.target is torch.quantize_per_tensor:
                scale, zero_point = (getattr(graph, argument.target) for argument in before.args[1:3])
                at_input = float(scale), int(zero_point)
            scales = weight.q_per_channel_scales().float()
            found[name] = Found(at_input, (float(module.scale), int(module.zero_point)), weight.int_repr(), scales)
    return found


def of_simulation(both: Both, op: str) -> Found:
    """How our simulation quantizes an op."""
    calibration = both.replay._simulator._calibration
    module = network(both.spec).get_submodule(op)
    assert isinstance(module.weight, Tensor)
    weight = quantize_weight(module.weight)
    at_input, output = calibration.input_qparams(op), calibration.output_qparams(op)
    return Found((at_input.scale, at_input.zero_point), (output.scale, output.zero_point), weight.values, weight.scale)


def same(left: Found, right: Found) -> bool:
    """Whether two agree on everything that both know."""
    return (
        left.output == right.output
        and (left.input is None or left.input == right.input)
        and torch.equal(left.integers, right.integers)
        and torch.equal(left.scales, right.scales)
    )


@pytest.mark.parametrize("model", [vl_image, minilm])
def test_simulation(model: Callable[[], ModelSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every scale, zero point and integer of a weight in its converted model is that of our simulation, and of fx."""
    with torch.no_grad():
        both = build(model())
        found = quantized_ops(converted(both.inc, monkeypatch))
    embeddings = {op for op in both.ops if isinstance(network(both.spec).get_submodule(op), nn.Embedding)}
    assert found.keys() == set(both.ops) - embeddings
    assert all(values.input is not None for values in found.values())
    for op, values in found.items():
        assert same(values, of_simulation(both, op)), op
        fx_input, fx_output = both.fx.input_qparams[op], both.fx.output_qparams[op]
        assert values.input == (fx_input.scale, fx_input.zero_point), op
        assert values.output == (fx_output.scale, fx_output.zero_point), op


def folded(spec: ModelSpec) -> ModelSpec:
    """Fold the batch norms of the residual network into its convolutions by hand."""
    model: Any = deepcopy(network(spec))
    places = [(model, "stem", "bn")]
    for block in model.blocks:
        places += [(block, "conv1", "bn1"), (block, "conv2", "bn2")]
        if isinstance(block.down, nn.Sequential):
            places.append((block.down, "0", "1"))
    for parent, conv, norm in places:
        setattr(parent, conv, fuse_conv_bn_eval(getattr(parent, conv), getattr(parent, norm)))
        setattr(parent, norm, nn.Identity())
    return replace(spec, model=model.requires_grad_(requires_grad=False))


def test_folded_batch_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a network with batch norms, the simulation differs by what torch fuses and shares, and by nothing else.

    torch folds the norms into the weights before it quantizes those; the simulation quantizes the weights as the model
    has them. With the norms folded by hand, all weights agree. So do the inputs of all convolutions, and the outputs of
    those without a relu: a kernel with a fused relu rounds behind it, the simulation before it. What one of them gives
    when it alone is quantized then differs in the last bit of fp32 sums, as a kernel's output lies differently in
    memory. And the head's input has the scale of what is pooled, as torch lets a pooling share the one of its input.
    """
    with torch.no_grad():
        spec = resnet()
        both, by_hand = build(spec), build(folded(spec))
        found = quantized_ops(converted(both.inc, monkeypatch))
        plain = [op for op in both.ops if torch.equal(found[op].scales, of_simulation(both, op).scales)]
        assert plain == ["fc"]
        inputs, outputs = set(), set()
        for op in both.ops:
            ours = of_simulation(by_hand, op)
            assert torch.equal(found[op].integers, ours.integers), op
            assert torch.equal(found[op].scales, ours.scales), op
            at_input = both.fx.input_qparams[op]
            if (at_input.scale, at_input.zero_point) == ours.input:
                inputs.add(op)
            if found[op].output == ours.output:
                outputs.add(op)
        assert inputs == set(both.ops) - {"fc"}
        assert outputs == set(both.ops) - {"stem", "blocks.0.conv1", "blocks.1.conv1"}
        for op in inputs & outputs:
            (ours_alone,), (alone,) = by_hand.replay.isolated(op), both.fx.isolated(op)
            torch.testing.assert_close(ours_alone, alone, rtol=0, atol=1e-7)
