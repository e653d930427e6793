"""How far scores move with the number of threads: python benchmarks/threads.py [MODEL].

Each number of threads is a process of its own, as MKL decides at its first product. The second table is without
the setting that `pytest_qsens.threads` makes, as on machines where torch uses another library.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from pytest_qsens.calibrated import calibrate
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.models.resolve import resolve
from pytest_qsens.models.source import ModelRequest

THREADS = (1, 2, 4)


def measure(model: str) -> dict[str, float]:
    """Isolated and fallback NMSE of every measured op, and the total's."""
    spec = resolve(ModelRequest(model)).load()
    ops = list_ops(spec.model)  # type: ignore[arg-type]  # a loaded model
    calibrated = calibrate(spec, ops, "w8a8")
    results = [*(calibrated.score(op, ["isolated", "fallback"]) for op in ops), calibrated.total()]
    return {f"{r.op} {mode}": scores["nmse"] or 0.0 for r in results for mode, scores in r.modes.items()}


def main() -> None:
    """Print the largest relative difference to one thread."""
    model = sys.argv[1] if len(sys.argv) > 1 else "minilm"
    if os.environ.get("QSENS_BENCHMARK_CHILD"):
        print(json.dumps(measure(model)))
        return
    for setting in ("AUTO,STRICT", "AUTO"):
        scores = []
        for threads in THREADS:
            environment = {"OMP_NUM_THREADS": str(threads), "MKL_CBWR": setting, "QSENS_BENCHMARK_CHILD": "1"}
            command = [sys.executable, __file__, model]
            run = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, check=True)
            scores.append(json.loads(run.stdout))
        for threads, other in zip(THREADS[1:], scores[1:], strict=True):
            moved = {op: abs(other[op] - value) / (value or 1.0) for op, value in scores[0].items()}
            worst = max(moved, key=lambda op: moved[op])
            print(
                f"{model}: MKL_CBWR={setting}: {threads} threads against 1: {moved[worst]:.1e} relative at most, in "
                f"{worst} (NMSE {scores[0][worst]:.1e})"
            )


if __name__ == "__main__":
    main()
