"""Results: travelling between processes, and the result file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_qsens.errors import QsensError
from pytest_qsens.profile import Profile
from pytest_qsens.result_files import check_overwritable, dump, load, write
from pytest_qsens.result_payloads import INTERVAL, NON_NEGATIVE, from_payload, to_payload
from pytest_qsens.results import Cost, OpResult, RunInfo, RunResult
from pytest_qsens.shards import Shard

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
METRIC = TEXT.filter(lambda name: name not in {*NON_NEGATIVE, INTERVAL})
SCORES = st.dictionaries(METRIC, NUMBER, max_size=3) | st.just({"nmse": 0.0, "sqnr_db": None})
STATUS = st.sampled_from(["measured", "estimated", "unexercised", "unquantizable", "unquantized", "failed", "unrun"])
RESULT = st.builds(
    OpResult,
    TEXT,
    TEXT,
    TEXT,
    STATUS,
    reason=st.none() | TEXT,
    isolated=st.none() | SCORES,
    fallback=st.none() | SCORES,
    seconds=NUMBER,
    scheme=st.none() | TEXT,
    added=st.none() | SCORES,
)
SECONDS = st.dictionaries(TEXT, NUMBER, max_size=3)
RUN = st.builds(
    RunInfo,
    TEXT,
    TEXT,
    TEXT,
    st.sampled_from(["isolated", "fallback", "both"]),
    st.dictionaries(TEXT, TEXT, max_size=3),
    st.builds(Cost, NUMBER, st.none() | NUMBER, st.none() | NUMBER, st.none() | NUMBER),
    engine_reason=st.none() | TEXT,
    data=st.none() | TEXT,
    profile=st.none() | st.builds(Profile, st.integers(1, 99), SECONDS, SECONDS, st.none() | NUMBER),
    reference=st.none() | TEXT,
    shard=st.none() | st.integers(1, 99).flatmap(lambda count: st.builds(Shard, st.integers(1, count), st.just(count))),
    config=st.none() | st.dictionaries(TEXT, TEXT, max_size=3),
)
RUN_RESULT = st.builds(RunResult, RUN, st.lists(RESULT, max_size=3).map(tuple), st.none() | RESULT)

MEASURED = OpResult(
    "encoder.0", "linear", "encoder.0", "measured", isolated={"nmse": 0.1 + 0.2, "sqnr_db": 5.0}, seconds=0.25
)
IDENTICAL = OpResult(
    "encoder.1", "linear", "encoder.1", "measured", "identical to the reference", {"nmse": 0.0, "sqnr_db": None}
)
FAILED = OpResult("encoder.2", "linear", "encoder.2", "failed", "NaN when quantized")
RUN_INFO = RunInfo("minilm", "w8a8", "replay", "isolated", {"torch": "2.13.0"}, Cost(12.5, 0.5, 0.75))
EXAMPLE = RunResult(
    RUN_INFO, (IDENTICAL, MEASURED, FAILED), OpResult("total", "total", "", "measured", None, {"nmse": 0.5})
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Path of a result file that does not exist yet."""
    return tmp_path / "result.json"


@given(RESULT)
def test_a_payload_carries_everything(result: OpResult) -> None:
    """Taking a result apart and rebuilding it gives the same result, also through JSON, as between processes."""
    assert from_payload(to_payload(result)) == result
    assert from_payload(json.loads(json.dumps(to_payload(result)))) == result


