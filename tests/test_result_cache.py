"""Cached scores: what is kept comes back digit for digit, and what cannot be believed does not come back at all."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_qsens import surroundings
from pytest_qsens.cache import ABOUT
from pytest_qsens.ops import TOTAL, Op
from pytest_qsens.quant.schemes import SCHEMES
from pytest_qsens.result_cache import ResultCache, SchemeKeys, count_scores, schemes_in
from pytest_qsens.results import IDENTICAL, OpResult, joined
from pytest_qsens.surroundings import surroundings as all_surroundings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_qsens.result_cache import Part

OP = Op("layers.0.q", "linear")
OPS = {"layers.0.q": SCHEMES["w8a8"], "layers.0.k": SCHEMES["w8a8"]}
ISOLATED = OpResult(OP.name, OP.type, OP.block, "measured", None, {"nmse": 0.1 + 0.2, "sqnr_db": None}, seconds=1.5)
FALLBACK = replace(ISOLATED, isolated=None, fallback={"nmse": 1e-300, "gain": -0.25, "distinguishable": True})
WHOLE = OpResult(TOTAL, TOTAL, "", "measured", None, {"nmse": 1.0})
FACTS: dict[str, Any] = {"engine": "delta", "engine_reason": None, "reference_seconds": 0.5}
RESULTS: dict[Part, OpResult] = {"isolated": ISOLATED, "fallback": FALLBACK, "total": WHOLE}


def opened(path: Path, facts: dict[str, object] | None = None, **schemes: str) -> ResultCache:
    """Open the cache as another process does."""
    chosen = OPS | {f"layers.0.{op}": SCHEMES[scheme] for op, scheme in schemes.items()}
    return ResultCache(path, "m", facts or {"model": "1"}, chosen)


def filled(path: Path) -> ResultCache:
    """Keep a score of each kind."""
    cache = opened(path)
    cache.trust("digest")
    cache.keep_facts("w8a8", FACTS)
    for part, result in RESULTS.items():
        cache.keep(result, part)
    assert cache.problem is None
    return cache


def op_of(part: Part) -> Op:
    """Return the op whose score of this kind `filled` keeps."""
    return Op(TOTAL, TOTAL) if part == "total" else OP


def known(cache: ResultCache) -> set[Part]:
    """Scores that are believed; each of them must be what was kept."""
    found = {part: cache.get(op_of(part), part) for part in RESULTS}
    assert all(result in (None, RESULTS[part]) for part, result in found.items())
    return {part for part, result in found.items() if result is not None}


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    """In another process, digit for digit, with what was told beside it."""
    filled(tmp_path)
    again = opened(tmp_path)
    assert again.reference == "digest"
    assert known(again) == set(RESULTS)
    assert again.facts() == FACTS
    assert (count_scores(again.path), schemes_in(again.path)) == (3, ["w8a8"])


@given(
    st.dictionaries(st.text(max_size=5), st.floats(0, allow_infinity=False), min_size=1),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
)
def test_any_score_comes_back(tmp_path_factory: pytest.TempPathFactory, scores: dict[str, float], name: str) -> None:
    """Whatever number and name."""
    cache = ResultCache(tmp_path_factory.mktemp("cache"), "m", {}, {name: SCHEMES["w8a8"]})
    cache.trust("digest")
    scores.pop("distinguishable", None)
    result = OpResult(name, "linear", Op(name, "").block, "measured", None, dict(scores))
    cache.keep(result, "isolated")
    assert cache.get(Op(name, "linear"), "isolated") == result


def test_nothing_is_believed_before_anything_is_known(tmp_path: Path) -> None:
    """An empty cache knows nothing, and looking into it makes no files."""
    cache = opened(tmp_path)
    assert cache.reference is None
    assert cache.facts() is None
    assert known(cache) == set()
    assert list(tmp_path.iterdir()) == []


def test_ops_without_a_score_are_kept_and_failures_are_not(tmp_path: Path) -> None:
    """That the data never reaches an op stays so; a failure may have been of the moment."""
    cache = opened(tmp_path)
    cache.trust("digest")
    for status in ("unexercised", "unquantizable", "failed"):
        op = Op(f"op.{status}", "linear")
        cache = ResultCache(tmp_path, "m", {}, {op.name: SCHEMES["w8a8"]})
        cache.trust("digest")
        cache.keep(OpResult(op.name, op.type, op.block, status, "why"), "isolated")  # type: ignore[arg-type]
        found = cache.get(op, "isolated")
        assert (found is None) == (status == "failed")


@pytest.mark.parametrize(
    ("schemes", "left"),
    [
        ({}, {"isolated", "fallback", "total"}),
        ({"k": "w8a8_dynamic"}, {"isolated"}),
        ({"q": "w8a8_dynamic"}, set()),
    ],
)
def test_a_score_depends_on_the_schemes_that_decide_it(tmp_path: Path, schemes: dict[str, str], left: set[str]) -> None:
    """One op quantized: on its own scheme. All others quantized, or all of them: on every op's."""
    filled(tmp_path)
    assert known(opened(tmp_path, **schemes)) == left


