"""Collect the statistics of ops: of weights, and of activations as they pass. Nothing of them is kept but sums."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.ao.quantization.observer import PerChannelMinMaxObserver

from pytest_qsens.graph.calls import finite_channels, finite_rows
from pytest_qsens.graph.capture import run_model
from pytest_qsens.graph.intercept import OpInterceptor, unchanged_state
from pytest_qsens.metrics import energy, squared_distance
from pytest_qsens.parts import rows_within
from pytest_qsens.proxies.statistics import Statistics

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from torch import Tensor, nn

    from pytest_qsens.graph.calls import Call
    from pytest_qsens.models.spec import Batch, ModelSpec
    from pytest_qsens.proxies.statistics import Group
    from pytest_qsens.quant.simulate import Simulator

_PART = 2**22
"""Values of a weight that are rounded at a time: a table of embeddings may have hundreds of millions."""


class Clock:
    """Seconds that each group of statistics has taken so far."""

    def __init__(self) -> None:
        self.seconds: defaultdict[Group, float] = defaultdict(float)

    @contextmanager
    def of(self, group: Group) -> Iterator[None]:
        """Add what runs meanwhile."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[group] += time.perf_counter() - start


class Observer:
    """Collects the statistics of some ops of a model.

    Args:
        ops: Names of those that are wanted.
        groups: What to collect; those of gradients are collected by `pytest_qsens.proxies.gradients`.
        simulator: Gives outputs of quantized ops.
        clock: Takes the time.

    Attributes:
        found: Op → its statistics, once it has been called.

    """

    def __init__(self, ops: Collection[str], groups: Collection[Group], simulator: Simulator, clock: Clock) -> None:
        self._ops = ops
        self._groups = groups
        self._simulator = simulator
        self._clock = clock
        self.found: dict[str, Statistics] = {}

    def run(self, model: nn.Module, batches: Sequence[Batch], spec: ModelSpec) -> None:
        """Run the model once on every batch and look at the calls of its ops."""
        for batch in batches:
            with unchanged_state(model), OpInterceptor(model, self._handle), torch.no_grad():
                run_model(model, batch, spec.output)

    def _handle(self, op: str, call: Call, run: Callable[[], Tensor]) -> Tensor:
        output = run()
        if op in self._ops and output.numel():
            if op not in self.found:
                self.found[op] = self._of_weight(op, call)
            if "local" in self._groups:
                with self._clock.of("local"):
                    add_output(self.found[op], call, output, self._simulator.output(op, call))
            if "inputs" in self._groups and call.kind != "embedding":
                with self._clock.of("inputs"):
                    add_input(self.found[op], call)
        return output

    def _of_weight(self, op: str, call: Call) -> Statistics:
        found = Statistics(call.kind, call.weight.numel())
        if "weight" in self._groups:
            with self._clock.of("weight"):
                found.weight_sse = sum(energy(error) for _, error in rounding_errors(self._simulator, op, call))
        if "weight_uint8" in self._groups:
            with self._clock.of("weight_uint8"):
                add_uint8_errors(found, call.weight)
        return found


def rounding_errors(simulator: Simulator, op: str, call: Call) -> Iterator[tuple[int, Tensor]]:
    """Give what rounding does to a weight, fp32, some rows at a time, each with the first row's number."""
    return simulator.weight_errors(op, call, rows_within(_PART, call.weight))


def add_uint8_errors(op: Statistics, weight: Tensor) -> None:
    """Add the rounding errors of a weight ``(out, ...)`` in uint8, asymmetric, by each output channel's range.

    NNCF's default ``WeightCompressionConfig``, INT8_ASYM, with which its criteria measure.
    """
    op.uint8_sse, op.uint8_worst = 0.0, 0.0
    for part in torch.split(weight.flatten(1), rows_within(_PART, weight)):
        exact = part.float()
        factory = {"device": weight.device}
        observer = PerChannelMinMaxObserver(
            ch_axis=0, dtype=torch.quint8, qscheme=torch.per_channel_affine, factory_kwargs=factory
        )
        observer(exact)
        scale, zero_point = observer.calculate_qparams()
        rounded = torch.fake_quantize_per_channel_affine(exact, scale, zero_point.float(), 0, 0, 255)
        squares = (rounded - exact).double().square()
        op.uint8_sse += float(squares.sum())
        op.uint8_worst = max(op.uint8_worst, float(squares.mean(1).max()))


def add_output(op: Statistics, call: Call, output: Tensor, quantized: Tensor) -> None:
    """Add the difference of an op's outputs, both of one shape; rows of inputs that are not finite are left out."""
    finite = None if call.kind == "embedding" else finite_rows(call.x, call.kind)
    if finite is not None:
        output, quantized = output[finite], quantized[finite]
    op.outputs += output.numel()
    op.output_sse += squared_distance(output, quantized)
    op.output_energy += energy(output)


def add_input(op: Statistics, call: Call) -> None:
    """Add an op's input; rows (a convolution's samples) that are not finite are left out.

    A row is what a linear sees at one position, and the channels at one position of a convolution's input. Variances
    and magnitudes of a channel are taken over the rows of one sample, the dimension before the last, as in NNCF.
    """
    x = finite_channels(call.x, call.kind)
    x = x if x.dim() > 1 else x[None]
    if not x.numel():
        return
    squares = x.double().square()
    op.inputs += x.numel()
    op.rows += x.shape[:-1].numel()
    op.row_norms += float(squares.sum(-1).sqrt().sum())
    op.input_energy += float(squares.sum())
    op.largest = max(op.largest, *map(abs, torch.stack(torch.aminmax(x)).tolist()))
    variances = x.double().var(-2, correction=0)
    op.calls += 1
    op.mean_square += float(squares.mean())
    op.mean_variance += float(variances.mean())
    op.max_variance += float(variances.max())
    op.mean_magnitude += float(x.abs().amax(-2).double().mean())
