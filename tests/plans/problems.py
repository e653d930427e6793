"""Small problems of planning, and all that there is to choose in them."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np

from pytest_qsens.plans.problem import Candidate, Problem, Unit


def random_problem(seed: int, units: int, schemes: int, *, dimensions: int = 0, common: float = 0.0) -> Problem:
    """Make one whose errors lie in six orders of magnitude.

    Args:
        seed: Of everything.
        units: How many.
        schemes: Candidates of each unit, every next one with fewer bits and an error that is 8 times as large.
        dimensions: Values in a sketch; 0 makes none.
        common: How much of each change is in one direction, that of all.

    """
    draw = np.random.default_rng(seed)
    direction = draw.normal(size=max(1, dimensions))
    listed, candidates = [], []
    for place in range(units):
        listed.append(Unit(f"u{place}", (f"u{place}",), ("linear",), int(draw.integers(1, 50)) * 100))
        for scheme in range(schemes):
            nmse = 10 ** draw.uniform(-9, -3) * 8**scheme
            sketch = None
            if dimensions:
                change = draw.normal(size=dimensions) + common * draw.choice([-1, 1]) * direction
                sketch = change * np.sqrt(nmse) / np.linalg.norm(change)
            candidates.append(Candidate(place, f"s{scheme}", 8 - 2 * scheme, nmse, nmse, sketch))
    names = tuple(f"s{scheme}" for scheme in range(schemes))
    return Problem("m", names, tuple(listed), tuple(candidates), 16.0)


class Choices(NamedTuple):
    """Every choice there is in a problem: errors as predicted, bits saved, and ops quantized, one entry each."""

    errors: np.ndarray
    saved: np.ndarray
    counts: np.ndarray


def choices(problem: Problem) -> Choices:
    """List them, with changes that are added up before they are squared where there are any."""
    places = range(len(problem.candidates))
    options = [[None, *(i for i in places if problem.owners[i] == unit)] for unit in range(len(problem.units))]
    picked = np.zeros((np.prod([len(of_unit) for of_unit in options]), len(places)))
    for row, choice in zip(picked, product(*options), strict=True):
        row[[place for place in choice if place is not None]] = 1
    errors = picked @ [candidate.nmse for candidate in problem.candidates]
    if problem.interacting:
        errors = ((picked @ np.stack([candidate.sketch for candidate in problem.candidates])) ** 2).sum(1)
    return Choices(errors, picked @ problem.saved, picked @ problem.counts)
