"""Sketches that a sweep gives, of every engine: those of what the ops really do to the output."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch

from pytest_qsens import engine_setup
from pytest_qsens.calibrated import calibrate
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.groups import grouped
from pytest_qsens.interactions import decode
from pytest_qsens.sketches import make_sketchers
from tests.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from pytest_qsens.calibrated import CalibratedModel

DIMENSIONS = 96
"""Fewer than the columns of the outputs here: these are sketched by columns first, too."""


def swept(
    architecture: str, engine: str, granularity: str = "op", *, divergence: bool = False
) -> Mapping[str, np.ndarray]:
    """Measure all ops or groups, and return their sketches."""
    spec = ARCHITECTURES[architecture].spec()
    ops = list_ops(spec.model)  # type: ignore[arg-type] # a module
    units = grouped(ops, granularity)
    model = calibrate(
        spec, ops, "w8a8_dynamic", engine=engine, divergence=divergence, expected=units, interactions=True
    )
    results = [model.score(unit, ("isolated",)) for unit in units]
    assert model.engine == engine
    for unit, result in zip(units, results, strict=True):
        if result.sketch is not None:
            expected = by_hand(model, [op.name for op in unit.ops])
            assert decode(result.sketch, unit.name) == pytest.approx(
                expected, abs=5e-3 * math.sqrt(expected @ expected)
            )
    return {result.op: decode(result.sketch, result.op) for result in results if result.sketch is not None}


def by_hand(model: CalibratedModel, ops: list[str]) -> np.ndarray:
    """Sketch the change of the whole output that replaying these ops gives."""
    pairs = list(zip(model._engine.references, model._engine.isolated(*ops), strict=True))
    sketchers = make_sketchers([reference.shape for reference, _ in pairs], DIMENSIONS)
    with torch.no_grad():
        found = sum(sketch(output - reference) for sketch, (reference, output) in zip(sketchers, pairs, strict=True))
    assert isinstance(found, torch.Tensor)
    return found.numpy() / math.sqrt(model._reference.size.energy)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_setup, "make_sketchers", partial(make_sketchers, dimensions=DIMENSIONS))


@pytest.mark.parametrize("engine", ["delta", "replay", "eager"])
def test_ops_of_a_language_model(engine: str) -> None:
    """Through the head with no logits made, as in a replay: ops before it, and the head itself, meet in one space."""
    found = swept("llama", engine)
    assert "lm_head" in found
    assert len(found) == 16
    assert {len(sketch) for sketch in found.values()} == {DIMENSIONS}


def test_where_logits_are_made() -> None:
    """Comparing distributions as well takes another path."""
    assert len(swept("llama", "delta", divergence=True)) == 16


def test_groups_and_other_outputs() -> None:
    """A group's sketch is that of what its ops do together; an encoder has no head."""
    assert len(swept("bert", "delta", "block")) >= 2
