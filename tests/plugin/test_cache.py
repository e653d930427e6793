"""Scores are kept as they are made: what a run has measured, no later run measures again, whatever ended the first."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qsens import cache
from tests.checkpoints import bert
from tests.plugin.harness import MODEL, OPS, write_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LABEL = "checkpoint"
LOGGING = """
import os
import sys
from pathlib import Path

import pytest

from pytest_qsens import measure

HERE = Path(__file__).parent


def log(*words):
    with (HERE / f"measured{os.environ.get('RUN', '')}.log").open("a") as file:  # one write: workers share the file
        file.write(" ".join(words) + "\\n")


@pytest.fixture(scope="session", autouse=True)
def logging():
    calibrate = measure._calibrate

    def logged(*args):
        log("load")
        found = calibrate(*args)
        score, total = found.score, found.total
        found.score = lambda op, modes: (log(op.name, *modes), score(op, modes))[1]
        found.total = lambda: (log("total", "total"), total())[1]
        return found

    measure._calibrate = logged
    yield
    measure._calibrate = calibrate


def pytest_runtest_logreport(report):
    if report.when == "call" and hasattr(report, "qsens"):
        with (HERE / "finished.log").open("a") as file:
            file.write(report.qsens["records"][0]["result"]["op"] + "\\n")


def pytest_unconfigure():
    with (HERE / "torch.log").open("a") as file:
        file.write(f"{'torch' in sys.modules}\\n")
"""


@pytest.fixture
def checkpoint(pytester: pytest.Pytester) -> Path:
    """Make a small BERT, and have every run log what it loads and measures."""
    pytester.makeconftest(LOGGING)
    return bert(pytester.path / LABEL)


def log(pytester: pytest.Pytester, name: str = "measured") -> list[str]:
    """Return what the runs since the last call have logged."""
    path = pytester.path / f"{name}.log"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def run(pytester: pytest.Pytester, *args: str, alone: bool = False) -> pytest.RunResult:
    """Run the built-in suite; in a process of its own if it matters what is imported, or who is killed."""
    start = pytester.runpytest_subprocess if alone else pytester.runpytest_inprocess
    return start("--qsens-model", f"./{LABEL}", "--qsens-json", "out.json", "-p", "no:randomly", *args)


def written(pytester: pytest.Pytester) -> dict[str, Any]:
    """Read the result file of the last run, without what is of a single run, and without seconds."""
    content: dict[str, Any] = json.loads((pytester.path / "out.json").read_text())
    del content["run"]["cost"], content["run"]["cached"]
    for result in (*content["ops"], content["total"]):
        del result["seconds"]
    return content


def cached(pytester: pytest.Pytester) -> int:
    """Return how many ops of the last run came from the cache, by its result file."""
    count: int = json.loads((pytester.path / "out.json").read_text())["run"]["cached"]
    return count


def names(pytester: pytest.Pytester) -> list[str]:
    """Ops of the last run that have scores, and the whole model."""
    content = json.loads((pytester.path / "out.json").read_text())
    return [op["op"] for op in (*content["ops"], content["total"]) if op["status"] == "measured"]


def scores() -> list[Path]:
    """Find the files of the scores in the cache."""
    [entry] = kept()
    return sorted(entry.path.glob("*.*.*.json"))


def kept() -> list[cache.Entry]:
    """Entries of scores in the cache; beside them are the artifacts of calibrated models."""
    return [entry for entry in cache.entries(cache.default_cache_dir()) if entry.kind == "results"]


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.usefixtures("checkpoint")
def test_an_unchanged_check_measures_nothing(pytester: pytest.Pytester, workers: str) -> None:
    """The second run tells what the first did, digit for digit; no process of it so much as imports torch."""
    first = run(pytester, "-n", workers, "--qsens-mode", "both", "--snapshot-update", alone=True)
    assert first.ret == pytest.ExitCode.OK
    expected, count = written(pytester), len(names(pytester)) - 1
    assert (cached(pytester), count) == (0, 16)
    assert len(log(pytester)) == 1 * max(1, int(workers)) + 2 * count + 1
    log(pytester, "torch")
    first.stdout.no_fnmatch_line("scores: *")

    second = run(pytester, "-n", workers, "--qsens-mode", "both", alone=True)
    assert second.ret == pytest.ExitCode.OK
    assert log(pytester) == []
    assert log(pytester, "torch") == ["False"] * (1 + int(workers))
    assert written(pytester) == expected
    assert cached(pytester) == count
    cost = json.loads((pytester.path / "out.json").read_text())["run"]["cost"]
    assert cost["reference_seconds"] > 0
    assert cost["forwards_per_op"] is None
    second.stdout.fnmatch_lines([f"scores: {count} ops from the cache, 0 measured in this run"])
    assert run(pytester, "-n", workers, "--qsens-mode", "both", "--qsens-no-cache").ret == pytest.ExitCode.OK
    assert written(pytester) == expected


INTERRUPT = """
import signal, time

