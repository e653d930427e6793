"""How many bytes a call takes at its peak, as torch's allocator counts them."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch._C._profiler import _EventType

if TYPE_CHECKING:
    from collections.abc import Callable


def peak_bytes(function: Callable[[], object]) -> int:
    """Run a function; returns the most bytes that what it allocates on the CPU takes at once.

    What it frees that was there before does not count.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    todo: list[Any] = list(profiled.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    changes: list[tuple[int, int]] = []
    own: set[int] = set()
    events: list[Any] = []
    while todo:
        event = todo.pop()
        todo += event.children
        if event.tag == _EventType.Allocation:
            events.append(event)
    events.sort(key=lambda event: event.start_time_ns)
    for event in events:
        size, pointer = event.extra_fields.alloc_size, event.extra_fields.ptr
        if size > 0:
            own.add(pointer)
        if size > 0 or pointer in own:
            changes.append(size)
    return max(accumulate(changes), default=0)
