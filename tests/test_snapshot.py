"""The snapshot file: its text, merging, and writing it without losing anything."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pytest_qsens import files
from pytest_qsens.errors import QsensError
from pytest_qsens.ops import TOTAL
from pytest_qsens.results import Scores, round_score
from pytest_qsens.snapshot import (
    Entry,
    Snapshot,
    adopt,
    changed,
    check_writable,
    dumps,
    environment_diff,
    load,
    merge,
    prune,
    union,
    with_other_schemes,
    write,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBER = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=1e300)
METRIC = st.sampled_from(["kl", "mse", "nmse", "sse", "top1"])
SCORES = st.dictionaries(METRIC, NUMBER.map(abs)).flatmap(
    lambda scores: st.sampled_from([scores, scores | {"sqnr_db": None}, scores | {"sqnr_db": 30.0}])
)
MODES = {mode: st.none() | SCORES for mode in ("isolated", "fallback", "added")}
ENTRY = st.builds(Entry, st.just("linear"), **MODES)
OF_A_CONFIG = st.builds(Entry, st.just("linear"), **MODES, scheme=TEXT)
NAME = st.sampled_from(["a.0", "a.1", "ü", TOTAL]) | TEXT
ENTRIES = st.dictionaries(NAME, ENTRY, max_size=4)
ENVIRONMENT = st.dictionaries(TEXT, TEXT, max_size=3)
SNAPSHOT = st.builds(Snapshot, TEXT, TEXT, ENVIRONMENT, ENTRIES | st.dictionaries(NAME, OF_A_CONFIG, max_size=4))

CANONICAL = """\
{
  "schema": 1,
  "model": "minilm",
  "scheme": "w8a8",
  "environment": {
    "arch": "x86_64",
    "torch": "2.13.0"
  },
  "ops": {
    "encoder.0": {"fallback": {"gain": -0.0001, "nmse": 0.05}, "isolated": {"nmse": 0.0312346}, "type": "linear"},
    "encoder.1": {"isolated": {"nmse": 0.0, "sqnr_db": null}, "type": "linear"}
  },
  "total": {"isolated": {"nmse": 1e-05}, "type": "total"}
}
"""


def entry(nmse: float, **modes: Scores) -> Entry:
    """Make an entry with this isolated NMSE, and other modes."""
    return Entry("linear", isolated={"nmse": nmse}, **modes)


def rounded(snapshot: Snapshot) -> Snapshot:
    """Give what a file can keep of a snapshot."""
    ops = {name: Entry.from_payload(value.to_payload()) for name, value in snapshot.ops.items()}
    return Snapshot(snapshot.model, snapshot.scheme, snapshot.environment, ops)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Path of a snapshot that does not exist yet."""
    return tmp_path / "snapshots" / "minilm" / "w8a8.json"


def put(path: Path, entries: dict[str, Entry], **environment: str) -> bool:
    """Write entries into the file of minilm, w8a8."""
    return write(
        path,
        lambda old: replace(merge(old, entries), environment=environment),
        model="minilm",
        scheme="w8a8",
    )


def test_text_of_the_file(tmp_path: Path) -> None:
    """One op a line, keys sorted, 6 significant digits, the whole model beside the ops, a newline at the end."""
    snapshot = Snapshot(
        "minilm",
        "w8a8",
        {"torch": "2.13.0", "arch": "x86_64"},
        {
            TOTAL: Entry("total", isolated={"nmse": 1e-5}),
            "encoder.1": Entry("linear", isolated={"sqnr_db": None, "nmse": -0.0}),
            "encoder.0": entry(0.03123456789, fallback={"nmse": 0.05, "gain": -0.0001}),
        },
    )
    assert dumps(snapshot) == CANONICAL
    file = tmp_path / "w8a8.json"
    file.write_text(CANONICAL)
    assert load(file, model="minilm", scheme="w8a8") == rounded(snapshot)


