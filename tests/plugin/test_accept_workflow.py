"""The workflow that accepts scores in CI: a dry run of its scripts with a repository and a remote of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.plugin.harness import LABEL, MODEL, snapshot_ops, write_model
from tests.workflows import ACCEPT, parsed, run, step

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SNAPSHOTS = "qsens_snapshots"
SNAPSHOT = {"schema": 1, "model": "m", "scheme": "w8a8", "environment": {}, "ops": {}}
ENV = {"QSENS_ARGS": f"--qsens-model {MODEL} -n 0", "QSENS_SNAPSHOTS": SNAPSHOTS}


def git(directory: Path, *args: str) -> str:
    """Run git, and return what it prints."""
    settings = ("-c", "user.name=me", "-c", "user.email=me@example.com", "-c", "init.defaultBranch=main")
    command = ["git", "-C", str(directory), *settings, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


class Dry:
    """A repository with a pull request's branch, its remote, and a checkout as a job gets it."""

    def __init__(self, directory: Path) -> None:
        self.remote, self.checkout = directory / "remote.git", directory / "checkout"
        self.artifact = directory / "runner temp" / "qsens-snapshots"
        work = directory / "work"
        work.mkdir()
        git(directory, "init", "--quiet", "--bare", str(self.remote))
        git(work, "init", "--quiet")
        self.work = work

    def push(self) -> str:
        """Commit everything to the branch of the pull request, and check it out as the workflow does."""
        git(self.work, "add", "-A")
        git(self.work, "commit", "--quiet", "-m", "Work")
        git(self.work, "push", "--quiet", str(self.remote), "HEAD:refs/heads/topic/x")
        commit = git(self.work, "rev-parse", "HEAD")
        shutil.rmtree(self.checkout, ignore_errors=True)
        git(self.work, "clone", "--quiet", "--no-checkout", str(self.remote), str(self.checkout))
        git(self.checkout, "checkout", "--quiet", "--detach", commit)
        return commit

    @property
    def head(self) -> str:
        """What the branch has."""
        return git(self.remote, "rev-parse", "refs/heads/topic/x")

    def commit(self) -> subprocess.CompletedProcess[str]:
        """Run the script of the job that may write."""
        context = {
            "github.event.sender.login": "octo-cat",
            "needs.authorize.outputs.branch": "topic/x",
            "runner.temp": str(self.artifact.parent),
        }
        return run(step(ACCEPT, "Commit"), context, self.checkout, env=ENV)

    def measured(self, name: str = "m/w8a8.json", text: str = json.dumps(SNAPSHOT)) -> Path:
        """Put a file into the artifact."""
        path = self.artifact / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path


@pytest.fixture
def dry(tmp_path: Path) -> Dry:
    """Make a repository whose branch has one file and one snapshot."""
    made = Dry(tmp_path)
    (made.work / "code.py").write_text("1\n")
    snapshot = made.work / SNAPSHOTS / "m" / "w8a8.json"
    snapshot.parent.mkdir(parents=True)
    snapshot.write_text(json.dumps(SNAPSHOT | {"environment": {"torch": "1"}}))
    made.push()
    return made


def test_a_dry_run(pytester: pytest.Pytester) -> None:
    """Measured in one checkout, committed from another one: the branch gets one commit, with the snapshot alone."""
    made = Dry(pytester.path)
    write_model(pytester)
    shutil.move(pytester.path / "net.py", made.work / "net.py")
    before = made.push()
    measured = run(step(ACCEPT, "Measure"), {}, made.checkout, env=ENV)
    assert measured.returncode == 0, measured.stdout + measured.stderr
    shutil.copytree(made.checkout / SNAPSHOTS, made.artifact)  # what upload and download of the artifact do
    git(made.checkout, "clean", "-fdxq")
    committed = made.commit()
    assert committed.returncode == 0, committed.stdout + committed.stderr
    assert git(made.remote, "rev-parse", "topic/x~1") == before
    assert git(made.remote, "diff", "--name-status", before, "topic/x") == f"A\t{SNAPSHOTS}/{LABEL}/w8a8.json"
    text = git(made.remote, "show", f"topic/x:{SNAPSHOTS}/{LABEL}/w8a8.json")
    assert len(json.loads(text)["ops"]) == 8
    assert "octo-cat" in git(made.remote, "log", "-1", "--format=%B", "topic/x")
    again = made.commit()
    assert again.returncode == 0
    assert "have these scores already" in again.stdout


