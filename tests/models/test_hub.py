"""``hub:org/name`` and the 3B preset without a checkpoint: the cache, the hub, or a clear error.

The hub is a small server on this machine that speaks as much of its protocol as the real client asks for. The client
reads its settings once, when imported, hence the subprocesses.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from tests.checkpoints import bert

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"

SCRIPT = """
import sys
from pytest_qsens import QsensError
from pytest_qsens.models.resolve import resolve
from pytest_qsens.models.source import ModelRequest
model, *steps = sys.argv[1:]
source = resolve(ModelRequest(model))
try:
    for step in steps:
        result = getattr(source, step)()
        print(step, sum(p.numel() for p in result.model.parameters()) if step == "load" else "done")
    if "load" not in steps and "skeleton" not in steps:
        print("torch" in sys.modules)
except QsensError as error:
    print("QsensError:", error)
"""


class Hub(BaseHTTPRequestHandler):
    """One repository, ``org/name``, made of the files in ``directory``."""

    directory: ClassVar[Path]
    requests: ClassVar[list[str]]

    def do_HEAD(self) -> None:
        """Describe a file."""
        self._answer(body=False)

    def do_GET(self) -> None:
        """Send a file or what the API knows about the repository."""
        self._answer(body=True)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name the base class has
        """Keep what was asked for."""

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.requests.append(f"{self.command} {path}")
        files = {file.name: file for file in self.directory.iterdir()}
        if path in ("/api/models/org/name", "/api/models/org/name/revision/main"):
            siblings = [{"rfilename": name} for name in files]
            self._send({"id": "org/name", "sha": COMMIT, "siblings": siblings}, body=body)
        elif path.startswith("/api/models/org/name/tree/"):
            entries = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": _etag(file)}
                for name, file in files.items()
            ]
            self._send(entries, body=body)
        elif path.startswith("/org/name/resolve/") and (file := files.get(path.rpartition("/")[2])):
            self._send(file, body=body)
        else:
            self._send({"error": "not found"}, body=body, status=404)

    def _send(self, content: Any, *, body: bool, status: int = 200) -> None:  # noqa: ANN401 - a file or JSON
        data = json.dumps(content).encode() if isinstance(content, (dict, list)) else content.read_bytes()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        elif not isinstance(content, (dict, list)):
            self.send_header("ETag", f'"{_etag(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """Serve a BERT checkpoint; the value is the hub's address."""
    Hub.directory, Hub.requests = bert(tmp_path / "repository"), []
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def run(cache: Path, endpoint: str, model: str, *steps: str, **environment: str) -> str:
    """Take ``steps`` with a model in a process of its own; return what it prints."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", **environment}
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, model, *steps],
        check=True,
        capture_output=True,
        text=True,
        env={**clean, "NO_PROXY": "127.0.0.1", **settings},
        timeout=120,
    )
    return done.stdout


def test_check_downloads_the_config_only_and_load_the_rest(hub: str, tmp_path: Path) -> None:
    """Looking at a model costs a few kilobytes; after loading it the hub is not asked again, nor needed."""
    cache = tmp_path / "cache"
    assert run(cache, hub, "hub:org/name", "check", "fingerprint", "data_fingerprint") == (
        "check done\nfingerprint done\ndata_fingerprint done\nFalse\n"
    )
    assert not [request for request in Hub.requests if "safetensors" in request]
    loaded = run(cache, hub, "hub:org/name", "check", "skeleton", "load")
    assert loaded.startswith("check done\nskeleton done\nload ")
    Hub.requests.clear()
    assert run(cache, hub, "hub:org/name", "check", "skeleton", "load") == loaded
    assert Hub.requests == []
    assert run(cache, "http://127.0.0.1:9", "hub:org/name", "check", "load", HF_HUB_OFFLINE="1").endswith(
        loaded.splitlines()[-1] + "\n"
    )


def test_a_repository_without_loadable_weights(hub: str, tmp_path: Path) -> None:
    """Pickled-only repositories are refused by their file list, before any download."""
    (Hub.directory / "model.safetensors").rename(Hub.directory / "pytorch_model.bin")
    printed = run(tmp_path / "cache", hub, "hub:org/name", "check")
    assert printed.startswith(f"QsensError: {hub}/org/name has pickled weights only (pytorch_model.bin).")
    assert not [request for request in Hub.requests if "resolve" in request]


def test_an_unknown_architecture_on_the_hub(hub: str, tmp_path: Path) -> None:
    """Found from the config, before the weights are downloaded."""
    config = json.loads((Hub.directory / "config.json").read_text())
    (Hub.directory / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    assert "no architecture 'NoSuchModel'" in run(tmp_path / "cache", hub, "hub:org/name", "check")
    assert not [request for request in Hub.requests if "safetensors" in request]


def test_a_repository_that_does_not_exist(hub: str, tmp_path: Path) -> None:
    """The places looked at are named, with what the hub said."""
    printed = run(tmp_path / "cache", hub, "hub:org/other", "check")
    assert printed.startswith("QsensError: cannot find hub:org/other. Looked at: the Hugging Face cache ")
    assert f"{tmp_path / 'cache'}" in printed
    assert f"{hub}/org/other (RepositoryNotFoundError" in printed
    assert "hf download org/other --local-dir DIR" in printed


@pytest.mark.parametrize("offline", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_the_3b_preset_without_checkpoint_or_hub(offline: dict[str, str], tmp_path: Path) -> None:
    """The message names every place looked at and the commands that help, at once and not after retries."""
    printed = run(tmp_path / "cache", "http://127.0.0.1:9", "qwen2_5_vl_3b", "check", **offline)
    for part in (
        "QsensError: no checkpoint for the model 'qwen2_5_vl_3b'. Looked at: --qsens-checkpoint and the ini option",
        "qsens_checkpoint (not given)",
        f"the Hugging Face cache {tmp_path / 'cache' / 'hub'}",
        "http://127.0.0.1:9/Qwen/Qwen2.5-VL-3B-Instruct (",
        "`hf download Qwen/Qwen2.5-VL-3B-Instruct --local-dir DIR`",
        "`--qsens-checkpoint DIR`",
        "`qsens_checkpoint = DIR`",
    ):
        assert part in printed


def test_a_config_left_in_the_cache_is_no_checkpoint(hub: str, tmp_path: Path) -> None:
    """What an earlier check left behind must not pass for the model when the hub is gone."""
    cache = tmp_path / "cache"
    run(cache, hub, "hub:org/name", "check")
    printed = run(cache, hub, "hub:org/name", "check", HF_HUB_OFFLINE="1")
    assert "(not there, or without weights)" in printed
