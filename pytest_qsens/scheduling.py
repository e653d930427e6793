"""Which worker measures which op. Needs pytest-xdist; imported only while it distributes."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]  # it ships no types

from pytest_qsens.ops import TOTAL
from pytest_qsens.refinement import owners
from pytest_qsens.workers import position

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pytest
    from xdist.remote import Producer  # type: ignore[import-untyped]  # it ships no types
    from xdist.workermanage import WorkerController  # type: ignore[import-untyped]  # it ships no types

    from pytest_qsens.collection.subjects import Case


class BlockScheduling(LoadScopeScheduling):  # type: ignore[misc]  # an untyped base
    """Hands out the ops of a model block by block, and every other test on its own.

    The ops of one block share recomputed values, so a block stays on one worker.

    Args:
        config: Pytest's.
        log: What xdist logs to.
        cases: What each test measures, by node id; complete when the collections of the workers come in.
        dealt: Number of workers, if each has ops of its own, as it plans what to measure in which order.

    """

    def __init__(self, config: pytest.Config, log: Producer, cases: Mapping[str, Case], *, dealt: int | None) -> None:
        super().__init__(config, log)
        self._cases = cases
        self._dealt = dealt

    def _split_scope(self, nodeid: str) -> str:
        case = self._cases.get(nodeid)
        if case is None or case.op == TOTAL:
            return nodeid
        return f"{case.model}-{case.scheme}-{case.unit.block}"

    def remove_node(self, node: WorkerController) -> str | None:
        """Take a worker out; what it had not finished goes to others, except the test it crashed in.

        `LoadScopeScheduling` hands that test out again with the rest of its unit, and it kills worker after worker.
        """
        workload: dict[str, dict[str, bool]] = self.assigned_work.pop(node)
        pending = [nodeid for unit in workload.values() for nodeid, done in unit.items() if not done]
        if not pending:
            return None
        crashed = pending[0]  # workers run their items in the order in which they got them
        for scope, unit in workload.items():
            rest = {nodeid: False for nodeid, done in unit.items() if not done and nodeid != crashed}
            if rest:
                self.workqueue[scope] = rest
        for other in self.nodes:
            self._reschedule(other)
        return crashed

    def _reschedule(self, node: WorkerController) -> None:
        """Keep a worker supplied, and let it go when nothing is left.

        A worker starts an item only when it knows the next one or that there is none. So it needs at least two, and a
        unit that a crash has left with a single item would wait for ever. It is let go only at its last item, because
        a worker that was told to stop takes no more, and another one may crash yet.
        """
        if node.shutting_down or node not in self.registered_collections:
            return  # the second: a replacement that is still collecting; `schedule` comes back to it
        while (left := self._next(node)) is not None and self._pending_of(self.assigned_work[node]) <= 2:
            self._assign_work_unit(node)
        if left is None and self._pending_of(self.assigned_work[node]) <= 1:
            node.shutdown()

    def _assign_work_unit(self, node: WorkerController) -> None:
        scope = self._next(node)
        if scope is not None:
            self.workqueue.move_to_end(scope, last=False)
            super()._assign_work_unit(node)

    def _next(self, node: WorkerController) -> str | None:
        """Scope that a worker gets next: where each has its own, one of these, or one whose worker is gone."""
        others = {position(other) for other in self.nodes} - {position(node)}
        return next((scope for scope in self.workqueue if self._owners.get(scope) not in others), None)

    @cached_property
    def _owners(self) -> dict[str, int]:
        """Position of the worker that a scope is of, for those that are of one."""
        if self._dealt is None:
            return {}
        ops: dict[tuple[str, str], list[str]] = {}
        for case in self._cases.values():
            ops.setdefault((case.model, case.scheme), []).append(case.op)
        shares = {key: owners(names, self._dealt) for key, names in ops.items()}
        return {
            self._split_scope(nodeid): shares[case.model, case.scheme][case.op] for nodeid, case in self._cases.items()
        }
