"""No change of a valid file, and no file at all, gives more than an error in one line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_qsens.cli import main
from pytest_qsens.configs.decisions import decide
from pytest_qsens.configs.read import FORMATS, read_config
from pytest_qsens.errors import QsensError
from tests.configs.ops import FILES, LLAMA, NET
from tests.configs.test_ours import FULL, changed, places

if TYPE_CHECKING:
    from pathlib import Path

_SETTINGS = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WRITTEN = sorted(path for path in FILES.iterdir() if path.suffix in (".json", ".yaml", ".txt"))
JSON_FILES = [path for path in WRITTEN if path.suffix == ".json"]
DOCUMENTS: list[Any] = [FULL, *(json.loads(path.read_text()) for path in JSON_FILES)]
_STATIC = {"w_dtype": "int8", "w_granularity": "per_channel", "act_dtype": "uint8", "act_granularity": "per_tensor"}
_BLOCKS = {"num_bits": 4, "block_sizes": {"-1": 128, "type": "static"}}
_TORCHAO = {"default": DOCUMENTS[-1]}
DOCUMENTS += [
    {"auto_quantize": {"disabled_layers": ["*a*", {"$import": "x"}], "constraints": {"effective_bits": 5}}},
    {"quant_cfg": {"*weight_quantizer": _BLOCKS, "default": {"enable": False}, "nn.Linear": {"*": {"axis": 0}}}},
    {
        "default_stage": {
            "default_modifiers": {"QuantizationModifier": {"scheme": {"W8A8": ["Linear"]}, "ignore": ["a"]}}
        }
    },
    {"approach": "weight_only", "op_name_dict": {"a.*": {"weight": {"bits": 4, "group_size": 32, "scheme": "sym"}}}},
    {"('a', 'Linear')": {"static_quant": _STATIC}},
    {"quantization_config": {"quant_method": "torchao", "quant_type": _TORCHAO, "modules_to_not_convert": ["a"]}},
]

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 200),
    st.sampled_from(
        [10**30, -1, 1.5, float("nan"), float("inf"), "", "re:(", "*", "\ud800", "\x1b[31m", "int8", "W8A8", "-1"]
    ),
    st.text(max_size=5),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def survives(path: Path, name: str | None = None) -> None:
    """Read and decide: an answer, or an error that begins with the path and has one line."""
    try:
        config = read_config(path, name)
    except QsensError as error:
        refusal = str(error)
    else:
        for ops in (LLAMA, NET):
            decisions, problems = decide(config, ops)
            assert [decision.op for decision in decisions] == list(ops)
            assert all(str(problem).startswith(str(path)) and "\n" not in str(problem) for problem in problems)
        return
    assert str(path) in refusal
    assert "\n" not in refusal


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_is_changed_is_read(tmp_path: Path, document: Any) -> None:  # noqa: ANN401 - JSON
    """Before anything of it is changed, each document is a config that says something of the ops of a model."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    assert read_config(path).rules


@_SETTINGS
@given(st.data())
def test_any_value_anywhere(tmp_path: Path, data: st.DataObject) -> None:
    """Values of any kind, anywhere in a file of any format, or something left out."""
    document = data.draw(st.sampled_from(DOCUMENTS))
    place = data.draw(st.sampled_from(places(document)))
    document = changed(document, place, data.draw(VALUES), remove=data.draw(st.booleans()))
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    survives(path)
    survives(path, data.draw(st.sampled_from(sorted(FORMATS))))


@_SETTINGS
@given(st.sampled_from(WRITTEN), st.integers(0, 2**16), st.binary(max_size=4), st.integers(0, 64))
def test_any_byte_anywhere(tmp_path: Path, source: Path, at: int, put: bytes, cut: int) -> None:
    """Bytes changed, put in or cut out, and files cut short."""
    content = source.read_bytes()
    at %= len(content)
    path = tmp_path / source.name
    path.write_bytes(content[:at] + put + content[at + cut :])
    survives(path)
    path.write_bytes(content[:at])
    survives(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | st.text("{}[]:-&*!?|>'\"%@`#,\n \t0a=.e~<", max_size=40).map(str.encode))
def test_any_text(tmp_path: Path, content: bytes) -> None:
    """Whatever a file holds, in every syntax."""
    for name in ("a.json", "a.yaml", "a.toml", "a.txt", "a"):
        path = tmp_path / name
        path.write_bytes(content)
        survives(path)


@pytest.mark.parametrize("text", ["\x1b[31mred", "\ud800", "a\nb"])
def test_nothing_odd_reaches_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    """Escape sequences, line ends and what is no character are printed as escapes."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"schema": 1, text: text, "rules": [{"ops": text, "scheme": "w8a8", text: 1}]}))
    assert main(["config", str(path)]) == 0
    printed = capsys.readouterr().out
    assert all(letter.isprintable() or letter == "\n" for letter in printed)
    printed.encode()