def test_a_payload_has_builtin_types_only() -> None:
    """NumPy's float64 is a float that xdist's serializer kills the worker for: none may get through."""
    scores: dict[str, Any] = {"nmse": np.float64(0.5), "sse": np.float32(2)}
    result = OpResult("a", "linear", "", "measured", None, scores, seconds=np.float64(1))

    def types(value: object) -> set[type]:
        if isinstance(value, dict):
            return {type(value), *(kind for item in value.items() for part in item for kind in types(part))}
        return {type(value)}

    assert types(to_payload(result)) == {dict, str, float, type(None)}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_no_number_never_travels(value: float) -> None:
    """An op with NaN or infinite scores has failed; presenting it as measured is a bug that must show."""
    with pytest.raises(ValueError, match="encoder: isolated, 'nmse': a finite number is needed"):
        to_payload(OpResult("encoder", "linear", "", "measured", None, {"nmse": value}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": "fine"}, "payload 'encoder.0', 'status': 'fine' is not one of measured, estimated"),
        ({"op": None}, "payload, 'op': a string is needed, found nothing"),
        ({"seconds": "1"}, "'seconds': a finite number is needed, found '1'"),
        ({"isolated": {"nmse": None}}, "'isolated', 'nmse': a finite number is needed, found nothing"),
        ({"isolated": 50 * "x"}, r"an object is needed, found 'x{36}\.\.\."),
        ({"colour": "red"}, "unknown key 'colour'"),
    ],
)
def test_a_broken_payload_is_refused(change: dict[str, Any], message: str) -> None:
    """What is wrong in a payload is named with the op it belongs to."""
    with pytest.raises(QsensError, match=message):
        from_payload({**to_payload(MEASURED), **change})


@given(RUN_RESULT)
def test_loading_what_was_dumped_is_the_identity(tmp_path_factory: pytest.TempPathFactory, result: RunResult) -> None:
    """A result survives its file at full precision, and the file's bytes survive being rewritten."""
    file = tmp_path_factory.getbasetemp() / "identity.json"
    file.write_bytes(dump(result).encode())
    loaded = load(file)
    assert loaded == result
    assert dump(loaded).encode() == file.read_bytes()


def test_layout_of_the_file(path: Path) -> None:
    """Other tools read this file: its keys, the order of the model's ops, null for an infinite SQNR, full precision."""
    write(path, EXAMPLE)
    document = json.loads(path.read_text())
    assert list(document) == ["schema", "run", "ops", "total"]
    assert document["schema"] == 1
    assert document["run"] == {
        "model": "minilm",
        "scheme": "w8a8",
        "engine": "replay",
        "engine_reason": None,
        "mode": "isolated",
        "environment": {"torch": "2.13.0"},
        "data": None,
        "cached": 0,
        "cost": {"wall_seconds": 12.5, "reference_seconds": 0.5, "forwards_per_op": 0.75},
    }
    assert [op["op"] for op in document["ops"]] == ["encoder.1", "encoder.0", "encoder.2"]
    assert document["ops"][0]["isolated"] == {"nmse": 0.0, "sqnr_db": None}
    assert document["ops"][1]["isolated"]["nmse"] == 0.30000000000000004
    assert document["ops"][2] == {
        "op": "encoder.2",
        "type": "linear",
        "block": "encoder.2",
        "status": "failed",
        "reason": "NaN when quantized",
        "isolated": None,
        "fallback": None,
        "seconds": 0.0,
    }
    assert document["total"]["isolated"] == {"nmse": 0.5}
    assert [line.strip()[:8] for line in path.read_text().splitlines()].count('{"op": "') == 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"schema": 1', '"schema": 2', "schema 2 is newer than 1.*Upgrade pytest-qsens"),
        ('"schema": 1', '"schema": "1"', "schema is '1', not 1"),
        ('"run": {', '"run": {,', "line 3: malformed JSON"),
        ('"mode": "isolated"', '"mode": "other"', "'run', 'mode': 'other' is not one of isolated, fallback, both"),
        ('"wall_seconds": 12.5', '"wall_seconds": null', "'cost', 'wall_seconds': a finite number is needed"),
        ('"wall_seconds"', '"wall_hours": 1, "wall_seconds"', "'cost': unknown key 'wall_hours'"),
        ('"torch": "2.13.0"', '"torch": 2', "'environment', 'torch': a string is needed"),
        ('"data": null', '"date": null', "'run': unknown key 'date'"),
        ('"ops": [', '"ops": {}, "list": [', "'ops': a list is needed"),
        ('"status": "failed"', '"status": "lost"', "op 'encoder.2', 'status': 'lost' is not one of"),
        ('"type": "total"', '"type": 0', "'total' 'total', 'type': a string is needed, found 0"),
        ('"total": {', '"more": 1, "total": {', "unknown key 'more'"),
        ("12.5", "Infinity", "Infinity is not a score"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_refused_and_left_untouched(
    path: Path, old: str, new: str, message: str
) -> None:
    """Reading names the file and the place; a run that would overwrite the file refuses to start."""
    text = dump(EXAMPLE)
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(QsensError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    with pytest.raises(QsensError, match="exists and is not a result file of this version; it is left untouched"):
        check_overwritable(path)
    assert path.read_text() == text.replace(old, new)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"processes": 2', '"processes": "2"', "'run', 'profile', 'processes': a finite number is needed, found '2'"),
        ('"load": 1.5', '"load": null', "'profile', 'seconds', 'load': a finite number is needed, found nothing"),
        ('"replay": {}', '"replay": []', "'profile', 'replay': an object is needed"),
        ('"gemm_seconds"', '"gemm"', "'profile': unknown key 'gemm'"),
    ],
)
def test_a_broken_profile_is_refused(path: Path, old: str, new: str, message: str) -> None:
    """A profile is read as strictly as the rest of the file."""
    text = dump(RunResult(replace(RUN_INFO, profile=Profile(2, {"load": 1.5}, {}, None)), ()))
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(QsensError, match=message):
        load(path)


