"""How good the estimates of engine probe are: python benchmarks/estimates.py [--json FILE] [--write] [MODEL...].

Estimates all ops of each model with several seeds of the probes, and compares them with what engine delta measures.
Needs scikit-learn for the digits, and the real weights of MiniLM. With --write it makes docs/estimates.md anew.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from scipy.stats import spearmanr
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from subjects import Subject, language_model
from timing import Forwards, machine, seconds

from pytest_qsens.calibrated import calibrate
from pytest_qsens.engines import probe
from pytest_qsens.engines.probe import ProbeEngine
from pytest_qsens.graph.capture import run_model
from pytest_qsens.graph.intercept import OpInterceptor
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.models.resolve import resolve
from pytest_qsens.models.source import ModelRequest
from tests.digits import digits

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from pytest_qsens.calibrated import CalibratedModel
    from pytest_qsens.graph.calls import Call
    from pytest_qsens.models.spec import ModelSpec

HERE = Path(__file__).resolve().parent

MODELS: dict[str, Callable[[], ModelSpec]] = {
    "MiniLM": lambda: resolve(ModelRequest("minilm")).load(),
    "tiny_qwen2_5_vl": lambda: resolve(ModelRequest("tiny_qwen2_5_vl")).load(),
    "CNN trained on digits": digits,
    "causal LM, 6 layers": lambda: language_model(6, 4096, 64, 2).spec,
}

SEEDS = 5


def subject(spec: ModelSpec) -> Subject:
    """Wrap a model for timing."""
    assert isinstance(spec.model, torch.nn.Module)
    listed = list_ops(spec.model)
    return Subject("", spec, spec.model, listed, listed, narrow=False)


def settle(model: CalibratedModel) -> None:
    """Finish what belongs to calibration: the search for scales, and the check of differences."""
    for ranges in (model._calibration._inputs, model._calibration._outputs):
        for observed in ranges.values():
            observed.qparams()
    assert isinstance(model._engine, ProbeEngine)
    model._engine.check()


def exact_scores(spec: ModelSpec, mode: str) -> dict[str, float]:
    """Measure all ops: op → sum of squared errors."""
    ops = list_ops(spec.model)  # type: ignore[arg-type] # a module
    model = calibrate(spec, ops, "w8a8", engine="delta", divergence=False)
    found = {}
    for op in ops:
        scores = model.score(op, [mode]).modes.get(mode)  # type: ignore[list-item, call-overload] # a mode
        if scores is not None and scores["sse"]:
            found[op.name] = scores["sse"]
    return found


def peer_scores(spec: ModelSpec, model: CalibratedModel, ops: Mapping[str, float]) -> tuple[dict[str, float], float]:
    """Score as ModelOpt does: the sum of squares of the loss's gradient times the change of an op's output.

    The loss is the cross entropy with the model's own most likely classes, or the mean square of an output without
    classes. Returns op → score, and seconds.
    """
    start = time.perf_counter()
    found = dict.fromkeys(ops, 0.0)
    for batch in spec.evaluation:
        outputs: list[tuple[str, Tensor, Tensor]] = []

        def handler(op: str, call: Call, run: Callable[[], Tensor], outputs: list[Any] = outputs) -> Tensor:
            output = run()
            if op not in ops:
                return output
            with torch.no_grad():
                change = model._simulator.output(op, call) - output
            output = output.detach() + (output - output.detach() if output.requires_grad else 0)
            tap = torch.zeros_like(output, requires_grad=True)
            outputs.append((op, tap, change))
            return output + tap

        with torch.enable_grad(), OpInterceptor(spec.model, handler):  # type: ignore[arg-type] # a module
            output = run_model(spec.model, batch, spec.output)  # type: ignore[arg-type] # a module
            flat = output.reshape(-1, output.shape[-1])
            loss = functional.cross_entropy(flat, flat.detach().argmax(-1)) if spec.logits else (output**2).mean()
        gradients = torch.autograd.grad(loss, [tap for _, tap, _ in outputs], allow_unused=True)
        for (op, _, change), gradient in zip(outputs, gradients, strict=True):
            if gradient is not None:
                found[op] += float((gradient * change).double().square().sum())
    return found, time.perf_counter() - start


def evaluate(name: str, mode: str) -> dict[str, Any]:
    """Estimate with several seeds."""
    spec = MODELS[name]()
    exact = exact_scores(MODELS[name](), mode)
    runs = []
    forwards = None
    peer: dict[str, float] = {}
    for seed in range(SEEDS):
        probe.SEED = 1000 * seed + probe.FIRST_SEED
        model = calibrate(spec, list_ops(spec.model), "w8a8", engine="probe", divergence=False)  # type: ignore[arg-type]
        forwards = forwards or Forwards(subject(spec))
        settle(model)
        engine: Any = model._engine
        if mode == "fallback":
            model._joint_scores()
        with torch.no_grad(), forwards.around() as unit:
            spent = seconds(partial(engine.estimates, mode))
        estimates = {op: found["sse"] for op, found in engine.estimates(mode).found.items() if op in exact}
        values = {op: estimates[op].value if op in estimates else exact[op] for op in exact}
        logarithms = {op: abs(math.log(values[op] / exact[op])) for op in exact if values[op] > 0}
        runs.append(
            {
                "forwards": spent / unit.seconds,
                "spearman": float(spearmanr([values[op] for op in exact], list(exact.values())).statistic),
                "median": statistics.median(logarithms.values()),
                "median_estimated": statistics.median(logarithms.get(op, 0.0) for op in estimates),
                "within": sum(found.low <= exact[op] <= found.high for op, found in estimates.items()),
                "estimated": len(estimates),
            }
        )
        if seed == 0 and mode == "isolated":
            with forwards.around() as unit:
                peer, spent = peer_scores(spec, model, exact)
            peer_cost = spent / unit.seconds
    found: dict[str, Any] = {"model": name, "mode": mode, "ops": len(exact), "runs": runs}
    for key in ("forwards", "spearman", "median", "median_estimated"):
        found[key] = statistics.median(run[key] for run in runs)
    found["worst_spearman"] = min(run["spearman"] for run in runs)
    found["coverage"] = sum(run["within"] for run in runs) / sum(run["estimated"] for run in runs)
    if peer:
        found["peer_spearman"] = float(spearmanr([peer[op] for op in exact], list(exact.values())).statistic)
        found["peer_forwards"] = peer_cost
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Write the results as a table."""
    lines = [
        "| model | mode | ops | forwards | Spearman (worst seed) | median log ratio | in the interval | peer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        peer = f"{row['peer_spearman']:.3f} ({row['peer_forwards']:.1f})" if "peer_spearman" in row else "-"
        lines.append(
            f"| {row['model']} | {row['mode']} | {row['ops']} | {row['forwards']:.1f} | {row['spearman']:.4f} "
            f"({row['worst_spearman']:.4f}) | {row['median_estimated']:.3f} | {row['coverage']:.0%} | {peer} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Read the command line, and measure."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--mode", choices=("isolated", "fallback", "both"), default="isolated")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--write", action="store_true", help="write docs/estimates.md")
    options = parser.parse_args()
    modes = ("isolated", "fallback") if options.mode == "both" else (options.mode,)
    rows = [evaluate(name, mode) for mode in modes for name in options.models or MODELS]
    about = machine()
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    if options.write:
        page = (HERE / "estimates.md.in").read_text()
        place = f"{about['cpu']} ({about['capability']}), {about['threads']} threads, torch {about['torch']}"
        text = page.replace("{machine}", place).replace("{table}", table(rows)).replace("{seeds}", str(SEEDS))
        (HERE.parent / "docs" / "estimates.md").write_text(text)


if __name__ == "__main__":
    main()
