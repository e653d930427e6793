"""What is written is read back as what it was written from, or is not written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_qsens.configs import names
from pytest_qsens.configs.read import read_config
from pytest_qsens.configs.rules import CLASS_OF
from pytest_qsens.configs.simulated import EMBEDDING
from pytest_qsens.configs.write import TARGETS, write_config
from pytest_qsens.errors import QsensError
from pytest_qsens.ops import Op
from pytest_qsens.quant.op_scheme import OpScheme, Unknown, named
from tests.configs.ops import FILES, LLAMA, NET
from tests.quant.test_op_scheme import OP_SCHEMES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pytest_qsens.configs.documents import Syntax

_SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
_SUFFIXES = {"YAML": ".yaml", "TOML": ".toml", "JSON": ".json"}
WRITINGS = [(target, syntax) for target, kind in TARGETS.items() for syntax in kind.syntaxes]

NONE = "unquantized"
_W8A8 = {
    "linear": [NONE, "w8a8", "w8a8_act_sym", "w8a8_minmax", "w8a8_act_sym_minmax"],
    "conv2d": [NONE, "w8a8", "w8a8_act_sym", "w8a8_minmax"],
    "embedding": [NONE, "w8a16_asym"],
}
_DYNAMIC = {"linear": [NONE, "w8a8_dynamic_act_tensor_asym"], "embedding": [NONE, "w8a16_asym"], "conv2d": [NONE]}
_WEIGHT_ONLY = {
    "linear": [NONE, "w4a16_g32", "w3a16_asym", "w8a16_g128", "wnf4a16_g64", "wfp4a16"],
    "embedding": [NONE],
    "conv2d": [NONE],
}
_COMPRESSED = {
    "linear": [
        *(
            NONE,
            "w8a8_minmax",
            "w8a8_static_minmax",
            "w8a8_dynamic",
            "w8a16",
            "w4a16_g128_asym",
            "w3a16_tensor",
            "wfp8a16_block8x4",
        ),
        *("fp8_dynamic", "fp8_static_tensor", "fp8_dynamic_block128x128_act_g128", "nvfp4_local"),
        *(
            "mxfp4_dynamic_even",
            "mxfp8_dynamic_rceil",
            "wmxfp6amxfp8_dynamic_even_act_rceil",
            "wfp4a16_g32",
            "w4afp8_dynamic_g128",
        ),
        *("w8a8_tensor_minmax", "w8a8_static_act_sym_moving_average", "fp8_static_moving_average"),
    ],
    "embedding": [NONE, "w8a16_asym", "w4a16_g32", "wfp8a16"],
    "conv2d": [NONE],
}
TOGETHER: dict[str, list[dict[str, list[str]]]] = {
    "qsens": [
        {
            "linear": [
                *(NONE, "w8a8", "w8a8_dynamic", "w4a16_g128_asym", "fp8e5m2_static_act_channel", "nvfp4_local"),
                *("w8a8_percentile99.9", "w8a8_entropy_smoothquant0.75", "w8a8_dynamic_smoothquant_unshared"),
                *("mxfp8_dynamic_rceil", "wmxfp4a16_even", "wmxfp4amxfp8_dynamic_rceil_act_floor"),
                *("w8a8_dynamic_smoothquant0.8_range", "w8a8_minmax_smoothquant_range_unshared"),
            ],
            "conv2d": [NONE, "w8a8", "w8a8_static", "w3a16_block4x4"],
            "embedding": [NONE, "w8a16_asym", "w4a16_g32", "wnf4a16"],
        }
    ],
    "neural-compressor": [_W8A8, _DYNAMIC, _WEIGHT_ONLY],
    "neural-compressor-best-configure": [_W8A8, _DYNAMIC, _WEIGHT_ONLY],
    "neural-compressor-qconfig": [
        {**_W8A8, "embedding": [NONE]},
        {"linear": [NONE, "w4a16_g32", "w3a16_asym", "wnf4a16_g64", "wfp4a16", "wfp8a16", "wfp8e5m2a16_g16"]},
    ],
    "torchao": [
        {
            "linear": [
                *(NONE, "w8a16", "w8a16_tensor", "w8a16_g64", "w8a16_asym", "w4a16_g128_asym", "w2a16", "wnvfp4a16"),
                *("w8a8_dynamic", "w8a8_dynamic_tensor_act_tensor_asym", "w4a8_dynamic_g32_act_asym"),
                *("fp8_dynamic", "fp8_dynamic_tensor_act_tensor", "fp8_dynamic_block128x128_act_g128", "wfp8a16"),
                *("wfp8e5m2a16_tensor", "mxfp8_dynamic", "mxfp4_dynamic", "nvfp4_dynamic"),
                *("mxfp8_dynamic_rceil", "mxfp4_dynamic_rceil", "mxfp4_dynamic_even", "mxfp8_dynamic_ceil"),
            ],
            "embedding": [NONE, "w8a16_asym", "w4a16_g32"],
            "conv2d": [NONE],
        }
    ],
    "compressed-tensors": [_COMPRESSED],
    "llm-compressor": [_COMPRESSED],
    "modelopt": [
        {
            "linear": [
                *(
                    NONE,
                    "w8a16",
                    "w8a8_static_act_sym_minmax",
                    "w4a16_g128",
                    "w4a16_g64",
                    "fp8_dynamic",
                    "fp8_static_tensor",
                ),
                *("wfp8a16_block128x128", "nvfp4_local", "wnvfp4a16", "wnvfp4afp8_static", "wmxfp4afp8_static"),
                *("mxfp8_dynamic", "mxfp4_dynamic"),
            ],
            "embedding": [NONE],
            "conv2d": [NONE],
        }
    ],
    "modelopt-quant-cfg": [
        {
            "linear": [
                *(NONE, "w4a16_g128", "w8a16", "w3a16_tensor", "wfp8a16_block16x32", "w8a8_static_act_sym_minmax"),
                *(
                    "w8a8_tensor_act_sym_minmax",
                    "fp8_static_tensor_requant",
                    "fp8_dynamic",
                    "fp8_dynamic_tensor_act_tensor",
                ),
                *("nvfp4_local", "wnvfp4afp8_static", "mxfp8_dynamic", "wmxfp4a16", "w16afp8_static"),
            ],
            "conv2d": [NONE, "w8a16", "fp8_static_tensor"],
            "embedding": [NONE, "w8a16", "w4a16_g32"],
        },
        {"linear": [NONE, "w8a8_static_act_sym_minmax", "w8a16", "fp8_static_tensor"], "embedding": [NONE]},
        {
            "linear": [NONE, "w8a8_static_act_sym_minmax_smoothquant0.8_unshared", "w4a16_g128", "fp8_static_tensor"],
            "conv2d": [NONE, "w8a8_static_act_sym_minmax"],
        },
    ],
    "modelopt-disabled-layers": [
        {"linear": [NONE, "w8a8", "fp8_dynamic"], "conv2d": [NONE, "w8a8"], "embedding": [NONE]}
    ],
    "onnxruntime": [
        {"linear": [NONE, "w8a8_minmax"], "embedding": ["w8a16_tensor", NONE]},
        {"linear": [NONE, "w4a8_tensor_asym_act_sym_minmax"]},
        {"linear": [NONE, "w8a8_minmax"], "conv2d": [NONE, "w8a8_minmax"]},
        {"linear": [NONE, "w8a8_percentile99.9"]},
    ],
}
"""Of each target schemes by type of op that go together in one file."""

_PARTS = ["layers.0", "layers.1", "encoder.layer.2", "self_attn", "q_proj", "fc-1", "lm_head", "0"]
NAMES = st.lists(st.sampled_from(_PARTS), min_size=1, max_size=3).map(".".join)


def scheme_of(name: str) -> OpScheme | None:
    """Scheme by its canonical name."""
    return None if name == NONE else named(name, "here")


@st.composite
def assignments(draw: st.DrawFn, target: str) -> dict[Op, OpScheme | None]:
    """Ops with usual names, and schemes that a target can say of them."""
    schemes = draw(st.sampled_from(TOGETHER[target]))
    found = {}
    for name in draw(st.lists(NAMES, min_size=1, max_size=8, unique=True)):
        kind = draw(st.sampled_from(sorted(schemes)))
        found[Op(name, kind)] = scheme_of(draw(st.sampled_from(schemes[kind])))
    return found


def written(path: Path, given_schemes: Mapping[Op, OpScheme | None], target: str, syntax: Syntax) -> str:
    """Write a file, and check that it says the same of every op."""
    ops = [*given_schemes]
    text = write_config({op.name: scheme for op, scheme in given_schemes.items()}, ops, target, syntax)
    path = path / f"written{_SUFFIXES[syntax]}"
    path.write_text(text, encoding="utf-8")
    config = read_config(path)
    decisions = {op: config.decide(op) for op in ops}
    assert config.problems == ()
    assert not any(decision.rivals for decision in decisions.values())
    if TARGETS[target].exclusions:
        left_out = {op for op, scheme in given_schemes.items() if scheme is None}
        assert {op for op, decision in decisions.items() if decision.scheme is None} == left_out | {
            op for op in ops if op.type == "embedding"
        }
        assert all(isinstance(decisions[op].scheme, Unknown) for op in set(ops) - left_out)
    else:
        assert {op: decision.scheme for op, decision in decisions.items()} == given_schemes
    return text


@pytest.mark.parametrize(("target", "syntax"), WRITINGS)
def test_what_a_target_can_say_is_read_back(tmp_path: Path, target: str, syntax: Syntax) -> None:
    """Whatever ops and schemes there are that go together: the file is of the target's format, and says it of each."""

    @settings(_SETTINGS, max_examples=40)
    @given(assignments(target))
    def check(given_schemes: dict[Op, OpScheme | None]) -> None:
        if target == "llm-compressor" and not any(given_schemes.values()):
            with pytest.raises(QsensError, match="a recipe quantizes something"):
                written(tmp_path, given_schemes, target, syntax)
        else:
            written(tmp_path, given_schemes, target, syntax)

    check()


