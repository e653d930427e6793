"""Names of schemes, and which of them can be simulated."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_qsens.configs.simulated import EMBEDDING, described, simulated_as
from pytest_qsens.errors import QsensError
from pytest_qsens.quant.op_scheme import (
    FLOATS,
    INTEGERS,
    ActivationScheme,
    OpScheme,
    Unknown,
    WeightScheme,
    named,
    parse,
)
from pytest_qsens.quant.schemes import SCHEMES

DTYPES = st.sampled_from((*INTEGERS, *FLOATS))
SIZES = st.integers(1, 10**9 - 1)
EXTENTS = st.one_of(
    st.tuples(st.sampled_from(["tensor", "channel"]), st.just(())),
    st.tuples(st.just("group"), st.tuples(SIZES)),
    st.tuples(st.just("block"), st.tuples(SIZES, SIZES)),
)
WEIGHTS = st.builds(
    lambda dtype, extent, symmetric: WeightScheme(dtype, *extent, symmetric), DTYPES, EXTENTS, st.booleans()
)
ACTIVATIONS = st.builds(
    lambda dtype, kind, extent, symmetric: ActivationScheme(dtype, kind, *extent, symmetric),
    DTYPES,
    st.sampled_from(["static", "dynamic", "local"]),
    EXTENTS | st.just(("token", ())),
    st.booleans(),
)
OP_SCHEMES = st.builds(OpScheme, st.none() | WEIGHTS, st.none() | ACTIVATIONS, st.booleans()).filter(
    lambda scheme: scheme != OpScheme(None)
)


@given(OP_SCHEMES)
def test_a_name_is_read_back(scheme: OpScheme) -> None:
    """Every scheme has a name of its own: what is read from it is the scheme again."""
    assert parse(scheme.name) == scheme


@given(st.text("wa0123456789_fpmxnv", max_size=24) | st.text(max_size=12))
def test_a_name_is_canonical(text: str) -> None:
    """A text is the name of a scheme only if that is what the scheme calls itself."""
    scheme = parse(text)
    assert scheme is None or scheme.name == text


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("w8a16", OpScheme(WeightScheme("int8"))),
        ("w4a16_g128", OpScheme(WeightScheme("int4", "group", (128,)))),
        ("w4a16_g128_asym", OpScheme(WeightScheme("int4", "group", (128,), symmetric=False))),
        ("fp8_dynamic", OpScheme(WeightScheme("fp8_e4m3"), ActivationScheme("fp8_e4m3", "dynamic", "token"))),
        (
            "fp8_static_tensor",
            OpScheme(WeightScheme("fp8_e4m3", "tensor"), ActivationScheme("fp8_e4m3", "static", "tensor")),
        ),
        (
            "mxfp4_dynamic",
            OpScheme(WeightScheme("mxfp4", "group", (32,)), ActivationScheme("mxfp4", "dynamic", "group", (32,))),
        ),
        (
            "w8a8",
            OpScheme(WeightScheme("int8"), ActivationScheme("int8", "static", "tensor", symmetric=False), output=True),
        ),
    ],
)
def test_names_are_those_of_the_field(name: str, scheme: OpScheme) -> None:
    """The schemes that people speak of are called as they call them."""
    assert scheme.name == name


def test_simulated_schemes_keep_their_names() -> None:
    """What can be simulated is found under the name that the command line takes, and simulated as itself."""
    for name, scheme in SCHEMES.items():
        assert described(scheme).name == name
        assert simulated_as(described(scheme), "linear") == (name, "")
    assert simulated_as(EMBEDDING, "embedding") == ("w8a8", "")


@pytest.mark.parametrize(
    ("name", "op_type", "obstacles"),
    [
        ("w4a16_g128", "linear", ["weights are int4", "per group of 128", "activations are not quantized"]),
        ("w8a8_static_act_sym", "linear", ["static activations are symmetric"]),
        ("w8a8_dynamic_tensor", "linear", ["weights have a scale per tensor"]),
        ("w8a8_dynamic_act_tensor_asym", "linear", ["dynamic activations have a scale per tensor", "have zero points"]),
        ("w8a8_dynamic_requant", "linear", ["outputs are requantized"]),
        ("w16a8_static", "linear", ["weights are not quantized"]),
        ("w8a8_static_asym", "linear", ["weights have zero points"]),
        ("fp8_dynamic_block128x128_act_g128", "linear", ["block of 128 x 128", "group of 128", "fp8_e4m3"]),
        ("nvfp4_local", "linear", ["scales of two kinds"]),
        ("w8a8_dynamic", "conv2d", ["has no tokens"]),
        ("w8a8", "embedding", ["rows of embeddings are simulated as w8a16_asym, not as w8a8"]),
    ],
)
def test_what_cannot_be_simulated_says_every_reason(name: str, op_type: str, obstacles: list[str]) -> None:
    """Each property that is in the way is named, with what would do."""
    found, reason = simulated_as(named(name, "test"), op_type)
    assert found is None
    assert [obstacle for obstacle in obstacles if obstacle not in reason] == []


@given(OP_SCHEMES, st.sampled_from(["linear", "conv1d", "conv2d", "embedding"]))
def test_only_simulated_schemes_lack_a_reason(scheme: OpScheme, op_type: str) -> None:
    """There is a reason exactly where there is no scheme, and a scheme only where all properties are its own."""
    name, reason = simulated_as(scheme, op_type)
    assert (name is None) == bool(reason)
    if name is not None and op_type != "embedding":
        assert described(SCHEMES[name]) == scheme


def test_an_unknown_scheme_says_why() -> None:
    """What has no terms keeps the reason that its reader gave."""
    assert simulated_as(Unknown("X", "because"), "linear") == (None, "because")


@pytest.mark.parametrize("name", ["w9", "w16a16", "fp8", "w4a16_g0", "W8A8", "w8a8_static_act_tensor", "w4a16_channel"])
def test_other_names_are_refused(name: str) -> None:
    """A name that is none, means nothing, or is not canonical, is refused with its place and with names that work."""
    with pytest.raises(QsensError, match=rf"^here: '{name}' is no scheme\. Write w8a8, .*docs/configs\.md"):
        named(name, "here")
