"""What Intel Neural Compressor does on its own, and what is left of it in the process and on the model: nothing."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from neural_compressor.adaptor.torch_utils import util
from torch import Tensor, nn
from torch.ao.quantization.fx.utils import assert_and_get_unique_device
from torch.fx import GraphModule

from pytest_qsens.calibrated import calibrate
from pytest_qsens.engines.inc import IncEngine
from pytest_qsens.errors import QsensError
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.models.spec import ModelSpec
from tests.inc.engines import build, equal, inc_number, network
from tests.inc.models import MLP, PATCH_EMBEDDING, mlp, randn, vl_image, vl_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    """Run as a calibrated model runs an engine."""
    with torch.no_grad():
        yield


def engine_of(spec: ModelSpec) -> IncEngine:
    """Build the engine as `calibrate` does."""
    engine = calibrate(spec, list_ops(network(spec)), "w8a8", engine="inc")._engine
    assert isinstance(engine, IncEngine)
    return engine


def test_unexercised_ops_have_no_number() -> None:
    """On text alone, it gives every op of the vision tower one number: that of the model with everything quantized.

    Those are the values that look like a result and are none; as an op of the plugin, each is unexercised.
    """
    spec = vl_text()
    ops = list_ops(network(spec))
    vision = [op for op in ops if op.name.startswith("model.visual.")]
    asked = [op.name for op in ops]
    engine = IncEngine(network(spec), spec.evaluation, spec.output, asked, spec.calibration)
    (joint,) = engine.joint()
    everything = inc_number(engine.references, [joint])
    some = [op.name for op in vision][::4]
    assert {engine.fall_back(op).sse for op in some} == {everything}
    text = "model.language_model.layers.0.self_attn.q_proj"
    assert engine.fall_back(text).sse != everything
    for name in ("inc", "fx"):
        scored = calibrate(spec, ops, "w8a8", engine=name)
        for op in vision:
            result = scored.score(op, ["isolated", "fallback"])
            assert (result.status, result.isolated, result.fallback) == ("unexercised", None, None), op


def test_patch_embedding_fails_alone() -> None:
    """The op that breaks the model when quantized is failed in both modes, with the reason; others are measured."""
    spec = vl_image()
    ops = {op.name: op for op in list_ops(network(spec))}
    scored = calibrate(spec, list(ops.values()), "w8a8", engine="inc")
    result = scored.score(ops[PATCH_EMBEDDING], ["isolated", "fallback"])
    assert (result.status, result.isolated, result.fallback) == ("failed", None, None)
    reason = result.reason or ""
    assert reason.count("'function' object has no attribute 'dtype'") == 2
    assert "only this op is quantized" in reason
    assert "everything but this op is quantized" in reason
    other = scored.score(ops["model.visual.blocks.0.attn.qkv"], ["isolated", "fallback"])
    assert other.status == "measured"
    for scores in (other.isolated, other.fallback):
        assert scores is not None
        assert scores["inc_sse"] == pytest.approx(scores["sse"], rel=1e-5)
        assert "noise" not in scores
    assert scored.total().status == "measured"


class Two(nn.Module):
    """Takes two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Use both."""
        out: Tensor = self.second(torch.tanh(self.first(x)) + y)
        return out


def test_batch_of_two_keys() -> None:
    """A batch with two keys is not taken for a batch and its label."""
    torch.manual_seed(0)
    batch = {"x": randn(8, 4, seed=1), "y": randn(8, 4, seed=2)}
    both = build(ModelSpec(Two().eval(), [batch], [batch], lambda out, _: out))
    assert len(both.ops) == 2
    for op in both.ops:
        assert equal(both.inc.fall_back(op).outputs, both.fx.fallback(op))


def state(model: nn.Module) -> list[Any]:
    """Everything on a model that can be left changed."""
    tensors = [(name, id(t), t._version, t.clone()) for name, t in [*model.named_parameters(), *model.named_buffers()]]
    modules = [
        (name, id(module), sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]
    return [[(n, i, v) for n, i, v, _ in tensors], [t.tolist() for *_, t in tensors], modules]


@pytest.mark.parametrize("model", [mlp, vl_text])
def test_nothing_is_left_on_the_model(model: Callable[[], ModelSpec]) -> None:
    """After both phases the model has no hook, no attribute and no value that it did not have before."""
    spec = model()
    before, output = state(network(spec)), network(spec)(**spec.evaluation[0])
    engine = engine_of(spec)
    op = min(engine._quantizable)
    list(engine.joint())
    list(engine.fallback(op))
    list(engine.isolated(op))
    assert state(network(spec)) == before
    after = network(spec)(**spec.evaluation[0])
    assert torch.equal(getattr(after, "logits", after), getattr(output, "logits", output))


def test_memory_does_not_grow() -> None:
    """Torch keeps every graph that was ever prepared in a cache without bound; here none stays, however many ops."""
    engine = engine_of(mlp())
    ops = sorted(engine._quantizable)

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(found), GraphModule) for found in gc.get_objects())

    engine.fall_back(ops[0])
    before = alive()
    for op in ops:
        engine.fall_back(op)
        next(engine.requantize([op]))
    assert alive() == before
    assert assert_and_get_unique_device.cache_info().currsize == 0


def test_models_do_not_mix() -> None:
    """A second model with the same names of ops, in the same process, gives what it gives alone."""
    alone = {op: engine_of(mlp(seed=1)).fall_back(op).sse for op in ("layers.0", "head")}
    first, second = engine_of(mlp(seed=0)), engine_of(mlp(seed=1))
    for op, value in alone.items():
        first.fall_back(op)
        next(first.requantize([op]))
        assert second.fall_back(op).sse == value
        assert first.fall_back(op).sse != value


def test_leaving_an_op_out_does_not_move_the_reading_point() -> None:
    """Without an op that is last in the model or in the list, the score is still that of the output.

    Its own functions read the score at the last op of a dictionary, to the end of which an excluded op is moved.
    """
    spec = mlp()
    for left_out in ("head", "layers.0"):
        ops = [op.name for op in list_ops(network(spec)) if op.name != left_out]
        engine = IncEngine(network(spec), spec.evaluation, spec.output, ops, spec.calibration)
        for op in ops:
            measured = engine.fall_back(op)
            assert [tuple(output.shape) for output in measured.outputs] == [(16, 8)]
            assert measured.sse == inc_number(engine.references, measured.outputs) > 0


def test_several_batches_are_scored_together() -> None:
    """Its number is the sum over all evaluation batches."""
    spec = mlp()
    spec = replace(spec, evaluation=[{"x": randn(16, 32, seed=2)}, {"x": randn(5, 32, seed=3)}])
    both = build(spec)
    measured = both.inc.fall_back("head")
    assert [len(output) for output in measured.outputs] == [16, 5]
    assert equal(measured.outputs, both.fx.fallback("head"))
    assert measured.sse == inc_number(both.inc.references, measured.outputs)


def names() -> dict[str, Any]:
    """Return what is defined in its module, and what it knows of earlier models."""
    return {**vars(util), "op_cfg_mapping": dict(util.op_cfg_mapping)}


class Fails(MLP):
    """Fails as soon as it is prepared."""

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers, if they are linears."""
        if type(self.head).__module__ != "torch.nn.modules.linear":
            raise RuntimeError("quantized")
        return super().forward(x)


