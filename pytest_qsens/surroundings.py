"""What moves numbers beside the model and the data, told without importing torch: code, libraries, processor, switches.

Two processes of equal surroundings are taken to measure the same. So everything counts that might matter; something
too many costs time after a change of it, something too few gives wrong numbers.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    *("torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy", "pillow", "neural-compressor"),
    # transformers uses these where they are installed
    *("accelerate", "causal-conv1d", "flash-attn", "flash-linear-attention", "kernels", "mamba-ssm", "peft"),
    *("sentencepiece", "tiktoken", "torchaudio", "torchvision", "triton"),
)
"""Whose code makes models, batches and numbers."""

_SWITCHES = re.compile(
    r"ATEN_CPU_CAPABILITY|(DNNL|ONEDNN)_(MAX_CPU_ISA|DEFAULT_FPMATH_MODE)|MKL_(CBWR|ENABLE_INSTRUCTIONS|DEBUG_CPU_TYPE)"
    r"|CUBLAS_WORKSPACE_CONFIG|NVIDIA_TF32_OVERRIDE|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"
    r"|USE_HUB_KERNELS|TRANSFORMERS_(SDPA|DISABLE)\w*"
)
"""Environment variables that choose kernels."""

_OURS = {"MKL_CBWR": "AUTO,STRICT"}
"""What is set before measuring, where the user has not set it (`pytest_qsens.threads.reproducible_sums`)."""

_PROCESSOR = re.compile(
    r"(vendor_id|cpu family|model|stepping|flags|Features|CPU implementer|CPU variant|CPU part)\s*:"
)


def surroundings() -> dict[str, object]:
    """Everything of this process, in builtin values."""
    return {
        "code": code(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "machine": platform.machine(),
        "processor": processor(),
        "switches": _OURS | {name: value for name, value in os.environ.items() if _SWITCHES.fullmatch(name)},
        "torch": _settings(),
    }


@cache
def code() -> str:
    """Hash of this package's own code: its version stays the same while somebody works on it."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@cache
def processor() -> str:
    """Hash of what the processor can do: libraries choose their kernels by it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = platform.processor()
    else:
        first = text.strip().partition("\n\n")[0]
        text = "\n".join(line for line in first.splitlines() if _PROCESSOR.match(line))
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _settings() -> dict[str, object]:
    """Torch's switches that somebody has turned; before its import nobody can have."""
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    usual = {"dtype": "torch.float32", "precision": "highest", "mkldnn": True, "deterministic": False}
    found = {
        "dtype": str(torch.get_default_dtype()),
        "precision": torch.get_float32_matmul_precision(),
        "mkldnn": bool(torch.backends.mkldnn.enabled),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    return {name: value for name, value in found.items() if value != usual[name]}
