"""Everything that cannot work ends the run with exit code 4 and one message, before anything is written."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.checkpoints import bert
from tests.plugin.harness import LABEL, MODEL, listing, op_id, snapshot_file, write_model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


def refused(pytester: pytest.Pytester, *args: str, message: str) -> None:
    """Run, and check that it is refused with this message (a glob), once, and that no file has changed."""
    before = listing(pytester)
    result = pytester.runpytest_inprocess(*args)
    assert result.ret == pytest.ExitCode.USAGE_ERROR, result.stdout.str()
    result.stderr.fnmatch_lines([f"ERROR: qsens: {message}"])
    assert result.stderr.str().count("ERROR: qsens:") == 1
    assert "ERROR: qsens:" not in result.stdout.str()
    assert listing(pytester) == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--qsens-model", ""], "--qsens-model is empty. Is a variable in it not set?"),
        (["--qsens-json", ""], "--qsens-json is empty. *"),
        (["--qsens-snapshot-dir", ""], "--qsens-snapshot-dir is empty. *"),
        (["--qsens-model", "minlm"], "no preset 'minlm' (did you mean minilm?). Known: minilm, *"),
        (["--qsens-model", "./none"], "no such directory: */none*"),
        (["--qsens-model", "net:spek"], "module net * has no 'spek' (did you mean spec?)*"),
        (["--qsens-model", "nut:spec"], "no module 'nut' for --qsens-model nut:spec*"),
        (["--qsens-model", "qwen2_5_vl_3b"], "*hf download Qwen/Qwen2.5-VL-3B-Instruct*"),
        (["--qsens-model", MODEL, "--qsens-checkpoint", "."], "*--qsens-checkpoint*"),
        (["--qsens-scheme", "w8b8"], "no value for --qsens-scheme: 'w8b8' (did you mean w8a8?). Known: w8a8, *"),
        (["--qsens-mode", "all"], "no value for --qsens-mode: 'all'. Known: isolated, fallback, both"),
        (["--qsens-engine", "repaly"], "no value for --qsens-engine: 'repaly' (did you mean replay?)*"),
        (["--qsens-memory", "lots"], "--qsens-memory takes a size such as 4GB*not 'lots'"),
        (["--qsens-memory", "4"], "--qsens-memory takes at least 1MB, not '4'*unit*"),
        (["--qsens-device", "gpu 1"], "--qsens-device takes a torch device such as cpu*not 'gpu 1'"),
        (["--qsens-max-ops", "-1"], "--qsens-max-ops takes a whole number from 1, not '-1'"),
        (["--qsens-calib-samples", "few"], "--qsens-calib-samples takes a whole number from 1, not 'few'"),
        (["--qsens-fail", "nmsd:5%"], "--qsens-fail 'nmsd:5%': no metric 'nmsd' (did you mean *"),
        (["--qsens-fail", "nmse:-5%"], "--qsens-fail 'nmse:-5%': '-5%' is not an amount for nmse*"),
        (["--qsens-ops", "haed"], f"--qsens-ops 'haed' matches none of the 8 ops of {LABEL} (near: head)*"),
        (["--qsens-ops", "head", "--qsens-ops", "encoder.*"], "--qsens-ops 'encoder.[*]' matches none*"),
        (
            [op_id("haed")],
            f"not found: {op_id('haed').replace('[', '[[]')} (near: {op_id('head').replace('[', '[[]')})*",
        ),
        (["qsens::test_nothing"], "not found: qsens::test_nothing*"),
        (["--qsens-json", "no/such/out.json"], "cannot write */no/such/out.json: there is no directory *"),
        (["--qsens-json", "net.py"], "*net.py exists and is not a result file*left untouched*"),
        (["--qsens-snapshot-prune", "--snapshot-update", "--qsens-max-ops=1"], "*needs a complete run*"),
        (["--dist", "loadscope", "-n2"], "--dist loadscope puts a whole model on one worker*-n N alone*"),
        (["--dist", "loadfile", "-n2"], "--dist loadfile *"),
        (["--dist", "loadgroup", "-n2"], "--dist loadgroup *"),
        (["--dist", "each", "-n2"], "--dist each *"),
    ],
)
@pytest.mark.parametrize("update", [False, True])
def test_options(pytester: pytest.Pytester, args: Sequence[str], message: str, *, update: bool) -> None:
    """Options that cannot be are refused, whatever else was asked for."""
    write_model(pytester)
    model = [] if "--qsens-model" in args else ["--qsens-model", MODEL]
    refused(pytester, *model, *args, *["--snapshot-update"] * update, message=message)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("qsens_scheme = w8b8", "no value for qsens_scheme in the ini file: 'w8b8' (did you mean w8a8?)*"),
        ("qsens_max_ops = none", "qsens_max_ops in the ini file takes a whole number from 1*'none'"),
        ("qsens_no_cache = maybe", "qsens_no_cache in the ini file takes true or false: *'maybe'"),
        ("qsens_fail = nmsd:5%", "qsens_fail in the ini file 'nmsd:5%': no metric 'nmsd' (did you mean *"),
        ("qsens_ops = haed", f"qsens_ops in the ini file 'haed' matches none of the 8 ops of {LABEL} (near: head)*"),
        (
            "qsens_fail_overrides = hedd = nmse:9%",
            "qsens_fail_overrides: 'hedd' matches neither an op of this run's models nor total (near: head)*",
        ),
        ("qsens_fail_overrides = nmse:5%", "qsens_fail_overrides: 'nmse:5%' is not 'GLOB = THRESHOLDS'*"),
    ],
)
def test_ini(pytester: pytest.Pytester, line: str, message: str) -> None:
    """The ini file is checked like the command line, and named in the message."""
    write_model(pytester)
    pytester.makeini(f"[pytest]\nqsens_model = {MODEL}\n{line}")
    refused(pytester, message=message)


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ("model=3", "model= of @pytest.mark.qsens takes a text, not 3"),
        ("fail=5", "fail= of @pytest.mark.qsens takes a text, not 5"),
        ("ops=3", "ops= of @pytest.mark.qsens takes a list of texts, not 3"),
        ("ops='haed'", "ops= of @pytest.mark.qsens 'haed' matches none of the 8 ops *"),
        ("allow_pickle='no'", "allow_pickle= of @pytest.mark.qsens takes true or false, not 'no'"),
    ],
)
def test_markers(pytester: pytest.Pytester, keyword: str, message: str) -> None:
    """A marker is checked like the command line: its keyword is named, without a traceback."""
    write_model(pytester)
    pytester.makepyfile(
        f"""
        import pytest

        @pytest.mark.qsens({keyword})
        def test_op(qsens_op, qsens_score, snapshot):
            assert qsens_score == snapshot
        """
    )
    before = listing(pytester)
    result = pytester.runpytest_inprocess("--snapshot-update", *[f"--qsens-model={MODEL}"] * (keyword != "model=3"))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stdout.fnmatch_lines([f"*qsens: {message}"])
    assert "Traceback" not in result.stdout.str()
    assert listing(pytester) == before


def test_a_factory_that_exits(pytester: pytest.Pytester) -> None:
    """``sys.exit()`` in the user's code is an error with its place, not the end of a run without a word."""
    pytester.makepyfile(quits="import sys\n\ndef spec():\n    sys.exit()\n")
    message = f"quits:spec: it raised SystemExit ({pytester.path}/quits.py:4)"
    refused(pytester, "--qsens-model", "quits:spec", "--snapshot-update", message=message)


