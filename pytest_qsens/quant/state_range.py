"""What the calibration batches show of keys and values of attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.ao.quantization.observer import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
    UniformQuantizationObserverBase,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from pytest_qsens.quant.op_scheme import ActivationScheme


class StateRange:
    """Least and largest value of what shares a scale in keys or values, ``(N, heads, tokens, dim)``.

    Of all calls, or their moving average if the observer is that.
    """

    def __init__(self, cache: ActivationScheme) -> None:
        self._granularity = cache.granularity
        apart = cache.granularity in ("head", "channel")
        averaged = cache.observer == "moving_average"
        self._observer: UniformQuantizationObserverBase
        if averaged:
            self._observer = MovingAveragePerChannelMinMaxObserver() if apart else MovingAverageMinMaxObserver()
        else:
            self._observer = PerChannelMinMaxObserver() if apart else MinMaxObserver()

    @property
    def about(self) -> str:
        """What has a scale of its own."""
        return {"head": "a scale per head", "channel": "a scale per channel"}.get(self._granularity, "one scale")

    def fits(self, values: Tensor) -> bool:
        """Whether these have as many scales as what was seen before."""
        if self._granularity not in ("head", "channel"):
            return True
        seen = self.state()["min_val"].numel()
        return seen in (0, values.shape[1] * (values.shape[3] if self._granularity == "channel" else 1))

    def observe(self, values: Tensor) -> None:
        """Take the values of one call."""
        if self._granularity == "head":
            values = values.movedim(1, 0)
        elif self._granularity == "channel":
            values = values.permute(1, 3, 0, 2).flatten(0, 1)
        self._observer(values)

    def state(self) -> Mapping[str, Tensor]:
        """Return what was seen; see `restore`."""
        found: Mapping[str, Tensor] = self._observer.state_dict()
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take what another has seen."""
        self._observer.load_state_dict(state)

    def extremes(self, dim: int) -> tuple[Tensor, Tensor]:
        """Both, and zero between them, of a shape that goes with keys or values of so many features."""
        state = self.state()
        low, high = state["min_val"].clamp(max=0), state["max_val"].clamp(min=0)
        shape = {"head": (-1, 1, 1), "channel": (-1, 1, dim)}.get(self._granularity, ())
        return low.view(shape), high.view(shape)
