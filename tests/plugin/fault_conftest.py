"""Conftest of runs that something happens to: they log what they do, and meet their fault at the moment it is for.

The fault is the JSON in the environment variable ``FAULT``: ``role`` (``worker`` or ``controller``) and ``moment`` say
where it strikes, ``op`` at which op a process has to be, ``path``, a regular expression, at which file, and ``act``
what happens. It strikes once, in the first process that comes there, and leaves a file ``struck``.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qsens import measure
from pytest_qsens.models.factory import FactorySource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).parent
ROLE = "worker" if "PYTEST_XDIST_WORKER" in os.environ else "controller"
FAULT: dict[str, Any] = json.loads(os.environ.get("FAULT", "{}"))
RUN = os.environ["RUN"]
MEGABYTE = 2**20

_current = ""
_renamed = ""
_hooks: list[Callable[[], object]] = []


def log(name: str, *words: object) -> None:
    """Add a line to a log that all processes share; runs with another ``RUN`` have logs of their own."""
    with (HERE / f"{name}{RUN}.log").open("a") as file:  # one write
        file.write(" ".join(map(str, words)) + "\n")


def reached(moment: str, path: str | None = None) -> None:
    """Let the fault strike if this is its moment."""
    here = FAULT.get("role") == ROLE and FAULT["moment"] == moment and FAULT.get("op", _current) == _current
    if not here or (path is not None and not re.search(FAULT["path"], path)):
        return
    try:
        (HERE / f"struck{RUN}").touch(exist_ok=False)
    except FileExistsError:
        return
    log("struck", os.getpid(), moment, _current)
    ACTS[FAULT["act"]]()


def kill() -> None:
    """Die."""
    os.kill(os.getpid(), signal.SIGKILL)


def halve() -> None:
    """Die when half of the file is written."""
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            path = link.readlink()
            if path.suffix == ".tmp" and re.search(FAULT["path"], str(path)):
                os.truncate(path, path.stat().st_size // 2)
    kill()


def orphan() -> None:
    """Lose the controller in the middle of something long."""
    time.sleep(2)  # until what was measured has been reported
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)


def truncate() -> None:
    """Cut the artifact short under the hands of those who use it."""
    [path] = Path(FAULT["cache"]).glob("artifacts/*/calibrated.safetensors")
    os.truncate(path, FAULT["size"])
    log("size", path.stat().st_size)


def let_the_system_kill() -> None:
    """Have the system end the process inside of the next write, when some of the content is on the disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FAULT["size"], resource.RLIM_INFINITY))


def starve() -> None:
    """Leave no memory to be had, until the op is done."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken: list[bytes] = []

    def release() -> None:
        taken.clear()
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

    _hooks.append(release)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), hard))
    for size in (MEGABYTE, MEGABYTE // 16, 4096):  # smaller ones are left for what is not a tensor
        with suppress(MemoryError):
            while True:
                taken.append(bytes(size))


def exhaust() -> None:
    """Take more memory than a control group of one's own has."""
    group = Path(FAULT["group"])
    (group / "cgroup.procs").write_text(str(os.getpid()))
    taken = [bytearray(os.urandom(MEGABYTE)) for _ in range(FAULT["size"] // MEGABYTE)]
    log("survived", len(taken))


def stay() -> None:
    """Go on once the other run comes, and give it the time to do what it must not do meanwhile."""
    (HERE / "inside").touch()
    await_file("coming")
    time.sleep(0.5)


def come() -> None:
    """Go on once the other run is inside."""
    await_file("inside")
    (HERE / "coming").touch()


def await_file(name: str) -> None:
    """Wait for another process to make a file."""
    deadline = time.monotonic() + 250
    while not (HERE / name).exists():
        assert time.monotonic() < deadline, name
        time.sleep(0.01)


ACTS: dict[str, Callable[[], object]] = {
    "come": come,
    "exhaust": exhaust,
    "halve": halve,
    "kill": kill,
    "let the system kill": let_the_system_kill,
    "orphan": orphan,
    "starve": starve,
    "stay": stay,
    "truncate": truncate,
}


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Find the moments in the life of a file; every event comes before what it is of."""
    global _renamed  # noqa: PLW0603 - what comes next is known by what came before
    if event == "open" and isinstance(arguments[0], str | os.PathLike):
        path, flags = os.fspath(arguments[0]), arguments[2]
        if flags & os.O_CREAT and path.endswith((".lock", ".tmp")):
            reached("lock" if path.endswith(".lock") else "create", path)
        elif path == os.path.dirname(_renamed):  # noqa: PTH120 - it is opened to be synchronized
            reached("replaced", _renamed)
    elif event == "os.rename":
        _renamed = os.fspath(arguments[1])
        reached("rename", _renamed)
    elif event == "os.remove" and os.fspath(arguments[0]).endswith(".lock"):
        reached("unlock", os.fspath(arguments[0]))


def pytest_configure(config: pytest.Config) -> None:
    """Watch files, if the fault is of one; and let the model be cached as a checkpoint is, though it is a factory's.

    Its code is always the same, and loading a checkpoint takes longer than all else.
    """
    log("started", os.getpid(), ROLE)
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)  # the process may run other tests afterwards
    for name in ("fingerprint", "identity", "data_fingerprint"):
        patch.setattr(FactorySource, name, lambda *_, **__: "the same")
    if "path" in FAULT and FAULT["role"] == ROLE:
        fsync = os.fsync

        def watched(descriptor: Any) -> None:  # noqa: ANN401 - whatever it takes
            reached("written", str(Path(f"/proc/self/fd/{descriptor}").readlink()))
            fsync(descriptor)

        os.fsync = watched  # type: ignore[assignment] # nobody names its parameter
        sys.addaudithook(audit)


@pytest.fixture(scope="session", autouse=True)
def _logged() -> Iterator[None]:
    """Log what is loaded and measured."""
    calibrate = measure._calibrate

    def logged(*args: Any) -> Any:  # noqa: ANN401 - whatever it takes
        reached("load")
        found: Any = calibrate(*args)
        log("measured", "load")
        score, total = found.score, found.total

        def measured(op: str, function: Callable[..., Any], *args: Any) -> Any:  # noqa: ANN401 - as above
            log("measured", op)
            reached("measure")
            try:
                return function(*args)
            finally:
                while _hooks:
                    _hooks.pop()()
                reached("measured")

        found.score = lambda op, modes: measured(op.name, score, op, modes)
        found.total = lambda: measured("total", total)
        return found

    measure._calibrate = logged  # type: ignore[assignment] # it passes on what it gets
    yield
    measure._calibrate = calibrate


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Note which op this is."""
    global _current  # noqa: PLW0603 - what happens deep inside of a test must know
    _current = item.nodeid.removesuffix("]").partition("-w8a8-")[2] or "total"
    reached("setup")


def pytest_runtest_teardown() -> None:
    """Come here when the score was reported."""
    reached("teardown")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Log, in the controller, the ops whose scores have come in."""
    if ROLE == "controller" and report.when == "call" and hasattr(report, "qsens"):
        log("reported", *(record["result"]["op"] for record in report.qsens["records"]))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:  # noqa: ANN401 - xdist has no types
    """Log how a worker ended that did so by itself."""
    if error:
        log("down", node.gateway.id, node.gateway._io.popen.wait(60))