@pytest.mark.parametrize("fail", [False, True])
def test_process_is_as_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str], *, fail: bool
) -> None:
    """Names in its module, logging, warnings and threads are restored, also after an exception; nothing is written."""
    engine_of(mlp())  # imports
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(util.op_cfg_mapping, "other", "kept")
    logger = logging.getLogger("neural_compressor")
    before = names()
    settings = (logging.root.manager.disable, logger.level, logger.disabled, list(warnings.filters))
    threads = torch.get_num_threads()
    capfd.readouterr()
    engine = engine_of(mlp())
    if fail:
        monkeypatch.setattr(engine, "evaluate", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine._first_phase(engine._keys["head"], engine._quantizable)
    else:
        list(engine.fallback("head"))
        list(engine.isolated("head"))
    assert names() == before
    assert settings == (logging.root.manager.disable, logger.level, logger.disabled, list(warnings.filters))
    assert torch.get_num_threads() == threads
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - its history would be a directory
    assert tuple(capfd.readouterr()) == ("", "")


def test_several_ops_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops that break the model are found by halves, and those that only break it together are an error."""
    engine = engine_of(mlp())
    run = engine._first_phase

    def breaking(candidate: Any, quantized: Any) -> Any:  # noqa: ANN401 - as the method
        if {"layers.1", "head"} & set(quantized):
            raise RuntimeError("no kernel")
        return run(candidate, quantized)

    monkeypatch.setattr(engine, "_first_phase", breaking)
    assert engine._without_kernels().keys() == {"layers.1", "head"}
    with pytest.raises(RuntimeError, match="no kernel"):
        list(engine.fallback("head"))
    assert len(list(engine.fallback("layers.0"))) == 1
    engine = engine_of(mlp())

    def together(_: Any, quantized: Any) -> Any:  # noqa: ANN401 - as the method
        # by types they are searched one by one, where each is harmless
        if len(quantized) == len(engine._quantizable):
            raise RuntimeError("no kernel")
        return run(engine._keys["head"], engine._quantizable)

    monkeypatch.setattr(engine, "_first_phase", together)
    monkeypatch.setattr(engine, "_search", lambda _: {})
    with pytest.raises(QsensError, match="no op alone is to blame: RuntimeError: no kernel"):
        list(engine.joint())


class Odd(nn.Linear):
    """A linear by inheritance only."""


def test_op_that_it_does_not_list() -> None:
    """It knows modules by their exact class; what it does not list is unquantizable, in fx as well."""
    torch.manual_seed(0)
    model = MLP()
    model.layers[0] = Odd(32, 32)
    x = {"x": randn(16, 32, seed=1)}
    spec = ModelSpec(model.eval(), [x], [x], lambda out, _: out)
    ops = list_ops(model)
    for name, reason in (("inc", "does not list it"), ("fx", "no kernel for it")):
        result = calibrate(spec, ops, "w8a8", engine=name).score(ops[0], ["isolated"])
        assert result.status == "unquantizable"
        assert reason in (result.reason or "")


class Encoder(nn.Module):
    """A layer that torch.fx takes as one call, between two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, tokens, 16)`` to ``(N, tokens, 4)``."""
        out: Tensor = self.last(self.layer(self.first(x)))
        return out


def test_what_is_listed_and_left_in_fp32_has_no_number() -> None:
    """Ops that Intel Neural Compressor lists and never quantizes failed; they are not measured as identical."""
    torch.manual_seed(0)
    batches = [{"x": torch.randn(2, 5, 16)} for _ in range(2)]
    spec = ModelSpec(Encoder().eval(), batches[:1], batches[1:], lambda out, _: out)
    ops = list_ops(network(spec))
    model = calibrate(spec, ops, "w8a8", engine="inc")
    results = {op.name: model.score(op, ["isolated", "fallback"]) for op in ops}
    for name in ("layer.linear1", "layer.linear2"):
        assert results[name].status == "failed"
        assert results[name].modes == {}
        assert (results[name].reason or "").count("leaves it in fp32") == 2
    assert results["first"].status == results["last"].status == "measured"
    packed = calibrate(spec, ops, "w8a8", engine="fx")
    by_name = {op.name: op for op in ops}
    assert "inside of a module that is traced as one call" in (
        packed.score(by_name["layer.linear1"], ["isolated"]).reason or ""
    )


FRESH = """
import os, random
import numpy as np
import torch
from pytest_qsens.calibrated import calibrate
from pytest_qsens.graph.modules import list_ops
from tests.inc.models import mlp

spec = mlp()
for seed in (torch.manual_seed, np.random.seed, random.seed):
    seed(5)
before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(), dict(os.environ)
ops = list_ops(spec.model)
model = calibrate(spec, ops, "w8a8", engine="inc")
model.score(ops[0], ["isolated", "fallback"])
after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(), dict(os.environ)
assert torch.equal(before[0], after[0])
assert before[1:3] == after[1:3]
assert after[3] == before[3] | {"MKL_CBWR": "AUTO,STRICT"}, {k for k in after[3] if after[3][k] != before[3].get(k)}
print("as before")
"""


def test_seeds_and_environment_are_kept() -> None:
    """From the first import on: random states are the user's, and no variable is set but the one for MKL."""
    run = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=False)
    assert run.stdout.endswith("as before\n"), run.stderr
