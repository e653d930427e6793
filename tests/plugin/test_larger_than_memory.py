"""A checkpoint that is larger than the memory a run may take: read as needed, and the same scores."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from transformers import LlamaConfig

from pytest_qsens.models import standin
from tests.checkpoints import VOCABULARY, tokenizer

if TYPE_CHECKING:
    from pathlib import Path

LIMIT = 1_100_000
"""KB a process may have of its own; what it maps of a file to read it is not counted, and a full machine drops it."""

OPS = ("--qsens-ops=model.layers.0.*", "--qsens-ops=model.layers.23.*", "--qsens-ops=lm_head")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a text model of 1.6 GB in bf16."""
    source = tmp_path_factory.mktemp("config")
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=1536,
        intermediate_size=5120,
        num_hidden_layers=24,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=64,
    ).save_pretrained(source)
    tokenizer().save_pretrained(source)
    (source / "data.jsonl").write_text('{"text": "the quick brown fox"}\n')
    directory = tmp_path_factory.mktemp("checkpoint") / "model"
    standin.write(str(source), directory)
    assert sum(file.stat().st_size for file in directory.glob("*.safetensors")) > 1400 * LIMIT
    return directory


def run(checkpoint: Path, directory: Path, limit: str, *options: str) -> tuple[int, str, dict[str, Any]]:
    """Measure a few ops in a process that may take so many bytes; returns exit code, output and the ops' results."""
    data = checkpoint.parent.parent / "config0" / "data.jsonl"
    directory.mkdir()
    arguments = [
        *(f"--rootdir={directory}", f"--qsens-model={checkpoint}", f"--qsens-calib={data}", f"--qsens-eval={data}"),
        *("--qsens-json=result.json", "--qsens-no-cache", "--qsens-memory=100MB", "--snapshot-update", *OPS, *options),
    ]
    ended = subprocess.run(
        [
            *("sh", "-c", f'ulimit -d {limit} && exec "$@"', "limited"),
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments),
        ],
        cwd=directory,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    result = directory / "result.json"
    ops = {op["op"]: op["isolated"] for op in json.loads(result.read_text())["ops"]} if result.exists() else {}
    return ended.returncode, ended.stdout + ended.stderr, ops


def test_scores_are_those_of_a_large_machine(checkpoint: Path, tmp_path: Path) -> None:
    """No digit differs, whether the weights would fit or not."""
    code, output, expected = run(checkpoint, tmp_path / "large", "unlimited")
    assert code == 0, output
    code, output, found = run(checkpoint, tmp_path / "small", str(LIMIT))
    assert code == 0, output
    assert found == expected
    assert len(found) == 2 * 7 + 1


def test_the_limit_is_one(checkpoint: Path, tmp_path: Path) -> None:
    """What needs all weights at once does not run in so little memory: an engine that has them in fp32."""
    code, output, _ = run(checkpoint, tmp_path / "wide", str(LIMIT), "--qsens-engine=fx")
    assert code != 0
    assert re.search("memory", output, re.IGNORECASE), output