KNOWN = sorted({name for groups in TOGETHER.values() for of in groups for some in of.values() for name in some})
ANY_NAMES = st.text(st.characters(codec="utf-8"), min_size=1) | st.text("ab.*[]?\\:'\"-_ ()|", min_size=1) | NAMES
ANY_OPS = st.builds(Op, ANY_NAMES, st.sampled_from(sorted(CLASS_OF)))
ANY_SCHEMES = st.none() | OP_SCHEMES | st.sampled_from(KNOWN).map(scheme_of)


@pytest.mark.parametrize(("target", "syntax"), WRITINGS)
def test_what_a_target_cannot_say_is_not_written(tmp_path: Path, target: str, syntax: Syntax) -> None:
    """Whatever names and schemes there are: the file says it, or there is none and an error names op and target."""

    @settings(_SETTINGS, max_examples=60)
    @given(st.lists(st.tuples(ANY_OPS, ANY_SCHEMES), min_size=1, max_size=4, unique_by=lambda pair: pair[0].name))
    def check(pairs: list[tuple[Op, OpScheme | None]]) -> None:
        try:
            written(tmp_path, dict(pairs), target, syntax)
        except QsensError as error:
            text = str(error)
            assert any(text.startswith(f"{op.name} ({op.type}): {target} cannot say ") for op, _ in pairs), text

    check()


