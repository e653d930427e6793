"""How well the error of many ops at once is predicted from each alone, on real weights, and what plans gain from it.

    python benchmarks/plans.py [--model minilm] [--subsets 20] SCHEME ...

prints, for each scheme, the joint error of random subsets of the ops: measured, predicted by adding isolated errors up,
and with interactions; from sketches of several sizes and from the changes themselves. Then plans with and without
interactions are compared, and each is measured.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pytest_qsens.calibrated import CalibratedModel, calibrate
from pytest_qsens.manifest import load_manifest
from pytest_qsens.models.resolve import resolve
from pytest_qsens.models.source import ModelRequest
from pytest_qsens.plans.problem import Candidate, Problem, Unit, own_error
from pytest_qsens.plans.solve import least_error
from pytest_qsens.sketches import make_sketchers

if TYPE_CHECKING:
    from pytest_qsens.ops import Op

SIZES = (256, 1024, 4096, 16384)
"""Of sketches, beside the changes themselves."""

SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
"""Of the ops in a subset, in turn."""

BUDGETS = tuple(eighth / 8 for eighth in range(1, 8))
"""Shares of the ops that plans quantize."""


def joint(model: CalibratedModel, ops: list[Op]) -> float:
    """Measure the NMSE with these ops quantized."""
    outputs = model._engine.isolated(*(op.name for op in ops))
    score = model._summed(outputs)
    assert not isinstance(score, str), score
    return score.sse / model._reference_size.energy


def changes(model: CalibratedModel, ops: list[Op]) -> np.ndarray:
    """Change of the whole output by each op, in units in which squares are the NMSE; one row an op."""
    references = list(model._engine.references)
    rows = [
        np.concatenate(
            [
                (output.double() - reference.double()).numpy().ravel()
                for reference, output in zip(references, model._engine.isolated(op.name), strict=True)
            ]
        )
        for op in ops
    ]
    return np.stack(rows) / np.sqrt(model._reference_size.energy)


def sketched(model: CalibratedModel, vectors: np.ndarray, size: int) -> np.ndarray:
    """Sketch such changes."""
    import torch

    shapes = [reference.shape for reference in model._engine.references]
    found = np.zeros((len(vectors), size))
    ends = np.cumsum([torch.Size(shape).numel() for shape in shapes])
    for sketcher, part, shape in zip(
        make_sketchers(shapes, size), np.split(vectors, ends[:-1], 1), shapes, strict=True
    ):
        found += np.stack([sketcher(torch.from_numpy(row).reshape(shape)).numpy() for row in part])
    return found


def predicted(nmse: np.ndarray, vectors: np.ndarray, subset: list[int]) -> float:
    """Predict the joint error with interactions."""
    return own_error(float(nmse[subset].sum()), list(vectors[subset]))


def relative(found: list[float], expected: list[float]) -> str:
    """Mean and largest relative error."""
    errors = [abs(a - b) / b for a, b in zip(found, expected, strict=True)]
    return f"{np.mean(errors):7.2%} {max(errors):7.2%}"


def measure(label: str, scheme: str, subsets: int) -> None:
    """Print the tables of one scheme."""
    source = resolve(ModelRequest(label, root=str(Path.cwd())))
    ops = list(load_manifest(source, None))
    model = calibrate(source.load(), ops, scheme, engine="replay", divergence=False)
    ops = [op for op in ops if model.refused(op) is None]
    start = time.perf_counter()
    vectors = changes(model, ops)
    nmse = (vectors**2).sum(1)
    exact = vectors @ vectors.T
    lengths = np.sqrt(np.outer(nmse, nmse)) + 1e-300
    values = vectors.shape[1]
    print(f"\n{label}, {scheme}: {len(ops)} ops, {values} output values, {time.perf_counter() - start:.0f} s")
    cosines = (exact / lengths)[np.triu_indices(len(ops), 1)]
    print(f"cosine of the changes of two ops: mean {cosines.mean():+.3f}, rms {np.sqrt((cosines**2).mean()):.3f}")
    draws = random.Random(0)
    chosen = [draws.sample(range(len(ops)), max(2, round(SHARES[i % 5] * len(ops)))) for i in range(subsets)]
    measured = [joint(model, [ops[i] for i in sorted(subset)]) for subset in chosen]
    print(f"{subsets} subsets, nmse {min(measured):.3g} to {max(measured):.3g}   mean     max relative error")
    print(f"  additive              {relative([float(nmse[s].sum()) for s in chosen], measured)}")
    exactly = [predicted(nmse, vectors, s) for s in chosen]
    print(f"  with interactions     {relative(exactly, measured)}")
    for size in SIZES:
        if size < values:
            small = sketched(model, vectors, size)
            error = np.sqrt((((small @ small.T - exact) / lengths) ** 2)[np.triu_indices(len(ops), 1)].mean())
            found = [predicted(nmse, small, s) for s in chosen]
            print(
                f"  sketches of {size:<6}    {relative(found, measured)}; from the exact prediction "
                f"{relative(found, exactly)}; of a cosine rms {error:.4f}"
            )
    plans(model, ops, nmse, sketched(model, vectors, 4096) if values > 4096 else vectors)


def plans(model: CalibratedModel, ops: list[Op], nmse: np.ndarray, sketches: np.ndarray) -> None:
    """Print what plans by additive scores and with interactions are predicted to lose, and do."""
    units = tuple(Unit(op.name, (op.name,), (op.type,), op.weights) for op in ops)

    def problem(*, interacting: bool) -> Problem:
        return Problem(
            "",
            ("",),
            units,
            tuple(
                Candidate(i, "", 8, float(nmse[i]), float(nmse[i]), sketches[i] if interacting else None)
                for i in range(len(ops))
            ),
            16,
        )

    print("ops quantized: nmse measured (predicted) of the plan by additive scores | with interactions")
    for share in BUDGETS:
        need = round(share * len(ops))
        told = []
        for interacting in (False, True):
            asked = problem(interacting=interacting)
            plan = least_error(asked, asked.counts, need)
            measured = joint(model, [op for op, taken in zip(ops, plan, strict=True) if taken])
            told.append(f"{measured:.4g} ({asked.predicted(plan):.4g})")
        print(f"  {need:>3} of {len(ops)}: {' | '.join(told)}")


def main() -> None:
    """Measure every scheme given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("schemes", nargs="+", metavar="SCHEME")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--subsets", type=int, default=20)
    given = parser.parse_args()
    for scheme in given.schemes:
        measure(given.model, scheme, given.subsets)


if __name__ == "__main__":
    main()
