"""A plot of plans: size against predicted error."""

from __future__ import annotations

import io
from importlib.util import find_spec
from typing import TYPE_CHECKING

from pytest_qsens.errors import QsensError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from pytest_qsens.plans.command import Plan, Plans
    from pytest_qsens.plans.problem import Problem

SUFFIXES = (".svg", ".png", ".pdf")
_PLAN = "#d62728"


def check_plot(path: Path) -> None:
    """Make sure that a plot can be made and goes to ``path``.

    Raises:
        QsensError: If matplotlib is not installed, or the name or the directory cannot be.

    """
    if path.suffix not in SUFFIXES:
        raise QsensError(f"--plot {path}: a plot is written as {', '.join(SUFFIXES)}. Choose a name that ends in one")
    if not path.parent.is_dir():
        raise QsensError(f"cannot write {path}: there is no directory {path.parent}. Create it first.")
    if find_spec("matplotlib") is None:
        raise QsensError("--plot needs matplotlib. Install it with: pip install 'pytest-qsens[report]'")


def plot(found: Plans, suffix: str) -> bytes:
    """Draw the best plans of all sizes by their predicted errors, and those that were made by their measured ones, too.

    Args:
        found: With a frontier.
        suffix: One of `SUFFIXES`.

    Returns:
        The contents of the file; equal plans give equal ones.

    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    problem = found.problem
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    if problem.interacting:
        rivals = [(problem.bits(p.rival), problem.predicted(p.rival)) for p in found.frontier if p.rival is not None]
        _line(axes, rivals, color="#999999", marker="x", linestyle="--", label="plans by additive scores")
    label = "plans with interactions" if problem.interacting else "plans"
    _line(axes, _points(problem, found.frontier), color="#1f77b4", marker="o", linestyle="-", label=label)
    _plans(axes, found)
    axes.set_yscale("log")
    axes.set_xlabel(f"bits a {problem.value} (unquantized: {problem.unquantized:g})")
    measured = any(plan.measured is not None for plan in found.plans)
    axes.set_ylabel("nmse of the output" if measured else "predicted nmse of the output")
    axes.set_title(f"{problem.model}: {', '.join(problem.schemes)}", fontsize=10)
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(fontsize=8)
    drawn = io.BytesIO()
    metadata = {".svg": {"Date": None}, ".png": {}, ".pdf": {"CreationDate": None}}[suffix]
    with mpl.rc_context({"svg.hashsalt": "qsens", "svg.fonttype": "none"}):
        figure.savefig(drawn, format=suffix[1:], dpi=150, metadata=metadata)
    return drawn.getvalue()


def _plans(axes: Axes, found: Plans) -> None:
    """Draw the plans that were made: open where they are predicted, filled where they were measured."""
    middle = sum(axes.get_xlim()) / 2
    labels = {"none": "plan, predicted", "full": "plan, measured"}
    for plan, (bits, predicted) in zip(found.plans, _points(found.problem, found.plans), strict=True):
        drawn = {"none": predicted, "full": plan.measured or 0.0}
        for fill, error in drawn.items():
            if error > 0:
                label = labels.pop(fill, None)
                size = 9 if fill == "none" else 5  # both are seen where they are in one place
                style = {"color": _PLAN, "markersize": size, "zorder": 3, "linestyle": "none", "label": label}
                axes.plot([bits], [error], marker="D", fillstyle=fill, **style)  # type: ignore[arg-type] # as below
        if min(drawn.values()) > 0:
            axes.plot([bits, bits], [*drawn.values()], color=_PLAN, linestyle=":", linewidth=1)
        if max(drawn.values()) > 0:
            side = "right" if bits > middle else "left"  # of the text, which stays inside
            axes.annotate(
                plan.name,
                (bits, predicted or drawn["full"]),
                xytext=(-10 if side == "right" else 10, -3),
                textcoords="offset points",
                horizontalalignment=side,
                color=_PLAN,
                fontsize=8,
            )


def _points(problem: Problem, plans: Sequence[Plan]) -> list[tuple[float, float]]:
    return [(problem.bits(plan.chosen), problem.predicted(plan.chosen)) for plan in plans]


def _line(axes: Axes, points: Sequence[tuple[float, float]], **style: str) -> None:
    """Draw what has an error; nothing quantized has none, and a logarithmic axis no place for it."""
    drawn = sorted(dict.fromkeys(point for point in points if point[1] > 0))
    axes.plot([bits for bits, _ in drawn], [error for _, error in drawn], **style)  # type: ignore[arg-type] # texts are right
