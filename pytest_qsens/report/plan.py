"""What ``qsens plan`` prints."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pytest_qsens.inspection.found import NAMES
from pytest_qsens.interactions import relative_error
from pytest_qsens.wording import first_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_qsens.plans.command import Plan, Plans
    from pytest_qsens.plans.problem import Problem

_LISTED = 20
"""Ops or groups that are listed by name."""


def report(found: Plans) -> Iterator[str]:
    """Lines about the plans, but for tables."""
    problem = found.problem
    yield f"model {problem.model}, schemes {', '.join(problem.schemes)}"
    yield from (f"note: {note}" for note in problem.notes)
    if problem.interacting:
        error = relative_error(problem.dimensions)
        yield (
            "predicted nmse: with interactions, from sketches"
            + (f" (standard error at most {error:.1%})" if error else " (exact)")
            + "; additive: the sum of isolated scores"
        )
    else:
        yield "predicted nmse: additive, the sum of isolated scores"
    for plan in found.plans:
        yield from _plan(problem, plan, detailed=len(found.plans) == 1)


def _plan(problem: Problem, plan: Plan, *, detailed: bool) -> Iterator[str]:
    if not detailed:
        return
    schemes = Counter(problem.assignment(plan.chosen).values())
    told = [f"{schemes[scheme]} {scheme}" for scheme in problem.schemes if schemes[scheme]]
    yield ""
    yield f"{plan.name}: {', '.join([*told, f'{schemes[None]} unquantized'])} of {problem.ops} ops"
    if problem.of_cache:
        yield from _by_kind(problem, plan)
    if problem.sized:
        yield f"bits a {problem.value}: {problem.bits(plan.chosen):.4g}{_size(problem, plan)}"
    yield f"predicted nmse: {_errors(problem, plan)}"
    yield from _measured(problem, plan)
    if plan.rival is not None and (plan.rival != plan.chosen).any():
        yield (
            f"additive scores alone would choose another plan: predicted nmse {problem.predicted(plan.rival):.4g}"
            + (f" at {problem.bits(plan.rival):.4g} bits a {problem.value}" if problem.sized else "")
        )
    kept = [unit for unit in problem.units if unit.kept is not None]
    free = {unit for unit, taken in zip(problem.owners, plan.chosen, strict=True) if taken}
    left = [unit.name for place, unit in enumerate(problem.units) if unit.kept is None and place not in free]
    if left:
        yield f"unquantized by choice: {first_of(left, _LISTED)}"
    reasons: dict[str, list[str]] = {}
    for unit in kept:
        reasons.setdefault(unit.kept or "", []).append(unit.name)
    for reason, names in reasons.items():
        yield f"unquantized, {reason}: {first_of(names, _LISTED)}"


def _by_kind(problem: Problem, plan: Plan) -> Iterator[str]:
    """Tell keys from values: they differ in what they bear."""
    assignment = problem.assignment(plan.chosen)
    kinds = {op: kind for unit in problem.units for op, kind in zip(unit.ops, unit.types, strict=True)}
    for kind, name in NAMES.items():
        schemes = Counter(assignment[op] for op, its in kinds.items() if its == kind)
        if schemes:
            told = [
                f"{schemes[scheme]} {scheme or 'unquantized'}" for scheme in (*problem.schemes, None) if schemes[scheme]
            ]
            yield f"{name}: {', '.join(told)}"


def _size(problem: Problem, plan: Plan) -> str:
    if not problem.of_cache:
        return ""
    bits, full = problem.bits(plan.chosen) * problem.values, problem.unquantized * problem.values
    return f"; a token takes {bits / 8:.6g} bytes, unquantized {full / 8:.6g}"


def _measured(problem: Problem, plan: Plan) -> Iterator[str]:
    if plan.measured is None:
        return
    for predicted, measured in plan.missed:
        yield f"a larger plan, predicted {predicted:.4g}, was measured at {measured:.4g}, which is past the budget"
    predicted = problem.predicted(plan.chosen)
    off = f" (prediction {predicted / plan.measured - 1:+.1%})" if plan.measured else ""
    yield f"measured nmse: {plan.measured:.4g}{off}"


def _errors(problem: Problem, plan: Plan) -> str:
    additive = f"{problem.additive(plan.chosen):.4g}"
    return f"{problem.predicted(plan.chosen):.4g} (additive {additive})" if problem.interacting else additive


def table(problem: Problem, plans: Sequence[Plan], title: str) -> list[list[str]]:
    """Table of plans: what they save, their size and predicted errors."""
    header = [title, "bits", "quantized", "predicted nmse", "additive"]
    rows = [[p.name, *_cells(problem, p)] for p in plans]
    if problem.interacting:
        header.append("by additive scores")
        for row, plan in zip(rows, plans, strict=True):
            row.append("-" if plan.rival is None else f"{problem.predicted(plan.rival):.4g}")
    if any(plan.measured is not None for plan in plans):
        header.append("measured nmse")
        for row, plan in zip(rows, plans, strict=True):
            row.append("-" if plan.measured is None else f"{plan.measured:.4g}")
    return [header, *rows]


def _cells(problem: Problem, plan: Plan) -> list[str]:
    quantized = problem.counts[plan.chosen].sum()
    return [
        f"{problem.bits(plan.chosen):.4g}",
        f"{quantized:.0f}/{problem.ops}",
        f"{problem.predicted(plan.chosen):.4g}",
        f"{problem.additive(plan.chosen):.4g}",
    ]
