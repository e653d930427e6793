"""Products of two activations: every engine measures what a model does that rounds both factors itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama import modeling_llama

from pytest_qsens import QsensError, engine_setup
from pytest_qsens.calibrated import calibrate
from pytest_qsens.engines.availability import check_engine
from pytest_qsens.engines.delta import tolerance
from pytest_qsens.graph.attention import list_states
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.graph.products import list_products
from pytest_qsens.metrics import Score
from pytest_qsens.models.spec import ModelSpec
from pytest_qsens.ops import STATES
from pytest_qsens.quant.assignment import Assignment
from pytest_qsens.quant.schemes import scheme_named
from tests.architectures import ARCHITECTURES
from tests.graph.attending import Flexible, InDtype, Mapped
from tests.graph.test_products import Never, Products
from tests.test_artifact import artifact, refuse

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from pytest_qsens.ops import Op
    from pytest_qsens.results import Mode, OpResult

ENGINES = ("replay", "delta", "eager")
MODES: tuple[Mode, ...] = ("isolated", "fallback")
SCHEMES = ("bmm_int8_dynamic", "bmm_fp8_dynamic", "bmm_fp8", "bmm_int8", "bmm_fp8_dynamic_tensor", "bmm_int4_asym")


def nmse(result: OpResult, mode: str) -> float:
    """Take the NMSE of one mode."""
    found: float = getattr(result, mode)["nmse"]
    return found


def agree(spec: ModelSpec, ops: Collection[Op], scheme: str) -> list[OpResult]:
    """Compare the engines in both modes, and return what a replay measures."""
    models = {engine: calibrate(spec, [*ops], scheme, engine=engine) for engine in ENGINES}
    found = {engine: [model.score(op, MODES) for op in ops] for engine, model in models.items()}
    totals = [model.total().isolated for model in models.values()]
    assert models["delta"].engine == "delta"
    assert totals[0] == totals[1] == totals[2] is not None
    for replay, eager, delta in zip(found["replay"], found["eager"], found["delta"], strict=True):
        assert (replay.status, replay.isolated, replay.fallback) == (eager.status, eager.isolated, eager.fallback)
        if replay.isolated is not None:
            expected = nmse(replay, "isolated")
            assert nmse(delta, "isolated") == pytest.approx(expected, abs=tolerance(expected), rel=0)
            assert nmse(delta, "fallback") == pytest.approx(nmse(replay, "fallback"), rel=1e-9)
    return found["replay"]


@pytest.mark.parametrize(("name", "scheme"), [("clip", "bmm_int8_dynamic"), ("bert", "bmm_fp8")])
def test_engines_agree(name: str, scheme: str) -> None:
    """Replays have the bits of whole forwards, differences are as near as they are for layers, in both modes."""
    spec = ARCHITECTURES[name].spec()
    ops = list_products(spec.model)[-5:]
    results = agree(spec, ops, scheme)
    assert {result.status for result in results} == {"measured"}
    assert all(nmse(result, "isolated") > 0 for result in results)


def rounded(x: Tensor, scheme: str, dim: int, seen: Tensor | None = None) -> Tensor:
    """Round a factor that is summed over along ``dim``: what these schemes mean, written down once more."""
    parts = scheme.split("_")
    over = {"keepdim": True} | ({} if "tensor" in parts else {"dim": dim})
    source = x if "dynamic" in parts else seen
    assert source is not None
    if "dynamic" not in parts or "tensor" in parts:
        low, high = source.min(), source.max()
    else:
        low, high = source.amin(**over), source.amax(**over)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if parts[1] == "fp8":
        scale = torch.maximum(-low, high).clamp(min=1e-30) / 448
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    levels = 2 ** int(parts[1].removeprefix("int"))
    zero = torch.zeros(())
    if "asym" in parts:
        scale = (high - low) / (levels - 1)
        zero = (-levels / 2 - torch.round(low / scale)).clamp(-levels / 2, levels / 2 - 1)
    else:
        scale = torch.maximum(-low, high).clamp(min=1e-30) / ((levels - 1) / 2)
    return (torch.round(x * (1 / scale)) + zero).clamp(-levels / 2, levels / 2 - 1).sub(zero) * scale


class Block(nn.Module):
    """A block with grouped-query attention, of 4 heads and 2, under a mask that leaves one query nothing."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 64), nn.Linear(32, 32)
        self.kind = kind

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take ``(N, tokens, 32)`` to heads of 8."""
        q, k, v = self.qkv(x).split((32, 16, 16), -1)
        return tuple(part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in (q, k, v))  # type: ignore[return-value] # three

    def mask(self, tokens: int) -> Tensor | None:
        """Make the mask: causal and bool, without the first query's own key; or of numbers; or none."""
        if self.kind == "bool":
            return torch.ones(tokens, tokens, dtype=torch.bool).tril(-1)
        return torch.arange(float(tokens)).expand(tokens, tokens) if self.kind == "float" else None

    def forward(self, x: Tensor) -> Tensor:
        """Attend, and add."""
        q, k, v = self.split(x)
        mask, causal = self.mask(x.shape[1]), self.kind == "causal"
        y = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=0.5, enable_gqa=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


