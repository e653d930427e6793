"""One line: what isolated scores say of the whole model, and what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_qsens.results import OpResult

_MISLEADING = 0.10
"""Relative: how far the sum of isolated errors may be from what was measured."""


def side_by_side(total: OpResult | None) -> Iterator[str]:
    """Put the sum of isolated errors, the prediction with interactions, and the measured error side by side."""
    scores = (total and total.isolated) or {}
    measured, additive, quadratic = (scores.get(name) for name in ("nmse", "additive", "quadratic"))
    if measured is None or additive is None or quadratic is None:
        return
    yield (
        f"total nmse: {measured:.4g} measured; sum of isolated {_beside(additive, measured)}, "
        f"with interactions {_beside(quadratic, measured)}"
    )
    if abs(additive - measured) > _MISLEADING * measured:
        how = "cancel" if additive > measured else "add up to more than their sum"
        yield (
            f"ISOLATED SCORES MISLEAD: errors of ops {how} when all are quantized. Judge sets of ops by what is "
            "measured jointly"
        )


def _beside(value: float, measured: float) -> str:
    return f"{value:.4g} ({value / measured - 1:+.1%})" if measured else f"{value:.4g}"