def test_keys_of_schemes() -> None:
    """Equal schemes have equal keys, whatever op; the joint key tells which op has which."""
    one = SchemeKeys({"a": SCHEMES["w8a8"], "b": SCHEMES["w8a8_static"]})
    other = SchemeKeys({"a": SCHEMES["w8a8_static"], "b": SCHEMES["w8a8"]})
    assert one.key("a", "isolated") == other.key("b", "isolated") != one.key("b", "isolated")
    assert one.key("a", "fallback") == one.key("b", "total") == one.joint != other.joint


def test_keys_of_what_is_added() -> None:
    """By itself it is as in a plain run; beside the others it depends on them; in a group it counts only alone."""
    without = "unquantized: the config leaves it unquantized"
    plain = SchemeKeys(dict.fromkeys("abc", SCHEMES["w8a8"]))
    base = {"a": SCHEMES["w8a8"], "b": without, "c": without}
    keys, bare = SchemeKeys({**base, "b": SCHEMES["w8a8"], "c": SCHEMES["w8a8"]}, base), SchemeKeys(base)
    assert keys.joint == bare.joint != plain.joint
    assert keys.key("b", "isolated") == plain.key("b", "isolated") != bare.key("b", "isolated")
    assert len({keys.key("b", part) for part in ("isolated", "added", "fallback")}) == 3
    other = {**base, "b": SCHEMES["w8a8_static"], "c": SCHEMES["w8a8"]}
    assert keys.key("b", "added") != SchemeKeys(other, base).key("b", "added")
    assert keys.key("g", "isolated", "bc") == plain.key("g", "isolated", "bc")
    assert keys.key("g", "isolated", "ab") == bare.key("g", "isolated", "ab") != plain.key("g", "isolated", "ab")


def test_other_facts_are_another_place(tmp_path: Path) -> None:
    """Whatever else the scores depend on is in the key."""
    filled(tmp_path)
    assert known(opened(tmp_path, {"model": "2"})) == set()


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the JSON of a file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "empty": lambda path, _: path.write_text(""),
    "half": lambda path, _: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "not text": lambda path, _: path.write_bytes(b"\xff\xfe\x00"),
    "no object": lambda path, _: path.write_text("[1]"),
    "nested": lambda path, _: path.write_text("[" * 100_000),
    "a digit": lambda path, _: path.write_text(path.read_text().replace("0.30000000000000004", "0.31000000000000004")),
    "no sum": lambda path, _: rewrite(path, lambda sealed: sealed.pop("sum")),
    "another score": lambda path, other: path.write_bytes(other.read_bytes()),
    "a directory": lambda path, _: (path.unlink(), path.mkdir()),
    "gone": lambda path, _: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_not_believed(tmp_path: Path, damage: str) -> None:
    """A file that is not whole, or not of this place, costs the one score; it is replaced by the next measurement."""
    cache = filled(tmp_path)
    [path] = cache.path.glob("*.isolated.*")
    [other] = cache.path.glob("*.fallback.*")
    DAMAGE[damage](path, other)
    again = opened(tmp_path)
    assert known(again) == {"fallback", "total"}
    again.keep(ISOLATED, "isolated")
    if damage == "a directory":
        assert again.problem is not None
    else:
        assert known(opened(tmp_path)) == set(RESULTS)


