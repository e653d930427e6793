"""What finds the range of static activations as calibration data pass: torch.ao's observers, and searches.

Torch has those of extremes, of their moving average, and the histogram; `range_search` has the others.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch.ao.quantization.observer import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    UniformQuantizationObserverBase,
)

from pytest_qsens import profile
from pytest_qsens.quant.distribution import Distribution
from pytest_qsens.quant.formats import round_input
from pytest_qsens.quant.observer_names import AVERAGING_CONSTANT, percentile_of
from pytest_qsens.quant.range_search import Range, least_error, of_entropy, of_percentile
from pytest_qsens.threads import one_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from pytest_qsens.quant.op_scheme import ActivationScheme
    from pytest_qsens.quant.range_search import Round


class QParams(NamedTuple):
    """Affine quantization: ``real = (integer - zero_point) * scale``."""

    scale: float
    zero_point: int


class Observer(Protocol):
    """Sees one tensor in every call of an op. Its memory does not grow with the values that it has seen."""

    def observe(self, values: Tensor) -> None:
        """Take the values of one call: fp32, finite, not empty."""

    def state(self) -> Mapping[str, Tensor]:
        """All that was seen, for `restore`."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Become one that has seen this."""

    def qparams(self) -> QParams:
        """Scale and zero point of uint8; 128 is that of symmetric ones."""

    def largest(self) -> float:
        """Magnitude that scales of floats are made of."""


class _TorchObserver:
    """One of torch's; the search for its scale, which is slow, is made once and when needed."""

    def __init__(self, observer: UniformQuantizationObserverBase) -> None:
        self._observer = observer
        self._qparams: QParams | None = None

    def observe(self, values: Tensor) -> None:
        self._observer(values)

    def state(self) -> Mapping[str, Tensor]:
        found: Mapping[str, Tensor] = self._observer.state_dict()
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._observer.load_state_dict(state)

    @profile.phase("calibration")
    def qparams(self) -> QParams:
        if self._qparams is None:
            scale, zero_point = self._observer.calculate_qparams()  # type: ignore[no-untyped-call] # torch's
            self._qparams = QParams(float(scale), int(zero_point))
        return self._qparams

    def largest(self) -> float:
        state = self.state()
        return max(0.0, -float(state["min_val"]), float(state["max_val"]))


class _SearchingObserver:
    """Searches the distribution of all values for a range."""

    def __init__(self, search: Callable[[Distribution], Range], *, symmetric: bool) -> None:
        self._distribution = Distribution()
        self._search = search
        self._symmetric = symmetric
        self._found: Range | None = None

    def observe(self, values: Tensor) -> None:
        self._distribution.add(values)

    def state(self) -> Mapping[str, Tensor]:
        return self._distribution.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._distribution.restore(state)

    @profile.phase("calibration")
    def _range(self) -> Range:
        if self._found is None:
            with one_thread():  # sums are to have the same bits on any number of threads
                self._found = self._search(self._distribution)
        return self._found

    def qparams(self) -> QParams:
        low, high = (torch.tensor(end, dtype=torch.float32) for end in self._range())
        scale, zero_point = _integers(low, high, symmetric=self._symmetric)
        return QParams(float(scale), int(zero_point))

    def largest(self) -> float:
        low, high = self._range()
        return max(0.0, -low, high)


def observer_of(activation: ActivationScheme) -> Observer:
    """Make what observes a static activation, or the static scale of a tensor."""
    if activation.dtype == "int8":
        return _of_integers(activation.observed_by, symmetric=activation.symmetric)
    name = activation.observed_by
    if name == "minmax":
        return _TorchObserver(MinMaxObserver())
    if name == "moving_average":
        return _TorchObserver(MovingAverageMinMaxObserver(averaging_constant=AVERAGING_CONSTANT))
    return _SearchingObserver(_search(name, partial(_rounded_floats, activation), symmetric=True), symmetric=True)


def observer_of_output(activation: ActivationScheme) -> Observer:
    """Make what observes an output that is requantized as an op with this input has it: to uint8, with zero points."""
    return _of_integers(activation.observed_by, symmetric=False)


def _of_integers(name: str, *, symmetric: bool) -> Observer:
    options = _uint8(symmetric=symmetric)
    if name == "histogram":
        return _TorchObserver(HistogramObserver(**options))
    if name == "minmax":
        return _TorchObserver(MinMaxObserver(**options))
    if name == "moving_average":
        return _TorchObserver(MovingAverageMinMaxObserver(averaging_constant=AVERAGING_CONSTANT, **options))
    search = _search(name, partial(_rounded_integers, symmetric=symmetric), symmetric=symmetric)
    return _SearchingObserver(search, symmetric=symmetric)


def _uint8(*, symmetric: bool) -> dict[str, Any]:
    # all of 0..255: what torch's x86 backend and Intel Neural Compressor use on machines with VNNI
    qscheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    return {"dtype": torch.quint8, "qscheme": qscheme, "reduce_range": False}


def _search(name: str, rounded: Round, *, symmetric: bool) -> Callable[[Distribution], Range]:
    percentile = percentile_of(name)
    if percentile is not None:
        return partial(of_percentile, percentile=percentile, symmetric=symmetric)
    if name == "mse":
        return partial(least_error, rounded=rounded, symmetric=symmetric)
    return partial(of_entropy, symmetric=symmetric)


def _integers(low: Tensor, high: Tensor, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return scales and zero points of ranges, as torch finds them."""
    observer = MinMaxObserver(**_uint8(symmetric=symmetric))
    observer.min_val, observer.max_val = low, high
    scale, zero_point = observer.calculate_qparams()
    return scale, zero_point


def _rounded_integers(values: Tensor, low: Tensor, high: Tensor, *, symmetric: bool) -> Tensor:
    scale, zero_point = _integers(low, high, symmetric=symmetric)
    integers = (values * (1 / scale)).round_()
    return torch.minimum(torch.maximum(integers, -zero_point), 255 - zero_point).mul_(scale)


def _rounded_floats(activation: ActivationScheme, values: Tensor, _low: Tensor, high: Tensor) -> Tensor:
    return torch.stack([round_input(values, activation, float(end)) for end in high])
