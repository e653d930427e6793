"""The exact engine: run each batch's graph once, then only what is downstream of the op in question."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.fx import Node
from torch.utils._pytree import tree_flatten, tree_leaves

from pytest_qsens.engines import OneByOne
from pytest_qsens.graph.calls import bind
from pytest_qsens.graph.capture import CaptureRefused, Graph, capture, run_model
from pytest_qsens.graph.intercept import OpInterceptor, unchanged_state
from pytest_qsens.graph.replay import Override, Run
from pytest_qsens.metrics import same
from pytest_qsens.noise import SEEDS, perturbed
from pytest_qsens.threads import one_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from pytest_qsens.graph.calls import Call
    from pytest_qsens.graph.capture import Output
    from pytest_qsens.graph.schedule import Groups
    from pytest_qsens.models.spec import Batch
    from pytest_qsens.profile import Phase
    from pytest_qsens.quant.simulate import Simulator


_ALIGNMENT = 64
"""Bytes of the widest vector register."""


class ReplayEngine(OneByOne):
    """Bit-identical to running the whole model with the op replaced, at a part of its cost.

    The values of the clean run are kept as far as the memory goes; those of the fully quantized run once it is asked
    for, and of one more for each seed. All threads are used if the clean values are the same on one, else one.

    Args:
        captured: Every evaluation batch.
        simulator: Gives the outputs of quantized ops.
        quantizable: Names of ops that can be quantized.
        memory: Bytes for values.
        added: Those of them that are not quantized when everything is.

    """

    name = "replay"
    phase: Phase = "replay"
    perturbs = True
    note: str | None = None
    distrusted: str | None = None

    def __init__(
        self,
        captured: Sequence[Captured],
        simulator: Simulator,
        quantizable: Collection[str],
        memory: int,
        added: Collection[str] = (),
    ) -> None:
        self._simulator = simulator
        self._joint_share = clean_share(memory, len(captured)) // (1 + len(SEEDS))
        self._clean = [run for run, _ in captured]
        self._threads = nullcontext if all(anywhere for _, anywhere in captured) else one_thread
        self._quantized: dict[int | None, list[Run]] = {}
        self.reported: Mapping[str, float] = {}
        graphs = [run.graph for run in self._clean]
        self.exercised = {
            op
            for graph in graphs
            for op, nodes in graph.calls.items()
            if any(node.meta["val"].numel() for node in nodes)
        }
        self.out_of_reach: Mapping[str, str] = {op: why for graph in graphs for op, why in graph.out_of_reach.items()}
        self.functional = list(dict.fromkeys(item for graph in graphs for item in graph.functional))
        self._quantizable = [op for op in quantizable if op not in self.out_of_reach]
        self._added = frozenset(added)
        self._base = [op for op in self._quantizable if op not in self._added]

    @property
    def references(self) -> Iterator[Tensor]:
        """Outputs of the unquantized model, fp32."""
        for run in self._clean:
            yield run.output
            run.release_all()

    def isolated(self, *ops: str) -> Iterator[Tensor]:
        """Only these ops are quantized."""
        for run in self._clean:
            with self._threads():
                output = run.replay(self._quantize(run.graph, ops))
            run.release_all()
            yield output

    def joint(self, seed: int | None = None) -> Iterator[Tensor]:
        """Everything is quantized but what is only added; a seed moves the outputs of ops in their last digits."""
        for run in self._joint_runs(seed):
            yield run.output
            run.release_all()

    def fallback(self, *ops: str, seed: int | None = None) -> Iterator[Tensor]:
        """Flip these ops in that: they are not quantized, or added; the seed as in `joint`."""
        for run in self._joint_runs(seed):
            with self._threads():
                output = run.replay(self._flip(run.graph, ops, seed))
            run.release_all()
            yield output

    def _joint_runs(self, seed: int | None) -> list[Run]:
        if seed not in self._quantized:
            with self._threads():
                self._quantized[seed] = [
                    Run(run.graph, self._everything(run.graph, seed), self._joint_share, run.groups)
                    for run in self._clean
                ]
        return self._quantized[seed]

    def _everything(self, graph: Graph, seed: int | None) -> dict[Node, Override]:
        calls: dict[Node, Any] = {node: node.target for nodes in graph.calls.values() for node in nodes}
        calls |= self._quantize(graph, self._base)
        return {node: _moved(call, seed) for node, call in calls.items()}

    def _flip(self, graph: Graph, ops: Collection[str], seed: int | None) -> dict[Node, Override]:
        restored: dict[Node, Any] = {node: node.target for op in ops for node in graph.calls.get(op, ())}
        added = self._quantize(graph, self._added.intersection(ops))
        return {node: _moved(call, seed) for node, call in (restored | added).items()}

    def _quantize(self, graph: Graph, ops: Collection[str]) -> dict[Node, Override]:
        def override(op: str, target: object) -> Override:
            def quantized(*args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401 - the call's own arguments
                return self._simulator.output(op, bind(target, args, kwargs))

            return quantized

        return {node: override(op, node.target) for op in ops for node in graph.calls.get(op, ())}


def _moved(call: Any, seed: int | None) -> Override:  # noqa: ANN401 - a call node's operator, or what replaces it
    if seed is None:
        return call  # type: ignore[no-any-return] # a callable

    def moved(*args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401 - the call's own arguments
        return perturbed(call(*args, **kwargs), seed)

    return moved


def clean_share(memory: int, batches: int) -> int:
    """Return the part of the memory for values of the clean run of one of so many batches."""
    return memory * 3 // 8 // batches


class Captured(NamedTuple):
    """A batch's graph, run once.

    Attributes:
        run: With its values.
        anywhere: Whether every value is the same on one thread and on all.

    """

    run: Run
    anywhere: bool


def captured_run(
    model: nn.Module, batch: Batch, output: Output, reference: Tensor, memory: int, states: Collection[str] = ()
) -> Captured:
    """Capture and run a batch, and check that a replay is a stand-in for the model.

    Args:
        model: On the device of the batch.
        batch: For evaluation.
        output: Takes the scored output.
        reference: The model's output on all threads.
        memory: Bytes of values to keep.
        states: Keys and values that can be changed.

    Raises:
        CaptureRefused: If it is none.

    """
    run = Run(capture(model, batch, output, states), memory=memory)
    anywhere = same(run.output, reference) and (torch.get_num_threads() == 1 or _same_on_one_thread(run))
    threads = nullcontext if anywhere else one_thread
    if not anywhere:
        with one_thread():
            run = Run(capture(model, batch, output, states), memory=memory)
            if not same(run.output, run_model(model, batch, output)):
                raise CaptureRefused("the captured graph does not reproduce the model's output bit for bit")
    with threads():
        # a value that left torch, through numpy or a Python number, would be a constant in the graph
        if not _follows(run, model, batch, output, states):
            raise CaptureRefused("the captured graph does not follow the model when the outputs of its ops change")
    return Captured(run, anywhere)


def repeated_run(graph: Graph, groups: Groups, memory: int, *, anywhere: bool) -> Captured:
    """Run a graph that `captured_run` has checked in another process.

    Args:
        graph: The graph.
        groups: Of its run there.
        memory: Bytes of values to keep.
        anywhere: As in `Captured`.

    """
    with nullcontext() if anywhere else one_thread():
        return Captured(Run(graph, memory=memory, groups=groups), anywhere)


def _follows(run: Run, model: nn.Module, batch: Batch, output: Output, states: Collection[str]) -> bool:
    """Whether a replay with the outputs of all ops changed gives what the model gives."""
    ops = run.graph.calls

    def handler(op: str, _: Call, call: Callable[[], Tensor]) -> Tensor:
        return _change(call()) if op in ops else call()

    with unchanged_state(model), OpInterceptor(model, handler, states):
        expected = run_model(model, batch, output)
    return same(run.replay({node: _changed(node.target) for nodes in ops.values() for node in nodes}), expected)


def _same_on_one_thread(run: Run) -> bool:
    """Whether all values of a run, which was made on all threads, are the same on one.

    How a kernel divides its work depends on shapes, layouts and what integers say, not on the numbers it adds up: one
    call of each kind stands for all. Where the graph writes in place, arguments are gone, and all is run again.
    """
    if run.groups:
        with one_thread():
            return _same_values(run, Run(run.graph, memory=0, groups=run.groups))
    seen: set[object] = set()
    for node in reversed(run.graph.nodes):  # values are kept from the end
        kind = _kind(node, run.graph)
        if node.op != "call_function" or kind in seen:
            continue
        seen.add(kind)
        (args, kwargs), expected = run.arguments(node), run.values(node)  # computed again on all threads, if dropped
        with one_thread():
            alike = _same_leaves(node.target(*args, **kwargs), expected)  # type: ignore[operator] # a call
        run.release_all()
        if not alike:
            return False
    return True


def _kind(node: Node, graph: Graph) -> object:
    """Return what a kernel may choose its way by."""

    def form(argument: object) -> object:
        if not isinstance(argument, Node):
            return repr(argument)
        value = argument.meta.get("val")
        if not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex()):
            return argument
        constant = graph.constants.get(argument)
        alignment = constant.data_ptr() % _ALIGNMENT if isinstance(constant, torch.Tensor) else 0
        return value.dtype, value.shape, value.stride(), alignment

    leaves, structure = tree_flatten((node.args, node.kwargs))
    return (node.target, str(structure), *map(form, leaves))


def _same_values(one: Run, other: Run) -> bool:
    """Whether all values kept are: those at the narrow places of the graph are, and all others lead to them."""
    pairs = zip(one.clean, other.clean, strict=True)
    return all(_same_leaves(a, b) for a, b in pairs if a is not None and b is not None)


def _same_leaves(one: object, other: object) -> bool:
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(same(a, b) for a, b in pairs if isinstance(a, torch.Tensor))


def _change(value: Tensor) -> Tensor:
    """Change a value about as much as quantization does, and not by a factor that a norm would undo."""
    return value.roll(1, -1).mul_(0.01).add_(value)


def _changed(target: Any) -> Override:  # noqa: ANN401 - a call node's operator
    def call(*args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401 - the call's own arguments
        return _change(target(*args, **kwargs))

    return call
