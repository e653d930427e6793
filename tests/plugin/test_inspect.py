"""`qsens inspect` of results of a config: an op is quantized as in the run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from pytest_qsens import QsensError
from tests.inspection.harness import inspected

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_qsens.inspection.found import Inspection

NET = """
import torch
from torch import nn

from pytest_qsens import ModelSpec


def spec():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(20, 32), nn.Linear(32, 8)).eval()
        batches = [{"input": torch.randint(0, 20, (4, 6))} for _ in range(3)]
    return ModelSpec(net, batches[:1], batches[1:], output=lambda out, batch: out)
"""


ROWS_OF_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
"""Of compressed-tensors: our own rules take w8a16 of an embedding for uint8 rows."""


def measured(pytester: pytest.Pytester, table: str, *arguments: str) -> Path:
    """Run a config that gives the table this scheme; returns the path of the result."""
    pytester.makepyfile(looks=NET)
    rules = [{"ops": "0", "scheme": table}, {"ops": "1", "scheme": "w8a8"}]
    config: dict[str, object] = {"schema": 1, "rules": rules}
    if table == "w8a16":
        groups = {"table": {"targets": ["Embedding"], "weights": ROWS_OF_INT8}}
        config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    (pytester.path / "quant.json").write_text(json.dumps(config))
    path = pytester.path / "out.json"
    options = ("--qsens-model", "looks:spec", "--qsens-config", "quant.json", "--qsens-json", str(path))
    assert pytester.runpytest_inprocess(*options, "--snapshot-update", *arguments).ret == 0
    return path


def found_of(path: Path, *arguments: str) -> Inspection:
    """Inspect the table."""
    return inspected(path, "0", "--model", "looks:spec", *arguments)


@pytest.mark.parametrize("scheme", ["w4a16_g32", "w8a16", "w8a16_asym"])
def test_an_embedding_has_the_scheme_of_the_config(scheme: str, pytester: pytest.Pytester) -> None:
    """A weight-only scheme is of rows there, and what is measured now is what the run measured."""
    found = found_of(measured(pytester, scheme), "--against", "w8a16", "--against", "w4a16_g32")
    assert found.scheme == scheme
    assert found.recorded.scores is not None
    assert found.whole.nmse == pytest.approx(found.recorded.scores["nmse"], rel=1e-4)
    assert not found.differs
    others = {other.scheme: other.flip for other in found.alternatives}
    assert set(others) == {"w8a16", "w4a16_g32"} - {scheme}
    nmse = {name: flip.nmse for name, flip in others.items() if flip is not None}
    assert nmse.keys() == others.keys()  # none is what the present one is already
    assert len({*nmse.values(), found.whole.nmse}) == len(nmse) + 1


def test_what_a_config_cannot_give_an_embedding(pytester: pytest.Pytester) -> None:
    """It is refused as the config would be."""
    path = measured(pytester, "w4a16_g32")
    with pytest.raises(QsensError, match=r"0 cannot be quantized: rows of embeddings are simulated with weights only"):
        found_of(path, "--scheme", "w8a8_dynamic")
    (other,) = found_of(path, "--against", "w8a8").alternatives
    assert (other.flip, (other.reason or "")[:18]) == (None, "rows of embeddings")


def test_an_op_that_would_be_added(pytester: pytest.Pytester) -> None:
    """Its scheme is the one that was tried, as it is without a config."""
    path = measured(pytester, "unquantized", "--qsens-config-down", "w8a16")
    found = found_of(path, "--against", "w8a8")
    assert found.scheme == "w8a16"
    assert found.recorded.scheme_of_op == "w8a16"
    assert found.recorded.scores is not None
    assert found.whole.nmse == pytest.approx(found.recorded.scores["nmse"], rel=1e-4)
    assert not found.differs
    assert [other.reason for other in found.alternatives] == ["int8 with a scale per row, as now"]