def test_a_file_of_another_run_key_is_not_believed(tmp_path: Path) -> None:
    """A whole file copied from elsewhere says where it belongs."""
    cache = filled(tmp_path)
    other = opened(tmp_path, {"model": "2"})
    other.trust("digest")
    other.keep(replace(ISOLATED, isolated={"nmse": 9.0}), "isolated")
    [path], [foreign] = cache.path.glob("*.isolated.*"), other.path.glob("*.isolated.*")
    assert path.name == foreign.name
    path.write_bytes(foreign.read_bytes())
    assert known(opened(tmp_path)) == {"fallback", "total"}


def test_what_another_model_gave_is_out_of_use(tmp_path: Path) -> None:
    """Once the unquantized outputs differ from those of the cached scores, no process believes these any more."""
    filled(tmp_path)
    cache = opened(tmp_path)
    assert cache.trust("digest")
    assert not cache.trust("other")
    assert known(cache) == set()
    assert cache.facts() is None
    assert known(opened(tmp_path)) == set()
    cache.keep(ISOLATED, "isolated")
    assert known(opened(tmp_path)) == {"isolated"}


def test_an_entry_that_is_removed_meanwhile_is_made_again(tmp_path: Path) -> None:
    """Eviction under the hands of a run costs what it had kept, and leaves nothing that nobody knows of."""
    cache = filled(tmp_path)
    for path in cache.path.iterdir():
        path.unlink()
    cache.path.rmdir()
    cache.keep(FALLBACK, "fallback")
    assert cache.problem is None
    assert (cache.path / ABOUT).exists()
    assert known(opened(tmp_path)) == {"fallback"}


@pytest.mark.parametrize("what", ["a file in the way", "disk full"])
def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """It raises nothing, and what is there stays readable."""
    if what == "disk full":
        filled(tmp_path)

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
    else:
        (tmp_path / "results").write_text("")
    cache = opened(tmp_path)
    cache.trust("digest")
    cache.keep(replace(ISOLATED, isolated={"nmse": 9.0}), "isolated")
    assert cache.problem is not None
    assert ("No space left" if what == "disk full" else "results") in cache.problem
    monkeypatch.undo()
    assert known(opened(tmp_path)) == (set(RESULTS) if what == "disk full" else set())


def test_surroundings_count_what_moves_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code, versions, processor, and the variables and switches that choose kernels; nothing of place, time or load."""
    import torch

    before = all_surroundings()
    assert json.loads(json.dumps(before)) == before
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("MKL_CBWR", "AUTO,STRICT")  # what measuring sets itself
    assert all_surroundings() == before
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert all_surroundings() != before
    monkeypatch.delenv("ATEN_CPU_CAPABILITY")
    for name in ("code", "processor"):
        with monkeypatch.context() as patch:
            patch.setattr(surroundings, name, lambda: "other")
            assert all_surroundings() != before
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert all_surroundings() != before
    finally:
        torch.set_float32_matmul_precision(precision)
    assert all_surroundings() == before


def test_surroundings_are_the_same_without_torch() -> None:
    """A process that has not imported torch finds the scores of one that has."""
    code = (
        "import json, sys; from pytest_qsens.surroundings import surroundings; "
        "assert 'torch' not in sys.modules; print(json.dumps(surroundings()))"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert json.loads(output) == all_surroundings()


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([ISOLATED], ISOLATED),
        ([ISOLATED, FALLBACK], replace(ISOLATED, fallback=FALLBACK.fallback, seconds=3.0)),
        (
            [replace(ISOLATED, reason=IDENTICAL), replace(FALLBACK, reason="note")],
            replace(ISOLATED, reason="note", fallback=FALLBACK.fallback, seconds=3.0),
        ),
        (
            [replace(ISOLATED, reason=IDENTICAL), replace(FALLBACK, reason=IDENTICAL)],
            replace(ISOLATED, reason=IDENTICAL, fallback=FALLBACK.fallback, seconds=3.0),
        ),
        (
            [replace(ISOLATED, reason=IDENTICAL), FALLBACK],
            replace(ISOLATED, fallback=FALLBACK.fallback, seconds=3.0),
        ),
        (
            [ISOLATED, replace(FALLBACK, status="failed", reason="why", fallback=None)],
            replace(ISOLATED, status="failed", reason="why", seconds=3.0),
        ),
    ],
)
def test_modes_are_joined(results: list[OpResult], expected: OpResult) -> None:
    """An op measured mode by mode, now or by an earlier run, is as one measured at once."""
    assert joined(results) == expected
