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
from functools import cache, reduce
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    *("torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy", "pillow", "neural-compressor"),
    # transformers uses these where they are installed
    *("accelerate", "causal-conv1d", "flash-attn", "flash-linear-attention", "jinja2", "kernels", "mamba-ssm"),
    *("mistral-common", "peft", "sentencepiece", "tiktoken", "timm", "torchaudio", "torchvision", "triton"),
)
"""Whose code makes models, batches and numbers."""

_SWITCHES = re.compile(
    r"ATEN_CPU_CAPABILITY|(DNNL|ONEDNN)_(MAX_CPU_ISA|CPU_ISA_HINTS|DEFAULT_FPMATH_MODE)|MKL_(CBWR|ENABLE_INSTRUCTIONS|DEBUG_CPU_TYPE)"
    r"|OPENBLAS_CORETYPE|CUBLAS_WORKSPACE_CONFIG|NVIDIA_TF32_OVERRIDE|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"
    r"|USE_HUB_KERNELS|TRANSFORMERS_(SDPA|DISABLE)\w*"
)
"""Environment variables that choose kernels."""

_OURS = {"MKL_CBWR": "AUTO,STRICT"}
"""What is set before measuring, where the user has not set it (`pytest_qsens.threads.reproducible_sums`)."""

_PRECISIONS = {
    **dict.fromkeys(("mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn", "cuda.matmul"), "none"),
    **dict.fromkeys(("cudnn.conv", "cudnn.rnn"), "tf32"),
}
"""What fp32 products may be computed in, and what that is by default; torch before 2.9 has no such attributes."""

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
    backends = torch.backends
    found: dict[str, tuple[object, object]] = {  # as it is, as it comes
        "dtype": (str(torch.get_default_dtype()), "torch.float32"),
        "mkldnn": (bool(backends.mkldnn.enabled), True),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), False),
        "denormals": (bool(torch.tensor([1e-40], dtype=torch.float32).mul(1).item()), True),
        "flash": (backends.cuda.flash_sdp_enabled(), True),
        "mem_efficient": (backends.cuda.mem_efficient_sdp_enabled(), True),
        "math": (backends.cuda.math_sdp_enabled(), True),
        "cudnn": (backends.cuda.cudnn_sdp_enabled(), True),
    }
    for name, usual in _PRECISIONS.items():
        owner = reduce(lambda value, part: getattr(value, part, None), name.split("."), backends)
        precision = str(getattr(owner, "fp32_precision", usual))
        found[name] = "none" if precision == "ieee" and usual == "none" else precision, usual  # two names for one thing
    return {name: value for name, (value, usual) in found.items() if value != usual}
