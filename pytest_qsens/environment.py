"""What scores depend on beside model, data and schemes: the machine and the packages."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path


def _cpu_vendor() -> str:
    """Vendor of the CPU: libraries choose other kernels for each, of the same instruction set."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def environment(device: str, engine: str) -> dict[str, str]:
    """Collect what moves scores in their last digits between machines. No host name, time or thread count."""
    import torch

    kind = torch.device(device).type
    kernels = {}  # the other engines simulate them, the same everywhere
    if engine == "fx":
        kernels["kernels"] = f"torch {torch.backends.quantized.engine}"
    elif engine == "inc":
        kernels["kernels"] = f"neural-compressor {version('neural-compressor')}"
    return kernels | {
        "cpu": f"{_cpu_vendor()} {torch.backends.cpu.get_cpu_capability()}".strip(),
        "device": torch.cuda.get_device_name(device) if kind == "cuda" else kind,
        "machine": platform.machine(),
        "pytest-qsens": version("pytest-qsens"),
        "torch": str(torch.__version__),
        "transformers": version("transformers"),
    }
