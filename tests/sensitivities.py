"""Small sensitivity files: ours, and of the shapes that other tools write."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pytest_qsens.result_files import write
from pytest_qsens.results import Cost, OpResult, RunInfo, RunResult

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

VISION = [f"visual.blocks.{block}.attn.{name}" for block in range(3) for name in ("qkv", "proj")]
LANGUAGE = [
    f"language_model.layers.{layer}.{name}" for layer in range(3) for name in ("self_attn.q_proj", "mlp.gate_proj")
]


def write_json(path: Path, document: object) -> Path:
    """Write any JSON."""
    path.write_text(json.dumps(document))
    return path


def model_opt(path: Path, values: Mapping[str, Any], **more: object) -> Path:
    """Write what AutoQuantize of ModelOpt measured, as people save it."""
    layers = [
        {"layer": name, "num_bits": 8.0, "sensitivity": value, "size_cost": 1024.0} for name, value in values.items()
    ]
    return write_json(
        path, {"model": {"id": "Tiny-VL"}, "scheme": {"name": "int8"}, "layer_sensitivity": layers, **more}
    )


def text_only(path: Path) -> Path:
    """Write what ModelOpt measured with text alone: the vision tower never ran, and every layer of it has 0.0."""
    language = {name: 0.5 / (index + 1) for index, name in enumerate(LANGUAGE)}
    return model_opt(path, language | dict.fromkeys(VISION, 0.0))


def neural_compressor(path: Path, fallback: Mapping[str, Any] | None, requant: Mapping[str, Any] | None = None) -> Path:
    """Write what MSE_V2 of Intel Neural Compressor measured; a table that is None is not in the file."""
    tables = {"fp32_fallback_sensitivity": fallback, "int8_requant_sensitivity": requant}
    return write_json(
        path,
        {
            key: [{"op_name": name, "op_type": "Linear", "mse": value} for name, value in table.items()]
            for key, table in tables.items()
            if table is not None
        },
    )


def results(path: Path, ops: Sequence[OpResult], mode: str = "both") -> Path:
    """Write a result file of ours."""
    write(path, RunResult(RunInfo("tiny", "w8a8", "replay", mode, {}, Cost(1.0)), tuple(ops)))
    return path


def measured(name: str, nmse: float, fallback: float | None = None, **more: float | None) -> OpResult:
    """Give an op with an isolated score, and one of the other mode if that is given."""
    other = None if fallback is None else {"nmse": fallback, "sse": 100 * fallback, "gain": 1 - fallback}
    return OpResult(name, "linear", name, "measured", None, {"nmse": nmse, "sse": 100 * nmse, **more}, other)
