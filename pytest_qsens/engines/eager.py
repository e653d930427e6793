"""The engine that always works: the model's own forward, with the calls of ops replaced while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.engines.forward import ForwardEngine
from pytest_qsens.graph.capture import run_model
from pytest_qsens.graph.intercept import OpInterceptor, unchanged_state
from pytest_qsens.noise import perturbed

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from torch import Tensor, nn

    from pytest_qsens.graph.calls import Call
    from pytest_qsens.graph.capture import Output
    from pytest_qsens.models.spec import Batch
    from pytest_qsens.quant.simulate import Simulator


class EagerEngine(ForwardEngine):
    """Computes what a quantized op returns in place of its call."""

    name = "eager"

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        output: Output,
        simulator: Simulator,
        quantizable: Collection[str],
        added: Collection[str] = (),
        states: Collection[str] = (),
    ) -> None:
        super().__init__(model, batches, output, quantizable, added, states)
        self._simulator = simulator

    def _outputs(self, quantized: Collection[str], seed: int | None) -> Iterator[Tensor]:
        def handler(op: str, call: Call, run: Callable[[], Tensor]) -> Tensor:
            output = self._simulator.output(op, call) if op in quantized else run()
            return output if seed is None else perturbed(output, seed)

        for batch in self._batches:
            intercepting = OpInterceptor(self._model, handler, self._states)
            with self._threads(), unchanged_state(self._model), intercepting:
                output = run_model(self._model, batch, self._output)
            yield output