class ByHand(Block):
    """The same in plain steps; ``flipped`` products have their factors rounded, and ``seen`` keeps what they were."""

    def __init__(self, block: Block, scheme: str, seen: dict[str, Tensor], flipped: Collection[str]) -> None:
        super().__init__(block.kind)
        self.load_state_dict(block.state_dict())
        self.scheme, self.seen, self.flipped = scheme, seen, flipped
        self.calibrating = False

    def factor(self, name: str, x: Tensor, dim: int) -> Tensor:
        """Round one of q, k, p and v."""
        if self.calibrating:
            self.seen[name] = x
        if not any(name in product for product in self.flipped) or self.calibrating:
            return x
        return rounded(x, self.scheme, dim, self.seen.get(name))

    def forward(self, x: Tensor) -> Tensor:
        """Attend, and add."""
        q, k, v = self.split(x)
        k, v = (part.repeat_interleave(2, 1) for part in (k, v))
        scores = self.factor("q", q, -1) @ self.factor("k", k, -1).mT * 0.5
        mask = torch.ones_like(scores, dtype=torch.bool).tril() if self.kind == "causal" else self.mask(x.shape[1])
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e30) if mask.dtype == torch.bool else scores + mask
        p = scores.softmax(-1)
        if self.kind == "bool":
            p = p * mask
        y = self.factor("p", p, -1) @ self.factor("v", v, -2)
        return x + self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [*(("causal", scheme) for scheme in SCHEMES), *((kind, SCHEMES[0]) for kind in ("none", "bool", "float"))],
)
def test_scores_are_those_of_a_model_that_rounds_by_hand(kind: str, scheme: str) -> None:
    """Of either product and of both, with arithmetic that shares nothing with ours; everything in between agrees."""
    torch.manual_seed(5)
    block = Block(kind).eval()
    batches = [{"x": torch.randn(2, 6, 32)} for _ in range(2)]
    spec = ModelSpec(block, batches[:1], batches[1:], lambda out, _: out, logits=False)
    ops = list_products(block)
    assert [op.name for op in ops] == [":qk", ":pv"]
    measured = calibrate(spec, ops, scheme, engine="replay")
    seen: dict[str, Tensor] = {}
    with torch.no_grad():
        reference = ByHand(block, scheme, seen, ())
        reference.calibrating = True
        reference(**batches[0])
        reference.calibrating = False
        x, exact = batches[1]["x"], block(**batches[1])
        torch.testing.assert_close(reference(x), exact, rtol=1e-5, atol=1e-6)
        for flipped, result in (
            (["qk"], measured.score(ops[0], ["isolated"])),
            (["pv"], measured.score(ops[1], ["isolated"])),
            (["qk", "pv"], measured.total()),
        ):
            score = Score(logits=False)
            score.add(exact, ByHand(block, scheme, seen, flipped)(x))
            assert result.isolated is not None
            assert score.sse > 0
            assert result.isolated["sse"] == pytest.approx(score.sse, rel=1e-4)
        fallback = measured.score(ops[0], ["fallback"]).fallback
        assert fallback is not None
        assert fallback["sse"] == measured.score(ops[1], ["isolated"]).isolated["sse"]  # type: ignore[index] # as above