def pytest_runtest_call(item):
    if "-encoder.layer.0.output.dense]" in item.nodeid and not (HERE / "interrupted").exists():
        (HERE / "interrupted").touch()
        os.kill({pid}, signal.{signal})
        if {pid} != os.getpid():
            time.sleep(60)
"""


@pytest.mark.parametrize(
    ("workers", "who", "how"),
    [
        ("0", "os.getpid()", "SIGINT"),
        ("0", "os.getpid()", "SIGKILL"),
        ("2", "os.getpid()", "SIGKILL"),
        ("1", "os.getppid()", "SIGINT"),
        ("1", "os.getppid()", "SIGKILL"),
    ],
    ids=["interrupt", "kill", "kill-worker", "interrupt-controller", "kill-controller"],
)
@pytest.mark.usefixtures("checkpoint")
def test_an_interrupted_run_is_resumed(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, workers: str, who: str, how: str
) -> None:
    """What was finished before is not measured again, the rest is, and every number is that of a run in one go."""
    pytester.makeconftest(LOGGING + INTERRUPT.format(pid=who, signal=how))
    monkeypatch.setenv("RUN", "1")  # workers without a controller may go on for a moment
    ended = run(pytester, "-n", workers, alone=True)
    assert (pytester.path / "interrupted").exists()
    expected = {"SIGINT": pytest.ExitCode.INTERRUPTED, "SIGKILL": -signal.SIGKILL}[how]
    assert ended.ret == (pytest.ExitCode.TESTS_FAILED if (workers, who) == ("2", "os.getpid()") else expected)
    finished = log(pytester, "finished")
    assert finished

    monkeypatch.delenv("RUN")
    resumed = run(pytester, "-n", workers, "--snapshot-update", alone=True)
    assert resumed.ret == pytest.ExitCode.OK
    again = [line.split()[0] for line in log(pytester) if line != "load"]
    assert not set(again) & set(finished)
    assert not any(op.startswith("encoder.layer.0.") for op in again)  # all of a block is kept when it is measured
    assert set(again) | {line.split()[0] for line in log(pytester, "measured1")} >= set(names(pytester))
    assert len(names(pytester)) == 17
    assert cached(pytester) == len(set(names(pytester)) - {"total"} - set(again)) > 0
    found = written(pytester)
    run(pytester, "--qsens-no-cache")
    assert written(pytester) == found
    log(pytester)
    run(pytester)
    assert log(pytester) == []
    assert written(pytester) == found


@pytest.mark.usefixtures("checkpoint")
def test_only_what_is_missing_is_measured(pytester: pytest.Pytester) -> None:
    """Three scores that are gone or damaged cost three scores, although the model has to be loaded for them."""
    run(pytester)
    expected = written(pytester)
    log(pytester)
    files = [path for path in scores() if ".isolated." in path.name][:3]
    files[0].unlink()
    files[1].write_text("{")
    files[2].write_bytes(files[2].read_bytes()[:-20])
    result = run(pytester)
    load, *measured = log(pytester)
    assert load == "load"
    assert len(measured) == 3
    result.stdout.fnmatch_lines(["scores: 13 ops from the cache, 3 measured in this run"])
    assert written(pytester) == expected
    run(pytester)
    assert log(pytester) == []


@pytest.mark.usefixtures("checkpoint")
def test_modes_are_kept_side_by_side(pytester: pytest.Pytester) -> None:
    """After one mode, both take the other one alone; an op is cached if all that is asked for is."""
    run(pytester)
    log(pytester)
    run(pytester, "--qsens-mode", "both")
    assert {tuple(line.split()[1:]) for line in log(pytester)} == {(), ("fallback",)}
    assert cached(pytester) == 0
    both = written(pytester)
    run(pytester, "--qsens-mode", "fallback")
    assert log(pytester) == []
    assert cached(pytester) == 16
    assert {name for op in written(pytester)["ops"] for name in ("isolated", "fallback") if op[name]} == {"fallback"}
    run(pytester, "--qsens-mode", "both", "--qsens-no-cache")
    assert written(pytester) == both


@pytest.mark.usefixtures("checkpoint")
def test_another_scheme_is_measured_and_both_are_kept(pytester: pytest.Pytester) -> None:
    """Schemes of one model share an entry, and do not get each other's scores."""
    found = {}
    for scheme in ("w8a8", "w8a8_dynamic"):
        run(pytester, "--qsens-scheme", scheme)
        assert len(log(pytester)) == 18
        found[scheme] = written(pytester)
    assert found["w8a8"] != found["w8a8_dynamic"]
    assert len(scores()) == 2 * 17
    for scheme, expected in found.items():
        run(pytester, "--qsens-scheme", scheme)
        assert log(pytester) == []
        assert written(pytester) == expected


