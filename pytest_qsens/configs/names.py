"""Names of the formats, for the command line: importing their readers takes longer."""

from __future__ import annotations

FORMATS = (
    "qsens",
    "neural-compressor",
    "torchao",
    "compressed-tensors",
    "llm-compressor",
    "modelopt",
    "onnxruntime",
)

WRITTEN = ("qsens",)
"""Kinds of files that are written, as in ``--to``: some formats have several."""
