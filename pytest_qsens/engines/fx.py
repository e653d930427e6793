"""The engine with torch's own int8 kernels: prepared, calibrated and packed once, one forward for every score."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.engines.forward import KernelEngine
from pytest_qsens.errors import QsensError, told
from pytest_qsens.graph.capture import run_model
from pytest_qsens.graph.intercept import unchanged_state
from pytest_qsens.quant.kernels import KernelModel
from pytest_qsens.threads import one_thread

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from torch import Tensor

    from pytest_qsens.quant.observers import QParams


class FxEngine(KernelEngine):
    """Scores as torch's x86 backend computes them, and as Intel Neural Compressor measures them, to the last bit.

    Raises:
        QsensError: If two runs of the unquantized model differ, or torch cannot prepare a part of it.

    """

    name = "fx"

    def _prepare(self) -> None:
        with one_thread(), unchanged_state(self._model):
            try:
                self._kernels = KernelModel(self._model, self._quantizable, self.calibrate)
            except Exception as error:
                raise QsensError(
                    f"engine fx: torch's FX quantization cannot prepare this model: {told(error)}. Use engine auto, "
                    "which needs no kernels."
                ) from error
        self.out_of_reach |= self._kernels.refused
        self._quantizable -= self._kernels.refused.keys()

    @property
    def input_qparams(self) -> Mapping[str, QParams]:
        """Scale and zero point of each op's input; none of embeddings."""
        return self._kernels.input_qparams

    @property
    def output_qparams(self) -> Mapping[str, QParams]:
        """Scale and zero point of each op's output; none of embeddings."""
        return self._kernels.output_qparams

    def isolated(self, *ops: str) -> Iterator[Tensor]:
        """Only these ops are quantized, and nothing beside the ops either."""
        return self._run(ops, others=False)

    def quantized(self, ops: Collection[str]) -> Iterator[Tensor]:
        """Quantize these ops, and what torch quantizes beside the ops, such as additions and poolings."""
        return self._run(ops, others=True)

    def _outputs(self, quantized: Collection[str], seed: int | None) -> Iterator[Tensor]:
        return self._run(quantized, others=True, seed=seed)

    def _run(self, quantized: Collection[str], *, others: bool, seed: int | None = None) -> Iterator[Tensor]:
        for batch in self._batches:
            self._kernels.switch(quantized, others=others, seed=seed)
            with self._threads(), unchanged_state(self._model), self._kernels.installed():
                output = run_model(self._kernels.root, batch, self._output)
            yield output