def rewrite(path: Path, times: bool) -> None:
    """Make the first weight of a checkpoint larger."""
    import torch
    from safetensors.torch import load_file, save_file

    status = path.stat()
    weights = load_file(path)
    weights["encoder.layer.0.output.dense.weight"] *= torch.linspace(1, 30, 32)[:, None]
    save_file(weights, path, metadata={"format": "pt"})
    assert path.stat().st_size == status.st_size
    if times:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "data": lambda path: (path / "eval.txt").write_text("the lazy dog jumps"),
    "weights": lambda path: rewrite(path / LABEL / "model.safetensors", times=False),
    "weights of old": lambda path: rewrite(path / LABEL / "model.safetensors", times=True),
    "tokenizer": lambda path: (path / LABEL / "tokenizer_config.json").write_text(
        (path / LABEL / "tokenizer_config.json").read_text().replace("64", "4")
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.usefixtures("checkpoint")
def test_what_has_changed_is_measured_anew(pytester: pytest.Pytester, change: str) -> None:
    """Other data, weights or tokens give other numbers, although sizes or times may be the same."""
    (pytester.path / "eval.txt").write_text("the quick brown fox jumps")
    run(pytester, "--qsens-eval", "eval.txt")
    before = written(pytester)
    log(pytester)
    CHANGES[change](pytester.path)
    run(pytester, "--qsens-eval", "eval.txt")
    assert len(log(pytester)) == 18
    after = written(pytester)
    assert after["ops"] != before["ops"]
    run(pytester, "--qsens-eval", "eval.txt", "--qsens-no-cache")
    assert written(pytester) == after


BLIND = """
from pytest_qsens.models import directory

@pytest.fixture(scope="session", autouse=True)
def blind():
    true, directory.checkpoint_identity = directory.checkpoint_identity, lambda *_, **__: "unchanged"
    yield
    directory.checkpoint_identity = true
"""


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.usefixtures("checkpoint")
def test_another_model_that_looks_the_same(pytester: pytest.Pytester, workers: str) -> None:
    """If files do not show that weights are others, the outputs do once the model is loaded: nothing is mixed."""
    pytester.makeconftest(LOGGING + BLIND)
    run(pytester)
    log(pytester)
    rewrite(pytester.path / LABEL / "model.safetensors", times=True)
    scores()[0].unlink()
    result = run(pytester, "-n", workers)
    assert len(log(pytester)) == 17 + max(1, int(workers))
    assert cached(pytester) == 0
    lines = [line for line in result.outlines if line.startswith("qsens: checkpoint: the unquantized outputs are not")]
    assert len(lines) == 1
    after = written(pytester)
    run(pytester)
    assert (log(pytester), cached(pytester)) == ([], 16)
    assert written(pytester) == after
    run(pytester, "--qsens-no-cache")
    assert written(pytester) == after


@pytest.mark.usefixtures("checkpoint")
def test_weights_that_change_while_they_are_loaded(pytester: pytest.Pytester) -> None:
    """What such a run measures is not kept: nobody knows what it is of."""
    pytester.makeconftest(
        LOGGING.replace('log("load")', 'log("load"); (HERE / "checkpoint" / "model.safetensors").touch()')
    )
    result = run(pytester)
    result.stdout.fnmatch_lines(["qsens: checkpoint: model or data have changed since the run began: *"])
    assert kept() == []
    assert len(names(pytester)) == 17


@pytest.mark.usefixtures("checkpoint")
def test_weights_that_change_while_they_are_measured(pytester: pytest.Pytester) -> None:
    """They lie in mapped files: what is written into these reaches a model that was loaded long ago."""
    pytester.makeconftest(
        LOGGING
        + """
def pytest_runtest_teardown(item):
    if "-encoder.layer.0.output.dense]" in item.nodeid:
        with (HERE / "checkpoint" / "model.safetensors").open("r+b") as file:
            file.seek(-4096, os.SEEK_END)
            content = file.read()
            file.seek(-4096, os.SEEK_END)
            file.write(content[::-1])
"""
    )
    result = run(pytester, "--snapshot-update", alone=True)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*the files of model checkpoint have changed while it was measured*"])
    assert not list(pytester.path.rglob("w8a8.json"))


@pytest.mark.usefixtures("checkpoint")
def test_contents_of_weights(pytester: pytest.Pytester, checkpoint: Path) -> None:
    """``--qsens-hash-weights`` finds the scores of a copy with other times, and of none with other contents."""
    run(pytester, "--qsens-hash-weights")
    expected = written(pytester)
    log(pytester)
    shutil.copytree(checkpoint, pytester.path / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(checkpoint)
    (pytester.path / "copy").rename(checkpoint)
    run(pytester, "--qsens-hash-weights")
    assert log(pytester) == []
    assert written(pytester) == expected
    rewrite(checkpoint / "model.safetensors", times=True)
    run(pytester, "--qsens-hash-weights")
    assert len(log(pytester)) == 18


@pytest.mark.usefixtures("checkpoint")
def test_no_cache_neither_reads_nor_writes(pytester: pytest.Pytester) -> None:
    """``--qsens-no-cache`` measures everything, and leaves no trace."""
    run(pytester, "--qsens-no-cache")
    assert len(log(pytester)) == 18
    assert not cache.default_cache_dir().exists()
    run(pytester)
    before = {path: path.stat().st_mtime_ns for path in scores()}
    log(pytester)
    run(pytester, "--qsens-no-cache")
    assert len(log(pytester)) == 18
    assert {path: path.stat().st_mtime_ns for path in scores()} == before


FULL = """
import os

@pytest.fixture(scope="session", autouse=True)
def full():
    from pytest_qsens import result_cache
    true = result_cache.write_atomically

    def write(path, text):
        if len(list(path.parent.iterdir())) < 5:
            return true(path, text)
        raise result_cache.QsensError(f"{path} cannot be written: full") from OSError(28, "No space left on device")

    result_cache.write_atomically = write
    yield
    result_cache.write_atomically = true
"""


@pytest.mark.parametrize(("what", "workers"), [("in the way", "0"), ("full", "0"), ("full", "1")])
@pytest.mark.usefixtures("checkpoint")
def test_a_cache_that_cannot_be_written_costs_nothing(pytester: pytest.Pytester, what: str, workers: str) -> None:
    """One line says so; every test passes and every file is written."""
    (pytester.path / "mine").write_text("")
    if what == "full":
        pytester.makeconftest(LOGGING + FULL)
    args = ("--snapshot-update", "-n", workers, *(["--qsens-cache", "mine"] if what == "in the way" else []))
    result = run(pytester, *args)
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=17)
    assert len([line for line in result.outlines if "could not be cached" in line]) == 1
    assert len(names(pytester)) == 17
    log(pytester)
    run(pytester, *args)
    assert 0 < cached(pytester) < 5 if what == "full" else cached(pytester) == 0


@pytest.mark.usefixtures("checkpoint")
def test_cached_scores_are_gated_and_recorded(pytester: pytest.Pytester) -> None:
    """They are compared with the snapshot as measured ones are, and accepted as these are."""
    assert run(pytester).ret == pytest.ExitCode.TESTS_FAILED
    log(pytester)
    assert run(pytester, "--snapshot-update").ret == pytest.ExitCode.OK
    [snapshot] = (pytester.path / "qsens_snapshots").rglob("*.json")
    accepted = snapshot.read_bytes()
    content = json.loads(accepted)
    content["ops"]["encoder.layer.0.output.dense"]["isolated"]["nmse"] /= 2
    snapshot.write_text(json.dumps(content))
    result = run(pytester)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=16, failed=1)
    result.stdout.fnmatch_lines(["E *worse than the snapshot of encoder.layer.0.output.dense in *"])
    assert run(pytester, "--snapshot-update").ret == pytest.ExitCode.OK
    assert log(pytester) == []
    snapshot.unlink()
    run(pytester, "--snapshot-update")
    assert snapshot.read_bytes() == accepted
    run(pytester, "--qsens-no-cache", "--snapshot-update")
    assert snapshot.read_bytes() == accepted


