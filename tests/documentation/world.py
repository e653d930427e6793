"""The directory that the pages' commands are run in: what they take for granted, under the names that they use."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import transformers
from PIL import Image

from tests import checkpoints
from tests.plugin import harness

SENTENCES = checkpoints.SENTENCES
SIZES = {**checkpoints.TEXT_SIZES, "hidden_size": 128, "intermediate_size": 256}  # groups of 128 fit
SNAPSHOT = Path(__file__).parents[2] / "fixtures" / "snapshots" / "minilm" / "w8a8.json"

CONFIG = """schema: 1
rules:
  - {ops: "*", scheme: w8a8}
"""


def build(directory: Path) -> Path:
    """Make a project: a checkpoint, data, a package with a factory, a config."""
    directory.mkdir(parents=True)
    config = transformers.LlamaConfig(**SIZES, bos_token_id=2, eos_token_id=3, max_position_embeddings=64)
    language_model = checkpoints._seeded(transformers.LlamaForCausalLM, config)
    checkpoints.save(language_model, directory / "my-llm", checkpoints.tokenizer(pad_token=None))
    (directory / "checkpoints").mkdir()
    shutil.copytree(directory / "my-llm", directory / "checkpoints" / "my-llm")
    for name in ("calib", "eval"):
        lines = [json.dumps({"text": text}) for text in (SENTENCES if name == "calib" else reversed(SENTENCES))]
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (directory / "my_package").mkdir()
    (directory / "my_package" / "models.py").write_text(harness._SOURCE.format(spare="''"))
    for name in ("quant.yaml", "rules.yaml"):
        (directory / name).write_text(CONFIG)
    (directory / "pictures").mkdir()
    Image.new("RGB", (32, 32), "teal").save(directory / "pictures" / "street.png")
    _git(directory, "init", "-q", "-b", "main")
    return directory


def prepare(page: str, directory: Path, environment: dict[str, str]) -> None:
    """Add what one page alone takes for granted."""
    if page == "options.md":  # it clears the cache
        environment["XDG_CACHE_HOME"] = str(directory / ".cache")
    if page == "ci.md":
        arguments = ("--qsens-model", "my_package.models:spec", "--qsens-config", "quant.yaml", "--snapshot-update")
        _run(("pytest", *arguments), directory, environment)
    if page in ("diff.md", "report.md"):
        _history(directory)
        _run(("pytest", "-q", "--qsens-model", "minilm", "--qsens-json", "qsens.json"), directory, environment)
        for name in ("main.json", "branch.json"):
            shutil.copy(directory / "qsens.json", directory / name)


def environment(cache: Path) -> dict[str, str]:
    """Environment of a page's commands: this Python's scripts first, one cache for all pages, no network."""
    outside = ("CI", "GITHUB_", "PYTEST_", "NO_COLOR", "FORCE_COLOR", "QSENS_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(outside)}
    return kept | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "XDG_CACHE_HOME": str(cache),
        "PYTEST_ADDOPTS": "-p no:hypothesispytest",
        "COLUMNS": "120",
    }


def _run(command: tuple[str, ...], directory: Path, environment: dict[str, str]) -> None:
    subprocess.run(command, cwd=directory, env=environment, check=True, capture_output=True)


def _history(directory: Path) -> None:
    """Commit four states of MiniLM's snapshot, in which one op gets better and worse."""
    path = directory / "qsens_snapshots" / "minilm" / "w8a8.json"
    path.parent.mkdir(parents=True)
    (directory / ".gitignore").write_text("my-llm/\ncheckpoints/\n")
    recorded = SNAPSHOT.read_text()
    content = json.loads(recorded)
    op = next(iter(content["ops"]))
    was = content["ops"][op]["isolated"]["nmse"]
    for factor in (1.5, 2.0, 0.5, 1.0):
        path.write_text(recorded.replace(f'"nmse": {was}', f'"nmse": {was * factor:.6g}', 1))
        _git(directory, "add", ".")
        _git(directory, "commit", "-q", "-m", f"{op} times {factor}")


def _git(directory: Path, *arguments: str) -> None:
    who = ("-c", "user.name=qsens", "-c", "user.email=qsens@example.com")
    subprocess.run(("git", *who, "-C", str(directory), *arguments), check=True)
