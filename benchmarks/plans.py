"""How well the error of many ops at once is predicted from each alone, and what plans gain from interactions.

    python benchmarks/plans.py [--models MiniLM ...] [--schemes SCHEME ...] [--subsets 20] [--write]

measures, for each model and scheme, the joint error of random subsets of the ops beside what is predicted by adding
isolated errors up, and with interactions. Then plans by additive scores and plans with interactions, of equal budgets,
are both measured: of one scheme, and of several together. ``--write`` puts the tables into docs/plan.md, between its
markers.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from digits import digits_mlp  # noqa: E402 - after the path
from timing import machine  # noqa: E402

from pytest_qsens.calibrated import CalibratedModel, calibrate  # noqa: E402
from pytest_qsens.graph.modules import list_ops  # noqa: E402
from pytest_qsens.interactions import DIMENSIONS  # noqa: E402
from pytest_qsens.models.resolve import resolve  # noqa: E402
from pytest_qsens.models.source import ModelRequest  # noqa: E402
from pytest_qsens.plans.bits import scheme_bits  # noqa: E402
from pytest_qsens.plans.problem import Candidate, Problem, Unit, own_error  # noqa: E402
from pytest_qsens.plans.solve import least_error, smallest  # noqa: E402
from pytest_qsens.quant.assignment import Assignment  # noqa: E402
from pytest_qsens.quant.schemes import scheme_named  # noqa: E402
from pytest_qsens.sketches import make_sketchers  # noqa: E402
from tests.plans.problems import random_problem  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pytest_qsens.models.spec import ModelSpec
    from pytest_qsens.ops import Op

MODELS: dict[str, Callable[[], ModelSpec]] = {
    "MiniLM": lambda: resolve(ModelRequest("minilm", root=str(HERE))).load(),
    "MLP trained on digits": digits_mlp,
}
SCHEMES = ("w4a16_g32", "w4a16_g128", "mxfp4_dynamic", "w8a8", "w8a8_dynamic")
LOW = ("w4a16_g32", "w4a16_g128", "mxfp4_dynamic", "w8a8_dynamic")
"""What plans of several schemes choose from."""
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
"""Of the ops in a subset, in turn."""
BUDGETS = tuple(eighth / 8 for eighth in range(1, 8))
"""Shares of the ops that plans of one scheme quantize."""
SAVINGS = (0.25, 0.5, 0.75, 0.9, 0.95)
"""Shares of the bits that plans of several schemes save, of those that can be."""
MARKS = "<!-- benchmarks/plans.py --write, from here -->", "<!-- benchmarks/plans.py --write, to here -->"


@dataclass(frozen=True)
class Measured:
    """A model under a scheme.

    Attributes:
        model: Calibrated.
        ops: Those that can be quantized.
        nmse: Isolated error of each.
        changes: Change of the whole output by each, in units in which squares are the NMSE; one row an op.
        sketches: Of these, as result files keep them.

    """

    model: CalibratedModel
    ops: list[Op]
    nmse: np.ndarray
    changes: np.ndarray
    sketches: np.ndarray

    @classmethod
    def of(cls, spec: ModelSpec, ops: list[Op], scheme: str) -> Measured:
        """Quantize every op alone."""
        model = calibrate(spec, ops, scheme, engine="replay", divergence=False)
        ops = [op for op in ops if model.reach.refused(op) is None]
        references = list(model._engine.references)
        rows = []
        for op in ops:
            pairs = zip(references, model._engine.isolated(op.name), strict=True)
            rows.append(np.concatenate([(found.double() - clean.double()).numpy().ravel() for clean, found in pairs]))
        changes = np.stack(rows) / np.sqrt(model._reference.size.energy)
        return cls(model, ops, (changes**2).sum(1), changes, sketched(model, changes))

    def joint(self, places: Sequence[int]) -> float:
        """Measure the NMSE with these ops quantized."""
        score = self.model._reference.summed(self.model._engine.isolated(*(self.ops[place].name for place in places)))
        assert not isinstance(score, str), score
        return score.sse / self.model._reference.size.energy


def sketched(model: CalibratedModel, changes: np.ndarray) -> np.ndarray:
    """Sketch changes."""
    import torch

    shapes = [reference.shape for reference in model._engine.references]
    ends = np.cumsum([torch.Size(shape).numel() for shape in shapes])
    parts = zip(make_sketchers(shapes, DIMENSIONS), np.split(changes, ends[:-1], 1), shapes, strict=True)
    return sum(
        np.stack([sketcher(torch.from_numpy(row).reshape(shape)).numpy() for row in part])
        for sketcher, part, shape in parts
    )


def errors(found: Sequence[float], expected: Sequence[float]) -> str:
    """Mean and largest relative error."""
    off = [abs(a - b) / b for a, b in zip(found, expected, strict=True)]
    return f"{np.mean(off):.1%}, {max(off):.1%}"


def cosines(measured: Measured) -> float:
    """Root mean square of the cosine of the changes of two ops."""
    lengths = np.sqrt(np.outer(measured.nmse, measured.nmse)) + 1e-300
    found = (measured.changes @ measured.changes.T / lengths)[np.triu_indices(len(measured.ops), 1)]
    return float(np.sqrt((found**2).mean()))


def predictions(label: str, scheme: str, measured: Measured, subsets: int) -> str:
    """Row of the table of predictions."""
    draws = random.Random(0)
    size = len(measured.ops)
    chosen = [draws.sample(range(size), max(2, round(SHARES[i % 5] * size))) for i in range(subsets)]
    joint = [measured.joint(sorted(subset)) for subset in chosen]
    nmse = measured.nmse
    additive = [float(nmse[subset].sum()) for subset in chosen]
    exact, small = (
        [own_error(float(nmse[subset].sum()), list(vectors[subset])) for subset in chosen]
        for vectors in (measured.changes, measured.sketches)
    )
    cells = (errors(additive, joint), errors(exact, joint), errors(small, joint))
    whole = measured.joint(range(size))
    return f"| {label} | `{scheme}` | {size} | {whole:.3g} | {cosines(measured):.2f} | {' | '.join(cells)} |"


def problem(units: Sequence[Op], schemes: Sequence[tuple[str, Measured]], *, interacting: bool) -> Problem:
    """Make the problem that ``qsens plan`` solves."""
    places = {op.name: place for place, op in enumerate(units)}
    candidates = [
        Candidate(
            places[op.name], scheme, scheme_bits(scheme, 16), float(nmse), float(nmse), sketch if interacting else None
        )
        for scheme, measured in schemes
        for op, nmse, sketch in zip(measured.ops, measured.nmse, measured.sketches, strict=True)
    ]
    listed = tuple(Unit(op.name, (op.name,), (op.type,), op.weights) for op in units)
    return Problem("", tuple(scheme for scheme, _ in schemes), listed, tuple(candidates), 16)


def beside(additive: float, interacting: float, *, same: bool) -> str:
    """Cell of a table: how much less the plan with interactions errs."""
    return f"{additive:.3g}, =" if same else f"{additive:.3g}, {interacting / additive - 1:+.1%}"


def one_scheme(label: str, scheme: str, measured: Measured) -> str:
    """Row of the table of plans of one scheme: joint errors, measured, for each budget."""
    asked = [problem(measured.ops, [(scheme, measured)], interacting=interacting) for interacting in (False, True)]
    cells = []
    for share in BUDGETS:
        need = max(1, round(share * len(measured.ops)))
        plans = [least_error(each, each.counts, need) for each in asked]
        found = [measured.joint(np.flatnonzero(plan)) for plan in plans]
        cells.append(beside(*found, same=bool((plans[0] == plans[1]).all())))
    return f"| {label} | `{scheme}` | {' | '.join(cells)} |"


def several_schemes(label: str, spec: ModelSpec, ops: list[Op], known: dict[str, Measured]) -> str:
    """Row of the table of plans that choose among schemes."""
    schemes = [(scheme, known[scheme]) for scheme in LOW if scheme in known]
    asked = [problem(ops, schemes, interacting=interacting) for interacting in (False, True)]
    cells = []
    for share in SAVINGS:
        plans = [least_error(each, each.saved, share * each.most(each.saved)) for each in asked]
        same = bool((plans[0] == plans[1]).all())
        found = [planned(spec, ops, each.assignment(plan)) for each, plan in zip(asked, plans, strict=True)]
        cells.append(beside(*found, same=same))
    return f"| {label} | {' | '.join(cells)} |"


def planned(spec: ModelSpec, ops: list[Op], assignment: dict[str, str | None]) -> float:
    """Measure the joint error of a plan of several schemes, as ``qsens plan --verify`` does."""
    schemes = {op: scheme_named(name, "plan") for op, name in assignment.items() if name is not None}
    names = {op: name or "unquantized" for op, name in assignment.items()}
    left_out = {op: ("unquantized", "planned") for op, name in assignment.items() if name is None}
    total = calibrate(spec, ops, Assignment("plan", schemes, names, left_out), engine="eager", divergence=False).total()
    assert total.isolated is not None, total.reason
    return total.isolated["nmse"] or 0.0


def solver() -> str:
    """Tell how long plans of a model of 415 ops under three schemes take, in seconds of the processor."""
    asked = random_problem(0, 415, 3, dimensions=DIMENSIONS, common=0.3)
    start = time.process_time()
    least_error(asked, asked.saved, 0.5 * asked.most(asked.saved))
    middle = time.process_time()
    smallest(asked, float(asked.nmse.sum()) * 0.01)
    end = time.process_time()
    return (
        f"Of the processor, a plan for 415 ops with three schemes takes {middle - start:.0f} s, with `--budget-nmse` "
        f"{end - middle:.0f} s."
    )


def tables(models: Sequence[str], schemes: Sequence[str], subsets: int) -> Iterator[str]:
    """Lines of the tables."""
    about = machine()
    rows: dict[str, list[str]] = {"predictions": [], "plans": [], "mixed": []}
    for label in models:
        spec, known = MODELS[label](), {}
        net = spec.model if not callable(spec.model) or hasattr(spec.model, "named_modules") else spec.model()
        ops = list(list_ops(net))
        for scheme in schemes:
            start = time.perf_counter()
            known[scheme] = Measured.of(MODELS[label](), ops, scheme)
            rows["predictions"].append(predictions(label, scheme, known[scheme], subsets))
            rows["plans"].append(one_scheme(label, scheme, known[scheme]))
            took = time.perf_counter() - start
            print(f"{rows['predictions'][-1]}\n{rows['plans'][-1]}  {took:.0f} s", file=sys.stderr, flush=True)
        if len([scheme for scheme in LOW if scheme in known]) > 1:
            rows["mixed"].append(several_schemes(label, MODELS[label](), ops, known))
            print(rows["mixed"][-1], file=sys.stderr, flush=True)
    yield f"Measured by `python benchmarks/plans.py --write` on {about['cpu']}, torch {about['torch']}. {solver()}"
    yield ""
    yield f"Relative error of the predicted joint nmse of {subsets} random subsets of the ops, mean and largest:"
    yield ""
    yield "| model | scheme | ops | nmse of all | cosine, rms | sum of isolated | with interactions | from sketches |"
    yield "|---|---|---|---|---|---|---|---|"
    yield from rows["predictions"]
    yield ""
    yield "Measured joint nmse of the plan by additive scores, and how much less or more that of the plan with"
    yield "interactions is (`=`: it is the same plan), where a share of the ops is quantized:"
    yield ""
    yield f"| model | scheme | {' | '.join(f'{share:.1%}' for share in BUDGETS)} |"
    yield f"|---|---|{'---|' * len(BUDGETS)}"
    yield from rows["plans"]
    if rows["mixed"]:
        yield ""
        chosen = ", ".join(f"`{scheme}`" for scheme in LOW if scheme in schemes)
        yield f"The same of plans that choose for every op among {chosen} and none, where a share"
        yield "of the bits that can be saved is saved:"
        yield ""
        yield f"| model | {' | '.join(f'{share:.0%}' for share in SAVINGS)} |"
        yield f"|---|{'---|' * len(SAVINGS)}"
        yield from rows["mixed"]


def main() -> None:
    """Read the command line, measure, and print or write."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, metavar="SCHEME")
    parser.add_argument("--subsets", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="into docs/plan.md, between its markers")
    given = parser.parse_args()
    lines = list(tables(given.models, given.schemes, given.subsets))
    print("\n".join(lines))
    if given.write:
        page = HERE.parent / "docs" / "plan.md"
        before, _, rest = page.read_text().partition(MARKS[0])
        _, _, after = rest.partition(MARKS[1])
        page.write_text("\n".join([before + MARKS[0], "", *lines, "", MARKS[1] + after]))


if __name__ == "__main__":
    main()
