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

WRITTEN = (
    "qsens",
    "neural-compressor",
    "neural-compressor-best-configure",
    "neural-compressor-qconfig",
    "torchao",
    "compressed-tensors",
    "llm-compressor",
    "modelopt",
    "modelopt-quant-cfg",
    "modelopt-disabled-layers",
    "onnxruntime",
)
"""Kinds of files that are written, as in ``--to``: some formats have several."""
