"""A scheme for each op: whatever engine measures it, what is quantized is what the assignment says."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pytest_qsens import QsensError
from pytest_qsens.calibrated import CalibratedModel, calibrate
from pytest_qsens.engines.delta import tolerance
from pytest_qsens.graph.calls import Call
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.metrics import Score, energy
from pytest_qsens.models.spec import ModelSpec
from pytest_qsens.ops import Op
from pytest_qsens.quant.assignment import Assignment
from pytest_qsens.quant.calibration import Calibration
from pytest_qsens.quant.schemes import SCHEMES, scheme_named
from pytest_qsens.quant.simulate import Simulator
from tests.schemes import INTEGER

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from pytest_qsens.results import OpResult

ENGINES = ("replay", "delta", "eager")
UNQUANTIZED = "unquantized", "the config leaves it unquantized"
OPS = ("embed", "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head")


class Block(nn.Module):
    """Two layers and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Run them."""
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """An embedding, blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, 12)

    def forward(self, ids: Tensor) -> Tensor:
        """Give logits."""
        logits: Tensor = self.head(self.blocks(self.embed(ids)))
        return logits


def net() -> Net:
    """Build it, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval()


def ids(seed: int) -> dict[str, Tensor]:
    """Draw a batch."""
    return {"ids": torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(seed))}


def spec() -> ModelSpec:
    """Two batches for calibration and two others."""
    return ModelSpec(net(), [ids(1), ids(2)], [ids(3), ids(4)], lambda out, _: out, logits=True)


def assigned(schemes: Mapping[str, str], added: Mapping[str, str] | None = None) -> Assignment:
    """Quantize these ops, and no others; more of them may be added."""
    added = added or {}
    return Assignment(
        "the config",
        {op: SCHEMES[scheme] for op, scheme in {**schemes, **added}.items()},
        {op: schemes.get(op, "unquantized") for op in OPS},
        dict.fromkeys((op for op in OPS if op not in schemes), UNQUANTIZED),
        frozenset(added),
    )


def calibrated(schemes: str | Assignment, engine: str) -> CalibratedModel:
    """Calibrate with an engine, which must be the one."""
    found = calibrate(spec(), list_ops(net()), schemes, engine=engine)
    assert found.engine == engine
    return found


@cache
def plain(scheme: str, engine: str) -> CalibratedModel:
    """One scheme for all ops."""
    return calibrated(scheme, engine)


@cache
def simulator(scheme: str) -> Simulator:
    """Simulate one scheme, calibrated by hooks of the model's modules."""
    model, calibration = net(), Calibration(SCHEMES[scheme])
    for name in OPS:
        module = model.get_submodule(name)
        module.register_forward_hook(
            lambda module, args, output, name=name: calibration.observe(name, call_of(module, args[0]), output)
        )
    with torch.no_grad():
        for batch in spec().calibration:
            model(**batch)
    return Simulator(SCHEMES[scheme], calibration)


def call_of(module: nn.Module, x: Tensor) -> Call:
    """Arguments of a module's call."""
    if isinstance(module, nn.Embedding):
        return Call("embedding", x, module.weight)
    assert isinstance(module, nn.Linear)
    return Call("linear", x, module.weight, module.bias)


def by_hooks(schemes: Mapping[str, str]) -> float:
    """NMSE of the model with the outputs of these modules replaced, each by what its own scheme makes of it."""
    model, clean = net(), net()
    for name, scheme in schemes.items():
        model.get_submodule(name).register_forward_hook(
            lambda module, args, _, name=name, scheme=scheme: simulator(scheme).output(name, call_of(module, args[0]))
        )
    score, size = Score(logits=False), 0.0
    with torch.no_grad():
        for batch in spec().evaluation:
            reference = clean(**batch)
            score.add(reference, model(**batch))
            size += energy(reference)
    return score.sse / size


def nmse(result: OpResult, mode: str) -> float:
    """Return the score of a mode that must have been measured."""
    assert result.status == "measured", result.reason
    value: float = getattr(result, mode)["nmse"]
    return value