def refusal(target: str, **schemes: str) -> str:
    """Give ops of `NET` schemes that a target has no way to say, and return what is said."""
    assignment = {op.name: scheme_of(schemes.get(op.name, NONE)) for op in NET}
    with pytest.raises(QsensError) as error:
        write_config(assignment, NET, target)
    return str(error.value)


@pytest.mark.parametrize(
    ("target", "schemes", "message"),
    [
        (
            "onnxruntime",
            {"fc1": "w8a8_minmax", "fc2": "w8a8_tensor_minmax"},
            (
                "fc2 (linear): onnxruntime cannot say 'w8a8_tensor_minmax': a file has one scheme for all, which makes "
                "'w8a8_minmax' of it. qsens, compressed-tensors, llm-compressor can say all that is asked for."
            ),
        ),
        (
            "neural-compressor",
            {"fc1": "w8a8", "fc2": "w8a8_dynamic_act_tensor_asym"},
            (
                "fc2 (linear): neural-compressor cannot say 'w8a8_dynamic_act_tensor_asym': other ops are quantized "
                "with approach 'static', and a file has one approach. qsens can say all that is asked for."
            ),
        ),
        (
            "torchao",
            {"fc1": "fp8_static_tensor"},
            (
                "fc1 (linear): torchao cannot say 'fp8_static_tensor': its configs hold the scales of static "
                "activations themselves, and none are known. qsens, compressed-tensors, llm-compressor, modelopt, "
                "modelopt-quant-cfg can say all that is asked for."
            ),
        ),
        (
            "modelopt",
            {"embed": "w8a16_asym", "fc1": "fp8_dynamic"},
            (
                "embed (embedding): modelopt cannot say 'w8a16_asym': it says how linear layers are quantized, and no "
                "embedding. qsens, torchao, compressed-tensors, llm-compressor can say all that is asked for."
            ),
        ),
        (
            "compressed-tensors",
            {"fc1": "wnf4a16_g64"},
            (
                "fc1 (linear): compressed-tensors cannot say 'wnf4a16_g64': it has no nf4. qsens, neural-compressor, "
                "neural-compressor-best-configure, neural-compressor-qconfig can say all that is asked for."
            ),
        ),
        (
            "neural-compressor",
            {"fc1": "w8a8_percentile99.9"},
            (
                "fc1 (linear): neural-compressor cannot say 'w8a8_percentile99.9': ranges of activations are found by "
                "percentile99.9; it has histogram and minmax. qsens, onnxruntime can say all that is asked for."
            ),
        ),
        (
            "compressed-tensors",
            {"fc1": "w8a8_static_act_sym_minmax_smoothquant_unshared"},
            (
                "fc1 (linear): compressed-tensors cannot say 'w8a8_static_act_sym_minmax_smoothquant_unshared': inputs "
                "are smoothed, which is not written to its files. qsens, modelopt-quant-cfg can say all that is asked "
                "for."
            ),
        ),
        (
            "modelopt",
            {"fc1": "w8a8_static_act_sym"},
            (
                "fc1 (linear): modelopt cannot say 'w8a8_static_act_sym': ranges of activations are found by "
                "histogram; it has minmax (measure 'w8a8_static_act_sym_minmax' to write that). qsens can say all that "
                "is asked for."
            ),
        ),
        (
            "qsens",
            {"embed": "w8a8"},
            (
                "embed (embedding): qsens cannot say 'w8a8': an embedding is given indices, which are not quantized. "
                "Neither can any other format."
            ),
        ),
    ],
)
def test_refusals_name_op_scheme_property_and_who_can(target: str, schemes: dict[str, str], message: str) -> None:
    """What is in the way is told with the op it is about, and with the targets that can say all of it."""
    assert refusal(target, **schemes) == message