def test_arguments_are_quoted_as_for_a_shell(pytester: pytest.Pytester) -> None:
    """`-k 'a or b'` is one argument, nothing is expanded, and a quote that is never closed is an error."""
    write_model(pytester)
    for arguments, code in (("-k 'head or embed' --tb=no", 0), ("-k '$(touch pwned)'", 4), ("-k 'head", 1)):
        env = ENV | {"QSENS_ARGS": f"--qsens-model {MODEL} -n 0 {arguments}"}
        found = run(step(ACCEPT, "Measure"), {}, pytester.path, env=env)
        assert found.returncode == code, found.stdout + found.stderr
        assert list(snapshot_ops(pytester)) == ["embed", "head"]
    assert not (pytester.path / "pwned").exists()


def test_other_files_beside_the_snapshots(dry: Dry) -> None:
    """A README that the branch has comes along with the artifact and stays what it is; another one is refused."""
    (dry.work / SNAPSHOTS / "README.md").write_text("Scores\n")
    dry.push()
    dry.measured()
    dry.measured("README.md", "Scores\n")
    before = dry.head
    found = dry.commit()
    assert found.returncode == 0, found.stdout + found.stderr
    assert git(dry.remote, "diff", "--name-only", before, "topic/x") == f"{SNAPSHOTS}/m/w8a8.json"
    dry.measured("README.md", "Other\n")
    found = dry.commit()
    assert found.returncode == 1
    assert "no snapshot file: 'README.md'" in found.stdout


def test_an_op_past_a_limit_is_not_accepted(pytester: pytest.Pytester) -> None:
    """Limits hold whatever is measured: the job that measures fails, and so nothing is handed over."""
    write_model(pytester)
    env = ENV | {"QSENS_ARGS": f"--qsens-model {MODEL} -n 0 --qsens-fail 'nmse:5%,nmse<=1e-12'"}
    found = run(step(ACCEPT, "Measure"), {}, pytester.path, env=env)
    assert found.returncode == 1
    assert "past the limit" in found.stdout


def test_only_what_was_measured_is_committed(dry: Dry) -> None:
    """A changed snapshot arrives on the branch, and what else is in the checkout does not come with it."""
    dry.measured()
    dry.measured("other/w4a16_g128-block.json")
    before = dry.head
    found = dry.commit()
    assert found.returncode == 0, found.stdout + found.stderr
    changed = git(dry.remote, "diff", "--name-only", before, "topic/x").split("\n")
    assert changed == [f"{SNAPSHOTS}/m/w8a8.json", f"{SNAPSHOTS}/other/w4a16_g128-block.json"]


def _a_workflow(dry: Dry) -> None:
    dry.measured("../qsens-snapshots/.github/workflows/ci.yml", "on: push")


def _a_script(dry: Dry) -> None:
    dry.measured("m/setup.py", "import os")


def _too_deep(dry: Dry) -> None:
    dry.measured("m/n/w8a8.json")


def _no_json(dry: Dry) -> None:
    dry.measured(text="on: push")


def _other_json(dry: Dry) -> None:
    dry.measured(text='{"scripts": {"test": "true"}}')


def _a_list(dry: Dry) -> None:
    dry.measured(text="[]")


def _a_link(dry: Dry) -> None:
    (dry.measured().parent / "w4a8.json").symlink_to("/etc/passwd")


def _a_linked_directory(dry: Dry) -> None:
    dry.measured()
    (dry.artifact / "linked").symlink_to(dry.checkout / ".git")


def _a_hidden_file(dry: Dry) -> None:
    dry.measured("m/.w8a8.json")


def _a_newline(dry: Dry) -> None:
    dry.measured("m/x\n::warning::y.json")


def _a_pipe(dry: Dry) -> None:
    os.mkfifo(dry.measured().parent / "w4a8.json")


def _a_link_in_the_branch(dry: Dry) -> None:
    shutil.rmtree(dry.work / SNAPSHOTS / "m")
    (dry.work / ".github").mkdir()
    (dry.work / ".github" / "file").write_text("")
    (dry.work / SNAPSHOTS / "m").symlink_to("../.github")
    dry.push()
    dry.measured()


