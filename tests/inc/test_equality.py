"""Engine fx computes what Intel Neural Compressor computes, to the last bit."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import pytest
import torch

from tests.inc.engines import Both, build, equal, inc_number
from tests.inc.models import BETWEEN, MODELS, PATCH_EMBEDDING, WHOLE, neighbours

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module", params=MODELS)
def both(request: pytest.FixtureRequest) -> Iterator[Both]:
    """Both engines on one of the models."""
    with torch.no_grad():
        yield build(MODELS[request.param]())


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """Return the model's name."""
    found: str = request.node.callspec.params["both"]
    return found


def test_fallback(both: Both) -> None:
    """The outputs with any one op left in fp32, and everything else quantized, are equal; so is inc's own number."""
    assert both.ops
    for op in both.ops:
        measured = both.inc.fall_back(op)
        assert equal(measured.outputs, both.fx.fallback(op)), op
        assert measured.sse == inc_number(both.inc.references, measured.outputs), op


def test_joint(both: Both) -> None:
    """The outputs with everything quantized are equal."""
    assert equal(both.inc.joint(), both.fx.joint())


def test_cumulative(both: Both) -> None:
    """The second phase, which scores each op with those before it quantized as well, is equal at every step."""
    for count, measured in enumerate(both.inc.requantize(both.ops), 1):
        assert equal(measured.outputs, both.fx.quantized(both.ops[:count])), measured.op
        assert measured.sse == inc_number(both.inc.references, measured.outputs), measured.op
    assert count == len(both.ops)


def test_isolated(both: Both, name: str) -> None:
    """The outputs with one op quantized are equal.

    Where the model is traced as a whole, Intel Neural Compressor quantizes additions, poolings and the like even then:
    there its score is that of ``quantized([op])``, and `FxEngine.isolated` quantizes the op alone.
    """
    for op in both.ops[:: max(1, len(both.ops) // 5)]:
        fx = both.fx.quantized([op]) if name in WHOLE else both.fx.isolated(op)
        assert equal(both.inc.isolated(op), fx), op


def test_replay_where_only_ops_are_quantized(both: Both, name: str) -> None:
    """Our simulation of the kernels gives the same, where nothing but ops is quantized and nothing is fused."""
    ops = list(islice(both.ops, 0, None, max(1, len(both.ops) // 4)))
    if name in ("resnet", "edges"):  # fused batch norms and relus, additions and poolings
        assert not equal(both.replay.joint(), both.inc.joint())
        return
    for op in ops:
        assert equal(both.replay.fallback(op), both.inc.fall_back(op).outputs), op
        assert equal(both.replay.isolated(op), both.inc.isolated(op)), op
    assert equal(both.replay.joint(), both.inc.joint())


def test_patch_embedding(both: Both, name: str) -> None:
    """The op that breaks the model when quantized is found, and the only one; it needs an image to be reached."""
    broken = both.inc._without_kernels()
    assert set(broken) == ({PATCH_EMBEDDING} if name == "vl_image" else set())
    if broken:
        assert "'function' object has no attribute 'dtype'" in str(broken[PATCH_EMBEDDING])


@pytest.mark.parametrize("between", BETWEEN)
def test_neighbours(between: str) -> None:
    """Whatever stands between two ops, it is rounded as torch rounds it when either of them, or both, are in fp32."""
    with torch.no_grad():
        both = build(neighbours(between))
        assert both.ops == ["conv1", "conv2"]
        assert both.fx._kernels.root is not both.spec.model  # traced as a whole
        assert equal(both.inc.joint(), both.fx.joint())
        for op in both.ops:
            assert equal(both.inc.fall_back(op).outputs, both.fx.fallback(op)), op
            assert equal(both.inc.isolated(op), both.fx.quantized([op])), op
        for count, measured in enumerate(both.inc.requantize(both.ops[::-1]), 1):
            assert equal(measured.outputs, both.fx.quantized(both.ops[::-1][:count])), count
        assert equal(both.inc._outputs([], None), both.fx.quantized([]))
