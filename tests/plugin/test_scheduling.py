"""The scheduler alone, against workers that finish and die in every order."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import execnet
from hypothesis import given
from hypothesis import strategies as st

from pytest_qsens.collection.subjects import Case
from pytest_qsens.scheduling import BlockScheduling
from pytest_qsens.workers import workers_beside

if TYPE_CHECKING:
    from collections.abc import Sequence


OP = "qsens::test_op[m-w8a8-"


@dataclass(eq=False)
class Worker:
    """What xdist's worker does with its queue: it starts an item only when it knows what comes next."""

    # ruff: noqa: D102  # the interface of xdist's `WorkerController`

    name: str
    gateway: SimpleNamespace
    nodemanager: SimpleNamespace
    queue: list[int] = field(default_factory=list)
    shutting_down: bool = False
    collected: bool = False

    def send_runtest_some(self, indices: Sequence[int]) -> None:
        assert not self.shutting_down, "a worker that was told to stop gets no more work"
        self.queue.extend(indices)

    def shutdown(self) -> None:
        self.shutting_down = True

    @property
    def ready(self) -> bool:
        return not self.collected or len(self.queue) > 1 or self.shutting_down


class Session:
    """What xdist's ``DSession`` does around a scheduler, one event at a time."""

    def __init__(self, ids: Sequence[str], crashing: set[str], workers: int, dealt: int | None) -> None:
        config: Any = SimpleNamespace(
            getvalue=lambda _: ["popen"] * workers, option=SimpleNamespace(loadscopereorder=True)
        )
        log: Any = SimpleNamespace(loadscopesched=lambda *_: None)
        cases = {nodeid: Case("m", "w8a8", nodeid[len(OP) : -1]) for nodeid in ids if nodeid.startswith(OP)}
        self.scheduler = BlockScheduling(config, log, cases, dealt=dealt)
        self.ids, self.crashing = list(ids), crashing
        self.ran: list[str] = []
        self.workers: list[Worker] = []
        self.closing = False
        self.manager = SimpleNamespace(specs=[execnet.XSpec("popen") for _ in range(workers)])
        for spec in self.manager.specs:
            self.start(spec)

    def start(self, spec: execnet.XSpec) -> None:
        name = f"gw{len(self.workers)}"
        worker = Worker(name, SimpleNamespace(id=name, spec=spec), self.manager)
        self.workers.append(worker)
        self.scheduler.add_node(worker)

    def step(self, worker: Worker) -> None:
        if not worker.collected:
            worker.collected = True
            if not self.closing:
                self.scheduler.add_node_collection(worker, self.ids)
                if self.scheduler.collection_is_completed:
                    self.scheduler.schedule()
        elif worker.queue:
            self.run(worker, worker.queue.pop(0))
        else:
            self.workers.remove(worker)
            if worker in self.scheduler.nodes:
                assert self.scheduler.remove_node(worker) is None
        if self.scheduler.tests_finished and not self.closing:
            self.closing = True
            for node in self.scheduler.nodes:
                node.shutdown()

    def run(self, worker: Worker, index: int) -> None:
        assert self.ids[index] not in self.ran, "a test runs once"
        self.ran.append(self.ids[index])
        if self.ids[index] not in self.crashing:
            self.scheduler.mark_test_complete(worker, index)
            return
        self.workers.remove(worker)
        assert self.scheduler.remove_node(worker) == self.ids[index]
        self.closing = False
        self.start(worker.gateway.spec)


OPS = st.lists(
    st.builds(lambda block, name: f"{OP}layers.{block}.{name}]", st.integers(0, 4), st.integers(0, 4))
    | st.builds(lambda number: f"test_file.py::test_{number}", st.integers(0, 9)),
    min_size=1,
    max_size=16,
    unique=True,
)


@given(ids=OPS, workers=st.integers(1, 4), dealing=st.booleans(), data=st.data())
def test_every_test_runs_once_whatever_crashes(
    ids: list[str], workers: int, *, dealing: bool, data: st.DataObject
) -> None:
    """In any order of events, with any tests killing their worker, each test runs exactly once and the run ends.

    This holds whether any worker takes any block or each has blocks of its own.
    """
    crashing = data.draw(st.sets(st.sampled_from(ids)))
    session = Session(ids, crashing, workers, dealt=workers if dealing else None)
    while session.workers:
        ready = [worker for worker in session.workers if worker.ready]
        assert ready, f"all wait for each other; ran {session.ran}"
        session.step(data.draw(st.sampled_from(ready)))
    assert sorted(session.ran) == sorted(ids)


def test_workers_of_one_machine_share_it() -> None:
    """Only workers on the same machine count when cores are shared."""
    specs = [
        execnet.XSpec(s) for s in ("popen", "popen//id=b", "ssh=far", "ssh=far//id=d", "popen//via=px", "socket=s")
    ]
    assert [workers_beside(spec, specs) for spec in specs] == [2, 2, 2, 2, 1, 1]
