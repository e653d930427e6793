"""What moves numbers is told, whichever of torch's switches it is."""

from __future__ import annotations

import subprocess
import sys

import pytest

SWITCHES = [
    "torch.set_float32_matmul_precision('medium')",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.mkldnn.conv.fp32_precision = 'bf16'",
    "torch.backends.cudnn.rnn.fp32_precision = 'ieee'",
    "torch.backends.cuda.enable_flash_sdp(False)",
    "torch.backends.mkldnn.set_flags(False)",
    "torch.set_flush_denormal(True)",
    "torch.use_deterministic_algorithms(True)",
    "torch.set_default_dtype(torch.float64)",
]


def told(code: str) -> str:
    """Run some code, and print what torch is set to."""
    program = (
        f"import torch\n{code}\nfrom pytest_qsens.surroundings import surroundings\nprint(surroundings()['torch'])"
    )
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def usual() -> str:
    """Return what is told of torch as it comes."""
    return told("")


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_is_told(usual: str, switch: str) -> None:
    """Two processes are not alike if one of them has turned it."""
    assert usual == "{}"
    assert told(switch) != usual
