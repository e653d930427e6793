"""Workers on other machines: an SSH server and a socket server on this one, each with a checkout of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import pytest_qsens
from pytest_qsens.option_declarations import joined
from tests.checkpoints import bert
from tests.plugin.harness import MODEL, OPS, listing, snapshot_file, write_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

COUNT = len(OPS) + 1

_MISSING = [name for name, found in (("ssh", shutil.which("ssh")), ("asyncssh", find_spec("asyncssh"))) if not found]
_IN_CI = bool(os.environ.get("CI") or os.environ.get("QSENS_CI"))
"""Asked while the environment is still that of the machine."""


@contextmanager
def served(
    command: Sequence[str | Path], directory: Path, port: str, environment: Mapping[str, str] = os.environ
) -> Iterator[int]:
    """Run a server that tells its port in its first line, until the end of the block."""
    with subprocess.Popen(
        [sys.executable, "-u", *command],
        cwd=directory,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            match = re.search(port, line)
            assert match, f"the server ended with {line!r}"
            yield int(match[1])
        finally:
            server.terminate()


@pytest.fixture
def far(pytester: pytest.Pytester, tmp_path: Path) -> Path:
    """Make the other checkout: a copy of the project of ``pytester`` and of this package.

    Workers there say where they have the package from.
    """
    write_model(pytester)
    pytester.makeini("[pytest]")
    pytester.makeconftest(
        """
        import os, pytest_qsens
        from pathlib import Path
        if "PYTEST_XDIST_WORKER" in os.environ:
            Path(os.environ["PYTEST_XDIST_WORKER"]).with_suffix(".where").write_text(pytest_qsens.__file__)
        """
    )
    checkout = tmp_path / "far"
    shutil.copytree(pytester.path, checkout)
    package = Path(pytest_qsens.__file__).parent
    shutil.copytree(package, checkout / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    return checkout


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[str]:
    """Start an SSH server; gives the gateway to it, without directory.

    The machine's own sshd would need root, users and a configuration; the client is the machine's own.
    """
    if _MISSING:
        (pytest.fail if _IN_CI else pytest.skip)(f"no {' and no '.join(_MISSING)} on this machine")
    home = tmp_path / "home"
    home.mkdir()
    with served([Path(__file__).with_name("ssh_server.py"), home], home, r"^(\d+)"):
        yield f"ssh=far//ssh_config={home}/ssh_config//python={sys.executable}"


@pytest.fixture
def socket(far: Path) -> Iterator[str]:
    """Start execnet's socket server in the other checkout; gives the gateway to it, one worker at a time."""
    script = find_spec("execnet.script.socketserver")
    assert script is not None
    assert script.origin is not None
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    line = r"Entering Accept loop \('127.0.0.1', (\d+)\)"
    with served([script.origin, "127.0.0.1:0"], far, line, environment) as port:
        yield f"socket=127.0.0.1:{port}"


def run(pytester: pytest.Pytester, *args: str, model: str = MODEL) -> pytest.RunResult:
    """Run the built-in suite on gateways."""
    options = ("-p", "no:randomly", "-p", "no:cacheprovider", "--dist", "load")
    return pytester.runpytest_subprocess("--qsens-model", model, *options, *args)


def where(checkout: Path) -> dict[str, Path]:
    """Workers that ran in a checkout, and the package that each of them used."""
    return {path.stem: Path(path.read_text()) for path in checkout.glob("*.where")}


def test_ssh(pytester: pytest.Pytester, far: Path, ssh: str) -> None:
    """Results and snapshot arrive here, and nothing is written there; the next run compares with what is here.

    The other checkout has no snapshot. An option's relative path means a file of each checkout, there or not: the
    second run names an output that exists.
    """
    tx = ("--tx", f"{ssh}//chdir={far}", "--qsens-json", "out.json")
    first = run(pytester, *tx, "--snapshot-update")
    first.assert_outcomes(passed=COUNT)
    first.stdout.fnmatch_lines([f"qsens: wrote {snapshot_file(pytester)} ({COUNT} lines new or changed)"])
    assert where(far) == {"gw0": far / "pytest_qsens" / "__init__.py"}
    assert where(pytester.path) == {}
    assert not (far / "qsens_snapshots").exists()
    assert not (far / "out.json").exists()
    run(pytester, *tx).assert_outcomes(passed=COUNT)
    content = json.loads((pytester.path / "out.json").read_text())
    assert {op["status"] for op in content["ops"]} == {"measured"}
    recorded = json.loads(snapshot_file(pytester).read_text())
    recorded["ops"]["head"]["isolated"] = {"nmse": 1e-9}
    snapshot_file(pytester).write_text(json.dumps(recorded))
    worse = run(pytester, *tx)
    worse.assert_outcomes(passed=COUNT - 1, failed=1)
    worse.stdout.fnmatch_lines([f"*worse than the snapshot of head in {snapshot_file(pytester)}"])


