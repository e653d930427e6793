"""Sharing a machine between the workers of pytest-xdist. Works without pytest-xdist installed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from pytest_qsens.errors import QsensError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pytest

SNAPSHOTS = "qsens_snapshots"
"""Key of ``workerinput``, for workers that are `apart`: the controller's snapshots."""

SHARE = "qsens_share"
"""Key of ``workerinput``: position of the worker, and how many there are."""

_THREADS = "OMP_NUM_THREADS"
WORKER_BYTES = 2 * 10**9
"""Memory of a worker beside the weights: libraries, and values of a run (docs/scale.md)."""

_UNFIT = {
    "loadscope": "puts a whole model on one worker",
    "loadfile": "puts a whole model on one worker",
    "loadgroup": "does not group on current pytest (pytest-xdist issue 1386) and separates the ops of a block",
    "each": "measures every op in every worker",
}


def check_distribution(config: pytest.Config) -> None:
    """Refuse the ``--dist`` modes that defeat measuring in parallel.

    Raises:
        QsensError: Naming the mode, why, and what to use.

    """
    mode = config.getoption("dist", "no")
    if mode in _UNFIT:
        raise QsensError(
            f"--dist {mode} {_UNFIT[mode]}. Leave --dist out: -n N alone spreads the blocks of the model over N workers"
        )


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(specs: Sequence[Any]) -> Callable[[], None]:
    """Let workers started from here share the cores, unless the user has set ``OMP_NUM_THREADS``.

    Args:
        specs: The execnet specs of all workers.

    Returns:
        What restores the environment after the run.

    """
    if _THREADS in os.environ:
        return lambda: None
    os.environ[_THREADS] = str(_share(cores(), sum(not machine(spec) for spec in specs)))

    def restore() -> None:
        os.environ.pop(_THREADS, None)

    return restore


def fitting(available: int, free: float, weights: int | None, *, kept: int) -> int:
    """How many workers a machine has cores and memory for.

    Args:
        available: Cores.
        free: Bytes of memory.
        weights: Bytes of the checkpoint, which all workers map; ``None`` if that is not known.
        kept: Bytes that every worker keeps of each number in a quantized weight; all are kept in mode ``fallback``.

    """
    if weights is None:
        return available
    each = WORKER_BYTES + weights * kept // 2  # from bf16
    return max(1, min(available, int((free - weights) // each)))


def workers_beside(spec: Any, specs: Sequence[Any]) -> int:  # noqa: ANN401  # execnet has no types
    """How many of the workers run on the machine that ``spec`` names, itself included."""
    return sum(machine(other) == machine(spec) for other in specs)


def position(node: Any) -> int:  # noqa: ANN401  # xdist ships no types
    """Tell which of the workers that were asked for this is, the first one being 0; a replacement takes its place."""
    return next(i for i, spec in enumerate(node.nodemanager.specs) if spec is node.gateway.spec)


def workers_here(config: pytest.Config) -> int:
    """How many workers share this machine, this process included; 0 without pytest-xdist."""
    return int(getattr(config, "workerinput", {}).get("qsens_workers", 0))


def limit_threads(config: pytest.Config) -> None:
    """In a worker: give torch its share of the cores, unless ``OMP_NUM_THREADS`` is set here."""
    workers = workers_here(config)
    if workers and _THREADS not in os.environ:
        import torch

        torch.set_num_threads(_share(cores(), workers))


def apart(spec: Any) -> bool:  # noqa: ANN401  # execnet has no types
    """Whether a worker is in another directory, and maybe on another machine; xdist goes by the same."""
    return not spec.popen or bool(spec.chdir)


def place(config: pytest.Config) -> str:
    """Tell for a message where this is, if it is a worker on another machine or in another directory."""
    given: dict[str, Any] = getattr(config, "workerinput", {})
    if SNAPSHOTS not in given:
        return ""
    return f" ({named(given['workerid'], given['qsens_machine'])}, in {config.rootpath})"


def named(worker: str, where: str) -> str:
    """Name a worker and its machine."""
    return f"worker {worker} on {where or 'this machine'}"


def _share(available: int, workers: int) -> int:
    return max(1, available // max(1, workers))


def machine(spec: Any) -> str:  # noqa: ANN401  # execnet has no types
    """Name the machine a spec runs on; the empty string is this one."""
    socket = str(spec.socket or "")
    host = socket.rpartition(":")[0] or socket  # a machine may serve several sockets
    return str(spec.via or spec.ssh or host)
