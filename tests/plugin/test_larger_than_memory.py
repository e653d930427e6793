"""A checkpoint that is larger than the memory a run may take: its weights are read as needed, and no digit differs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from transformers import LlamaConfig

from pytest_qsens.models import standin
from tests.checkpoints import VOCABULARY, tokenizer
from tests.control_groups import forget, little_memory

if TYPE_CHECKING:
    from pathlib import Path

    from tests.control_groups import Group

LIMIT = 800_000_000
"""Bytes that a run may take; half of them it needs for libraries, values and one layer that is quantized."""

OPS = ("--qsens-ops=model.layers.0.*", "--qsens-ops=model.layers.23.*", "--qsens-ops=lm_head")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a text model of twice the limit, and data for it."""
    directory = tmp_path_factory.mktemp("large")
    source = directory / "config"
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=1536,
        intermediate_size=5120,
        num_hidden_layers=24,
        num_attention_heads=12,
        max_position_embeddings=64,
    )
    config.save_pretrained(source)
    tokenizer().save_pretrained(source)
    (directory / "data.jsonl").write_text('{"text": "the quick brown fox"}\n')
    standin.write(str(source), directory / "model")
    assert sum(file.stat().st_size for file in (directory / "model").glob("*.safetensors")) > 1.9 * LIMIT
    return directory / "model"


def measure(checkpoint: Path, directory: Path, group: Group | None = None) -> dict[str, Any]:
    """Measure some ops, in a control group if one is given; returns their scores."""
    directory.mkdir()
    data = checkpoint.parent / "data.jsonl"
    enter = () if group is None else group.entry
    arguments = [
        *("-q", "-p", "no:cacheprovider", f"--rootdir={directory}", f"--qsens-model={checkpoint}", *OPS),
        *(f"--qsens-calib={data}", f"--qsens-eval={data}", "--qsens-memory=100MB", "--qsens-no-cache"),
        *("--snapshot-update", "--qsens-json=result.json"),
    ]
    ended = subprocess.run(
        [*enter, sys.executable, "-m", "pytest", *arguments],
        cwd=directory,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    ops = json.loads((directory / "result.json").read_text())["ops"]
    return {op["op"]: op["isolated"] for op in ops if op["status"] == "measured"}


def test_scores_are_those_of_a_large_machine(checkpoint: Path, tmp_path: Path) -> None:
    """The run that has too little memory drops weights and reads them again, and is not killed."""
    expected = measure(checkpoint, tmp_path / "large")
    assert len(expected) == 2 * 7 + 1
    forget(checkpoint)
    try:
        with little_memory(LIMIT) as group:
            found = measure(checkpoint, tmp_path / "small", group)
            assert group.kills() == 0
            assert group.reclaimed()
    except PermissionError as error:
        pytest.skip(f"no control group can be made on this machine: {error}")
    assert found == expected
