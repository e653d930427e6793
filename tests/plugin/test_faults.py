"""Disks that are full, files that are damaged, clocks that are wrong: never another number, and nothing is lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from typing import TYPE_CHECKING

import pytest
import torch

from pytest_qsens import cache
from tests.plugin.faults import COUNT, Disk, Site, small_disk

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.plugin.faults import Undisturbed

_IN_CI = bool(os.environ.get("QSENS_CI"))
"""Asked while the environment is still that of the machine."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Mount a disk of 2 MB."""
    try:
        with small_disk(tmp_path / "disk", "size=2m") as found:
            yield found
    except OSError as error:
        (pytest.fail if _IN_CI else pytest.skip)(f"no disk can be mounted on this machine: {error}")


@pytest.mark.parametrize("left", [0, 20_000])
def test_a_full_disk_under_the_cache(undisturbed: Undisturbed, tmp_path: Path, disk: Disk, left: int) -> None:
    """It costs time and a line: the scores are right, what was cached before stays, and what fits is cached."""
    site = undisturbed.copy(tmp_path / "site", "results", prefix=disk.prefix)
    shutil.move(site.cache, disk.path / "cache")
    site.cache = disk.path / "cache"
    for path in sorted(site.cache.glob("results/*/*.*.*.json"))[2:]:
        path.unlink()
    kept = _files(site.cache / "results")
    missing = COUNT - 2
    disk.fill(left)

    full = site.run("-n", "1")
    assert full.code == 0, full.output
    assert not list(site.cache.glob("artifacts/*/*"))
    assert len(full.lines("qsens: scores could not be cached: ", "No space left on device")) == 1
    undisturbed.check(site)
    assert len(site.measured()) == missing
    assert _files(site.cache / "results").items() >= kept.items()
    assert not list(site.cache.rglob("*.tmp"))

    disk.free()
    counts = []
    for _ in range(2):
        freed = site.run()
        assert freed.code == 0, freed.output
        assert not freed.lines("could not be cached")
        undisturbed.check(site)
        counts.append(len(site.measured()))
    assert counts == [missing, 0] if left == 0 else 0 < counts[0] < missing
    assert counts[1] == 0
    assert {entry.kind for entry in cache.entries(site.cache)} == {"results", "artifacts"}


def _files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


def test_a_full_disk_under_snapshot_and_result(undisturbed: Undisturbed, tmp_path: Path, disk: Disk) -> None:
    """The run fails and says so, the old files stay, and the next run writes what this one has measured."""
    site = undisturbed.copy(tmp_path / "site", prefix=disk.prefix)
    shutil.move(site.snapshots, disk.path / "snapshots")
    site.snapshots = disk.path / "snapshots"
    result = disk.path / "result.json"
    shutil.copy(undisturbed.site.path / "out.json", result)
    older = result.read_bytes()
    disk.fill(0)

    full = site.run("-n", "1", f"--qsens-json={result}")
    assert full.code == pytest.ExitCode.TESTS_FAILED
    for path in (site.file, result):
        assert len(full.lines(f"qsens: {path} cannot be written: No space left on device")) == 1
    assert site.file.read_text() == undisturbed.old
    assert result.read_bytes() == older
    assert {path.name for path in (*site.file.parent.iterdir(), *disk.path.iterdir())} == {
        site.file.name,
        result.name,
        "snapshots",
        Disk.BALLAST,
    }
    assert site.measured() == set(undisturbed.ops)

    disk.free()
    freed = site.run("-n", "1")
    assert freed.code == 0, freed.output
    undisturbed.check(site)
    assert site.measured() == set()