def test_ops_and_assignment_must_fit() -> None:
    """A scheme without op, an op without scheme, a product of two activations with one: each is an error."""
    scheme = scheme_of("w8a8")
    for assignment, ops, message in [
        ({"a": scheme}, [], "'a', which is no op"),
        ({}, [Op("a", "linear")], "'a' is given no scheme"),
        (
            {"a": scheme, "a:grouped_mm": scheme},
            [Op("a", "linear"), Op("a:grouped_mm", "grouped_mm")],
            r"a:grouped_mm \(grouped_mm\): no format can say",
        ),
        ({"a:qk": scheme}, [Op("a:qk", "qk")], r"a:qk \(qk\): no format can say 'w8a8'"),
        ({"a:grouped_mm": None}, [Op("a:grouped_mm", "grouped_mm")], "there is no op with a weight"),
    ]:
        with pytest.raises(QsensError, match=message):
            write_config(assignment, ops)


def test_members_of_groups_are_written() -> None:
    """What a group is given is written for each member, and products of activations are left out."""
    group = Op("a|b", "linear", (Op("a", "linear"), Op("b", "linear")))
    ops = [group, Op("a:qk", "qk"), Op("e", "embedding")]
    text = write_config({"a|b": scheme_of("w8a8"), "a:qk": None, "e": EMBEDDING}, ops, "neural-compressor")
    assert text == '{\n  "approach": "static",\n  "op_name_dict": {}\n}\n'


def test_most_common_schemes_are_not_spelled_out() -> None:
    """Our own format has one rule for most ops, and others name those alone that are exceptions."""
    ops = [Op("e", "embedding"), *(Op(f"layers.{number}.fc", "linear") for number in range(20))]
    assignment = {op.name: scheme_of("w8a8") for op in ops} | {"e": EMBEDDING, "layers.3.fc": None}
    assert write_config(assignment, ops) == (
        "schema: 1\nrules:\n- ops: layers.3.fc\n  scheme: unquantized\n- ops: '*'\n  scheme: w8a8\n"
    )
    assert write_config(assignment, ops, "neural-compressor").count(".fc") == 1
    assignment |= {name: scheme_of("w8a8_minmax") for name, scheme in assignment.items() if scheme == scheme_of("w8a8")}
    assert write_config(assignment, ops, "compressed-tensors").count(".fc") == 1


OF_TOOLS = [path.name for path in sorted(FILES.iterdir()) if path.suffix in (".json", ".yaml")]
WRITTEN_AS = {
    "neural_compressor_best": "neural-compressor-best-configure",
    "neural_compressor_qconfig": "neural-compressor-qconfig",
    "modelopt_fp8_quant_cfg": "modelopt-quant-cfg",
    "modelopt_auto_quant_cfg": "modelopt-quant-cfg",
}
"""Start of a file's name → what it is written as, where that is not the format's name."""


@pytest.mark.parametrize("file", OF_TOOLS)
def test_files_of_tools_are_written_back(tmp_path: Path, file: str) -> None:
    """What a tool wrote itself is written in the same format, saying the same of each op."""
    config = read_config(FILES / file)
    ops = NET if file.startswith("neural") else LLAMA
    schemes = {op: config.decide(op).scheme for op in ops}
    target = next((name for start, name in WRITTEN_AS.items() if file.startswith(start)), config.format)
    written(tmp_path, schemes, target, TARGETS[target].syntaxes[0])  # type: ignore[arg-type] # none is `Unknown`


def test_targets_are_listed_once() -> None:
    """The command line takes the targets that there are."""
    assert tuple(TARGETS) == names.WRITTEN
    assert tuple(TOGETHER) == names.WRITTEN