def test_a_shard_says_which_it_is(path: Path) -> None:
    """What merges shards needs their number, and what the unquantized model gave; other files have no such key."""
    write(path, RunResult(replace(RUN_INFO, shard=Shard(2, 3), reference="0a1b"), ()))
    run = json.loads(path.read_text())["run"]
    assert run["shard"] == {"index": 2, "count": 3}
    assert run["reference"] == "0a1b"
    for shard, message in (
        ('"index": 4', "'run', 'shard' takes i/N.*not '4/3'"),
        ('"part": 2', "'shard', 'index': a f"),
    ):
        path.write_text(path.read_text().replace('"index": 2', shard))
        with pytest.raises(QsensError, match=message):
            load(path)
        path.write_text(path.read_text().replace(shard, '"index": 2'))


@pytest.mark.parametrize("content", [b"", b"[]", b'{"name": "package.json"}', b"\x89PNG\xff", b"print('hello')"])
def test_a_file_of_someone_else_is_not_overwritten(path: Path, content: bytes) -> None:
    """Mistyping ``--qsens-json setup.py`` must not cost the file."""
    path.write_bytes(content)
    with pytest.raises(QsensError, match="is not a result file"):
        check_overwritable(path)
    assert path.read_bytes() == content


def test_an_older_result_may_be_overwritten(path: Path) -> None:
    """Running again with the same result file is the usual thing, and the check itself writes nothing."""
    check_overwritable(path)
    assert not path.exists()
    write(path, EXAMPLE)
    check_overwritable(path)
    assert load(path) == EXAMPLE
    write(path, RunResult(RUN_INFO, ()))
    assert load(path) == RunResult(RUN_INFO, ())
    assert list(path.parent.iterdir()) == [path]


def test_places_where_no_result_can_go_are_named(tmp_path: Path) -> None:
    """A missing directory, what is no file, and a read-only place are found before anything is measured."""
    with pytest.raises(QsensError, match=r"there is no directory .*/missing\. Create it first"):
        check_overwritable(tmp_path / "missing" / "result.json")
    for place in (tmp_path, Path("/dev/full"), Path("/dev/null")):
        with pytest.raises(QsensError, match=rf"cannot write {place}: it is not a file"):
            check_overwritable(place)
    with pytest.raises(QsensError, match="/sys/kernel is not writable"):
        check_overwritable(Path("/sys/kernel/result.json"))


def test_a_missing_result_says_how_to_get_one(path: Path) -> None:
    """The error for a file that is not there gives the option that writes it."""
    with pytest.raises(QsensError, match=r"there is no result file .*--qsens-json"):
        load(path)
