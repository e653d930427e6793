"""What a process knows of scores: when that needs the model, and what loading it makes of what the cache said."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.collection.plan import Wanted
from pytest_qsens.known_scores import KnownScores, Look
from pytest_qsens.ops import Op
from pytest_qsens.quant.schemes import SCHEMES
from pytest_qsens.result_cache import ResultCache
from pytest_qsens.results import OpResult

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

OPS = {name: Op(name, "linear") for name in "ab"}
FACTS = {"engine": "delta", "engine_reason": None}
SEEN = Look("model", "data")


def scores(path: Path, wanted: Iterable[str] = "ab", *looks: Look | None, model: bool = False) -> KnownScores:
    """Open what is known; each look at the model gives the next of ``looks``, which are the same by default."""
    left = iter(looks or (SEEN, SEEN))
    schemes = dict.fromkeys("ab", SCHEMES["w8a8"])
    return KnownScores(
        Wanted({OPS[op]: {"isolated"} for op in wanted}, model=model),
        lambda: next(left),
        lambda seen: ResultCache(path, "m", {"seen": list(seen)}, schemes),
    )


def measure(known: KnownScores, op: str, nmse: float = 0.5) -> None:
    """Take a score as measured in two seconds."""
    result = OpResult(op, "linear", "", "measured", None, {"nmse": nmse}, seconds=2.0)
    assert known.add(OPS[op], "isolated", result, FACTS, "w8a8").spent == 2.0


def test_the_model_is_needed_for_what_is_missing(tmp_path: Path) -> None:
    """Or for a test that takes it; if all is known, it is not."""
    known = scores(tmp_path)
    assert (known.sure, known.missing()) == (False, {OPS["a"], OPS["b"]})
    assert known.loaded("digest") is None
    measure(known, "a")
    again = scores(tmp_path)
    assert (again.sure, again.missing()) == (False, {OPS["b"]})
    assert scores(tmp_path, "a").sure
    assert scores(tmp_path, "a").facts == FACTS
    assert not scores(tmp_path, "a", model=True).sure
    assert scores(tmp_path, "ab", None).sure  # nothing is cached that would have to be checked


def test_time_is_spent_once(tmp_path: Path) -> None:
    """Another test of the op costs nothing, and what an earlier run has measured is no time of this one."""
    known = scores(tmp_path)
    known.loaded("digest")
    measure(known, "a")
    assert [found.spent for _ in range(2) if (found := known.get(OPS["a"], "isolated"))] == [0.0, 0.0]
    found = scores(tmp_path).get(OPS["a"], "isolated")
    assert found is not None
    assert (found.spent, found.result.seconds) == (None, 2.0)


def test_scores_of_other_outputs_are_forgotten(tmp_path: Path) -> None:
    """Also those that were looked up before, by this process and by all others."""
    known = scores(tmp_path)
    known.loaded("digest")
    measure(known, "a")
    again = scores(tmp_path)
    assert again.missing() == {OPS["b"]}
    assert "not those of the cached scores" in (again.loaded("other") or "")
    assert again.missing() == {OPS["a"], OPS["b"]}
    assert scores(tmp_path).missing() == {OPS["a"], OPS["b"]}


def test_a_model_that_changes_while_it_is_loaded(tmp_path: Path) -> None:
    """Nobody knows what the loaded one is of: nothing is believed or kept."""
    known = scores(tmp_path)
    known.loaded("digest")
    measure(known, "a")
    again = scores(tmp_path, "ab", SEEN, Look("changed", "data"))
    assert again.missing() == {OPS["b"]}
    assert "have changed" in (again.loaded("digest") or "")
    assert again.missing() == {OPS["a"], OPS["b"]}
    measure(again, "b")
    assert scores(tmp_path).missing() == {OPS["b"]}


def test_a_model_that_is_downloaded_when_it_is_loaded(tmp_path: Path) -> None:
    """Its files can be told only then; its scores are kept all the same."""
    known = scores(tmp_path, "ab", None, SEEN)
    assert known.loaded("digest") is None
    measure(known, "a")
    assert scores(tmp_path).missing() == {OPS["b"]}
