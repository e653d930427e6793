"""Who may accept, and what can be committed to: the workflow's script asks GitHub's API with the real ``gh``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.github_api import GitHub, github, permission, pull, refusal
from tests.workflows import ACCEPT, run, step

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

REPOSITORY = "owner/name"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
API = f"https://api.github.com/repos/{REPOSITORY}"
PERMISSION = f"{API}/collaborators/octo-cat/permission"
PULL = f"{API}/pulls/7"


@pytest.fixture
def api() -> Iterator[GitHub]:
    """Answer as GitHub does for a pull request of a branch of the repository, and somebody who may write."""
    with github("secret") as found:
        found.answers[PERMISSION] = permission("octo-cat", "write")
        found.answers[PULL] = pulled()
        yield found


def pulled(*, head: str | None = REPOSITORY, state: str = "open") -> tuple[int, dict[str, object]]:
    """Give the pull request."""
    return pull(REPOSITORY, head, number=7, state=state, commit=COMMIT, branch="topic/x")


def authorize(api: GitHub, directory: Path, *, token: str = "secret") -> tuple[subprocess.CompletedProcess[str], str]:
    """Run the script; returns how it ended and its outputs."""
    output = directory / "output"
    output.touch()
    context = {
        "github.event.sender.login": "octo-cat",
        "github.repository": REPOSITORY,
        "github.token": token,
        "github.event.issue.number || github.event.pull_request.number": "7",
    }
    outside = {"GITHUB_OUTPUT": str(output), "HOME": str(directory), **api.env}
    return run(step(ACCEPT, "Find the commit"), context, directory, env=outside), output.read_text()


def errors(found: subprocess.CompletedProcess[str]) -> list[str]:
    """Annotations that GitHub makes of what was printed."""
    return re.findall(r"^::error title=qsens accept::(.+)$", found.stdout, re.MULTILINE)


@pytest.mark.parametrize("role", ["admin", "maintain", "write"])
def test_who_may_write_may_accept(api: GitHub, tmp_path: Path, role: str) -> None:
    """The commit is settled once, before anything is measured; nothing else is asked, and nothing written."""
    api.answers[PERMISSION] = permission("octo-cat", role)
    found, output = authorize(api, tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr
    assert output == f"commit={COMMIT}\nbranch=topic/x\n"
    assert api.asked == [PERMISSION, PULL]
    assert errors(found) == []


@pytest.mark.parametrize("role", ["triage", "read", "none"])
def test_others_may_not(api: GitHub, tmp_path: Path, role: str) -> None:
    """Whoever may not write is refused before anything else is asked."""
    api.answers[PERMISSION] = permission("octo-cat", role)
    found, output = authorize(api, tmp_path)
    assert found.returncode == 1
    assert output == ""
    assert errors(found) == ["octo-cat may not write to owner/name"]
    assert len(api.asked) == 1


@pytest.mark.parametrize("pulled", [pulled(head="fork/name"), pulled(head=None), pulled(state="closed")])
def test_what_cannot_be_committed_to(api: GitHub, tmp_path: Path, pulled: tuple[int, dict[str, object]]) -> None:
    """A branch of a fork, of a fork that is gone, or of a pull request that is closed or merged."""
    api.answers[PULL] = pulled
    found, output = authorize(api, tmp_path)
    assert found.returncode == 1
    assert output == ""
    assert errors(found) == ["only branches of owner/name with an open pull request can be committed to"]


@pytest.mark.parametrize("path", [PERMISSION, PULL])
@pytest.mark.parametrize(
    "answer",
    [refusal(404, "Not Found"), refusal(403, "Resource not accessible by integration"), refusal(502, "Server Error")],
)
def test_an_answer_that_is_none(api: GitHub, tmp_path: Path, path: str, answer: tuple[int, object]) -> None:
    """Errors allow nothing, although ``gh`` prints their text as it prints answers; what GitHub says is to be seen."""
    api.answers[path] = answer
    found, output = authorize(api, tmp_path)
    assert found.returncode == 1
    assert output == ""
    (error,) = errors(found)
    assert "GitHub does not tell" in error
    assert f"HTTP {answer[0]}" in found.stderr


def test_a_token_that_is_none(api: GitHub, tmp_path: Path) -> None:
    """The token is what the workflow has, and without a good one nothing is allowed."""
    found, output = authorize(api, tmp_path, token="expired")
    assert (found.returncode, output) == (1, "")
    assert "Bad credentials" in found.stderr
