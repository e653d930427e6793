"""The unquantized outputs that everything is compared with."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from pytest_qsens import profile
from pytest_qsens.errors import first_line
from pytest_qsens.metrics import Score, energies

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from pytest_qsens.engines import Engine
    from pytest_qsens.results import Scores
    from pytest_qsens.samples import Rows
    from pytest_qsens.sketches import Sketcher

NOT_FINITE = "the output holds NaN or infinite values"


class Size(NamedTuple):
    """How large the reference is.

    Attributes:
        energy: Sum of its squares.
        values: Number of its values.
        energies: Sum of the squares of each sample.

    """

    energy: float
    values: int
    energies: Sequence[float]


class Reference:
    """The unquantized outputs, batch by batch, as an engine has them.

    Args:
        engine: Computes, or keeps, the outputs.
        logits: Whether they are compared as distributions, too.
        rows: What of each batch's output belongs to which sample.
        sketchers: Of each batch, if what ops do to the output is sketched.

    """

    def __init__(
        self, engine: Engine, *, logits: bool, rows: Sequence[Rows], sketchers: Sequence[Sketcher | None]
    ) -> None:
        self._engine = engine
        self._logits = logits
        self._rows = rows
        self._sketchers = sketchers

    @cached_property
    def size(self) -> Size:
        """How large they are; computed once."""
        with profile.phase("scoring"):
            pairs = zip(self._engine.references, self._rows, strict=True)
            sizes = [(energies(reference, rows), reference.numel()) for reference, rows in pairs]
        return Size(
            sum(size.whole for size, _ in sizes),
            sum(count for _, count in sizes),
            [energy for size, _ in sizes for energy in size.samples],
        )

    def related(self, score: Score) -> Scores | str:
        """Put what was summed in relation to the reference; why that cannot be done, if it cannot."""
        found = score.related(*self.size)
        return NOT_FINITE if found is None else found | dict(self._engine.reported)

    def summed(self, outputs: Iterator[Tensor], *, sketching: bool = False) -> Score | str:
        """Compare what an engine computes with the reference; why that cannot be done, if it cannot."""
        try:
            score = Score(logits=self._logits)
            given = zip(self._engine.references, outputs, self._rows, self._sketchers, strict=True)
            for reference, output, rows, sketcher in given:
                score.add(reference, output, rows, sketcher if sketching else None)
        except Exception as error:  # noqa: BLE001 - quantized values can make a model raise anything
            return f"the model fails ({first_line(error)})"
        return score