def test_here_and_there(pytester: pytest.Pytester, far: Path, socket: str) -> None:
    """A worker here and one behind a socket share the ops of one run."""
    result = run(pytester, "--tx", "popen", "--tx", f"{socket}//chdir={far}", "--snapshot-update")
    result.assert_outcomes(passed=COUNT)
    assert where(pytester.path).keys() == {"gw0"}
    assert where(far) == {"gw1": far / "pytest_qsens" / "__init__.py"}
    assert set(json.loads(snapshot_file(pytester).read_text())["ops"]) == set(OPS)


def test_several_workers_by_a_proxy(pytester: pytest.Pytester, far: Path, socket: str) -> None:
    """One socket is enough for a whole machine: its proxy starts the workers there.

    xdist gives these the import path of the controller, so they have its package, but the model of their directory.
    """
    gateways = ("--px", f"id=far//{socket}", "--tx", f"2*popen//via=far//python={sys.executable}//chdir={far}")
    run(pytester, *gateways, "--snapshot-update").assert_outcomes(passed=COUNT)
    assert where(far).keys() == {"gw0", "gw1"}
    assert (far / "built.log").exists()
    assert not (pytester.path / "built.log").read_text().count("cpu")


def retrained(checkpoint: Path) -> None:
    """Change one weight in the middle of a tensor."""
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    weights["encoder.layer.0.output.dense.weight"][3, 3] += 1
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})


def removed(checkpoint: Path) -> None:
    """Take the weights away."""
    (checkpoint / "model.safetensors").unlink()


def gone(checkpoint: Path) -> None:
    """Take all of it away."""
    shutil.rmtree(checkpoint)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (retrained, "net: worker gw0 on this machine and worker gw1 on far have not the same checkpoint (hashes *"),
        (removed, "no weights in *far/net: * (worker gw1 on far, in *far)"),
        (gone, "no such directory: *far/net* (worker gw1 on far, in *far)"),
    ],
)
def test_another_checkpoint_there(
    pytester: pytest.Pytester, far: Path, ssh: str, damage: Callable[[Path], None], message: str
) -> None:
    """A machine without the weights, or with others, ends the run with its name before anything is measured."""
    bert(pytester.path / "net")
    shutil.copytree(pytester.path / "net", far / "net")
    damage(far / "net")
    before = listing(pytester)
    args = ("--tx", "popen", "--tx", f"{ssh}//chdir={far}", "--snapshot-update", "--qsens-json", "out.json")
    result = run(pytester, *args, model="./net")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert any(re.search(_pattern(message), line) for line in (*result.outlines, *result.errlines))
    assert {name: text for name, text in listing(pytester).items() if not name.endswith(".where")} == before


def _pattern(message: str) -> str:
    return re.escape(message).replace(r"\*", ".*")


def test_the_same_checkpoint_there(pytester: pytest.Pytester, far: Path, socket: str) -> None:
    """A copy in another directory, of another age, is the same checkpoint."""
    bert(pytester.path / "net")
    shutil.copytree(pytester.path / "net", far / "net", copy_function=shutil.copyfile)
    result = run(pytester, "--tx", "popen", "--tx", f"{socket}//chdir={far}", "--snapshot-update", model="./net")
    assert result.ret == 0
    assert where(far)


def test_other_data_there(pytester: pytest.Pytester, far: Path, socket: str) -> None:
    """Each machine reads its own data file, and they have to be the same."""
    bert(pytester.path / "net")
    shutil.copytree(pytester.path / "net", far / "net")
    (pytester.path / "texts.txt").write_text("one text\nanother text\n")
    (far / "texts.txt").write_text("one text\nsomething else\n")
    args = ("--tx", "popen", "--tx", f"{socket}//chdir={far}", "--qsens-eval", "texts.txt")
    result = run(pytester, *args, model="./net")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["ERROR: qsens: net: worker gw0 on this machine and worker gw1 on 127.0.0.1 have not the same data*"]
    )


def test_options_are_spelled_in_one_argument() -> None:
    """Our options only, and flags have no value."""
    arguments = [
        "--qsens-json",
        "out.json",
        "--qsens-no-cache",
        "-k",
        "x",
        "--qsens-ops",
        "a*",
        "--qsens-mode=both",
        "t",
    ]
    assert joined(arguments) == [
        *("--qsens-json=out.json", "--qsens-no-cache", "-k", "x", "--qsens-ops=a*", "--qsens-mode=both", "t")
    ]
    assert joined([]) == []
