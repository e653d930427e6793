"""What engines have in common that run the whole model for every score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import TYPE_CHECKING

from pytest_qsens import profile
from pytest_qsens.engines import OneByOne
from pytest_qsens.errors import QsensError
from pytest_qsens.graph.capture import run_model
from pytest_qsens.graph.intercept import OpInterceptor, unchanged_state
from pytest_qsens.metrics import same
from pytest_qsens.threads import one_thread
from pytest_qsens.wording import first_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from pytest_qsens.graph.calls import Call
    from pytest_qsens.graph.capture import Output
    from pytest_qsens.models.spec import Batch
    from pytest_qsens.profile import Phase


class ForwardEngine(OneByOne, ABC):
    """Runs the model for every score, on one thread if kernels round by the number of threads.

    Raises:
        QsensError: If two runs of the unquantized model differ.

    """

    phase: Phase = "forward"
    perturbs = True
    distrusted: str | None = None

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        output: Output,
        quantizable: Collection[str],
        added: Collection[str] = (),
        states: Collection[str] = (),
    ) -> None:
        self._model = model
        self._states = states
        self._threads: Callable[[], AbstractContextManager[None]] = nullcontext
        self._batches = batches
        self._output = output
        self.exercised: set[str] = set()
        self.out_of_reach: dict[str, str] = {}
        self.functional: Sequence[tuple[str, str]] = ()  # only a graph shows them
        self.reported: Mapping[str, float] = {}
        with profile.phase("reference"):
            self.references = list(self._reference())
        self._quantizable = frozenset(quantizable) - self.out_of_reach.keys()
        self._added = frozenset(added)

    @property
    def note(self) -> str | None:
        """Nothing to say."""
        return None

    def isolated(self, *ops: str) -> Iterator[Tensor]:
        """Only these ops are quantized."""
        return self._outputs(frozenset(ops), None)

    def joint(self, seed: int | None = None) -> Iterator[Tensor]:
        """Everything is quantized but what is only added; a seed moves the outputs of ops in their last digits."""
        return self._outputs(self._quantizable - self._added, seed)

    def fallback(self, *ops: str, seed: int | None = None) -> Iterator[Tensor]:
        """Flip these ops in that: they are not quantized, or added; the seed as in `joint`."""
        base = self._quantizable - self._added
        return self._outputs(base.difference(ops) | self._added.intersection(ops), seed)

    @abstractmethod
    def _outputs(self, quantized: Collection[str], seed: int | None) -> Iterator[Tensor]:
        """Run the evaluation batches with these ops quantized."""

    def _reference(self) -> Iterator[Tensor]:
        for number, batch in enumerate(self._batches, 1):
            with one_thread(), unchanged_state(self._model):
                reference = run_model(self._model, batch, self._output)
            if not same(self._watched(batch), reference):
                self._threads = one_thread
                if not same(self._watched(batch), reference):
                    raise QsensError(
                        f"the model is not deterministic: two runs of evaluation batch {number} differ. Scores would "
                        "measure that, not quantization; look for dropout and random sampling in its forward."
                    )
            yield reference

    def _watched(self, batch: Batch) -> Tensor:
        def handler(op: str, _: Call, run: Callable[[], Tensor]) -> Tensor:
            output = run()
            if output.numel():
                self.exercised.add(op)
            return output

        with (
            self._threads(),
            unchanged_state(self._model),
            OpInterceptor(self._model, handler, self._states) as interceptor,
        ):
            output = run_model(self._model, batch, self._output)
        self.out_of_reach |= interceptor.out_of_reach()
        return output


class KernelEngine(ForwardEngine):
    """Has the model quantized by others, who calibrate it themselves.

    Args:
        model: Module in fp32 and evaluation mode.
        batches: Evaluation batches.
        output: Picks the tensor to score.
        quantizable: Ops that the scheme can quantize and the calibration data reaches.
        calibration: Calibration batches.

    Raises:
        QsensError: If the model has forward hooks that they drop.

    """

    name: str

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        output: Output,
        quantizable: Collection[str],
        calibration: Sequence[Batch],
    ) -> None:
        from pytest_qsens.quant.kernels import dropped_hooks  # what it imports is of no use to other engines

        if hooked := dropped_hooks(model):
            names = first_of([name or "the model itself" for name in hooked], 3)
            raise QsensError(
                f"engine {self.name}: torch's conversion drops the forward hooks of {names}, so it would measure "
                "another model. Remove them, or use engine auto, which runs them."
            )
        super().__init__(model, batches, output, quantizable)
        self._calibration = calibration
        self._prepare()

    @abstractmethod
    def _prepare(self) -> None:
        """Set up the quantized model, and drop from the quantizable ops what cannot be quantized in it."""

    def calibrate(self, model: nn.Module) -> None:
        """Run a model that observes on the calibration batches; on one thread, for the same scales on any number."""
        with profile.phase("calibration"), one_thread():
            for batch in self._calibration:
                run_model(model, batch, self._output)
