"""The same numbers whatever the number of threads.

A quantizer turns the last bit of its input into a whole step, and the search for an activation's scale jumps between
histogram bins. So what threads change in a sum's last bit can move a score by a percent. The clean values that scales
and integers are made from are therefore computed alike for every number of threads.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


def reproducible_sums() -> None:
    """Ask MKL to add in an order that does not depend on the number of threads.

    It reads this before its first product in the process. Other libraries have no such switch: for them `one_thread`.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


@contextmanager
def threads_of(workers: int) -> Iterator[None]:
    """Run torch on as many threads as so many workers have together, while the others wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads * max(1, workers))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
