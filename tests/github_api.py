"""As much of GitHub's REST API as our workflows ask, on a socket of this machine, for the real ``gh``.

``gh`` sends to the socket that its setting ``http_unix_socket`` names what it would send to GitHub, without TLS.
Shapes of answers: https://docs.github.com/en/rest/collaborators/collaborators, https://docs.github.com/en/rest/pulls/pulls.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

_IN_CI = bool(os.environ.get("QSENS_CI"))
"""Asked while the environment is still that of the machine."""


@dataclass
class GitHub:
    """What is asked, and what is answered: status and body by address, 404 for others, 401 without the token."""

    config: Path
    """Directory of settings, to be named by ``GH_CONFIG_DIR``: the user's are not looked at."""
    token: str
    answers: dict[str, tuple[int, Any]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    """Addresses, in order; there is nothing but GET."""

    @property
    def env(self) -> dict[str, str]:
        """What ``gh`` needs to find the socket."""
        return {
            "GH_CONFIG_DIR": str(self.config),
            "GH_HOST": "github.com",
            "GH_NO_UPDATE_NOTIFIER": "1",
            "GH_TELEMETRY": "false",
        }

    def answer(self, url: str, authorization: str | None) -> tuple[int, Any]:
        """Take down what is asked for, and answer it."""
        self.asked.append(url)
        if authorization != f"token {self.token}":
            return refusal(401, "Bad credentials")
        return self.answers.get(url, refusal(404, "Not Found"))


def refusal(status: int, message: str) -> tuple[int, dict[str, str]]:
    """Give the answer to what is not allowed or not there."""
    return status, {"message": message, "documentation_url": "https://docs.github.com/rest", "status": str(status)}


def permission(login: str, role: str) -> tuple[int, dict[str, Any]]:
    """Give what somebody may do; of roles, ``permission`` knows neither ``maintain`` nor ``triage``."""
    legacy = {"maintain": "write", "triage": "read"}.get(role, role)
    allowed = {name: legacy in names for name, names in (("admin", ("admin",)), ("push", ("admin", "write")))}
    user = {"login": login, "id": 1, "type": "User", "site_admin": False, "permissions": allowed, "role_name": role}
    return 200, {"permission": legacy, "role_name": role, "user": user}


def pull(
    base: str, head: str | None, *, number: int, state: str, commit: str, branch: str
) -> tuple[int, dict[str, Any]]:
    """Give a pull request; the repository of its branch is null when the fork is gone."""
    sides = {
        name: {
            "label": f"{(repository or 'unknown').split('/')[0]}:{ref}",
            "ref": ref,
            "sha": sha,
            "repo": repository
            and {"id": 2, "name": repository.split("/")[1], "full_name": repository, "fork": name == "head"},
        }
        for name, repository, ref, sha in (("head", head, branch, commit), ("base", base, "main", "f" * 40))
    }
    return 200, {"number": number, "state": state, "locked": False, "title": "A change", "draft": False, **sides}


@contextmanager
def github(token: str) -> Iterator[GitHub]:
    """Answer ``gh`` until the end; without the program the test is skipped, but in CI."""
    if shutil.which("gh") is None:
        (pytest.fail if _IN_CI else pytest.skip)("there is no gh: apt-get install gh")
    with tempfile.TemporaryDirectory(prefix="qsens-") as place:  # not pytest's directory: paths of sockets are short
        found = GitHub(Path(place, "config"), token)
        found.config.mkdir()
        socket = Path(place, "socket")
        (found.config / "config.yml").write_text(f"http_unix_socket: {socket}\n")
        with _Server(str(socket), _handler(found)) as server:
            Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            yield found
            server.shutdown()


class _Server(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True


def _handler(github: GitHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = f"https://{self.headers['Host']}{self.path}"
            status, content = github.answer(url, self.headers["Authorization"])
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing on standard error."""

    return Handler
