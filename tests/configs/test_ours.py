"""The format of this project, and its JSON schema."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pytest_qsens
from pytest_qsens.configs.read import read_config
from pytest_qsens.errors import QsensError
from pytest_qsens.ops import Op
from tests.configs.ops import LLAMA, NET, complaints, says, write

YAML = """\
schema: 1
schemes:
  small: {weight: {dtype: int4, granularity: group, group_size: 32}}
rules:
  - {ops: lm_head, scheme: unquantized}
  - {ops: [fc1, "em*"], scheme: small}
  - {ops: "*", types: [linear], scheme: {weight: {dtype: fp8_e4m3}, activation: {dtype: fp8_e4m3, kind: dynamic}}}
"""
TOML = """\
schema = 1
[schemes.small]
weight = {dtype = "int4", granularity = "group", group_size = 32}
[[rules]]
ops = "lm_head"
scheme = "unquantized"
[[rules]]
ops = ["fc1", "em*"]
scheme = "small"
[[rules]]
ops = "*"
types = "linear"
scheme = {weight = {dtype = "fp8_e4m3"}, activation = {dtype = "fp8_e4m3", kind = "dynamic"}}
"""
FULL: dict[str, Any] = {
    "$schema": "schema.json",
    "schema": 1,
    "schemes": {
        "a": {"weight": {"dtype": "int4", "granularity": "group", "group_size": 32, "symmetric": False}},
        "b": {
            "activation": {"dtype": "int8", "kind": "static", "granularity": "token", "observer": "percentile99.9"},
            "requantize_output": True,
            "smoothquant": {"alpha": 0.8, "shared": False, "statistic": "range"},
        },
        "c": {"weight": {"dtype": "fp8_e4m3", "granularity": "block", "block": [128, 128]}},
        "d": {"cache": {"dtype": "int4", "kind": "dynamic", "granularity": "group", "group_size": 32}},
        "e": {"cache": {"dtype": "fp8_e4m3", "kind": "static", "granularity": "head", "symmetric": True}},
        "f": {"cache": {"dtype": "int8", "kind": "static", "observer": "moving_average"}},
        "g": {
            "weight": {"dtype": "mxfp8", "scaling_mode": "rceil"},
            "activation": {"dtype": "mxfp4", "kind": "dynamic", "scaling_mode": "even"},
        },
        "h": {"cache": {"dtype": "mxfp4", "kind": "dynamic", "scaling_mode": "ceil"}},
    },
    "rules": [
        {"ops": "x", "scheme": "a"},
        {"ops": ["y", "z"], "types": ["linear", "embedding", "k"], "scheme": "unquantized"},
        {"ops": "*", "types": "linear", "scheme": {"requantize_output": True}},
    ],
}


@pytest.mark.parametrize(("name", "text"), [("a.yaml", YAML), ("a.toml", TOML)])
def test_the_first_rule_that_matches_holds(tmp_path: Path, name: str, text: str) -> None:
    """YAML and TOML say the same; an op that no rule matches is not quantized."""
    path = write(tmp_path / name, text)
    assert set(says(path, [op for op in LLAMA if "layers" in op.name]).values()) == {"fp8_dynamic"}
    expected = {"embed": "w4a16_g32", "fc1": "w4a16_g32", "fc2": "fp8_dynamic", "lm_head": "unquantized"}
    assert says(path, NET) == expected
    assert says(path, [Op("conv", "conv2d")]) == {"conv": "unquantized"}


def test_simulated_schemes_mean_embeddings_in_their_own_way(tmp_path: Path) -> None:
    """With a scheme that can be simulated, an embedding is what that scheme makes of it, and nothing is wrong."""
    path = write(tmp_path / "a.yaml", "schema: 1\nrules: [{ops: '*', scheme: w8a8}]")
    assert says(path, NET) == {"embed": "w8a16_asym", "fc1": "w8a8", "fc2": "w8a8", "lm_head": "w8a8"}
    assert complaints(path, NET) == []


@pytest.mark.parametrize("scheme", ["w8a16", "w8a16_g32", "w8a16_tensor", "w4a16"])
def test_a_weights_scheme_for_embeddings_is_kept(tmp_path: Path, scheme: str) -> None:
    """By name or by type it is what the file says; one of activations, too, is their `w8a16_asym`."""
    by_name = write(tmp_path / "a.yaml", f"schema: 1\nrules: [{{ops: embed, scheme: {scheme}}}]")
    by_type = write(tmp_path / "b.yaml", f"schema: 1\nrules: [{{ops: '*', types: embedding, scheme: {scheme}}}]")
    for path in (by_name, by_type):
        assert says(path, NET[:1]) == {"embed": scheme}
        assert complaints(path, NET[:1]) == []
    path = write(tmp_path / "c.yaml", "schema: 1\nrules: [{ops: embed, scheme: w8a8}]")
    assert says(path, NET[:1]) == {"embed": "w8a16_asym"}


def test_what_is_wrong_is_told(tmp_path: Path) -> None:
    """A glob without an op, an unknown key, a scheme that cannot be simulated: each with its place."""
    path = write(
        tmp_path / "a.yaml",
        "schema: 1\nwhy: no\nrules:\n- {ops: fc9, scheme: w8a8}\n- {ops: [fc*, none], scheme: wnf4a16, alpha: 0.5}\n",
    )
    unsimulated = (
        "'rules', entry 2, 'ops', entry 1: 2 ops (fc1, ...) are quantized as 'wnf4a16', which cannot be simulated: "
        "weights are nf4 (simulated: int2 to int8, fp8_e4m3, mxfp8, mxfp4, nvfp4)"
    )
    assert complaints(path, NET) == [
        "'rules', entry 2, 'alpha': unknown key (value 0.5): what it does is not known, so it is left out",
        "'why': unknown key (value false): what it does is not known, so it is left out",
        "'rules', entry 1, 'ops': 'rule 1: fc9' matches no op of the model. Correct it, or take it out.",
        "'rules', entry 2, 'ops', entry 2: 'rule 2: none' matches no op of the model. Correct it, or take it out.",
        unsimulated,
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda it: it.update(schema=2), "schema 2 is newer than 1"),
        (lambda it: it.pop("schema"), "schema is None, not 1. Write schema: 1"),
        (lambda it: it.update(rules=[]), "there is no rule"),
        (lambda it: it.update(rules={}), "'rules': a list is needed"),
        (lambda it: it["rules"].append(3), "'rules', entry 4: an object is needed, found 3"),
        (lambda it: it["rules"][0].pop("ops"), "'rules', entry 1, 'ops': a name or a glob is needed"),
        (lambda it: it["rules"][0].update(ops=[1]), "'ops', entry 1: a string is needed, found 1"),
        (lambda it: it["rules"][0].update(scheme="w9"), "'rules', entry 1, 'scheme': 'w9' is no scheme"),
        (lambda it: it["rules"][0].update(scheme=None), "the name of a scheme or an object is needed, found null"),
        (lambda it: it["rules"][0].update(types="lstm"), "'types': 'lstm' is no type of op"),
        (lambda it: it["schemes"].update(w8a8={}), "the name 'w8a8' has a meaning already"),
        (lambda it: it["schemes"].update(unquantized={}), "the name 'unquantized' has a meaning already"),
        (lambda it: it["schemes"].update(d={}), "nothing is quantized"),
        (lambda it: it["schemes"]["a"]["weight"].update(dtype="int99"), "'int99' is not one of int1"),
        (lambda it: it["schemes"]["a"]["weight"].update(group_size=0), "'group_size': 0 is not possible"),
        (lambda it: it["schemes"]["a"]["weight"].update(group_size=True), "a whole number is needed, found true"),
        (lambda it: it["schemes"]["a"]["weight"].pop("granularity"), "granularity None does not go with group_size 32"),
        (lambda it: it["schemes"]["a"]["weight"].update(granularity="token"), "'token' is not one of tensor, channel"),
        (lambda it: it["schemes"]["b"]["activation"].pop("kind"), "'kind': a string is needed"),
        (lambda it: it["schemes"]["b"]["activation"].update(kind="dynamic"), "'percentile99.9' has nothing to observe"),
        (
            lambda it: it["schemes"]["b"]["activation"].update(observer="kl"),
            "'kl' is not one of minmax, moving_average",
        ),
        (lambda it: it["schemes"]["b"]["smoothquant"].update(alpha=2), "'alpha': 2 is not possible"),
        (
            lambda it: it["schemes"]["g"]["weight"].update(scaling_mode="up"),
            "'up' is not one of floor, rceil, ceil, even",
        ),
        (lambda it: it["schemes"]["g"]["weight"].update(dtype="int8"), "scales of int8 have no mode, those of mxfp8"),
        (lambda it: it["schemes"]["c"]["weight"].update(block=[1]), r"\[rows, columns\] is needed, found \[1\]"),
    ],
)
def test_mistakes_are_told_with_their_place(tmp_path: Path, change: Any, message: str) -> None:  # noqa: ANN401 - a function
    """What a file may not say is refused: what, where, the value."""
    document = copy.deepcopy(FULL)
    change(document)
    with pytest.raises(QsensError, match=message):
        read_config(write(tmp_path / "a.json", document), "qsens")


VALUES = st.sampled_from(
    [
        True,
        False,
        0,
        1,
        32,
        1.5,
        "",
        "mse",
        "percentile1",
        "dynamic",
        "int8",
        "mxfp8",
        "rceil",
        "group",
        "block",
        "token",
        "x",
        "static",
        [],
        [1, 2],
        {},
        ["linear"],
    ]
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:  # noqa: ANN401 - JSON
    """Every place in a document, as keys and indices."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in inner for place in places(child, (*path, key)))]


