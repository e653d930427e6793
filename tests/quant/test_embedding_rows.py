"""Rows of embeddings with weight-only schemes: those of torchao, bit for bit, whatever is looked up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, PerRow, quantize_
from torchao.quantization.quant_primitives import MappingType
from torchao.quantization.quantize_.workflows.float8.float8_tensor import Float8Tensor

from pytest_qsens.calibrated import calibrate
from pytest_qsens.configs.simulated import simulating
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.metrics import Score
from pytest_qsens.models.spec import ModelSpec
from pytest_qsens.ops import Op
from pytest_qsens.quant.assignment import Assignment
from pytest_qsens.quant.formats import round_weight
from pytest_qsens.quant.op_scheme import named

if TYPE_CHECKING:
    from pytest_qsens.quant.schemes import Scheme

ENGINES = ("replay", "delta", "eager")
EMBED = Op("embed", "embedding")


class Net(nn.Module):
    """An embedding with rows of different sizes, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(30, 64), nn.Linear(64, 7)
        with torch.no_grad():
            self.embed.weight *= 10.0 ** torch.arange(-1, 2).repeat(10)[:, None]
            self.embed.weight[3] = 0

    def forward(self, ids: Tensor) -> Tensor:
        """Give logits."""
        found: Tensor = self.head(self.embed(ids))
        return found


def spec() -> ModelSpec:
    """Model and data; ids repeat, some are never looked up."""
    torch.manual_seed(0)
    return ModelSpec(
        Net(),
        [{"ids": torch.randint(0, 25, (2, 9))}],
        [{"ids": torch.randint(0, 25, (3, 9))} for _ in range(2)],
        lambda out, _: out,
        logits=False,
    )


def scheme_of(name: str) -> Scheme:
    """Return what simulates a scheme of an embedding."""
    found, reason = simulating(named(name, "test"), EMBED)
    assert found is not None, reason
    return found


def assigned(name: str) -> Assignment:
    """Quantize the embedding alone."""
    left_out = {"head": ("unquantized", "the config leaves it unquantized")}
    names = {"embed": name, "head": "unquantized"}
    return Assignment("the config", {"embed": scheme_of(name)}, names, left_out)  # type: ignore[arg-type] # a status


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("w8a16", IntxWeightOnlyConfig(torch.int8, PerAxis(0))),
        ("w4a16", IntxWeightOnlyConfig(torch.int4, PerAxis(0))),
        ("w4a16_g32", IntxWeightOnlyConfig(torch.int4, PerGroup(32))),
        ("w4a16_g32_asym", IntxWeightOnlyConfig(torch.int4, PerGroup(32), MappingType.ASYMMETRIC)),
        ("w2a16_g16", IntxWeightOnlyConfig(torch.int2, PerGroup(16))),
    ],
)
def test_scores_are_those_of_torchao(name: str, config: Any, engine: str) -> None:  # noqa: ANN401 - a config of torchao
    """The model that it quantizes has the error that is measured."""
    given = spec()
    measured = calibrate(given, list_ops(given.model), assigned(name), engine=engine)  # type: ignore[arg-type] # a module
    quantized, exact = spec().model, spec().model
    quantize_(quantized, config, filter_fn=lambda module, _: isinstance(module, nn.Embedding))
    score = Score(logits=False)
    with torch.no_grad():
        for batch in given.evaluation:
            score.add(exact(**batch), quantized(**batch))
    result = measured.score(EMBED, ["isolated"])
    assert score.sse > 0
    for found in (result, measured.total()):
        assert found.isolated is not None
        assert found.isolated["sse"] == pytest.approx(score.sse, rel=1e-2 if engine == "delta" else 1e-9)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["w8a16_tensor", "w4a16_tensor_asym", "wfp8a16_tensor"])
def test_one_scale_of_all_rows(name: str, engine: str) -> None:
    """It is that of the whole table, as ONNX Runtime's is, of which the largest rows are never looked up."""
    given, exact, quantized = spec(), spec().model, spec().model
    for model in (given.model, exact, quantized):
        model.embed.weight.data[29, 5] = 37.0  # type: ignore[union-attr]
    measured = calibrate(given, list_ops(given.model), assigned(name), engine=engine)  # type: ignore[arg-type] # a module
    weight = named(name, "test").weight
    assert weight is not None
    quantized.embed.weight.data = round_weight(quantized.embed.weight.data, weight).real()
    score = Score(logits=False)
    with torch.no_grad():
        for batch in given.evaluation:
            score.add(exact(**batch), quantized(**batch))
    result = measured.score(EMBED, ["isolated"])
    assert score.sse > 0
    assert result.isolated is not None
    assert result.isolated["sse"] == pytest.approx(score.sse, rel=1e-2 if engine == "delta" else 1e-9)


def test_rows_of_e4m3() -> None:
    """E4M3 has a scale for each row, as torchao's ``Float8Tensor`` has."""
    given = spec()
    found = calibrate(given, list_ops(given.model), assigned("wfp8a16"), engine="eager")  # type: ignore[arg-type] # a module
    weight = spec().model.embed.weight.detach()
    expected = Float8Tensor.from_hp(weight, granularity=PerRow()).dequantize()
    expected[3] = 0  # of zeros alone it makes 0 / 0
    score = Score(logits=False)
    exact, quantized = spec().model, spec().model
    quantized.embed.weight.data = expected
    with torch.no_grad():
        for batch in given.evaluation:
            score.add(exact(**batch), quantized(**batch))
    result = found.score(EMBED, ["isolated"])
    assert result.isolated is not None
    assert result.isolated["sse"] == pytest.approx(score.sse, rel=1e-9)


def test_groups_that_do_not_divide_a_row() -> None:
    """It is told when the table is seen."""
    given = spec()
    model = calibrate(given, list_ops(given.model), assigned("w4a16_g48"), engine="replay")  # type: ignore[arg-type] # a module
    result = model.score(EMBED, ["isolated"])
    assert result.status == "unquantizable"
    assert result.reason == "w4a16_g48 gives weights a scale per 48 features, and 64 of them cannot be divided by 48"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("w8a8", "rows of embeddings are simulated with weights only, such as w8a16_asym, not as w8a8"),
        ("wfp8a16_block8x8", "with scales per tensor, row or group"),
        ("wnvfp4a16", "with scales per tensor, row or group"),
        ("wnf4a16", "weights are nf4"),
    ],
)
def test_what_cannot_be_simulated_says_why(name: str, reason: str) -> None:
    """Scales of the whole table need the whole table, and indices are not quantized."""
    found, why = simulating(named(name, "test"), EMBED)
    assert found is None
    assert reason in why


def test_schemes_of_layers_do_to_embeddings_what_they_did() -> None:
    """What a config calls uint8 rows, as torch's kernels have them, is what the usual schemes mean."""
    found, _ = simulating(named("w8a16_asym", "test"), EMBED)
    assert found is not None
    assert (found.name, found.rows) == ("w8a8", False)
