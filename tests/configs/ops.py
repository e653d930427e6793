"""Ops of small models, and what a config says about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qsens.configs.decisions import decide, scheme_name
from pytest_qsens.configs.read import read_config
from pytest_qsens.ops import Op

if TYPE_CHECKING:
    from collections.abc import Sequence

FILES = Path(__file__).parent / "files"

NET = (Op("embed", "embedding"), Op("fc1", "linear"), Op("fc2", "linear"), Op("lm_head", "linear"))

_LAYER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_LAYER += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LLAMA = (
    Op("model.embed_tokens", "embedding"),
    *(Op(f"model.layers.{layer}.{name}", "linear") for layer in range(2) for name in _LAYER),
    Op("lm_head", "linear"),
)


def says(path: Path, ops: Sequence[Op] = LLAMA, name: str | None = None) -> dict[str, str]:
    """Op → name of its scheme."""
    decisions, _ = decide(read_config(path, name), ops)
    return {decision.op.name: scheme_name(decision.scheme) for decision in decisions}


def complaints(path: Path, ops: Sequence[Op] = LLAMA, name: str | None = None) -> list[str]:
    """Everything that is wrong, without the path."""
    config = read_config(path, name)
    return [str(problem).removeprefix(f"{path}, ").removeprefix(f"{path}: ") for problem in decide(config, ops)[1]]


def write(path: Path, value: object) -> Path:
    """Write JSON, or text as it is."""
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path