@pytest.mark.usefixtures("checkpoint")
def test_a_part_of_the_ops(pytester: pytest.Pytester) -> None:
    """A selection takes its scores from a complete run, and gives its own to one."""
    run(pytester, "--qsens-ops", "encoder.layer.0.*")
    assert len(log(pytester)) == 1 + 6
    run(pytester)
    assert len(log(pytester)) == 1 + 10 + 1
    assert cached(pytester) == 6
    run(pytester, "-k", "layer.1")
    assert log(pytester) == []
    run(pytester, "--qsens-engine", "eager", "--qsens-ops", "pooler.*")
    assert len(log(pytester)) == 2  # another engine's scores are its own


def test_factories_are_measured_every_time(pytester: pytest.Pytester) -> None:
    """What the code of a factory does cannot be told from outside."""
    pytester.makeconftest(LOGGING)
    write_model(pytester)
    for _ in range(2):
        pytester.runpytest_inprocess("--qsens-model", MODEL)
        assert len(log(pytester)) == 1 + len(OPS) + 1
    assert not cache.default_cache_dir().exists()


@pytest.mark.usefixtures("checkpoint")
def test_tests_that_take_the_model(pytester: pytest.Pytester) -> None:
    """They get the calibrated model, loaded for them; the scores beside it come from the cache."""
    pytester.makepyfile(
        test_user="""
        import pytest
        from pytest_qsens.calibrated import CalibratedModel
        pytestmark = pytest.mark.qsens(model="./checkpoint", ops="pooler.*")

        def test_score(qsens_score): assert qsens_score.result.isolated
        def test_model(qsens_model, qsens_op, qsens_score):
            assert isinstance(qsens_model, CalibratedModel)
            assert qsens_model.score(qsens_op, ["isolated"]).isolated == qsens_score.result.isolated
        """
    )
    for expected in (["load", "pooler.dense isolated", "pooler.dense isolated"], ["load", "pooler.dense isolated"]):
        pytester.runpytest_inprocess("-p", "no:randomly", "test_user.py").assert_outcomes(passed=2)
        assert log(pytester) == expected
    pytester.runpytest_inprocess("test_user.py::test_score").assert_outcomes(passed=1)
    assert log(pytester) == []


