"""Names of schemes, and which of them can be simulated."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_qsens.configs.simulated import EMBEDDING, simulated_as
from pytest_qsens.errors import QsensError
from pytest_qsens.ops import Op
from pytest_qsens.quant.observer_names import OBSERVERS, percentile_name
from pytest_qsens.quant.op_scheme import (
    FLOATS,
    INTEGERS,
    ActivationScheme,
    OpScheme,
    SmoothQuant,
    Unknown,
    WeightScheme,
    named,
    parse,
)
from pytest_qsens.quant.scaling_modes import POWERS_OF_TWO, SCALING_MODES
from pytest_qsens.quant.schemes import SCHEMES, scheme_named

if TYPE_CHECKING:
    from collections.abc import Callable

DTYPES = st.sampled_from((*INTEGERS, *FLOATS))
SIZES = st.integers(1, 10**9 - 1)
EXTENTS = st.one_of(
    st.tuples(st.sampled_from(["tensor", "channel"]), st.just(())),
    st.tuples(st.just("group"), st.tuples(SIZES)),
    st.tuples(st.just("block"), st.tuples(SIZES, SIZES)),
)
MODES = st.sampled_from(["", *SCALING_MODES])


def mode_of(dtype: str, mode: str) -> str:
    """Return the mode, where scales of the format have one."""
    return mode if dtype in POWERS_OF_TWO else ""


WEIGHTS = st.builds(
    lambda dtype, extent, symmetric, mode: WeightScheme(dtype, *extent, symmetric, mode_of(dtype, mode)),
    *(DTYPES, EXTENTS, st.booleans(), MODES),
)
KNOWN = st.sampled_from(["", *OBSERVERS]) | st.floats(50, 99.999, exclude_max=True).map(
    lambda share: percentile_name(round(share, 6))
)
ACTIVATIONS = st.builds(
    lambda dtype, kind, extent, symmetric, observer, mode: ActivationScheme(
        dtype, kind, *extent, symmetric, "" if kind == "dynamic" else observer, mode_of(dtype, mode)
    ),
    DTYPES,
    st.sampled_from(["static", "dynamic", "local"]),
    EXTENTS | st.just(("token", ())),
    st.booleans(),
    KNOWN,
    MODES,
)
SMOOTHING = st.builds(
    SmoothQuant, st.sampled_from([0, 0.5, 1]) | st.floats(0, 1), st.booleans(), st.sampled_from(["magnitude", "range"])
)
OP_SCHEMES = st.builds(
    OpScheme, st.none() | WEIGHTS, st.none() | ACTIVATIONS, st.booleans(), st.none() | st.none() | SMOOTHING
).filter(lambda scheme: replace(scheme, smoothing=None) != OpScheme(None))


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


@pytest.mark.parametrize(
    ("name", "weight", "activation"),
    [
        ("mxfp8_dynamic_rceil", "rceil", "rceil"),
        ("mxfp8_dynamic_rceil_act_floor", "rceil", ""),
        ("mxfp4_dynamic_act_even", "", "even"),
        ("w8amxfp8_dynamic_act_rceil", "", "rceil"),
        ("wmxfp4amxfp8_dynamic_ceil", "ceil", "ceil"),
        ("wmxfp4a16_rceil", "rceil", None),
    ],
)
def test_modes_of_scales_have_names(name: str, weight: str, activation: str | None) -> None:
    """One mode is said once, and of inputs alone after `_act`."""
    scheme = named(name, "test")
    assert scheme.weight is not None
    assert scheme.weight.scaling_mode == weight
    assert (None if scheme.activation is None else scheme.activation.scaling_mode) == activation
    assert simulated_as(scheme, Op("op", "linear")) == (name, "")


def test_simulated_schemes_keep_their_names() -> None:
    """What can be simulated is found under the name that the command line takes, and simulated as itself."""
    for name, scheme in SCHEMES.items():
        assert scheme.name == name
        assert simulated_as(scheme.parts, Op("op", "linear")) == (name, "")
    assert simulated_as(EMBEDDING, Op("op", "embedding")) == ("w8a8", "")


@pytest.mark.parametrize(
    ("name", "op_type", "obstacles"),
    [
        ("wnf4a16", "linear", ["weights are nf4 (simulated: int2 to int8, fp8_e4m3, mxfp8, mxfp4, nvfp4)"]),
        ("w1aint16_dynamic", "linear", ["weights are int1", "activations are int16"]),
        ("w16a8_static", "linear", ["weights are not quantized"]),
        ("w4a4", "linear", ["static activations are int4", "outputs are requantized"]),
        ("w8a8_dynamic_requant", "linear", ["outputs are requantized (simulated: with static int8 activations only)"]),
        ("w4a16_block128x128", "linear", ["block of 128 x 128 (simulated for int4: per tensor, channel or group)"]),
        (
            "mxfp4_dynamic_g16",
            "linear",
            ["weights have a scale per group of 16 (simulated for mxfp4: per group of 32)"],
        ),
        ("fp8_static_act_token", "linear", ["static activations have a scale per token", "per tensor)"]),
        ("fp8_dynamic_asym_act_asym", "linear", ["weights have zero points", "dynamic activations have zero points"]),
        ("fp8_local", "linear", ["scales of two kinds"]),
        ("nvfp4_static", "linear", ["static activations are nvfp4 (simulated: int8, fp8_e4m3)"]),
        (
            "fp8_static_entropy",
            "linear",
            ["are found by entropy (simulated: by minmax, moving_average, percentile, mse)"],
        ),
        ("fp8_static_histogram", "linear", ["are found by histogram"]),
        ("nvfp4_local_mse", "linear", ["scales of local activations of nvfp4 are found by mse (simulated: by minmax)"]),
        ("w8a16_smoothquant", "linear", ["inputs are smoothed (simulated: with integers"]),
        ("w8a8_tensor_smoothquant", "linear", ["weights that have a scale per channel or group"]),
        ("fp8_dynamic_smoothquant", "linear", ["inputs are smoothed"]),
        ("w8a8_smoothquant", "conv2d", ["scales the input features of linear layers, and a conv2d is none"]),
        ("w8a8_dynamic", "conv2d", ["has no tokens"]),
        ("w4a16_g128", "conv2d", ["groups along the features of a linear layer"]),
        ("mxfp4_dynamic", "conv1d", ["groups along the features of a linear layer"]),
        ("wfp8a16_block2x2", "conv1d", ["blocks of a matrix"]),
        ("w8a8", "embedding", ["rows of embeddings are simulated with weights only, such as w8a16_asym, not as w8a8"]),
    ],
)
def test_what_cannot_be_simulated_says_every_reason(name: str, op_type: str, obstacles: list[str]) -> None:
    """Each property that is in the way is named, with what would do."""
    found, reason = simulated_as(named(name, "test"), Op("op", op_type))
    assert found is None
    assert [obstacle for obstacle in obstacles if obstacle not in reason] == []


@pytest.mark.parametrize(
    ("longer", "name"),
    [
        ("w8a8_histogram", "w8a8"),
        ("fp8_static_minmax", "fp8_static"),
        ("w8a8_percentile99.99", "w8a8_percentile"),
        ("w8a8_smoothquant0.5", "w8a8_smoothquant"),
        ("w8a8_smoothquant0.80", "w8a8_smoothquant0.8"),
        ("mxfp8_dynamic_floor", "mxfp8_dynamic"),
        ("mxfp8_dynamic_rceil_act_rceil", "mxfp8_dynamic_rceil"),
        ("kv_mxfp8_dynamic_floor", "kv_mxfp8_dynamic"),
        ("fp8_dynamic_rceil", None),
        ("wmxfp8a8_dynamic_act_rceil", None),
        ("kv_fp8_rceil", None),
        ("w8a8_dynamic_mse", None),
        ("w8a8_percentile12", None),
        ("w8a8_smoothquant1.5", None),
    ],
)
def test_one_name_for_what_is_usual(longer: str, name: str | None) -> None:
    """The usual observer and strength are left out; and there is no observer where nothing is calibrated."""
    assert parse(longer) is None
    assert name is None or parse(name) is not None


@pytest.mark.parametrize(
    "make",
    [
        lambda: ActivationScheme("int8", "dynamic", "token", observer="mse"),
        lambda: ActivationScheme("int8", "static", "tensor", observer="kl"),
        lambda: SmoothQuant(1.1),
        lambda: WeightScheme("mxfp8", "group", (32,), scaling_mode="round"),
        lambda: WeightScheme("nvfp4", "group", (16,), scaling_mode="rceil"),
        lambda: ActivationScheme("int8", "dynamic", "token", scaling_mode="floor"),
    ],
)
def test_parts_that_mean_nothing_are_not_made(make: Callable[[], object]) -> None:
    """So that no name is given to them."""
    with pytest.raises(ValueError, match=r"observer|alpha|mode"):
        make()


def test_features_that_a_group_does_not_divide() -> None:
    """They are in the way where they are known."""
    scheme = named("w4a16_g128", "test")
    for features, known in ((256, True), (192, False), (None, True)):
        found, reason = simulated_as(scheme, Op("op", "linear", features=features))
        assert (found is not None) == known
        assert ("192 of them cannot be divided by 128" in reason) == (not known)


@given(OP_SCHEMES, st.sampled_from(["linear", "conv1d", "conv2d", "embedding"]))
def test_only_simulated_schemes_lack_a_reason(scheme: OpScheme, op_type: str) -> None:
    """There is a reason exactly where there is no scheme, and a scheme only where all properties are its own."""
    name, reason = simulated_as(scheme, Op("op", op_type))
    assert (name is None) == bool(reason)
    if name is not None and op_type != "embedding":
        assert scheme_named(name, "scheme").parts == scheme


def test_an_unknown_scheme_says_why() -> None:
    """What has no terms keeps the reason that its reader gave."""
    assert simulated_as(Unknown("X", "because"), Op("op", "linear")) == (None, "because")


@pytest.mark.parametrize("name", ["w9", "w16a16", "fp8", "w4a16_g0", "W8A8", "w8a8_static_act_tensor", "w4a16_channel"])
def test_other_names_are_refused(name: str) -> None:
    """A name that is none, means nothing, or is not canonical, is refused with its place and with names that work."""
    with pytest.raises(QsensError, match=rf"^here: '{name}' is no scheme\. Write w8a8, .*docs/configs\.md"):
        named(name, "here")


@given(OP_SCHEMES)
def test_a_scheme_is_known_by_its_name_if_it_is_simulated(scheme: OpScheme) -> None:
    """The command line takes the names of all that can be simulated; of others it says what is in the way."""
    simulated, reason = simulated_as(scheme, Op("op", "linear"))
    if simulated is not None:
        assert scheme_named(scheme.name, "scheme").parts == scheme
        return
    with pytest.raises(QsensError) as caught:
        scheme_named(scheme.name, "value for --qsens-scheme:")
    assert str(caught.value).startswith(
        f"no value for --qsens-scheme: {scheme.name!r}, which cannot be simulated: {reason}. Try w8a8, "
    )


@pytest.mark.parametrize(
    ("name", "tried"), [("wnf4a16", "w8a8"), ("kv_mxint8_dynamic", "kv_fp8"), ("bmm_fp8_dynamic_g32", "bmm_fp8")]
)
def test_what_is_tried_instead_is_of_the_same_kind(name: str, tried: str) -> None:
    """Of layers, keys and values, or products: no scheme of one kind does what one of another does."""
    with pytest.raises(QsensError, match=r"cannot be simulated: ") as caught:
        scheme_named(name, "scheme")
    offered = str(caught.value).rpartition(". Try ")[2].split(", ")
    assert offered[0] == tried
    parts, others = parse(name), [parse(other) for other in offered]
    assert parts is not None
    for other in others:
        assert other is not None
        assert (other.cache is None, other.products is None) == (parts.cache is None, parts.products is None)


def test_names_that_are_none() -> None:
    """What was probably meant is told, and where other names come from."""
    with pytest.raises(
        QsensError, match=r"^no scheme 'mxfp4' \(did you mean mxfp4_dynamic\?\)\. Known: w8a8, .*docs/configs"
    ):
        scheme_named("mxfp4", "scheme")


@pytest.mark.parametrize(
    ("name", "features", "refused"),
    [
        ("w4a16_g128", 256, None),
        ("w4a16_g128", 192, "weights a scale per 128 input features, and 192 of them cannot be divided by 128"),
        ("fp8_dynamic_block128x128_act_g128", 100, "weights a scale per 128 input features"),
        ("w4a8_dynamic_act_g32", 48, "activations a scale per 32"),
        ("nvfp4_local", 40, "weights a scale per 16"),
        ("w8a16", 7, None),
        ("fp8_dynamic", 7, None),
    ],
)
def test_features_that_cannot_be_divided(name: str, features: int, refused: str | None) -> None:
    """Groups are whole."""
    reason = scheme_named(name, "scheme").refusal_of_features(features)
    assert (reason is None) if refused is None else (reason is not None and refused in reason)


@pytest.mark.parametrize(
    ("name", "row_wise", "needs_ranges", "embeddings"),
    [
        ("w8a8", True, True, True),
        ("w8a8_dynamic", True, False, True),
        ("w8a16", True, False, True),
        ("w4a16_g128", True, False, False),
        ("w8a8_dynamic_act_tensor_asym", False, False, True),
        ("fp8_static", True, True, False),
        ("fp8_dynamic_tensor_act_tensor", False, False, False),
        ("mxfp4_dynamic", True, False, False),
        ("nvfp4_dynamic", False, False, False),
        ("nvfp4_local", True, True, False),
    ],
)
def test_what_a_scheme_needs(name: str, *, row_wise: bool, needs_ranges: bool, embeddings: bool) -> None:
    """Rows can go together unless a scale is of all of them; ranges are observed for scales that are not dynamic."""
    scheme = scheme_named(name, "scheme")
    assert scheme.is_row_wise is row_wise
    assert scheme.needs_ranges is needs_ranges
    assert (scheme.refusal("embedding") is None) is embeddings