def test_a_result_that_cannot_be_written(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """A device is no place for a result: nothing is read from it, measured or written."""
    site = undisturbed.copy(tmp_path / "site", "results")
    for device in ("/dev/full", "/dev/zero"):
        ended = site.run(f"--qsens-json={device}")
        assert ended.code == pytest.ExitCode.USAGE_ERROR, ended.output
        assert ended.lines(f"ERROR: qsens: cannot write {device}: it is not a file. Choose another name.")
        assert site.file.read_text() == undisturbed.old


def test_an_artifact_is_cut_short_between_runs(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """It is made again."""
    site = undisturbed.copy(tmp_path / "site", "artifacts")
    [path] = site.cache.glob("artifacts/*/calibrated.safetensors")
    whole = path.read_bytes()
    os.truncate(path, len(whole) // 2)
    ended = site.run("-n", "1")
    assert ended.code == 0, ended.output
    undisturbed.check(site)
    assert path.stat().st_size == pytest.approx(len(whole), rel=0.01)  # it holds how long something took


@pytest.mark.parametrize("part", [0, 0.5])
def test_an_artifact_is_cut_short_while_it_is_used(undisturbed: Undisturbed, tmp_path: Path, part: float) -> None:
    """Those that have read it have all that they need."""
    site = undisturbed.copy(tmp_path / "site", "artifacts")
    [path] = site.cache.glob("artifacts/*/calibrated.safetensors")
    size = int(path.stat().st_size * part)
    fault = {"role": "worker", "moment": "measure", "act": "truncate", "cache": str(site.cache), "size": size}
    ended = site.run("-n", "2", fault=fault)
    site.struck()
    assert site.log("size") == [str(size)]
    assert ended.code == 0, ended.output
    undisturbed.check(site)


def test_bits_of_the_cache_are_turned(
    undisturbed: Undisturbed, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is damaged is measured again, or made again, whatever file and bit it is; nothing of it is believed."""
    monkeypatch.setenv("RUN", "")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    again = 0
    try:
        for seed in range(20):
            site = undisturbed.copy(pytester.path / str(seed), "results", "artifacts")
            damage(site, random.Random(seed))
            monkeypatch.chdir(site.path)
            for count in (COUNT, 0):
                result = pytester.runpytest_inprocess(*site.arguments())
                assert result.ret == pytest.ExitCode.OK
                undisturbed.check(site)
                measured = site.measured()
                assert len(measured) <= count
                again += len(measured)
    finally:
        torch.set_num_threads(threads)
    assert again > 20


def damage(site: Site, chosen: random.Random) -> None:
    """Turn a bit in three files with scores, in one file of another kind, and everywhere else one time in four."""
    files = [path for path in sorted(site.cache.rglob("*")) if path.is_file()]
    scores = [path for path in files if len(path.name.split(".")) == 4]
    others = [path for path in files if path not in scores]
    struck = {*chosen.sample(scores, 3), chosen.choice(others), *(path for path in others if chosen.random() < 0.25)}
    for path in struck:
        content = bytearray(path.read_bytes())
        content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
        path.write_bytes(content)


FAR = 20 * 365 * 86400
"""Seconds."""

JUMPING = """
import itertools
jumps = itertools.cycle([0, {far}, -{far}, 60, -60])
true = time.time
time.time = lambda: true() + next(jumps)
"""


@pytest.mark.parametrize("shift", [FAR, -FAR], ids=["future", "past"])
def test_times_that_cannot_be(undisturbed: Undisturbed, tmp_path: Path, shift: int) -> None:
    """Files of another time, locks among them, and a clock that jumps, neither stop a run nor change a number.

    What runs have just used is not taken for old.
    """
    site = undisturbed.copy(tmp_path / "site", "artifacts", "results")
    scores = sorted(site.cache.glob("results/*/*.isolated.*.json"))
    for path in scores[::2]:
        path.unlink()
    [artifact] = site.cache.glob("artifacts/*/calibrated.safetensors")
    artifact.unlink()
    for path in (site.file, artifact):
        path.with_name(f".{path.name}.lock").touch()
        path.with_name(f".{path.name}.1.tmp").write_text("half")
    now = time.time()
    for path in site.path.rglob("*"):
        if path.suffix != ".py":  # those are compared with what was compiled of them
            os.utime(path, (now + shift, now + shift))
    with (site.path / "conftest.py").open("a") as file:
        file.write(JUMPING.format(far=FAR))
    ended = site.run("-n", "1", "--qsens-cache-size=1MB")
    assert ended.code == 0, ended.output
    undisturbed.check(site)
    assert len(site.measured()) == len(scores[::2]) == 5
    assert not [path for path in site.path.rglob("*") if path.suffix in (".lock", ".tmp")]
    assert {entry.kind for entry in cache.entries(site.cache)} == {"results", "artifacts"}
    again = site.run("-n", "1", "--qsens-cache-size=1MB")
    assert again.code == 0, again.output
    assert site.measured() == set()


def test_what_is_used_stays_whatever_the_clock_says(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Of entries from the future none is kept in place of those that are used; one that another run uses comes last."""
    site = undisturbed.copy(tmp_path / "site", "artifacts", "results")
    far, other = (_entry(site.cache, number) for number in (1, 2))
    os.utime(far, (time.time() + FAR, time.time() + FAR))
    assert site.run().code == 0
    assert far.exists()
    time.sleep(0.01)
    cache.touch(other)
    assert site.run("--qsens-cache-size=1.5MB").code == 0
    assert (far.exists(), other.exists()) == (False, True)
    assert site.measured() == set()
    undisturbed.check(site)


def _entry(cache_dir: Path, number: int) -> Path:
    path = cache_dir / "results" / f"{number:032x}"
    path.mkdir()
    (path / cache.ABOUT).write_text(json.dumps({"by": cache.OWNER, "model": "other"}))
    (path / f"{number:032x}.scheme.json").write_bytes(bytes(1_000_000))
    return path
