"""The engine that always works: one full forward per op, its calls replaced while the model runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pytest_qsens.errors import QsensError
from pytest_qsens.graph.capture import run_model
from pytest_qsens.graph.intercept import OpInterceptor, unchanged_state

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from torch import Tensor, nn

    from pytest_qsens.graph.calls import Call
    from pytest_qsens.graph.capture import Output
    from pytest_qsens.models.spec import Batch
    from pytest_qsens.quant.simulate import Simulator


class EagerEngine:
    """Runs the model itself for every score.

    Raises:
        QsensError: If two runs of the unquantized model differ.

    """

    name = "eager"

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        output: Output,
        simulator: Simulator,
        quantizable: Collection[str],
    ) -> None:
        self._model = model
        self._batches = batches
        self._output = output
        self._simulator = simulator
        self._quantizable = frozenset(quantizable)
        self.exercised: set[str] = set()
        self.inlined: dict[str, str] = {}
        self.functional: Sequence[tuple[str, str]] = ()  # only a graph shows them
        self.references = list(self._reference())

    def isolated(self, op: str) -> Iterator[Tensor]:
        """Only this op is quantized."""
        return self._outputs({op})

    def joint(self) -> Iterator[Tensor]:
        """Everything the scheme can quantize is quantized."""
        return self._outputs(self._quantizable)

    def fallback(self, op: str) -> Iterator[Tensor]:
        """Everything but this op is quantized."""
        return self._outputs(self._quantizable - {op})

    def _outputs(self, quantized: Collection[str]) -> Iterator[Tensor]:
        def handler(op: str, call: Call, run: Callable[[], Tensor]) -> Tensor:
            return self._simulator.output(op, call) if op in quantized else run()

        for batch in self._batches:
            with unchanged_state(self._model), OpInterceptor(self._model, handler):
                yield run_model(self._model, batch, self._output)

    def _reference(self) -> Iterator[Tensor]:
        def handler(op: str, _: Call, run: Callable[[], Tensor]) -> Tensor:
            self.exercised.add(op)
            return run()

        for number, batch in enumerate(self._batches, 1):
            with unchanged_state(self._model):
                reference = run_model(self._model, batch, self._output)
            with unchanged_state(self._model), OpInterceptor(self._model, handler) as interceptor:
                again = run_model(self._model, batch, self._output)
            if again.shape != reference.shape or not torch.equal(again.nan_to_num(), reference.nan_to_num()):
                raise QsensError(
                    f"the model is not deterministic: two runs of evaluation batch {number} differ. "
                    "Scores would measure that, not quantization; look for dropout and random sampling in its forward."
                )
            self.inlined |= {op: by for op, by in interceptor.inlined.items() if op not in self.exercised}
            yield reference
