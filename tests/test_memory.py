"""Sizes as people write them, and a default that leaves room for others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
import pytest

from pytest_qsens import memory
from pytest_qsens.errors import QsensError
from pytest_qsens.memory import default_memory, free_memory, parse_memory

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GB", 4 * 10**9), ("1.5GiB", 3 * 2**29), ("800M", 8 * 10**8), ("8 gb", 8 * 10**9), ("2000000", 2 * 10**6)],
)
def test_sizes(text: str, size: int) -> None:
    """Decimal and binary units, any case, with and without the B."""
    assert parse_memory(text, "--qsens-memory") == size


@pytest.mark.parametrize("text", ["", "x", "-1GB", "4GBB", "4 i", "1e9", "nan", "0.5MB", "4"])
def test_what_is_no_size(text: str) -> None:
    """The message names where it was given and the value."""
    with pytest.raises(QsensError, match=r"qsens_memory in the ini file takes .* not '" + text):
        parse_memory(text, "qsens_memory in the ini file")


def test_the_default_is_shared() -> None:
    """A third of what is free for one process, a part of that for each of several."""
    free = psutil.virtual_memory().available
    assert default_memory(1) < free
    assert default_memory(4) == pytest.approx(default_memory(1) / 4, rel=0.2)


def test_a_container_can_leave_less_than_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What limits the container of this process is what counts."""
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("500000\n")
    (tmp_path / "memory.stat").write_text("anon 7\ninactive_file 500000\n")
    assert default_memory(1) == 10**6
    (tmp_path / "memory.max").write_text("max\n")
    assert default_memory(1) > 10**7


@pytest.mark.parametrize("line", ["0::/jobs/one", "9:memory:/jobs/one"])
def test_a_control_group_can_leave_less(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str) -> None:
    """Its own limit or that of a group around it, in either version of control groups."""
    version_1 = ":memory:" in line
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_OWN_CGROUPS", tmp_path / "own")
    (tmp_path / "own").write_text(f"3:cpu:/other\n{line}\n")
    names = ("limit_in_bytes", "usage_in_bytes") if version_1 else ("max", "current")
    group = tmp_path / "memory" / "jobs" if version_1 else tmp_path / "jobs"
    (group / "one").mkdir(parents=True)
    (group / f"memory.{names[0]}").write_text("3000000\n")
    (group / f"memory.{names[1]}").write_text("1500000\n")
    (group / "memory.stat").write_text("total_inactive_file 0\ninactive_file 0\n")
    assert free_memory() == 1_500_000
    assert default_memory(1, reserved=300_000) == 400_000
    assert default_memory(1, reserved=10**9) == 0