def op_of(name: str) -> Op:
    """Look up an op."""
    return next(op for op in list_ops(net()) if op.name == name)


def agree(one: float, other: float, engine: str, mode: str) -> bool:
    """Whether two scores are the same: to the last bit, but where engine ``delta`` adds up differences."""
    if engine != "delta":
        return one == other
    return abs(one - other) <= (tolerance(other) if mode == "isolated" else 1e-9 * other)


SCHEME = st.sampled_from([*INTEGER, "w8a16"])  # those that quantize embeddings, and inputs of any width


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(OPS), SCHEME, min_size=1), st.sampled_from(ENGINES), st.data())
def test_a_config_is_what_hooks_make_of_the_model(schemes: dict[str, str], engine: str, data: st.DataObject) -> None:
    """The whole, one op alone, and all but one or one more, each with its own scheme, equal a model with hooks."""
    left = sorted(set(OPS) - schemes.keys())
    added = {name: data.draw(SCHEME) for name in left[:1]}
    model = calibrated(assigned(schemes, added), engine)
    assert agree(nmse(model.total(), "isolated"), by_hooks(schemes), "replay", "total")
    name = data.draw(st.sampled_from(sorted(schemes)))
    found = model.score(op_of(name), ["isolated", "fallback"])
    assert agree(nmse(found, "isolated"), by_hooks({name: schemes[name]}), engine, "isolated")
    rest = {op: scheme for op, scheme in schemes.items() if op != name}
    assert agree(nmse(found, "fallback"), by_hooks(rest) if rest else 0.0, engine, "fallback")
    for op, scheme in added.items():
        found = model.score(op_of(op), ["isolated", "added"])
        assert agree(nmse(found, "isolated"), by_hooks(added), engine, "isolated")
        assert agree(nmse(found, "added"), by_hooks({**schemes, op: scheme}), engine, "added")
        assert found.added is not None
        assert found.added["loss"] == pytest.approx(nmse(found, "added") - nmse(model.total(), "isolated"), abs=1e-15)
    for op in left[1:]:
        assert (model.score(op_of(op), ["isolated"]).status, model.score(op_of(op), ["isolated"]).isolated) == (
            "unquantized",
            None,
        )


MIXED = {
    "embed": "w8a8",
    "blocks.0.up": "w8a8_dynamic",
    "blocks.0.down": "w8a8_static",
    "blocks.1.up": "w8a8",
    "blocks.1.down": "w8a8_dynamic",
}


@pytest.mark.parametrize("engine", ENGINES)
def test_one_op_alone_is_what_it_is_in_a_plain_run(engine: str) -> None:
    """Bit for bit, whatever the others have: its score can be taken from a run of its scheme."""
    model = calibrated(assigned(MIXED), engine)
    for name, scheme in MIXED.items():
        alone = model.score(op_of(name), ["isolated"]).isolated
        assert alone is not None
        assert alone == plain(scheme, engine).score(op_of(name), ["isolated"]).isolated


@pytest.mark.parametrize("engine", ENGINES)
def test_restoring_an_op_is_the_config_without_it(engine: str) -> None:
    """Mode ``fallback`` of an op is the total of the config that leaves it out, and ``added`` the other way round."""
    without = {op: scheme for op, scheme in MIXED.items() if op != "blocks.0.down"}
    one, other = (
        calibrated(assigned(MIXED), engine),
        calibrated(assigned(without, {"blocks.0.down": "w8a8_static"}), engine),
    )
    restored = nmse(one.score(op_of("blocks.0.down"), ["fallback"]), "fallback")
    assert agree(restored, nmse(other.total(), "isolated"), engine, "fallback")
    added = nmse(other.score(op_of("blocks.0.down"), ["added"]), "added")
    assert agree(added, nmse(one.total(), "isolated"), engine, "added")


