"""What is replaced while Intel Neural Compressor's functions run changes none of its numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from neural_compressor.adaptor.torch_utils import util
from neural_compressor.model import Model

from pytest_qsens.engines.inc import _Loader, _quiet
from pytest_qsens.threads import one_thread
from tests.inc.engines import build, network
from tests.inc.models import mlp, resnet, vl_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pytest_qsens.models.spec import ModelSpec


@pytest.mark.parametrize("model", [mlp, resnet, vl_text])
def test_stock_numbers(model: Callable[..., ModelSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as it is, it gives every op the very number that the engine reports.

    That holds where nothing of its own goes wrong: one batch for calibration and evaluation, and a last module that
    gives the output. Only `sorted` is shadowed, to see the numbers, of which it returns the order alone.
    """
    spec = model(one_batch=True)
    found: list[dict[Any, float]] = []

    def spying(keys: Iterable[Any], key: Callable[[Any], Any], reverse: bool) -> list[Any]:
        keys = list(keys)
        found.append({name: float(key((name, kind))) for name, kind in keys})
        return sorted(keys, key=key, reverse=reverse)

    with torch.no_grad():
        both = build(spec)
        adaptor, config = both.inc._adaptor, both.inc._config
        order = list(config["op"])
        assert order[-1][0].removesuffix(".module") == both.ops[-1]
        monkeypatch.setattr(util, "sorted", spying, raising=False)
        with one_thread(), _quiet():
            stock = adaptor.calculate_op_sensitivity(
                Model(network(spec)), _Loader(spec.evaluation[0]), config, None, confidence_batches=1, fallback=True
            )
        monkeypatch.undo()
        ours = {op: both.inc.fall_back(op).sse for op in both.ops}
    theirs = {name.removesuffix(".module"): number for name, number in found[0].items()}
    # it also has a number for ops that never ran
    assert {op: theirs[op] for op in ours} == ours
    # all of its list, or the few that it looks at twice
    assert {name for name, _ in stock} <= set(found[0])