@pytest.mark.parametrize("kind", ["causal", "bool"])
def test_engines_agree_on_attention_of_ones_own(kind: str) -> None:
    """Layers around it are linear, and go through differences; attention does not."""
    torch.manual_seed(6)
    blocks = nn.Sequential(Block(kind), Block(kind))
    batches = [{"input": torch.randn(2, 6, 32)} for _ in range(2)]
    spec = ModelSpec(blocks, batches[:1], batches[1:], lambda out, _: out, logits=False)
    results = agree(spec, list_products(blocks), "bmm_int8")
    assert [result.op for result in results] == ["0:qk", "0:pv", "1:qk", "1:pv"]
    assert all(result.status == "measured" and nmse(result, "fallback") > 0 for result in results)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_scores_are_those_of_transformers_with_rounding_attention(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its eager attention, patched to round, errs as is measured, whichever attention the measured model has."""
    spec = ARCHITECTURES["llama"].spec()
    model: Any = spec.model
    model.set_attn_implementation(implementation)
    ops = list_products(model)
    measured = calibrate(spec, ops, "bmm_fp8_dynamic", engine="delta")
    plain: Callable[..., Any] = modeling_llama.eager_attention_forward
    flipped: set[str] = set()

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: object
    ) -> tuple[Tensor, None]:
        layer, groups = f"model.layers.{module.layer_idx}.self_attn", module.num_key_value_groups

        def factor(kind: str, x: Tensor, dim: int) -> Tensor:
            return rounded(x, "bmm_fp8_dynamic", dim) if f"{layer}:{kind}" in flipped else x

        key, value = factor("qk", key, -1), factor("pv", value, -2)
        key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
        scores = factor("qk", query, -1) @ key.mT * scaling
        p = (scores if mask is None else scores + mask).softmax(-1)
        return (factor("pv", p, -1) @ value).transpose(1, 2), None

    model.set_attn_implementation("eager")
    with torch.no_grad():
        exact = model(**spec.evaluation[0]).logits
        monkeypatch.setattr(modeling_llama, "eager_attention_forward", attend)
        assert modeling_llama.eager_attention_forward is not plain
        torch.testing.assert_close(model(**spec.evaluation[0]).logits, exact, rtol=1e-4, atol=1e-6)
        for chosen, result in (
            *(({op.name}, measured.score(op, ["isolated"])) for op in ops),
            ({op.name for op in ops}, measured.total()),
        ):
            flipped.clear()
            flipped.update(chosen)
            score = Score(logits=False)
            score.add(exact, model(**spec.evaluation[0]).logits)
            assert result.isolated is not None
            # torch's kernel differs in last digits from the steps, and what is half way between two numbers follows
            near = 1e-4 if implementation == "eager" else 5e-2
            assert result.isolated["sse"] == pytest.approx(score.sse, rel=near)


def own(module: nn.Module) -> ModelSpec:
    """Make a model of a module, and data."""
    torch.manual_seed(3)
    batches = [{"input": torch.randn(2, 5, 8)} for _ in range(2)]
    return ModelSpec(nn.Sequential(module), batches[:1], batches[1:], lambda out, _: out, logits=False)


@pytest.mark.parametrize("scheme", ["bmm_int8_dynamic", "bmm_int8_asym"])
def test_products_of_ones_own(scheme: str) -> None:
    """Those in a function, in a loop and with an addition are measured; one with a weight says why it is not."""
    spec = own(Products())
    results = agree(spec, list_products(spec.model), scheme)
    assert [result.status for result in results] == ["measured"] * 4 + ["unquantizable"]
    assert all(nmse(result, "isolated") > 0 for result in results[:4])
    assert str(results[4].reason).startswith("its module ran, but did not multiply two activations here: one factor is")


class Dropping(nn.Module):
    """Attends with dropout, the same in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over ``(N, tokens, 8)``."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1), dropout_p=0.1)


@pytest.mark.parametrize("scheme", ["bmm_fp8", "bmm_fp8_dynamic"])
def test_dropout_is_told(scheme: str) -> None:
    """Probabilities that are dropped inside of the product are out of reach; what goes into it is not."""
    spec = own(Dropping())
    ops = list_products(spec.model)
    model = calibrate(spec, ops, scheme, engine="eager")
    found = [model.score(op, ["isolated"]) for op in ops]
    assert [result.status for result in found] == ["measured", "unquantizable"]
    assert str(found[1].reason) == "attention drops probabilities at random, and cannot be taken apart"


def test_one_product_is_rounded_as_said() -> None:
    """Rows of the left factor, columns of the right one."""
    spec = own(Products(0))
    model: Any = spec.model
    batch = spec.evaluation[0]["input"]
    with torch.no_grad():
        exact = model(batch)
        y = model[0].wide(batch)
        left, right = model[0].mixing @ y, y.transpose(1, 2)
        near = torch.bmm(rounded(left, "bmm_int8_dynamic", -1), rounded(right, "bmm_int8_dynamic", -2))
        expected = model[0].biased(near, y @ batch.mT)
    score = Score(logits=False)
    score.add(exact, expected)
    ops = list_products(spec.model)
    found = calibrate(spec, ops, "bmm_int8_dynamic", engine="replay").score(ops[0], ["isolated"]).isolated
    assert found is not None
    assert found["sse"] == pytest.approx(score.sse, rel=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_no_data_reach_has_no_number(engine: str) -> None:
    """A product of a module that never runs is unexercised; one that was not made in its forward is not quantized."""

    class Skipping(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self[0](x)
            return found

    spec = own(Skipping(Never(), Never()))
    ops = list_products(spec.model)
    model = calibrate(spec, ops, "bmm_fp8", engine=engine)
    assert [model.score(op, MODES).status for op in ops] == ["unquantizable", "unexercised"]
    assert model.total().isolated["nmse"] == 0  # type: ignore[index] # measured


def test_layers_caches_and_products_together() -> None:
    """Each scores alone as it does without the others; together they are one model."""
    spec, model = ARCHITECTURES["llama"].spec(), ARCHITECTURES["llama"].build()
    layers, products = list_ops(model)[:2], list_products(model)[:2]
    caches = [op for op in list_states(model) if op.type != "q"][:1]
    by_kind = {"w8a8": layers, "kv_fp8": caches, "bmm_fp8_dynamic": products}
    schemes = {op.name: scheme_named(name, "scheme") for name, ops in by_kind.items() for op in ops}
    together = Assignment("the config", schemes, {op: scheme.name for op, scheme in schemes.items()})
    ops = [*layers, *caches, *products]
    found = {engine: calibrate(spec, ops, together, engine=engine) for engine in ("replay", "eager")}
    for name, few in by_kind.items():
        alone = calibrate(spec, few, name, engine="replay")
        for op in few:
            expected = alone.score(op, ["isolated"]).isolated
            assert found["replay"].score(op, ["isolated"]).isolated == expected
            assert found["eager"].score(op, ["isolated"]).isolated == expected
        assert found["replay"].total().isolated != alone.total().isolated
    assert found["replay"].total().isolated == found["eager"].total().isolated


def test_processes_share_what_calibration_has_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process, which calibrates nothing, has the bits of the first."""
    spec = own(Block("causal"))
    spec = ModelSpec(spec.model, *([{"input": torch.randn(2, 6, 32)}] for _ in range(2)), lambda out, _: out)  # type: ignore[arg-type] # lists
    ops = list_products(spec.model)
    first = calibrate(spec, ops, "bmm_int8_asym", engine="delta", artifact=artifact(tmp_path))
    monkeypatch.setattr(engine_setup, "prepare", refuse)
    second = calibrate(spec, ops, "bmm_int8_asym", engine="delta", artifact=artifact(tmp_path))
    assert [first.score(op, MODES[:1]).isolated for op in ops] == [second.score(op, MODES[:1]).isolated for op in ops]
    assert first.total().isolated == second.total().isolated


def test_they_are_listed_once() -> None:
    """What is measured is not among the products that nothing quantizes; those beside it stay there."""
    spec = ARCHITECTURES["mixtral"].spec()
    ops = list_products(spec.model)
    model = calibrate(spec, ops[:1], "bmm_fp8", engine="replay")
    others = {op.op: op.type for op in model.functional_ops}
    assert ops[0].name not in others
    assert {op.name for op in ops[2:]} <= others.keys()
    assert "grouped_mm" in others.values()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_attention_in_another_dtype(dtype: torch.dtype) -> None:
    """Factors, queries, keys and values keep the dtype that a module gives them, as torch demands one of all."""
    torch.manual_seed(8)
    module = InDtype(dtype)
    exact = InDtype(torch.float32)
    exact.load_state_dict(module.state_dict())
    for scheme in ("bmm_fp8", "bmm_int8_dynamic", "kv_fp8", "attn_int8_dynamic"):
        spec = own(module)
        ops = [op for op in (*list_states(spec.model), *list_products(spec.model)) if means(scheme, op)]
        results = agree(spec, ops, scheme)
        wide = calibrate(own(exact), ops, scheme, engine="replay")
        assert len(results) == (3 if scheme.startswith("attn") else 2)
        for op, result in zip(ops, results, strict=True):
            expected = nmse(wide.score(op, MODES), "isolated")
            far = 1.001 if dtype == torch.float64 else 3
            noise = torch.finfo(dtype).eps ** 2  # other outputs of attention are rounded to that dtype in another way
            assert expected / far < nmse(result, "isolated") < expected * far + noise


def means(scheme: str, op: Op) -> bool:
    """Whether a scheme is of an op."""
    return scheme_named(scheme, "scheme").means(op.type)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("module", [Flexible, Mapped])
def test_inside_of_vmap_nothing_is_seen(module: type[nn.Module]) -> None:
    """Its values are no tensors that could be read: the eager engine runs it, and says that ops are out of reach."""
    spec = own(module())
    ops = [*list_ops(spec.model), *list_states(spec.model), *list_products(spec.model)]
    by_kind = {op.name: "attn_fp8" if op.type in STATES else "w8a8" if op.type == "linear" else "bmm_fp8" for op in ops}
    schemes = {op: scheme_named(name, "scheme") for op, name in by_kind.items()}
    model = calibrate(spec, ops, Assignment("the config", schemes, {op: one.name for op, one in schemes.items()}))
    assert model.engine == "eager"
    assert "capture refused: torch.vmap runs in 0" in str(model.engine_reason)
    results = {op.name: model.score(op, ["isolated"]) for op in ops}
    measured = {op for op, result in results.items() if result.status == "measured"}
    assert measured == ({"0.qkv"} if module is Flexible else set())
    assert {result.status for result in results.values()} <= {"measured", "unquantizable"}
    assert all("ran, but" in str(result.reason) for op, result in results.items() if op not in measured)


@pytest.mark.parametrize("engine", ["fx", "inc"])
def test_kernels_of_layers_refuse_products(engine: str) -> None:
    """Torch's int8 kernels are of layers."""
    with pytest.raises(QsensError, match=rf"engine {engine} measures scheme w8a8 only, not 'bmm_fp8'"):
        check_engine(engine, "bmm_fp8", "cpu")


def test_estimates_refuse_products() -> None:
    """A gradient of one input does not tell what rounding two does."""
    spec = own(Products())
    with pytest.raises(QsensError, match="probe estimates what rounding one input does, and 0:matmul has two") as error:
        calibrate(spec, list_products(spec.model), "bmm_fp8", engine="probe")
    assert error.match(r"engine delta, the default \(without --qsens-time-budget, --qsens-top and --qsens-repres")
