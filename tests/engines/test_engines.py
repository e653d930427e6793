"""The two engines agree to the last bit, and the errors of bad models are clear."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pytest_qsens.calibrated import calibrate
from pytest_qsens.errors import QsensError
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.models.spec import ModelSpec
from tests.architectures import ARCHITECTURES


def digits_of(spec: ModelSpec, engine: str, scheme: str = "w8a8") -> list[object]:
    """Score every op in both modes, and the total."""
    assert isinstance(spec.model, nn.Module)
    ops = list_ops(spec.model)
    model = calibrate(spec, ops, scheme, engine=engine)
    assert model.engine == engine
    results = [*(model.score(op, ["isolated", "fallback"]) for op in ops), model.total()]
    return [(r.op, r.status, r.isolated, r.fallback) for r in results]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_replay_equals_eager(name: str) -> None:
    """Every score of both modes, and the total, are bit-identical between replaying and running the model."""
    architecture = ARCHITECTURES[name]
    replay = digits_of(architecture.spec(), "replay")
    assert replay == digits_of(architecture.spec(), "eager")
    assert sum(status == "measured" for _, status, _, _ in replay) > len(replay) / 2  # type: ignore[misc] # tuples


class Net(nn.Module):
    """Two layers around a function."""

    def __init__(self, between: object = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers."""
        y = self.first(x)
        return self.second(self.between(y) if callable(self.between) else y)


def spec_of(model: nn.Module, x: Tensor | None = None) -> ModelSpec:
    """Score a model's output tensor on seeded data."""
    generator = torch.Generator().manual_seed(0)
    calibration = torch.randn(8, 4, generator=generator)
    evaluation = torch.randn(8, 4, generator=generator) if x is None else x
    return ModelSpec(model, [{"x": calibration}], [{"x": evaluation}], lambda out, _: out)


def seeded(between: object = None) -> Net:
    """Build the net with seeded weights."""
    torch.manual_seed(0)
    return Net(between)


def test_value_that_leaves_torch_goes_to_the_eager_engine() -> None:
    """A graph that holds an op's value as a constant would score zero; it is refused and the eager engine measures."""
    model = seeded(lambda y: torch.from_numpy(y.numpy() * 2))
    scored = calibrate(spec_of(model), list_ops(model), "w8a8")
    assert scored.engine == "eager"
    assert "follow the model" in (scored.engine_reason or "")
    result = scored.score(list_ops(model)[0], ["isolated"])
    assert result.isolated is not None
    assert result.isolated["nmse"]


def test_branch_on_an_op_goes_to_the_eager_engine() -> None:
    """The reason is kept for the summary; asking for replay is an error."""
    model = seeded(lambda y: y * 2 if y.sum() > 0 else y)
    assert "depend on activations" in (calibrate(spec_of(model), list_ops(model), "w8a8").engine_reason or "")
    with pytest.raises(QsensError, match="replay cannot be used"):
        calibrate(spec_of(model), list_ops(model), "w8a8", engine="replay")


def test_not_finite_reference_names_the_op() -> None:
    """An overflow in the reference names the first op whose output holds it."""
    model = seeded()
    with torch.no_grad():
        model.first.weight.mul_(100)
    with pytest.raises(QsensError, match=r"evaluation batch 1 .*first in op first"):
        calibrate(spec_of(model, torch.full((2, 4), 3e38)), list_ops(model), "w8a8")


def test_not_finite_only_when_quantized_fails_that_op() -> None:
    """An op whose rounding leads to NaN is failed, with no number; the others are measured."""
    model = seeded(lambda y: y.abs().clamp_min(1e-9).where(y != 0, -torch.ones(())).log())
    spec = spec_of(model, torch.zeros(1, 4) + 1e-3)
    with torch.no_grad():
        model.first.bias.copy_(torch.tensor([1e-6, 1.0, -1.0, 0.5]))
        model.first.weight.fill_(1e-4)
    first, second = list_ops(model)
    scored = calibrate(spec, (first, second), "w8a8")
    result = scored.score(first, ["isolated"])
    assert (result.status, result.isolated) == ("failed", None)
    assert "NaN" in (result.reason or "")
    assert scored.score(second, ["isolated"]).status == "measured"


def test_random_model_is_refused() -> None:
    """A model whose runs differ cannot be scored by any engine."""
    model = seeded(lambda y: y + torch.rand_like(y))
    with pytest.raises(QsensError, match="not deterministic"):
        calibrate(spec_of(model), list_ops(model), "w8a8")


def test_zero_reference_is_refused() -> None:
    """No relative error exists against a zero output."""
    model = seeded(lambda y: y * 0)
    with torch.no_grad():
        model.second.bias.zero_()
    with pytest.raises(QsensError, match="zero everywhere"):
        calibrate(spec_of(model), list_ops(model), "w8a8")


def test_tied_weights_flip_alone() -> None:
    """Quantizing a head that shares the embedding's weight leaves the embedding as it is, and the other way round."""
    spec = ARCHITECTURES["qwen2_5_vl"].spec()
    assert isinstance(spec.model, nn.Module)
    ops = {op.name: op for op in list_ops(spec.model)}
    before = spec.model.lm_head.weight.clone()  # type: ignore[operator, union-attr] # a linear
    model = calibrate(spec, list(ops.values()), "w8a8")
    head = model.score(ops["lm_head"], ["isolated"])
    embedding = model.score(ops["model.language_model.embed_tokens"], ["isolated"])
    assert head.isolated != embedding.isolated
    assert torch.equal(before, spec.model.lm_head.weight)  # type: ignore[arg-type, union-attr] # a linear
    assert spec.model.lm_head.weight is spec.model.model.language_model.embed_tokens.weight  # type: ignore[union-attr]


def test_unexercised_ops_have_no_number() -> None:
    """An op that the evaluation data never reached, or that has no scales, says so and has no score."""
    spec = ARCHITECTURES["qwen2_5_vl"].spec()
    assert isinstance(spec.model, nn.Module)
    text = {key: value for key, value in spec.evaluation[0].items() if key in ("attention_mask", "use_cache")}
    text["input_ids"] = spec.evaluation[0]["input_ids"].clamp_max(99)
    ops = {op.name: op for op in list_ops(spec.model)}
    vision = ops["model.visual.blocks.0.attn.qkv"]
    only_text = ModelSpec(spec.model, [text], [text], spec.output, logits=True)
    result = calibrate(only_text, list(ops.values()), "w8a8").score(vision, ["isolated"])
    assert (result.status, result.isolated, result.reason) == (
        "unexercised",
        None,
        "the evaluation data never reached it",
    )
    uncalibrated = ModelSpec(spec.model, [text], spec.evaluation, spec.output, logits=True)
    result = calibrate(uncalibrated, list(ops.values()), "w8a8").score(vision, ["isolated"])
    assert (result.status, result.isolated) == ("unexercised", None)
    assert "calibration" in (result.reason or "")
