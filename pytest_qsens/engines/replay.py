"""The exact engine: run each batch's graph once, then only what is downstream of the op in question."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pytest_qsens.graph.calls import bind
from pytest_qsens.graph.capture import CaptureRefused, Graph, capture, run_model
from pytest_qsens.graph.intercept import OpInterceptor, unchanged_state
from pytest_qsens.graph.replay import Override, Run
from pytest_qsens.threads import one_thread

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from torch import Tensor, nn
    from torch.fx import Node

    from pytest_qsens.graph.capture import Output
    from pytest_qsens.models.spec import Batch
    from pytest_qsens.quant.simulate import Simulator


class ReplayEngine:
    """Bit-identical to running the whole model with the op replaced, at a part of its cost.

    All values of the clean run are kept, and of the fully quantized one once it is asked for.

    Raises:
        CaptureRefused: If a batch's graph is not an exact stand-in for the model.

    """

    name = "replay"

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        output: Output,
        simulator: Simulator,
        quantizable: Collection[str],
    ) -> None:
        self._simulator = simulator
        self._quantizable = quantizable
        self._clean = [_verified_run(model, batch, output) for batch in batches]
        self._quantized: list[Run] | None = None
        graphs = [run.graph for run in self._clean]
        self.references = [run.output for run in self._clean]
        self.exercised = {op for graph in graphs for op in graph.calls}
        self.inlined: Mapping[str, str] = {op: by for graph in graphs for op, by in graph.inlined.items()}
        self.functional = list(dict.fromkeys(item for graph in graphs for item in graph.functional))

    def isolated(self, op: str) -> Iterator[Tensor]:
        """Only this op is quantized."""
        for run in self._clean:
            yield run.replay(self._quantize(run.graph, [op]))

    def joint(self) -> Iterator[Tensor]:
        """Everything the scheme can quantize is quantized."""
        for run in self._joint_runs():
            yield run.output

    def fallback(self, op: str) -> Iterator[Tensor]:
        """Everything but this op is quantized."""
        for run in self._joint_runs():
            yield run.replay({node: node.target for node in run.graph.calls.get(op, ())})  # type: ignore[misc] # a callable

    def _joint_runs(self) -> list[Run]:
        if self._quantized is None:
            with one_thread():
                self._quantized = [Run(run.graph, self._quantize(run.graph, self._quantizable)) for run in self._clean]
        return self._quantized

    def _quantize(self, graph: Graph, ops: Collection[str]) -> dict[Node, Override]:
        def override(op: str, target: object) -> Override:
            def quantized(*args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401 - the call's own arguments
                return self._simulator.output(op, bind(target, args, kwargs))

            return quantized

        return {node: override(op, node.target) for op in ops for node in graph.calls.get(op, ())}


def _verified_run(model: nn.Module, batch: Batch, output: Output) -> Run:
    with one_thread():
        reference = run_model(model, batch, output)
        run = Run(capture(model, batch, output))
        if not _same(run.output, reference):
            raise CaptureRefused("the captured graph does not reproduce the model's output bit for bit")
        # a value that left torch, through numpy or a Python number, would be a constant in the graph: change every op
        graph = run.graph
        changed = Run(graph, {node: _changed(node.target) for nodes in graph.calls.values() for node in nodes}).output
        with unchanged_state(model), OpInterceptor(model, lambda _, __, call: _change(call())):
            expected = run_model(model, batch, output)
    if not _same(changed, expected):
        raise CaptureRefused("the captured graph does not follow the model when the outputs of its ops change")
    return run


def _same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left.nan_to_num(), right.nan_to_num())


def _change(value: Tensor) -> Tensor:
    """Change a value about as much as quantization does, and not by a factor that a norm would undo."""
    return value + 0.01 * value.roll(1, -1)


def _changed(target: Any) -> Override:  # noqa: ANN401 - a call node's operator
    def call(*args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401 - the call's own arguments
        return _change(target(*args, **kwargs))

    return call