@pytest.mark.usefixtures("checkpoint")
def test_the_size_is_limited(pytester: pytest.Pytester) -> None:
    """After a run the least recently used entries go, until the rest is small enough; that of the run stays."""
    old = cache.default_cache_dir() / "results" / f"{1:032x}"
    old.mkdir(parents=True)
    (old / "entry.json").write_text('{"by": "pytest-qsens", "model": "old"}')
    (old / f"{1:032x}.scheme.json").write_bytes(bytes(1_000_000))
    run(pytester, "--qsens-cache-size", "2MB")
    assert [entry.model for entry in kept()] == ["old", LABEL]
    run(pytester, "--qsens-cache-size", "1MB")
    assert [entry.model for entry in kept()] == [LABEL]
    assert {entry.kind for entry in cache.entries(cache.default_cache_dir())} == {"results", "artifacts"}
    result = run(pytester, "--qsens-cache-size", "big")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: qsens: --qsens-cache-size takes a size such as 4GB*'big'"])


@pytest.mark.usefixtures("checkpoint")
def test_two_runs_at_once(pytester: pytest.Pytester) -> None:
    """They share the cache without disturbing each other."""
    command = [sys.executable, "-m", "pytest", "--qsens-model", f"./{LABEL}", "-n", "2"]
    with (
        subprocess.Popen([*command, "--qsens-json", "a.json"], stdout=subprocess.DEVNULL) as one,
        subprocess.Popen([*command, "--qsens-json", "b.json"], stdout=subprocess.DEVNULL) as other,
    ):
        assert {one.wait(), other.wait()} == {pytest.ExitCode.TESTS_FAILED}  # everything is new
    log(pytester)
    run(pytester)
    assert log(pytester) == []
    found = written(pytester)
    for name in ("a.json", "b.json"):
        shutil.copy(pytester.path / name, pytester.path / "out.json")
        assert written(pytester) == found


def test_the_script_lists_what_a_run_has_kept(pytester: pytest.Pytester, checkpoint: Path) -> None:
    """``qsens cache`` knows the default cache as pytest does."""
    run(pytester, "--qsens-scheme", "w8a8_static", "--qsens-ops", "pooler.*")
    code = "import sys; from pytest_qsens.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "cache", "list"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert re.match(rf"{checkpoint.name} +results +w8a8_static +1 +[\d.]+ KB +\d{{4}}-", output[1])
    assert re.match(rf"{checkpoint.name} +artifacts +- +- +[\d.]+ KB +\d{{4}}-", output[2])
    assert output[3].startswith(f"{cache.default_cache_dir()}: 2 entries, ")