@pytest.mark.parametrize("engine", ENGINES)
def test_members_of_a_group_keep_their_schemes(engine: str) -> None:
    """A group is flipped with each member's own scheme; what the config leaves out of it is told, and left out."""
    schemes = {"blocks.0.up": "w8a8_dynamic", "blocks.0.down": "w8a8", "blocks.1.up": "w8a8"}
    model = calibrated(assigned(schemes, {"blocks.1.down": "w8a8"}), engine)
    whole = Op("blocks.0", "linear", (op_of("blocks.0.up"), op_of("blocks.0.down")))
    part = Op("blocks.1", "linear", (op_of("blocks.1.up"), op_of("blocks.1.down")))
    found = model.score(whole, ["isolated"])
    alone = {op: scheme for op, scheme in schemes.items() if op.startswith("blocks.0")}
    assert agree(nmse(found, "isolated"), by_hooks(alone), engine, "isolated")
    found = model.score(part, ["isolated"])
    assert agree(nmse(found, "isolated"), by_hooks({"blocks.1.up": "w8a8"}), engine, "isolated")
    assert found.reason == f"without blocks.1.down (unquantized: {UNQUANTIZED[1]})"


def unsimulated(ops: Collection[str]) -> Assignment:
    """Quantize everything, some ops in a way that nobody can simulate."""
    names = {op: "mxfp4" if op in ops else "w8a8" for op in OPS}
    left_out = dict.fromkeys(ops, ("unquantizable", "mxfp4 cannot be simulated"))
    schemes = {op: SCHEMES["w8a8"] for op in OPS if op not in ops}
    return Assignment("the config", schemes, names, left_out)  # type: ignore[arg-type]  # literals


def test_the_total_says_what_it_is_without() -> None:
    """An op whose scheme cannot be simulated has no score, and every number of the whole model says so."""
    model = calibrated(unsimulated(OPS[:5]), "replay")
    result = model.score(op_of("embed"), ["isolated"])
    assert (result.status, result.reason) == ("unquantizable", "mxfp4 cannot be simulated")
    assert model.total().reason == (
        "without embed, blocks.0.up, blocks.0.down and 2 more, whose schemes cannot be simulated"
    )
    assert agree(nmse(model.total(), "isolated"), by_hooks({"head": "w8a8"}), "replay", "total")


def test_probe_estimates_a_config_but_nothing_that_is_added() -> None:
    """The estimates of a config's ops hold the exact scores; what would be added is refused."""
    exact = calibrated(assigned(MIXED), "replay")
    model = calibrated(assigned(MIXED), "probe")
    results = [model.score(op_of(name), ["isolated"]) for name in MIXED]
    bounds = {result.op: result.intervals["isolated"] for result in results if "isolated" in result.intervals}
    assert bounds
    for name, (low, high) in bounds.items():
        assert low / 2 <= nmse(exact.score(op_of(name), ["isolated"]), "isolated") <= 2 * high
    with pytest.raises(QsensError, match="asked for 1 ops"):
        calibrate(spec(), list_ops(net()), assigned(MIXED, {"head": "w8a8"}), engine="probe")


@pytest.mark.parametrize("engine", ["fx", "inc"])
def test_kernels_have_one_scheme(engine: str) -> None:
    """Engines with torch's kernels measure no config."""
    with pytest.raises(QsensError, match=f"engine {engine} measures scheme w8a8 only"):
        calibrate(spec(), list_ops(net()), assigned(MIXED), engine=engine)


def test_products_are_told_alike_under_every_scheme() -> None:
    """What is cached of a model is shared by runs under the same schemes, whatever they are called."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(self.q(x), x, x)

    batches = [{"x": torch.randn(2, 4, 8)}]
    own = ModelSpec(Attention().eval(), batches, batches, lambda output, _: output)
    uniform = Assignment.uniform(scheme_named("w8a8", "here"), list_ops(own.model))
    told = [calibrate(own, list_ops(own.model), replace(uniform, title=title)).functional_ops for title in ("a", "b")]
    assert told[0] == told[1]
    assert [op.reason for op in told[0]] == ["qk products are not quantized", "pv products are not quantized"]