@given(SNAPSHOT)
def test_loading_what_was_dumped_is_the_identity(tmp_path_factory: pytest.TempPathFactory, snapshot: Snapshot) -> None:
    """A snapshot at the file's precision survives the file, and the file's bytes survive being rewritten."""
    file = tmp_path_factory.getbasetemp() / "identity.json"
    file.write_bytes(dumps(snapshot).encode())
    loaded = load(file)
    assert loaded == rounded(snapshot)
    assert dumps(loaded).encode() == file.read_bytes()


@given(SNAPSHOT)
def test_order_of_measuring_leaves_no_trace(snapshot: Snapshot) -> None:
    """The same entries give the same bytes whichever came first."""
    backwards = Snapshot(
        snapshot.model,
        snapshot.scheme,
        dict(reversed([*snapshot.environment.items()])),
        dict(reversed([*snapshot.ops.items()])),
    )
    assert dumps(backwards) == dumps(snapshot)


@given(NUMBER)
def test_rounding_is_idempotent_and_keeps_six_digits(value: float) -> None:
    """Rounding again changes nothing, and loses at most half a unit of the sixth digit."""
    once = round_score(value)
    assert round_score(once) == once
    assert abs(once - value) <= 5.000001e-6 * abs(value)


def test_a_missing_file_is_an_empty_snapshot(path: Path) -> None:
    """Before the first update there is nothing to compare with, and that is no error."""
    assert load(path, model="minilm", scheme="w8a8") == Snapshot("minilm", "w8a8")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"nmse": 0.0,', '"nmse": 0.0', r"w8a8\.json, line 11: malformed JSON"),
        ("{\n", "<<<<<<< HEAD\n{\n", r"line 1: malformed JSON .* merge conflicts"),
        ('"encoder.1"', '"encoder.0"', "'encoder.0' is there twice"),
        ('"schema": 1', '"schema": 2', r"schema 2 is newer than 1.*Upgrade pytest-qsens"),
        ('"schema": 1', '"schema": 0', "schema is 0, not 1"),
        ('"schema": 1', '"schema": true', "schema is True, not 1"),
        ('"schema": 1,', "", "schema is None, not 1"),
        ('"minilm"', "7", "'model': a string is needed, found 7"),
        ('"minilm"', '"bert"', "is the snapshot of model 'bert', not 'minilm'"),
        ('"w8a8"', '"w4a16"', "is the snapshot of scheme 'w4a16', not 'w8a8'"),
        ('"2.13.0"', "2.13", "'environment', 'torch': a string is needed, found 2.13"),
        ('"type": "linear"', '"type": null', "op 'encoder.[01]', 'type': a string is needed, found nothing"),
        ('"type": "linear"', '"typ": "linear"', "op 'encoder.[01]', 'type': a string is needed"),
        ('"isolated": {"nmse": 0.0312346}', '"isolated": 3', "'isolated': an object is needed, found 3"),
        ('"isolated": {"nmse": 0.0312346}', '"other": {}', "op 'encoder.0': unknown key 'other'"),
        ("0.0312346", "NaN", "w8a8.json: NaN is not a score"),
        ("0.0312346", "-Infinity", "-Infinity is not a score"),
        ("0.0312346", "1e999", "'nmse': a finite number is needed, found inf"),
        ("0.0312346", "1" + 400 * "0", "'nmse': a finite number is needed, found 10000"),
        ("0.0312346", "1" + 5000 * "0", "malformed JSON"),
        ("0.0312346", "null", "'nmse': a finite number is needed, found nothing"),
        ("0.0312346", "-0.0312346", "op 'encoder.0', 'isolated', 'nmse': -0.0312346 is not possible"),
        ("0.0312346", "true", "'nmse': a finite number is needed, found True"),
        ("0.0312346", '"0.03"', "'nmse': a finite number is needed, found '0.03'"),
        ('"encoder.1"', '"total"', "'total' belongs beside 'ops'"),
        ('"total": {', '"sum": {}, "total": {', "unknown key 'sum'"),
        ("\n", 100_000 * "[", "malformed JSON"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_refused_and_left_untouched(
    path: Path, old: str, new: str, message: str
) -> None:
    """Reading names the file and the place; writing refuses too, so the user can still repair it."""
    assert old in CANONICAL
    text = CANONICAL.replace(old, new)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(QsensError, match=message) as caught:
        load(path, model="minilm", scheme="w8a8")
    assert str(path) in str(caught.value)
    with pytest.raises(QsensError, match=message):
        put(path, {"encoder.0": entry(0.5)})
    assert path.read_text() == text


@pytest.mark.parametrize("text", ["[]", "3", "null", '"minilm"'])
def test_json_of_another_shape_is_refused(path: Path, text: str) -> None:
    """Valid JSON that is no object is named as such."""
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(QsensError, match="an object is needed"):
        load(path)


def test_a_file_that_is_no_text_is_refused(path: Path) -> None:
    """Binary rubbish and directories are errors that name the path, not tracebacks."""
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(QsensError, match=r"w8a8\.json is not UTF-8 text"):
        load(path)
    with pytest.raises(QsensError, match="cannot be read: Is a directory"):
        load(path.parent)


@given(ENTRIES, ENTRIES, ENTRIES)
def test_union_of_reports_does_not_depend_on_their_order(
    one: dict[str, Entry], two: dict[str, Entry], three: dict[str, Entry]
) -> None:
    """Reports arrive in any order and more than once, even contradicting: the file's text is always the same."""

    def text(*batches: dict[str, Entry]) -> str:
        return dumps(Snapshot("", "", {}, union(*batches)))

    assert text(one, two) == text(two, one)
    assert text(one, one) == text(one)
    assert text(union(one, two), three) == text(one, union(two, three))


def test_union_takes_the_larger_of_two_contradicting_reports() -> None:
    """Of two scores of one op the larger NMSE is kept; modes reported apart come together."""
    both = union({"a": entry(0.1, fallback={"nmse": 1.0})}, {"a": entry(0.2)})
    assert both == {"a": entry(0.2, fallback={"nmse": 1.0})}


def test_union_refuses_an_op_of_two_types() -> None:
    """One name for two kinds of op is a bug upstream that must not reach the file."""
    with pytest.raises(QsensError, match="op 'a' was reported with two types, conv2d and linear"):
        union({"a": Entry("linear")}, {"a": Entry("conv2d")})


@given(SNAPSHOT, ENTRIES)
def test_merging_twice_is_merging_once(snapshot: Snapshot, entries: dict[str, Entry]) -> None:
    """Accepting the same entries again changes nothing."""
    once = merge(snapshot, entries)
    assert merge(once, entries) == once


@given(SNAPSHOT, ENTRIES, ENTRIES)
def test_merging_disjoint_entries_commutes(snapshot: Snapshot, one: dict[str, Entry], two: dict[str, Entry]) -> None:
    """Two processes that measured different ops can write in any order."""
    assume(not one.keys() & two.keys())
    assert merge(merge(snapshot, one), two) == merge(merge(snapshot, two), one)


@given(SNAPSHOT, ENTRIES, ENVIRONMENT, st.data())
def test_an_environment_is_that_of_every_line(
    snapshot: Snapshot, others: dict[str, Entry], environment: dict[str, str], data: st.DataObject
) -> None:
    """What a run measured replaces all lines with their environment, and nothing if one mode of one was left out."""
    scores: Scores = {"nmse": 0.5}
    again = {name: Entry(entry.type, **dict.fromkeys(entry.modes, scores)) for name, entry in snapshot.ops.items()}
    moved = adopt(snapshot, {**others, **again}, environment)
    assert moved == replace(snapshot, environment=environment, ops=again)
    lines = [(name, mode) for name, entry in again.items() for mode in entry.modes]
    if lines:
        name, mode = data.draw(st.sampled_from(lines))
        again[name] = replace(again[name], **{mode: None})
        assert adopt(snapshot, {**others, **again}, environment) == snapshot


def test_an_op_of_another_type_was_not_measured() -> None:
    """The score of a linear is none of the convolution that is recorded under its name."""
    snapshot = Snapshot("m", "s", {"torch": "2.12"}, {"a": Entry("conv1d", isolated={"nmse": 0.1})})
    assert adopt(snapshot, {"a": entry(0.1)}, {"torch": "2.13"}) == snapshot


@given(SNAPSHOT)
def test_what_a_file_cannot_tell_apart_has_not_changed(snapshot: Snapshot) -> None:
    """Lines count as changed by the six digits that the file has."""
    assert changed(snapshot, rounded(snapshot)) == []
    assert set(changed(Snapshot("m", "s"), snapshot)) == set(snapshot.ops)
    old, new = ({"a": entry(value), "b": entry(0.1)} for value in (0.1, 0.100001))
    assert changed(Snapshot("m", "s", {}, old), Snapshot("m", "s", {}, new)) == ["a"]


@given(SNAPSHOT, ENTRIES)
def test_merging_removes_nothing(snapshot: Snapshot, entries: dict[str, Entry]) -> None:
    """Ops and modes that were not measured stay as they were; those that were have the new scores."""
    merged = merge(snapshot, entries)
    assert merged.ops.keys() == snapshot.ops.keys() | entries.keys()
    for name, result in merged.ops.items():
        new, old = entries.get(name, Entry("")), snapshot.ops.get(name, Entry(""))
        stays = name not in entries or new.scheme == old.scheme
        assert result.modes == ({**old.modes, **new.modes} if stays else new.modes)
        assert result.scheme == (new if name in entries else old).scheme


def test_updating_one_mode_keeps_the_other() -> None:
    """A run in isolated mode leaves the fallback scores in the file."""
    old = Snapshot("minilm", "w8a8", {"torch": "2.12"}, {"a": entry(0.1, fallback={"nmse": 0.7})})
    new = merge(old, {"a": entry(0.2)})
    assert new.ops["a"] == entry(0.2, fallback={"nmse": 0.7})
    assert new.environment == {"torch": "2.12"}


def test_an_op_of_another_type_keeps_nothing() -> None:
    """Where a module was replaced by one of another kind, the old scores go, in modes that were not measured too."""
    old = Snapshot("minilm", "w8a8", {}, {"a": entry(0.1, fallback={"nmse": 0.7})})
    new = Entry("conv1d", isolated={"nmse": 0.2})
    assert merge(old, {"a": new}).ops == {"a": new}


def test_an_op_with_another_scheme_keeps_nothing() -> None:
    """Its scores were those of the other one, in modes that were not measured too; who has it is found out."""
    old = Snapshot("m", "s", {}, {op: replace(entry(0.1, fallback={"nmse": 0.7}), scheme="w8a8") for op in "ab"})
    new = {"a": replace(entry(0.2), scheme="w4a16"), "b": replace(entry(0.2), scheme="w8a8")}
    assert with_other_schemes(old, new) == {"a": new["a"]}
    merged = merge(old, new).ops
    assert merged["a"] == new["a"]
    assert merged["b"].fallback == {"nmse": 0.7}
    with pytest.raises(QsensError, match="two schemes, w4a16 and w8a8"):
        union(merged, {"a": old.ops["a"]})


def test_pruning_removes_what_is_not_kept() -> None:
    """Only the ops named stay, and the whole model's entry with them."""
    snapshot = Snapshot("m", "s", {}, {"a": entry(0.1), "b": entry(0.2), TOTAL: Entry("total")})
    assert list(prune(snapshot, {"b"}).ops) == ["b", TOTAL]


def test_environments_are_compared_key_by_key() -> None:
    """Changed, added and vanished keys each get a line; equal ones none."""
    lines = environment_diff(
        {"torch": "2.12", "arch": "x86_64", "gone": "1"}, {"torch": "2.13", "arch": "x86_64", "cpu": "AVX512"}
    )
    assert lines == ["cpu not recorded → AVX512", "gone 1 → not known", "torch 2.12 → 2.13"]


def test_writing_makes_directories_and_leaves_nothing_else(path: Path) -> None:
    """After a write the snapshot directory holds the snapshot and no lock or temporary file."""
    assert put(path, {"a": entry(0.1)}, torch="2.13")
    assert load(path, model="minilm", scheme="w8a8").ops == {"a": entry(0.1)}
    assert [file.name for file in path.parent.parent.rglob("*")] == ["minilm", "w8a8.json"]


def test_writing_the_same_touches_nothing(path: Path) -> None:
    """A file whose text would not change keeps its inode and time stamp."""
    put(path, {"a": entry(0.1)})
    os.utime(path, (1, 1))
    before = path.stat()
    assert not put(path, {"a": entry(0.1 + 1e-9)})
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_written_file_has_the_mode_of_a_new_one(path: Path) -> None:
    """The umask decides, as for any file a program makes; a temporary file's 0600 would not suit a repository."""
    old = os.umask(0o027)
    try:
        put(path, {"a": entry(0.1)})
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_link_is_followed(path: Path, tmp_path: Path) -> None:
    """A snapshot kept elsewhere through a symbolic link is updated there and the link stays."""
    path.parent.mkdir(parents=True)
    path.symlink_to(tmp_path / "elsewhere.json")
    put(path, {"a": entry(0.1)})
    assert path.is_symlink()
    assert load(tmp_path / "elsewhere.json").ops == {"a": entry(0.1)}


def test_writing_needs_no_other_place(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the snapshot can be written, neither home nor cache nor temporary directory is needed to write it."""
    for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR"):
        monkeypatch.setenv(name, "/proc/none")
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert put(path, {"a": entry(0.1)})


def hold(path: Path) -> int:
    """Lock a snapshot as another process would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def test_a_lock_that_is_not_let_go_ends_in_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stuck process does not hang everyone else without a word."""
    monkeypatch.setattr(files, "LOCK_TIMEOUT_SECONDS", 0.1)
    descriptor = hold(path)
    with pytest.raises(QsensError, match=r"w8a8.json is locked by another process .*/\.w8a8\.json\.lock"):
        put(path, {"a": entry(0.2)})
    assert not path.exists()
    os.close(descriptor)
    assert put(path, {"a": entry(0.2)})


def test_a_lock_on_a_removed_file_is_none(path: Path) -> None:
    """A writer that waited for one whose lock file is gone starts over, so that it meets those who came later."""
    first = hold(path)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(put, path, {"a": entry(0.1)})
        time.sleep(0.1)
        path.with_name(f".{path.name}.lock").unlink()
        second = hold(path)
        os.close(first)
        time.sleep(0.2)
        assert not waiting.done()
        os.close(second)
        assert waiting.result(timeout=30)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_a_killed_writer_left_locked_is_free(path: Path) -> None:
    """Only a living process holds a lock: a file that is left over stops nobody and is cleared away."""
    os.close(hold(path))
    assert put(path, {"a": entry(0.1)})
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(("code", "written"), [(errno.ENOLCK, True), (errno.EOPNOTSUPP, True), (errno.EBADF, False)])
def test_a_file_system_without_locks(path: Path, monkeypatch: pytest.MonkeyPatch, code: int, *, written: bool) -> None:
    """Scores that took hours are not lost for want of a lock that this file system does not have at all."""

    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    if written:
        assert put(path, {"a": entry(0.1)})
    else:
        with pytest.raises(QsensError, match=r"cannot lock .*w8a8.json with .*: Bad file descriptor"):
            put(path, {"a": entry(0.1)})
    assert path.exists() == written


def test_unwritable_places_are_named(path: Path) -> None:
    """Each thing that can fail in writing says which directory it was, even for root."""
    readonly = Path("/sys/kernel/snapshots")
    with pytest.raises(QsensError, match="/sys/kernel/snapshots cannot be created"):
        put(readonly / "w8a8.json", {"a": entry(0.1)})
    with pytest.raises(QsensError, match=r"cannot lock /sys/kernel/w8a8\.json: /sys/kernel is not writable"):
        put(readonly.parent / "w8a8.json", {"a": entry(0.1)})
    with pytest.raises(QsensError, match=r"/sys/kernel/w8a8\.json cannot be written"):
        files.write_atomically(readonly.parent / "w8a8.json", "")
    path.parent.mkdir(parents=True)
    path.with_name(f".{path.name}.lock").mkdir()
    with pytest.raises(QsensError, match=r"cannot lock .*w8a8\.json: .* \(Is a directory\)"):
        put(path, {"a": entry(0.1)})


def test_probing_a_directory(tmp_path: Path) -> None:
    """The probe tells read-only places, below which nothing exists yet, from writable ones, and leaves no trace."""
    check_writable(tmp_path / "not" / "yet")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(QsensError, match=r"/sys/kernel/a/b is not writable: .* \(/sys/kernel\)"):
        check_writable(Path("/sys/kernel/a/b"))
    with pytest.raises(QsensError, match=r"/sys/kernel is not writable: [^()]*\. Choose"):
        check_writable(Path("/sys/kernel"))
    (tmp_path / "file").touch()
    with pytest.raises(QsensError, match=r"file/below is not writable: Not a directory"):
        check_writable(tmp_path / "file" / "below")


WRITER = """
import sys
from pathlib import Path
from pytest_qsens.snapshot import Entry, merge, write

path, prefix, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
sys.stdout.write("ready\\n")
sys.stdout.flush()
sys.stdin.readline()
for i in range(count):
    entries = {f"{prefix}.{i % 50}": Entry("linear", isolated={"nmse": i / 1000, "sse": 1.5})}
    write(path, lambda old: merge(old, entries), model="m", scheme="s")
"""


def writer(path: Path, prefix: str, count: int) -> subprocess.Popen[str]:
    """Start a process that makes ``count`` updates, ready to go once a line is sent to it."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), prefix, str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    """Let a writer begin."""
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def test_two_writers_lose_nothing(path: Path) -> None:
    """Two processes that update different ops at the same time both end up in the file."""
    processes = [writer(path, prefix, 50) for prefix in ("one", "two")]
    for process in processes:
        go(process)
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    wanted = {f"{prefix}.{i}" for prefix in ("one", "two") for i in range(50)}
    assert load(path, model="m", scheme="s").ops.keys() == wanted


@pytest.mark.parametrize("delay_ms", [5, 20, 50, 110])
def test_a_killed_writer_leaves_a_whole_file(path: Path, delay_ms: int) -> None:
    """``kill -9`` in the middle of many writes: the file is always complete, and the next write clears up."""
    process = writer(path, "op", 1_000_000)
    go(process)
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.001)
    time.sleep(delay_ms / 1000)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    text = path.read_text()
    snapshot = load(path, model="m", scheme="s")
    assert dumps(snapshot) == text
    assert snapshot.ops
    (path.parent / f".{path.name}.99999.tmp").write_text('{"schema"')  # what a kill between two steps leaves
    write(path, lambda old: merge(old, {"next": entry(1.0)}), model="m", scheme="s")
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert load(path).ops.keys() == {*snapshot.ops, "next"}


def test_readers_never_see_a_part(path: Path) -> None:
    """While one process writes, another one that reads gets a whole file each time."""
    put(path, {f"op.{i}": entry(i / 7) for i in range(200)})
    stop = threading.Event()

    def read() -> set[int]:
        seen = set()
        while not stop.is_set():
            seen.add(len(json.loads(path.read_text())["ops"]))
        return seen

    with ThreadPoolExecutor() as pool:
        seen = pool.submit(read)
        for i in range(40):
            put(path, {"op.0": entry(float(i))})
        stop.set()
        assert seen.result() == {200}