def test_the_ini_file_from_a_directory_below(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """A factory named in the ini file is found wherever pytest is called; if not, the places are told."""
    write_model(pytester)
    pytester.makeini(f"[pytest]\nqsens_model = {MODEL}")
    monkeypatch.chdir(pytester.mkdir("below"))
    run = ("--collect-only", "-q", "--rootdir", str(pytester.path), str(pytester.path))
    assert pytester.runpytest_subprocess(*run).ret == pytest.ExitCode.OK
    missing = f"no module 'nut' for --qsens-model nut:spec. Looked in {pytester.path}/below, {pytester.path} and *"
    refused(pytester, "--qsens-model", "nut:spec", message=missing)


def test_pruning_without_updating(pytester: pytest.Pytester) -> None:
    """Pruning writes, so it needs the option that lets a run write."""
    write_model(pytester)
    refused(pytester, "--qsens-model", MODEL, "--qsens-snapshot-prune", message="*so it needs --snapshot-update")


def test_node_id_without_a_model(pytester: pytest.Pytester) -> None:
    """A node id of the suite is nothing without a model."""
    refused(pytester, op_id("head"), message=f"{op_id('head').replace('[', '[[]')} needs a model: add --qsens-model*")


def test_without_syrupy(pytester: pytest.Pytester) -> None:
    """Scores are compared by syrupy."""
    write_model(pytester)
    refused(pytester, "--qsens-model", MODEL, "-p", "no:syrupy", message="*syrupy*remove -p no:syrupy")


def _empty_checkpoint(path: Path) -> None:
    path.mkdir()


def _truncated_checkpoint(path: Path) -> None:
    weights = bert(path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _pickled_checkpoint(path: Path) -> None:
    (bert(path) / "model.safetensors").rename(path / "pytorch_model.bin")


def _shardless_checkpoint(path: Path) -> None:
    (bert(path) / "model.safetensors").unlink()
    index = {"weight_map": {"embeddings.word_embeddings.weight": "model-00001-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _reshaped_checkpoint(path: Path) -> None:
    config = json.loads((bert(path) / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))


def _unbuildable_checkpoint(path: Path) -> None:
    config = json.loads((bert(path) / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 3}))


def _foreign_checkpoint(path: Path) -> None:
    config = json.loads((bert(path) / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"], "model_type": "nosuch"}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_empty_checkpoint, "*config.json*"),
        (_truncated_checkpoint, "*model.safetensors*"),
        (_pickled_checkpoint, "*--qsens-allow-pickle*"),
        (_shardless_checkpoint, "*model-00001-of-00002.safetensors*"),
        (_reshaped_checkpoint, "*embeddings*"),
        (_unbuildable_checkpoint, "cannot make the model of */checkpoint: The hidden size (32) is not a multiple*"),
        (_foreign_checkpoint, "*NoSuchModel*"),
    ],
)
def test_checkpoints(pytester: pytest.Pytester, make: Callable[[Path], None], message: str) -> None:
    """Damaged and unsafe checkpoints are found before the run starts, from their headers."""
    make(pytester.path / "checkpoint")
    refused(pytester, "--qsens-model", "./checkpoint", "--snapshot-update", message=message)


@pytest.mark.parametrize("option", ["--qsens-calib", "--qsens-eval"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "*absent.txt*"),
        ("empty.txt", b"\n\n", "*empty.txt*"),
        ("latin.txt", b"caf\xe9", "*latin.txt*"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "*broken.jsonl:2: not JSON*"),
        ("image.jsonl", b'{"text": "a", "image": "none.png"}', "*none.png*"),
    ],
)
def test_data_files(pytester: pytest.Pytester, option: str, name: str, content: bytes | None, message: str) -> None:
    """Data files that cannot be read are found before the run starts."""
    bert(pytester.path / "checkpoint")
    if content is not None:
        (pytester.path / name).write_bytes(content)
    refused(pytester, "--qsens-model", "./checkpoint", option, name, message=message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema": 1,\n"model"', "*w8a8.json, line 2: malformed JSON*"),
        ('{"schema": 99}', "*w8a8.json: schema 99 is newer than 1*Upgrade pytest-qsens*"),
        (
            '{"schema": 1, "model": "other", "scheme": "w8a8", "environment": {}, "ops": {}}',
            "*snapshot of model 'other'*",
        ),
    ],
)
@pytest.mark.parametrize("update", [False, True])
def test_snapshots(pytester: pytest.Pytester, content: str, message: str, *, update: bool) -> None:
    """A snapshot that cannot be used is named and left as it is, with ``--snapshot-update`` too."""
    write_model(pytester)
    snapshot_file(pytester).parent.mkdir(parents=True)
    snapshot_file(pytester).write_text(content)
    refused(pytester, "--qsens-model", MODEL, *["--snapshot-update"] * update, message=message)


def test_read_only_snapshot_directory(pytester: pytest.Pytester) -> None:
    """A directory that cannot be written is found before hours of measuring, and is no matter without updating."""
    write_model(pytester)
    place = "/sys/qsens_snapshots"  # not even root can write there
    run = ("--qsens-model", MODEL, "--qsens-snapshot-dir", place, "--qsens-ops", "head")
    refused(pytester, *run, "--snapshot-update", message=f"{place}* is not writable*")
    assert pytester.runpytest_inprocess(*run).ret == pytest.ExitCode.TESTS_FAILED


def test_nothing_but_the_snapshot_directory_must_be_writable(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured is recorded where home and caches are read-only, as on build machines."""
    write_model(pytester)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "/proc/none")
    run = ("--qsens-model", MODEL, "--qsens-ops", "head", "--snapshot-update")
    assert pytester.runpytest_inprocess(*run).ret == pytest.ExitCode.OK
    assert [path.name for path in snapshot_file(pytester).parent.iterdir()] == ["w8a8.json"]


def test_a_link_to_a_read_only_place(pytester: pytest.Pytester) -> None:
    """Where a snapshot is a link, it is the place it leads to that must be writable."""
    write_model(pytester)
    snapshot_file(pytester).parent.mkdir(parents=True)
    snapshot_file(pytester).symlink_to("/sys/none/w8a8.json")
    refused(pytester, "--qsens-model", MODEL, "--snapshot-update", message="/sys/none is not writable*")


def test_updating_in_ci(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """In CI snapshots are compared: updating needs an explicit option there, and others' snapshots are not ours."""
    write_model(pytester)
    monkeypatch.setenv("CI", "true")
    run = ("--qsens-model", MODEL, "--qsens-ops", "head")
    for option in ("--snapshot-update", "--snapshot-update-new-only"):
        refused(pytester, *run, option, message="CI is set to 'true'*--qsens-allow-ci-update*")
    assert pytester.runpytest_inprocess(*run).ret == pytest.ExitCode.TESTS_FAILED
    pytester.makepyfile(test_amber="def test_it(snapshot): assert 1 == snapshot")
    assert pytester.runpytest_inprocess("--snapshot-update").ret == pytest.ExitCode.OK
    assert not snapshot_file(pytester).exists()
    allowed = pytester.runpytest_inprocess(*run, "--snapshot-update", "--qsens-allow-ci-update")
    assert allowed.ret == pytest.ExitCode.OK
    assert snapshot_file(pytester).exists()


NAN = """
import torch
from pytest_qsens import ModelSpec

def spec():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    batches = [{"input": torch.ones(1, 4)}]
    return ModelSpec(model, batches, batches, output=lambda out, batch: out)
"""


@pytest.mark.parametrize(("workers", "terminal"), [("0", []), ("1", []), ("0", ["-p", "no:terminal"])])
def test_a_model_that_gives_nan(pytester: pytest.Pytester, workers: str, terminal: Sequence[str]) -> None:
    """What only running the model shows stops the whole run alike, with xdist too: once, naming the op."""
    pytester.makepyfile(bad=NAN)
    before = listing(pytester)
    result = pytester.runpytest_subprocess(
        "--qsens-model", "bad:spec", "--snapshot-update", "--qsens-json", "out.json", "-n", workers, *terminal
    )
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert result.stderr.str().count("ERROR: qsens:") == 1
    result.stderr.fnmatch_lines(["ERROR: qsens: *the output of 1 holds NaN*"])
    assert "Traceback" not in result.stdout.str()
    assert listing(pytester) == before


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_override_of_nothing(pytester: pytest.Pytester, workers: str) -> None:
    """A threshold for an op that no model of the run has would gate nothing: refused, wherever models are chosen."""
    write_model(pytester)
    pytester.makeini(
        "[pytest]\nqsens_fail_overrides =\n    *.down = nmse:9%\n    total = nmse:9%\n    *.dwon = nmse:9%"
    )
    own = (
        "import pytest\n@pytest.mark.qsens(model='net:spec')\ndef test(qsens_score, snapshot): qsens_score == snapshot"
    )
    pytester.makepyfile(test_user=own)
    message = "qsens_fail_overrides: '[*].dwon' matches neither an op of this run's models nor total (near: down*)*"
    refused(pytester, "--snapshot-update", "-n", workers, message=message)
    pytester.makeini("[pytest]\nqsens_fail_overrides = *.none = nmse:9%")
    pytester.makepyfile(test_user="def test_other(): pass")
    assert pytester.runpytest_inprocess("-n", workers).ret == pytest.ExitCode.OK  # nothing is measured


FAILS_ON_THE_WAY = """
import torch
from pytest_qsens import ModelSpec

class Net(torch.nn.Sequential):
    def _apply(self, fn, recurse=True):
        with open("tried.txt", "a") as log:
            log.write("x")
        return 1 / 0

def spec():
    batches = [{"input": torch.ones(2, 4)}]
    model = Net(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    return ModelSpec(model, batches, batches, output=lambda out, batch: out)
"""


def test_a_model_that_fails_in_an_unforeseen_way(pytester: pytest.Pytester) -> None:
    """Whatever is raised while a model is made ready ends the run once, with its type and place; no op tries again."""
    pytester.makepyfile(bad=FAILS_ON_THE_WAY)
    place = f"{pytester.path}/bad.py:8"
    message = f"the model cannot be measured: ZeroDivisionError: division by zero ({place})"
    result = pytester.runpytest_inprocess("--qsens-model", "bad:spec", "--snapshot-update")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: qsens: {message}"])
    assert (pytester.path / "tried.txt").read_text() == "x"
    assert not (pytester.path / "qsens_snapshots").exists()


def test_a_device_that_is_not_there(pytester: pytest.Pytester) -> None:
    """A device torch cannot use stops the run with its name."""
    write_model(pytester)
    refused(pytester, "--qsens-model", MODEL, "--qsens-device", "xpu:7", message="device 'xpu:7' cannot be used: *")


def test_a_replay_that_is_refused(pytester: pytest.Pytester) -> None:
    """Asking for the replay engine where the graph cannot be captured is refused; ``auto`` measures and says why."""
    pytester.makepyfile(
        branchy="""
        import torch
        from pytest_qsens import ModelSpec

        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.last = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
            def forward(self, x):
                x = self.first(x)
                return self.last(x if x.sum().item() > 0 else -x)

        def spec():
            torch.manual_seed(0)
            batches = [{"x": torch.ones(2, 4)}]
            return ModelSpec(Net(), batches, batches, output=lambda out, batch: out)
        """
    )
    refused(pytester, "--qsens-model", "branchy:spec", "--qsens-engine", "replay", message="*replay cannot be used*")
    result = pytester.runpytest_inprocess("--qsens-model", "branchy:spec", "--snapshot-update")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["*qsens: model branchy.spec, scheme w8a8, engine eager*", "slower engine eager: *"])


def test_hooks_that_an_engine_drops(pytester: pytest.Pytester) -> None:
    """An engine that would measure another model refuses, and names the hooked op; the usual one measures it."""
    pytester.makepyfile(
        hooked="""
        import torch
        from pytest_qsens import ModelSpec

        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.last = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
                self.first.register_forward_hook(lambda module, args, output: output * 2)
            def forward(self, x):
                return self.last(self.first(x))

        def spec():
            torch.manual_seed(0)
            batches = [{"x": torch.ones(2, 4)}]
            return ModelSpec(Net(), batches, batches, output=lambda out, batch: out)
        """
    )
    message = "*engine fx: torch's conversion drops the forward hooks of first, so*"
    refused(pytester, "--qsens-model", "hooked:spec", "--qsens-engine", "fx", message=message)
    pytester.runpytest_inprocess("--qsens-model", "hooked:spec", "--snapshot-update").assert_outcomes(passed=3)