def _snapshots_are_a_link(dry: Dry) -> None:
    shutil.rmtree(dry.work / SNAPSHOTS)
    (dry.work / SNAPSHOTS).symlink_to(".")
    dry.push()
    dry.measured()


def _other_changes(dry: Dry) -> None:
    dry.measured()
    (dry.checkout / "code.py").write_text("2\n")


def _other_files(dry: Dry) -> None:
    dry.measured()
    (dry.checkout / "new.py").write_text("2\n")


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (_a_workflow, "no snapshot file: '.github/workflows/ci.yml'"),
        (_a_script, "no snapshot file: 'm/setup.py'"),
        (_too_deep, "no snapshot file: 'm/n/w8a8.json'"),
        (_no_json, "no snapshot in it: m/w8a8.json"),
        (_other_json, "no snapshot in it: m/w8a8.json"),
        (_a_list, "no snapshot in it: m/w8a8.json"),
        (_a_link, "no plain file: m/w4a8.json"),
        (_a_linked_directory, "no snapshot file: 'linked'"),
        (_a_hidden_file, "no snapshot file: 'm/.w8a8.json'"),
        (_a_newline, "no snapshot file: $'m/x\\n::warning::y.json'"),
        (_a_pipe, "no plain file: m/w4a8.json"),
        (_a_link_in_the_branch, "a link: qsens_snapshots/m"),
        (_snapshots_are_a_link, "a link: qsens_snapshots"),
        (_other_changes, "other files changed:  M code.py"),
        (_other_files, "other files changed: ?? new.py"),
    ],
)
def test_tampering_is_refused(dry: Dry, tamper: Callable[[Dry], None], message: str) -> None:
    """Code of a pull request may have written anything into the artifact: nothing but snapshots is committed."""
    tamper(dry)
    before = dry.head
    found = dry.commit()
    assert found.returncode != 0
    assert dry.head == before
    (line,) = [line for line in found.stdout.splitlines() if line.startswith("::")]
    assert line == f"::error title=qsens accept::{message}"


def test_code_of_the_branch_is_not_run(dry: Dry) -> None:
    """Modules, hooks and filters that a branch brings along stay files."""
    for name in ("json.py", "sys.py", "sitecustomize.py", "encodings.py"):
        (dry.work / name).write_text("open('pwned', 'w')\n")
    (dry.work / ".gitattributes").write_text("* filter=evil diff=evil\n")
    (dry.work / ".gitconfig").write_text('[filter "evil"]\n  clean = touch pwned\n')
    for name in ("git", "find", "cp", "python3"):
        (dry.work / name).write_text("#!/bin/sh\ntouch pwned\n")
        (dry.work / name).chmod(0o755)
    dry.push()
    dry.measured()
    before = dry.head
    found = dry.commit()
    assert found.returncode == 0, found.stdout + found.stderr
    assert dry.head != before
    assert not (dry.checkout / "pwned").exists()


def test_a_branch_that_has_moved_on(dry: Dry) -> None:
    """What was pushed meanwhile was not measured, and is not overwritten."""
    dry.measured()
    (dry.work / "code.py").write_text("2\n")
    git(dry.work, "commit", "--quiet", "-am", "More")
    git(dry.work, "push", "--quiet", str(dry.remote), "HEAD:refs/heads/topic/x")
    head = dry.head
    found = dry.commit()
    assert found.returncode == 1
    assert "[rejected]" in found.stderr
    assert dry.head == head


def test_jobs_are_apart() -> None:
    """Code of the pull request runs where nothing may be written, and the job that may write has no other steps."""
    jobs = parsed(ACCEPT)["jobs"]
    assert jobs["measure"]["permissions"] == {"contents": "read"}
    assert jobs["measure"]["steps"][0]["with"]["persist-credentials"] is False
    assert [step.get("name", step.get("uses", "").split("@")[0]) for step in jobs["commit"]["steps"]] == [
        "actions/checkout",
        "actions/download-artifact",
        "Commit",
    ]
    assert not any("secrets" in str(job) or "actions/cache" in str(job) for job in jobs.values())
