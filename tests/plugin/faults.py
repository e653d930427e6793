"""Runs of a small model in processes of their own, and what they come to when nothing happens to them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import psutil

from pytest_qsens.ops import Op
from pytest_qsens.snapshot import dumps, load
from tests.conftest import OUTSIDE
from tests.plugin.fault_net import BLOCKS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MODEL = "net:spec"
LABEL = "net.spec"
COUNT = 1 + 2 * BLOCKS + 1 + 1
"""Ops, and the whole model."""

GONE = "gone"
"""An op that only the old snapshot knows."""

QUIET = ("-p", "no:hypothesispytest", "-p", "no:cacheprovider")
"""Plugins that take time and nobody needs."""

SECONDS = 300
"""After this a run hangs."""


@dataclass(frozen=True)
class Finished:
    """How a run ended, and what it printed."""

    code: int
    output: str

    def lines(self, *parts: str) -> list[str]:
        """Lines with all of these parts in them."""
        return [line for line in self.output.splitlines() if all(part in line for part in parts)]


@dataclass
class Running:
    """A run that goes on."""

    process: subprocess.Popen[bytes]
    output: Any

    def wait(self) -> Finished:
        """Wait for its end."""
        try:
            self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            for worker in psutil.Process(self.process.pid).children(recursive=True):
                worker.kill()
            self.process.kill()
            self.process.wait()
        self.output.seek(0)
        found = Finished(self.process.returncode, self.output.read().decode())
        self.output.close()
        return found


@dataclass
class Site:
    """A directory where runs are made.

    Attributes:
        path: The directory.
        prefix: Command that makes other commands run where the disks of the site are.

    """

    path: Path
    prefix: tuple[str, ...] = ()
    cache: Path = field(init=False)
    snapshots: Path = field(init=False)

    def __post_init__(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        for name in ("conftest.py", "net.py"):
            shutil.copy(Path(__file__).with_name(f"fault_{name}"), self.path / name)
        (self.path / "pytest.ini").write_text("[pytest]\n")
        self.cache = self.path / "cache"
        self.snapshots = self.path / "qsens_snapshots"

    @property
    def file(self) -> Path:
        """The snapshot file."""
        return self.snapshots / LABEL / "w8a8.json"

    def arguments(self, *args: str) -> list[str]:
        """Arguments of a run that updates the snapshot; the last of several equal options holds."""
        options = [f"--qsens-cache={self.cache}", f"--qsens-snapshot-dir={self.snapshots}", "--qsens-json=out.json"]
        return ["-p", "no:randomly", f"--qsens-model={MODEL}", "--snapshot-update", *options, *args]

    def start(self, *args: str, fault: Mapping[str, object] | None = None, run: str = "") -> Running:
        """Start a run in processes of its own."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST_")}
        given = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120", "RUN": run}
        given |= {} if fault is None else {"FAULT": json.dumps(fault)}
        # No pipe, which workers without a controller would keep open.
        output = tempfile.TemporaryFile()  # noqa: SIM115 - `Running` closes it
        process = subprocess.Popen(
            [*self.prefix, "env", "-C", str(self.path), sys.executable, "-m", "pytest", *QUIET, *self.arguments(*args)],
            env={name: value for name, value in kept.items() if name not in OUTSIDE} | given,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        return Running(process, output)

    def run(self, *args: str, fault: Mapping[str, object] | None = None) -> Finished:
        """Make a run in processes of its own."""
        return self.start(*args, fault=fault).wait()

    def result(self, name: str = "out.json") -> dict[str, Any]:
        """Content of a result file."""
        content: dict[str, Any] = json.loads((self.path / name).read_text())
        return content

    def scores(self, name: str = "out.json") -> dict[str, Any]:
        """All that was found out about each op, and the whole model, but how long it took."""
        content = self.result(name)
        ops = {result["op"]: result for result in (*content["ops"], content["total"])}
        return {op: {**result, "seconds": None} for op, result in ops.items()}

    def log(self, name: str, run: str = "") -> list[str]:
        """Take the lines that runs have logged since this was asked last."""
        path = self.path / f"{name}{run}.log"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def struck(self, run: str = "") -> list[str]:
        """Take the note of the fault: the process, the moment, and the op; it must have struck."""
        (self.path / f"struck{run}").unlink()
        [line] = self.log("struck", run)
        return line.split()

    def measured(self, run: str = "") -> set[str]:
        """Ops that were measured since this was asked last."""
        return set(self.log("measured", run)) - {"load"}

    def reported(self) -> set[str]:
        """Ops whose scores have come in since this was asked last."""
        return set(self.log("reported"))

    def processes(self) -> set[int]:
        """Take the processes that were started since this was asked last."""
        return {int(line.split()[0]) for line in self.log("started")}


def wait_for_the_end(processes: set[int], seconds: float = SECONDS) -> None:
    """Wait for processes to end by themselves."""
    deadline = time.monotonic() + seconds
    while alive := [pid for pid in processes if _alive(pid)]:
        assert time.monotonic() < deadline, f"{alive} do not end"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # of those without a parent nobody may take note
    except psutil.NoSuchProcess:
        return False


@dataclass(frozen=True)
class Undisturbed:
    """What runs come to when nothing happens to them.

    Attributes:
        site: Where they were made, with all that they have cached.
        old: Text of a snapshot file in which every line is out of date, and one is of an op that is gone.

    """

    site: Site
    old: str
    fresh: str
    """Text of the snapshot file that such a run makes where there is none."""

    @classmethod
    def made(cls, directory: Path) -> Undisturbed:
        """Make two runs: one that measures, and one that updates the old snapshot."""
        site = Site(directory)
        first = site.run("-n", "2", "--qsens-json=first.json")
        assert first.code == 0, first.output
        fresh = site.file.read_text()
        content = json.loads(fresh)
        for entry in (*content["ops"].values(), content["total"]):
            entry["isolated"] = {"nmse": 1.0}
        content["ops"][GONE] = {"isolated": {"nmse": 0.5}, "type": "linear"}
        site.file.write_text(json.dumps(content))
        old = dumps(load(site.file))
        site.file.write_text(old)
        second = site.run("-n", "2")
        assert second.code == 0, second.output
        assert site.scores() == site.scores("first.json")
        made = cls(site, old, fresh)
        lines = dict(made.lines)
        assert lines.pop(GONE) == json.loads(old)["ops"][GONE]
        assert lines == _lines(fresh)
        assert len(lines) == len(site.measured()) == COUNT
        return made

    @cached_property
    def scores(self) -> dict[str, Any]:
        """Scores of all ops and of the whole model."""
        return self.site.scores()

    @cached_property
    def snapshot(self) -> str:
        """Text of the snapshot file."""
        return self.site.file.read_text()

    @property
    def lines(self) -> dict[str, Any]:
        """Lines of the snapshot file."""
        return _lines(self.snapshot)

    @property
    def ops(self) -> list[str]:
        """All ops, and the whole model."""
        return list(self.scores)

    @property
    def firsts(self) -> list[str]:
        """The first op of every block, when the others are measured as well, and the whole model."""
        return list({Op(op, "").block or op: op for op in reversed(self.ops)}.values())[::-1]

    def mates(self, op: str) -> set[str]:
        """Other ops of its block."""
        block = Op(op, "").block
        return {other for other in self.ops if block and other != op and Op(other, "").block == block}

    def copy(self, directory: Path, *cached: str, prefix: tuple[str, ...] = ()) -> Site:
        """Make a site with the old snapshot, and some folders of the cache: what is there need not be found out."""
        site = Site(directory, prefix)
        site.file.parent.mkdir(parents=True)
        site.file.write_text(self.old)
        for name in ("manifests", *cached):
            shutil.copytree(self.site.cache / name, site.cache / name)
        return site

    def check(self, site: Site) -> None:
        """See that the last run of a site came to what an undisturbed one comes to, digit for digit."""
        assert site.scores() == self.scores
        assert site.file.read_text() == self.snapshot
        assert [path.name for path in site.file.parent.iterdir()] == [site.file.name]

    def resume(self, site: Site, *args: str) -> set[str]:
        """Run once more after a fault, see that all comes to the same, and tell which ops were measured."""
        ended = site.run(*args)
        assert ended.code == 0, ended.output
        self.check(site)
        return site.measured()

    def check_file(self, site: Site) -> dict[str, bool]:
        """See that the snapshot file is whole, and each line in it as it was or as it is to be; which of them are."""
        text = site.file.read_text()
        assert dumps(load(site.file)) == text
        found, old = _lines(text), _lines(self.old)
        assert found.keys() == old.keys()
        assert all(line in (old[op], self.lines[op]) for op, line in found.items())
        return {op: line == self.lines[op] for op, line in found.items()}


def _lines(text: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(text)
    lines: dict[str, Any] = content["ops"]
    return lines | ({"total": content["total"]} if "total" in content else {})


@dataclass(frozen=True)
class Disk:
    """A small disk.

    Attributes:
        path: Where to find it, from outside of its name space and inside.
        prefix: Command that makes other commands run where the disk is.

    """

    BALLAST: ClassVar[str] = "ballast"

    path: Path
    prefix: tuple[str, ...]

    def fill(self, left: int) -> None:
        """Leave only so many bytes, and see that no more can be written."""
        with (self.path / self.BALLAST).open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        os.truncate(self.path / self.BALLAST, (self.path / self.BALLAST).stat().st_size - left)
        probe = self.path / "probe"
        try:
            probe.write_bytes(bytes(left + 4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017 - that it is raised is checked below
            probe.unlink()
        else:
            raise AssertionError("the disk is not full")

    def free(self) -> None:
        """Make room again."""
        (self.path / self.BALLAST).unlink()


@contextmanager
def small_disk(path: Path, options: str) -> Iterator[Disk]:
    """Mount a disk in memory until the block ends.

    It is in a name space of its own, so that nothing is left mounted whatever happens to the tests.

    Raises:
        PermissionError: If that is not allowed here.

    """
    path.mkdir(parents=True, exist_ok=True)
    root = os.geteuid() == 0
    script = 'mount -t tmpfs -o "$1" tmpfs "$0" && echo mounted && exec cat'
    with subprocess.Popen(
        ["unshare", "-m" if root else "-rm", "sh", "-c", script, str(path), options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stderr is not None
        if holder.stdout.readline() != b"mounted\n":
            raise PermissionError(holder.stderr.read().decode().strip())
        user = () if root else ("-U", "--preserve-credentials")
        command = ("nsenter", "-t", str(holder.pid), "-m", *user)
        yield Disk(Path(f"/proc/{holder.pid}/root{path}"), command)
        holder.stdin.close()