def changed(document: Any, path: tuple[Any, ...], value: object, *, remove: bool) -> Any:  # noqa: ANN401 - JSON
    """Put a value into a document, or take one out."""
    document = copy.deepcopy(document)
    if not path:
        return value
    place = document
    for key in path[:-1]:
        place = place[key]
    if remove:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return document


def test_modes_of_scales(tmp_path: Path) -> None:
    """Each part has its own, the usual one where none is given; names have them, too."""
    for scheme, name in (
        (FULL["schemes"]["g"], "wmxfp8amxfp4_dynamic_rceil_act_even"),
        ({"weight": {"dtype": "mxfp8", "scaling_mode": "floor"}}, "wmxfp8a16"),
        ("mxfp4_dynamic_rceil", "mxfp4_dynamic_rceil"),
    ):
        path = write(tmp_path / "a.json", {"schema": 1, "rules": [{"ops": "*", "types": ["linear"], "scheme": scheme}]})
        assert says(path, NET)["fc1"] == name


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(places(FULL)), VALUES, st.booleans())
def test_reader_and_schema_agree(tmp_path: Path, path: tuple[Any, ...], value: object, remove: bool) -> None:
    """What the schema refuses is refused or told as a problem, and what it takes is read, but for names of schemes.

    YAML's and JSON's null is as good as no entry to the reader, as to other tools, so it is none of the values here.
    """
    fastjsonschema = pytest.importorskip("fastjsonschema")
    schema = json.loads((Path(pytest_qsens.__file__).parent / "configs" / "schema.json").read_text())
    document = changed(FULL, path, value, remove=remove)
    try:
        fastjsonschema.validate(schema, document)
        valid = True
    except fastjsonschema.JsonSchemaValueException:
        valid = False
    try:
        problems = read_config(write(tmp_path / "a.json", document), "qsens").problems
        read = not problems
    except QsensError as error:
        read = False
        if "is no scheme" in str(error) or "has a meaning already" in str(error):  # a schema cannot know
            return
    assert read == valid
