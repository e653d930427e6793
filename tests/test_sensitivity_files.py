"""Reading sensitivity files of several tools."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qsens.errors import QsensError
from pytest_qsens.results import OpResult
from pytest_qsens.sensitivity_files import Sensitivities, read_pair
from tests.sensitivities import LANGUAGE, measured, model_opt, neural_compressor, results, text_only, write_json

if TYPE_CHECKING:
    from pathlib import Path

OURS = [measured("a", 0.1, 0.9), measured("b", 0.2, 0.8), measured("c", 0.3, 0.7)]


def read(path: Path, **asked: str) -> Sensitivities:
    """Read one file, as if compared with itself."""
    return read_pair(path, path, **asked)[0]


def test_ours(tmp_path: Path) -> None:
    """All ops of a result file are there: with the value of the mode and metric, or why there is none."""
    ops = [*OURS, OpResult("d", "linear", "", "unexercised", "no batch"), OpResult("e", "linear", "", "unrun")]
    ops.append(OpResult("f", "linear", "", "measured", None, None, {"nmse": 0.1}))
    found = read(results(tmp_path / "r.json", ops))
    assert (found.tool, found.mode, found.metric) == ("pytest-qsens", "isolated", "nmse")
    assert found.about == "model tiny, scheme w8a8, engine replay"
    assert found.values == {"a": 0.1, "b": 0.2, "c": 0.3}
    assert found.without == {
        "d": "unexercised: no batch",
        "e": "unrun",
        "f": "measured, but without nmse in mode isolated",
    }
    assert found.trusted


def test_estimates_are_called_so(tmp_path: Path) -> None:
    """A value that was estimated is compared, and never passes for a measured one."""
    path = results(tmp_path / "r.json", [*OURS, OpResult("d", "linear", "", "estimated", "probe", {"nmse": 0.4})])
    assert read(path).notes == ("estimates, not measured: 1 of 4 values",)
    assert read(path, metric="sse").notes == ()


@pytest.mark.parametrize(
    ("mode", "metric", "larger"),
    [
        ("isolated", "nmse", True),
        ("isolated", "sqnr_db", False),
        ("isolated", "top1", False),
        ("fallback", "nmse", False),
        ("fallback", "sse", False),
        ("fallback", "sqnr_db", True),
        ("fallback", "gain", True),
    ],
)
def test_the_direction_of_ours(tmp_path: Path, mode: str, metric: str, larger: bool) -> None:
    """A large error is sensitive when the op is quantized alone, a small one when it alone is not; dB are reversed."""
    scores = {"nmse": 0.1, "sse": 1.0, "sqnr_db": 10.0, "top1": 0.5}
    path = results(
        tmp_path / "r.json", [OpResult("a", "linear", "", "measured", None, scores, {**scores, "gain": 0.1})]
    )
    found = read(path, mode=mode, metric=metric)
    assert (found.mode, found.metric, found.larger_is_sensitive) == (mode, metric, larger)


def test_an_infinite_sqnr_is_a_value(tmp_path: Path) -> None:
    """An op whose output equals the reference is measured, and the least sensitive of all."""
    path = results(tmp_path / "r.json", [measured("a", 0.0, sqnr_db=None), measured("b", 0.1, sqnr_db=10.0)])
    assert read(path, metric="sqnr_db").values == {"a": math.inf, "b": 10.0}


def test_neural_compressor(tmp_path: Path) -> None:
    """Its values are sums of squares of the model with this op in fp32: small is sensitive; names lose ``.module``."""
    found = read(neural_compressor(tmp_path / "i.json", {"x.q_proj.module": 4.5, "x.module.fc": 5}, {}))
    assert (found.mode, found.metric, found.larger_is_sensitive) == ("fallback", "sse", False)
    assert found.values == {"x.q_proj": 4.5, "x.module.fc": 5.0}
    assert not found.trusted
    assert found.notes == ("the values that it calls mse are sums of squared errors",)


def test_neural_compressors_requantize_order_is_called_cumulative(tmp_path: Path) -> None:
    """The other list is no score of single ops: used only if there is nothing else, and told either way."""
    path = tmp_path / "i.json"
    found = read(neural_compressor(path, {}, {"a": 1.0}))
    assert (found.mode, found.larger_is_sensitive, found.about) == ("cumulative", True, "int8_requant_sensitivity")
    assert "no score of the op alone" in found.notes[1]
    assert read(neural_compressor(path, None, {"a": 1.0})).mode == "cumulative"
    found = read(neural_compressor(path, {"a": 2.0}, {"a": 1.0}))
    assert (found.mode, found.values) == ("fallback", {"a": 2.0})
    assert found.notes[1] == "'int8_requant_sensitivity' is cumulative and left aside"


def test_model_opt(tmp_path: Path) -> None:
    """Large is sensitive; what it is about is told where the file says so, and other keys do not matter."""
    found = read(text_only(tmp_path / "m.json"))
    assert (found.tool, found.mode, found.larger_is_sensitive) == ("ModelOpt AutoQuantize", "isolated", True)
    assert found.about == "model Tiny-VL, scheme int8"
    assert found.values[LANGUAGE[0]] == 0.5
    assert len(found.values) == 12
    found = read(model_opt(tmp_path / "m.json", {"a": 1}, model="m", scheme=None, autoquant_state=[1]))
    assert (found.about, found.values) == ("layer_sensitivity", {"a": 1.0})


@pytest.mark.parametrize(
    ("mode", "metric", "expected"),
    [
        (None, None, ("fallback", "sse")),
        ("isolated", None, ("isolated", "sse")),
        (None, "nmse", ("fallback", "nmse")),
    ],
)
def test_ours_follows_the_other_tool(
    tmp_path: Path, mode: str | None, metric: str | None, expected: tuple[str, str]
) -> None:
    """Unless asked otherwise ours is taken in the mode and metric that the other file has, on either side."""
    ours, other = results(tmp_path / "r.json", OURS), neural_compressor(tmp_path / "i.json", {"a": 1.0})
    left, right = read_pair(ours, other, mode, metric)
    assert (left.mode, left.metric) == expected
    assert (right.mode, right.metric) == ("fallback", "sse")
    assert read_pair(other, ours, mode, metric) == (right, left)
    left, _ = read_pair(ours, text_only(tmp_path / "m.json"), mode, metric)
    assert (left.mode, left.metric) == (mode or "isolated", metric or "nmse")


def test_two_of_ours_meet_in_a_mode_and_metric_of_both(tmp_path: Path) -> None:
    """The default is what both have; where they share no mode, each is taken as it is."""
    both = results(tmp_path / "both.json", OURS)
    scores = {"sse": 1.0, "sqnr_db": 3.0}
    alone = results(tmp_path / "alone.json", [OpResult("a", "linear", "", "measured", None, None, scores)], "fallback")
    assert [(it.mode, it.metric) for it in read_pair(both, alone)] == [("fallback", "sse")] * 2
    other = results(tmp_path / "other.json", [measured("a", 1.0)], "isolated")
    assert [(it.mode, it.metric) for it in read_pair(other, alone)] == [("isolated", "sse"), ("fallback", "sse")]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"mode": "fallback"}, r"r\.json: there is no mode 'fallback' in it\. It has isolated\."),
        ({"metric": "kl"}, r"r\.json, mode isolated: there is no metric 'kl' in it\. It has nmse, sse\."),
        ({"metric": "colour"}, r"there is no metric 'colour' in it"),
    ],
)
def test_what_is_not_in_a_result_is_said_with_what_is(tmp_path: Path, asked: dict[str, str], message: str) -> None:
    """A mode or metric that was not measured is never replaced by another one."""
    with pytest.raises(QsensError, match=message):
        read(results(tmp_path / "r.json", [measured("a", 0.1)]), **asked)


@pytest.mark.parametrize("option", ["mode", "metric"])
def test_options_for_ours_need_one_of_ours(tmp_path: Path, option: str) -> None:
    """Asking for a mode of files that have only one would otherwise pass unheard."""
    with pytest.raises(QsensError, match=f"--{option} chooses from result files of pytest-qsens, and neither"):
        read(text_only(tmp_path / "m.json"), **{option: "fallback"})


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "an object is needed, found []"),
        ({}, "unknown shape, found an object without keys. Known are a result file of pytest-qsens"),
        ({"schema": 1, "ops": {}, "model": "m"}, "unknown shape, found keys 'schema', 'ops', 'model'. Known are"),
        ({str(number): 0 for number in range(10)}, "'7' and 2 more. Known are"),
        ({"schema": 2, "run": {}, "ops": []}, "schema 2 is newer than 1"),
        ({"layer_sensitivity": {}}, "'layer_sensitivity': a list is needed, found {}"),
        ({"layer_sensitivity": []}, "'layer_sensitivity' without a single layer"),
        ({"layer_sensitivity": [1]}, "'layer_sensitivity', entry 1: an object is needed, found 1"),
        ({"layer_sensitivity": [{"sensitivity": 1}]}, "entry 1, 'layer': a string is needed, found nothing"),
        ({"layer_sensitivity": [{"layer": "", "sensitivity": 1}]}, "entry 1, 'layer': the name is empty"),
        (
            {"layer_sensitivity": [{"layer": "a"}]},
            "entry 1 'a', 'sensitivity': a finite number is needed, found nothing",
        ),
        ({"layer_sensitivity": [{"layer": "a", "sensitivity": "1"}]}, "a finite number is needed, found '1'"),
        ({"layer_sensitivity": [{"layer": "a", "sensitivity": True}]}, "a finite number is needed, found True"),
        (
            {"layer_sensitivity": [{"layer": "a", "sensitivity": math.nan}]},
            "entry 1 'a', 'sensitivity': a finite number",
        ),
        ({"layer_sensitivity": [{"layer": "a", "sensitivity": math.inf}]}, "a finite number is needed, found inf"),
        ({"layer_sensitivity": [{"layer": "a", "sensitivity": -1}]}, "'sensitivity': -1.0 is not possible"),
        (
            {"layer_sensitivity": [{"layer": "a", "sensitivity": 1, "num_bits": "8"}]},
            "'num_bits': a finite number is needed, found '8'",
        ),
        (
            {"layer_sensitivity": [{"layer": "a", "sensitivity": 1}, {"layer": "a", "sensitivity": 2}]},
            "entry 2 'a': 'a' is there twice. Keep one of the two entries.",
        ),
        ({"fp32_fallback_sensitivity": None}, "'fp32_fallback_sensitivity': a list is needed, found nothing"),
        (
            {"fp32_fallback_sensitivity": [], "int8_requant_sensitivity": []},
            "'fp32_fallback_sensitivity' and 'int8_requant_sensitivity' without a single op",
        ),
        ({"int8_requant_sensitivity": [{"op_name": 3, "mse": 1}]}, "entry 1, 'op_name': a string is needed, found 3"),
        ({"fp32_fallback_sensitivity": [{"op_name": ".module", "mse": 1}]}, "'op_name': the name is empty"),
        (
            {"fp32_fallback_sensitivity": [{"op_name": "a", "mse": 1, "op_type": 7}]},
            "'op_type': a string is needed, found 7",
        ),
        (
            {"fp32_fallback_sensitivity": [{"op_name": "a", "mse": 1}, {"op_name": "a.module", "mse": 2}]},
            "entry 2 'a': 'a' is there twice",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_place(tmp_path: Path, document: Any, message: str) -> None:  # noqa: ANN401  # any JSON
    """The message says which file, which entry, what was found, and what shapes are known."""
    path = write_json(tmp_path / "bad.json", document)
    with pytest.raises(QsensError) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_files_of_no_kind(tmp_path: Path) -> None:
    """A missing file, a directory, text and bytes end in a message, not a traceback."""
    with pytest.raises(QsensError, match=r"there is no file .*/none\.json\. Known are"):
        read(tmp_path / "none.json")
    with pytest.raises(QsensError, match="cannot be read: Is a directory"):
        read(tmp_path)
    path = tmp_path / "bad.json"
    for content, message in (
        (b"import x", "malformed JSON"),
        (b"\x89PNG", "is not UTF-8"),
        (b'{"a":1,"a":2}', "twice"),
    ):
        path.write_bytes(content)
        with pytest.raises(QsensError, match=message):
            read(path)


def test_a_result_of_ours_without_scores_or_with_an_op_twice(tmp_path: Path) -> None:
    """There is nothing to compare in a run that measured nothing, and an op with two scores has none."""
    path = results(tmp_path / "r.json", [OpResult("a", "linear", "", "unrun")])
    with pytest.raises(QsensError, match=r"none of its 1 ops has a score\. `qsens show .*r\.json` says why"):
        read(path)
    results(path, [OpResult("a", "linear", "", "measured", None, {"colour": 1.0})])
    with pytest.raises(QsensError, match="none of its 1 ops has a score"):
        read(path)
    with pytest.raises(QsensError, match=r"r\.json, 'ops': 'a' is there twice"):
        read(results(path, [measured("a", 1.0), measured("a", 2.0)]))
    text = results(path, OURS).read_text()
    path.write_text(text.replace("0.1,", "NaN,", 1))
    with pytest.raises(QsensError, match="'a', 'isolated', 'nmse': a finite number is needed, found nan"):
        read(path)
