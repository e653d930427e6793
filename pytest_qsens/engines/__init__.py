"""Ways to compute a model's output with some ops quantized; each is one small module with the same protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from pytest_qsens.estimate import Estimate
    from pytest_qsens.metrics import Score
    from pytest_qsens.profile import Phase
    from pytest_qsens.results import Mode


Unit = tuple[str, ...]
"""Names of the ops that are flipped and scored as one, in model order: those of a group, or that of one op."""


class Engine(Protocol):
    """Outputs of the evaluation batches under quantization, one tensor per batch."""

    name: str

    phase: Phase
    """What its own time counts for in a profile."""

    reported: Mapping[str, float]
    """What another tool said itself about the output asked for last: name → number."""

    @property
    def note(self) -> str | None:
        """What has to be said of every score with everything else quantized, if something has."""

    distrusted: str | None
    """Why it does not measure several ops at once any more, if it found that they do not get their own scores."""

    perturbs: bool
    """Whether it can move values by a seed."""

    @property
    def references(self) -> Iterable[Tensor]:
        """Outputs of the unquantized model, fp32, batch by batch."""

    @property
    def exercised(self) -> Collection[str]:
        """Ops that the evaluation batches reach with at least one row."""

    @property
    def out_of_reach(self) -> Mapping[str, str]:
        """Op → why nothing can be put in its place, in at least one batch: it cannot be quantized."""

    @property
    def functional(self) -> Sequence[tuple[str, str]]:
        """``(owner:kind, kind)`` of products that no module owns."""

    def isolated(self, *ops: str) -> Iterator[Tensor]:
        """Only these ops are quantized."""

    def together(self, *ops: str) -> Score | None:
        """Score with only these ops quantized, if the engine measures several changes at once."""

    def measured_with(self, unit: Unit, mode: Mode) -> Collection[Unit]:
        """Others whose scores in this mode came together with that of these ops."""

    def joint(self, seed: int | None = None) -> Iterator[Tensor]:
        """Everything the scheme can quantize is quantized.

        With a seed, the outputs of all ops are moved in their last digits (`pytest_qsens.noise.perturbed`).
        """

    def fallback(self, *ops: str, seed: int | None = None) -> Iterator[Tensor]:
        """Everything but these ops is quantized; the seed as in `joint`."""

    def estimate(self, op: str, mode: Mode) -> Mapping[str, Estimate] | None:
        """Estimate an op's score by metric, ``sse`` and maybe ``kl``; ``None`` if it is to be measured."""

    def watch(self, check: Callable[[], None]) -> None:
        """Call this between the steps of estimating: what it raises ends that, and there are no estimates."""

    def measure_exactly(self, ops: Collection[str]) -> None:
        """Estimate these no more: they are going to be asked for one after the other, and measured together."""

    def why_measured(self, op: str, mode: Mode) -> str | None:
        """Why an op is measured by an engine that estimates, if that has to be said."""

    def all_but(self, *ops: str, seed: int | None = None) -> Score | None:
        """Score with all but these ops quantized, if the engine measures several changes at once; seed as above."""


class OneByOne:
    """What an engine has to say that measures one op after the other."""

    def together(self, *ops: str) -> Score | None:  # noqa: ARG002 - the protocol's
        """Nothing."""
        return None

    def measured_with(self, unit: Unit, mode: Mode) -> Collection[Unit]:  # noqa: ARG002 - the protocol's
        """Nothing."""
        return ()

    def all_but(self, *ops: str, seed: int | None = None) -> Score | None:  # noqa: ARG002 - the protocol's
        """Nothing."""
        return None

    def estimate(self, op: str, mode: Mode) -> Mapping[str, Estimate] | None:  # noqa: ARG002 - the protocol's
        """Nothing."""
        return None

    def watch(self, check: Callable[[], None]) -> None:
        """Nothing: there are no such steps."""

    def measure_exactly(self, ops: Collection[str]) -> None:
        """Nothing: all are measured."""

    def why_measured(self, op: str, mode: Mode) -> str | None:  # noqa: ARG002 - the protocol's
        """Nothing."""
        return None
