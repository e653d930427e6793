"""Between the controller and the workers of pytest-xdist: what these are given, what they tell, who measures what."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

from pytest_qsens.collection.plan import files
from pytest_qsens.errors import QsensError
from pytest_qsens.given_options import base_options
from pytest_qsens.time_budget import LATE, LEFT, left
from pytest_qsens.workers import SHARE, SNAPSHOTS, apart, check_distribution, machine, named, position, workers_beside

if TYPE_CHECKING:
    from collections.abc import Mapping

    from xdist.remote import Producer  # type: ignore[import-untyped]  # it ships no types
    from xdist.workermanage import WorkerController  # type: ignore[import-untyped]  # it ships no types

    from pytest_qsens.results import Payload
    from pytest_qsens.session.controller import Controller

CHANNEL = "qsens_channel"
"""Key of ``workerinput``: where a worker sends what it is going to measure."""


class Distribution:
    """Registered beside the controller; without pytest-xdist nothing calls it.

    Args:
        controller: Is told what is going to be measured.

    """

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._config = controller.config
        self._plans: dict[WorkerController, Payload] = {}
        self._files: dict[str, tuple[str, Mapping[str, str | None]]] = {}
        """Model or config → first process that told, and hashes of its files."""

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: WorkerController) -> None:
        """Tell a worker how many there are on its machine, and listen to what it is going to measure.

        What is recorded here is what it compares with, wherever it is: there may be no snapshot, or an older one.
        """
        for name, found in files(self._config).items():
            self._files.setdefault(name, ("this process", found))
        spec, specs = node.gateway.spec, node.nodemanager.specs
        channel = node.gateway.newchannel()
        # In the thread that receives: the plan is there when xdist handles the list of tests sent after it.
        channel.setcallback(partial(self._plans.__setitem__, node))
        node.workerinput.update(
            {
                "qsens_workers": workers_beside(spec, specs),
                "qsens_machine": machine(spec),
                "qsens_scattered": any(map(apart, specs)),
                SHARE: (position(node), len(specs)),
                CHANNEL: channel,
            }
        )
        options = base_options(self._config)
        if options.time_budget is not None:
            node.workerinput[LEFT] = left(self._config, options)
            node.workerinput[LATE] = any(run.results.keys() - run.lost for run in self._controller.runs.values())
        if apart(spec):
            from pytest_qsens.snapshot import collect_texts

            directory = base_options(self._config).snapshot_dir
            node.workerinput[SNAPSHOTS] = (str(directory), collect_texts(directory))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Producer) -> object | None:
        """Schedule by block."""
        return self._scheduler(log) if base_options(config).model is not None else None

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: WorkerController) -> None:
        """Learn what is going to be measured; the first worker tells, all collect the same."""
        planned = self._plans.pop(node, None)
        if planned is None:
            return
        self._compare_files(node, planned["files"])
        if self._controller.cases:
            return
        try:
            check_distribution(self._config)
            self._controller.prepare(planned)
        except QsensError as error:
            self._controller.stop(str(error))
        else:
            self._schedule_by_block()

    def _compare_files(self, node: WorkerController, told: Mapping[str, Mapping[str, str | None]]) -> None:
        """Stop before anything is measured if config, checkpoint or data of two processes differ, on any machines."""
        here = named(node.gateway.id, machine(node.gateway.spec))
        for label, found in told.items():
            there, known = self._files.setdefault(label, (here, found))
            for what, other in found.items():
                one = known[what]
                if None not in (one, other) and one != other:
                    self._controller.stop(
                        f"{label}: {there} and {here} have not the same {what} (hashes {one} and {other}). Copy the "
                        "files of the one to the other, or give each the path of the right ones"
                    )

    def _schedule_by_block(self) -> None:
        """Take over from xdist's scheduler if the model is chosen in code alone, which shows only now."""
        from xdist.scheduler import LoadScheduling, WorkStealingScheduling  # type: ignore[import-untyped]  # no types

        session = self._config.pluginmanager.getplugin("dsession")
        if type(session.sched) in (LoadScheduling, WorkStealingScheduling) and not session.sched.has_pending:
            nodes, session.sched = session.sched.nodes, self._scheduler(session.log)
            for node in nodes:
                session.sched.add_node(node)

    def _scheduler(self, log: Producer) -> object:
        from pytest_qsens.scheduling import BlockScheduling

        workers = len(self._config.pluginmanager.getplugin("dsession").nodemanager.specs)
        refined = base_options(self._config).refined
        return BlockScheduling(self._config, log, self._controller.cases, dealt=workers if refined else None)
