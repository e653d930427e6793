"""The cache directory: what is listed, and that nothing is ever removed but what is ours and may go."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING

from pytest_qsens import cache
from pytest_qsens.cli import main

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

FOREIGN = ("notes.txt", "model.safetensors", "summary.json", ".hidden")


def entry(cache_dir: Path, number: int, model: str = "m", size: int = 1000) -> Path:
    """Make an entry of a score, used at ``number`` seconds."""
    path = cache_dir / "results" / f"{number:032x}"
    path.mkdir(parents=True)
    about = json.dumps({"by": "pytest-qsens", "model": model})
    (path / cache.ABOUT).write_text(about)
    (path / f"{number:032x}.isolated.{number:032x}.json").write_bytes(b"x" * (size - len(about)))
    os.utime(path, (number, number))
    return path


def test_entries_by_last_use(tmp_path: Path) -> None:
    """Each with its model, size and last use; the one that was used last comes last."""
    paths = [entry(tmp_path, number, f"m{number}") for number in (3, 1, 2)]
    assert [(found.model, found.size, found.used) for found in cache.entries(tmp_path)] == [
        ("m1", 1000, 1),
        ("m2", 1000, 2),
        ("m3", 1000, 3),
    ]
    cache.touch(paths[1])
    assert cache.entries(tmp_path)[-1].path == paths[1]


def test_no_cache_is_an_empty_one(tmp_path: Path) -> None:
    """Nothing there is nothing wrong."""
    assert cache.entries(tmp_path / "none") == []
    assert cache.clear(tmp_path / "none") == []
    assert cache.trim(tmp_path / "none", 0, ()) == []


def test_trimming_takes_what_was_not_used_for_long(tmp_path: Path) -> None:
    """As much as is needed and no more, and never what is to be kept."""
    paths = [entry(tmp_path, number) for number in range(4)]
    assert cache.trim(tmp_path, 4000, ()) == []
    assert [found.path for found in cache.trim(tmp_path, 2500, {paths[0]})] == [paths[1], paths[2]]
    assert [path.exists() for path in paths] == [True, False, False, True]
    assert [found.path for found in cache.trim(tmp_path, 0, {paths[0]})] == [paths[3]]


def test_a_use_in_the_future_does_not_last(tmp_path: Path) -> None:
    """What was used while the clock was wrong is not kept for ever at the cost of all that is used since."""
    ahead, used = entry(tmp_path, 2**32), entry(tmp_path, 1)
    cache.trim(tmp_path, 2000, ())
    assert ahead.stat().st_mtime <= time.time()
    os.utime(ahead, (time.time() - 60, time.time() - 60))
    cache.touch(used)
    assert [found.path for found in cache.trim(tmp_path, 1000, ())] == [ahead]


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    """Somebody may name any directory: neither foreign directories nor foreign files in ours are touched."""
    ours = entry(tmp_path, 1)
    foreign = [ours / name for name in FOREIGN]
    foreign += [tmp_path / "results" / "2024" / "entry.json", tmp_path / "results" / f"{7:032x}" / "entry.json"]
    foreign += [tmp_path / "manifests" / "notes.json", tmp_path / "other" / f"{1:032x}" / "entry.json"]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"model": "m"}')
    outside = tmp_path / "outside"
    entry(outside, 1).rename(outside / "entry")
    (tmp_path / "results" / f"{9:032x}").symlink_to(outside / "entry")
    (tmp_path / "manifests" / f"{5:032x}.json").write_text("{}")
    assert [found.path for found in cache.clear(tmp_path)] == [ours]
    assert sorted(path for path in ours.iterdir()) == sorted(ours / name for name in FOREIGN)
    assert all(path.exists() for path in foreign)
    assert len(list((outside / "entry").iterdir())) == 2
    assert [path.name for path in (tmp_path / "manifests").iterdir()] == ["notes.json"]
    assert cache.entries(tmp_path) == []


def test_what_a_killed_writer_left_goes_too(tmp_path: Path) -> None:
    """Temporary files do not outlive their entry."""
    path = entry(tmp_path, 1)
    (path / f".{1:032x}.scheme.json.4711.tmp").write_text("half")
    cache.clear(tmp_path)
    assert not path.exists()


def test_the_command_lists_and_clears(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What ``qsens cache`` says about models, scores and sizes, and that one model can go alone."""
    for number, model in enumerate(("a", "b", "b")):
        entry(tmp_path, number, model)
    assert main(["cache", "list", "--cache", str(tmp_path)]) == 0
    header, *rows, last = capsys.readouterr().out.splitlines()
    assert header.split() == ["model", "what", "schemes", "scores", "size", "last", "used"]
    assert [row.split()[:2] for row in rows] == [["b", "results"], ["b", "results"], ["a", "results"]]
    assert {row.split()[2] for row in rows} == {"1"}
    assert last == f"{tmp_path}: 3 entries, 3 KB"
    assert main(["cache", "clear", "--cache", str(tmp_path), "--model", "b"]) == 0
    assert capsys.readouterr().out == f"removed from {tmp_path}: 2 entries, 2 KB\n"
    assert [found.model for found in cache.entries(tmp_path)] == ["a"]
    assert main(["cache", "clear", "--cache", str(tmp_path)]) == 0
    assert cache.entries(tmp_path) == []


def test_bad_input_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that is not there and a file in place of the cache are told apart from an empty cache."""
    entry(tmp_path, 1, "a")
    assert main(["cache", "clear", "--cache", str(tmp_path), "--model", "b"]) == 4
    assert capsys.readouterr().err == f"qsens: nothing of a model 'b' in {tmp_path}. There is: a.\n"
    (tmp_path / "file").write_text("")
    for action in ("list", "clear"):
        assert main(["cache", action, "--cache", str(tmp_path / "file")]) == 4
        assert "is not a directory" in capsys.readouterr().err
    assert main(["cache", "list", "--cache", str(tmp_path / "none")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/none: 0 entries, 0 B\n"
