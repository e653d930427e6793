"""How much the worst op of MiniLM owes to padded positions: python benchmarks/minilm_positions.py.

Sentences in a batch are padded to one length, and a model computes values at padded positions that nobody reads.
The plugin scores real tokens only. This prints the worst ops both ways.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_qsens.calibrated import calibrate
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.models.outputs import states
from pytest_qsens.models.resolve import resolve
from pytest_qsens.models.source import ModelRequest

if TYPE_CHECKING:
    from pytest_qsens.models.spec import ModelSpec


def ranking(spec: ModelSpec, scheme: str) -> list[tuple[float, str]]:
    """Isolated NMSE and name of every measured op, worst first."""
    ops = list_ops(spec.model)  # type: ignore[arg-type]  # a loaded model
    model = calibrate(spec, ops, scheme)
    results = [model.score(op, ["isolated"]) for op in ops]
    return sorted(((r.isolated["nmse"] or 0.0, r.op) for r in results if r.isolated), reverse=True)


def main() -> None:
    """Print a table."""
    spec = resolve(ModelRequest("minilm")).load()
    for scheme in ("w8a8", "w8a8_static", "w8a8_dynamic"):
        for positions, chosen in (("real tokens", spec), ("all positions", replace(spec, output=states, rows=None))):
            first, second = ranking(chosen, scheme)[:2]
            print(
                f"{scheme:13} {positions:13} worst {first[1]} {first[0]:.2e}, next {second[1]} {second[0]:.2e}, "
                f"ratio {first[0] / second[0]:.1f}"
            )


if __name__ == "__main__":
    main()
