"""How good the estimates of engine probe are: python benchmarks/estimates.py [OPTION...] [MODEL...].

Estimates all ops of each model with several seeds of the probes, and compares them with what engine delta measures.
Needs scikit-learn for the digits, and the real weights of MiniLM. With --write it makes docs/estimates.md anew. With
--states it estimates keys and values instead of layers, and --write makes that part of the page, and no other. With
--checkpoint it runs pytest with engine probe on a checkpoint of Qwen2.5-VL-3B instead (`qsens standin qwen2_5_vl_3b
CHECKPOINT` makes one), and prints what that takes.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from scipy.stats import spearmanr
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import scale
from digits import digits_cnn
from subjects import Subject, language_model
from text_model import text_model
from timing import Forwards, machine, seconds

from pytest_qsens.calibrated import calibrate
from pytest_qsens.engines import probe
from pytest_qsens.graph.attention import list_states
from pytest_qsens.graph.backward import Backward
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.models.resolve import resolve
from pytest_qsens.models.source import ModelRequest
from pytest_qsens.ops import CACHED
from tests.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from pytest_qsens.calibrated import CalibratedModel
    from pytest_qsens.graph.backward import Gradient
    from pytest_qsens.models.spec import ModelSpec
    from pytest_qsens.ops import Op

HERE = Path(__file__).resolve().parent

MODELS: dict[str, Callable[[], ModelSpec]] = {
    "MiniLM": lambda: resolve(ModelRequest("minilm")).load(),
    "tiny_qwen2_5_vl": lambda: resolve(ModelRequest("tiny_qwen2_5_vl")).load(),
    "CNN trained on digits": digits_cnn,
    "causal LM, 6 layers": lambda: language_model(6, 4096, 64, 2).spec,
}

HELD_OUT: dict[str, Callable[[], ModelSpec]] = {
    "another CNN trained on digits": lambda: digits_cnn(seed=1),
    "small ViT": ARCHITECTURES["vit"].spec,
    "small GPT-2": ARCHITECTURES["gpt2"].spec,
    "small Whisper": ARCHITECTURES["whisper"].spec,
    "small Qwen3-VL": ARCHITECTURES["qwen3_vl"].spec,
}
"""What no constant of the estimates was chosen on."""

LAYERS = "w8a8"

WITH_STATES: dict[str, tuple[Callable[[], ModelSpec], tuple[str, ...]]] = {
    "causal LM trained on text": (text_model, ("kv_int8", "kv_fp8", "kv_int4_dynamic_g16_asym")),
    "MiniLM": (MODELS["MiniLM"], ("kv_int8", "kv_fp8", "kv_int4_dynamic_g32_asym")),
    "small Whisper": (
        HELD_OUT["small Whisper"],
        ("kv_int8", "kv_fp8", "kv_int4_dynamic_g16_asym", "kv_int8_dynamic"),
    ),
    "another, 6 layers": (partial(text_model, 1, 6), ("kv_int8", "kv_fp8", "kv_int4_dynamic_g16_asym")),
}
"""Models with keys and values, and the schemes of these that are estimated."""

_MARK = "<!-- benchmarks/estimates.py --states --write, {} here -->"
_STATES_PART = re.compile(rf"(?<={_MARK.format('from')}\n).*?(?=\n{_MARK.format('to')})", re.DOTALL)

SEEDS = 5


def subject(spec: ModelSpec) -> Subject:
    """Wrap a model for timing."""
    assert isinstance(spec.model, torch.nn.Module)
    listed = list_ops(spec.model)
    return Subject("", spec, spec.model, listed, listed, narrow=False)


def settle(model: CalibratedModel) -> None:
    """Finish what belongs to calibration: the search for scales."""
    for ranges in (model._calibration._inputs, model._calibration._outputs):
        for observed in ranges.values():
            observed.qparams()


def ops_of(spec: ModelSpec, scheme: str) -> tuple[Op, ...]:
    """Layers, or keys and values, whatever the scheme is of."""
    if scheme == LAYERS:
        return list_ops(spec.model)  # type: ignore[arg-type] # a module
    return tuple(op for op in list_states(spec.model) if op.type in CACHED)  # type: ignore[arg-type]


def exact_scores(spec: ModelSpec, mode: str, scheme: str) -> dict[str, float]:
    """Measure all ops: op → sum of squared errors; noise with everything else quantized is left out."""
    ops = ops_of(spec, scheme)
    model = calibrate(spec, ops, scheme, engine="delta", divergence=False)
    engine: Any = model._engine
    with torch.no_grad():
        engine.check()
        measure = engine.together if mode == "isolated" else engine.all_but
        scores = {op.name: measure(op.name) for op in ops if op.name in engine.exercised}
    return {op: score.sse for op, score in scores.items() if score.finite and score.sse}


def peer_scores(model: CalibratedModel, ops: Mapping[str, float], *, logits: bool) -> dict[str, float]:
    """Score as ModelOpt does: the sum of squares of the loss's gradient times the change of an op's output.

    The loss is the cross entropy with the model's own most likely classes, or the mean square of an output without
    classes. Gradients go through the same graph as those of the estimates, so that costs compare.
    """
    engine: Any = model._engine
    found = dict.fromkeys(ops, 0.0)
    for run in engine._clean:
        named = {node: op for op in ops for node in run.graph.calls.get(op, ())}

        def watch(gradient: Gradient, named: Mapping[Any, str] = named) -> None:
            op, call = named[gradient.node], gradient.call
            if call.kind == "embedding":
                quantized = model._simulator.output(op, call)
            else:
                quantized, _ = model._simulator.rounded(op, call)
            found[op] += float((gradient.output[0] * (quantized - gradient.value)).double().square().sum())

        start = loss_gradient(run.output, logits=logits)
        Backward(run, engine._weights, engine._region, named).passes([lambda start=start: start], watch)  # type: ignore[misc] # a probe
        run.release_all()
    return found


def loss_gradient(output: Tensor, *, logits: bool) -> Tensor:
    """Gradient of the peer's loss."""
    with torch.enable_grad():
        values = output.detach().requires_grad_()
        flat = values.reshape(-1, values.shape[-1])
        loss = functional.cross_entropy(flat, flat.detach().argmax(-1)) if logits else (values**2).mean()
        return torch.autograd.grad(loss, values)[0]


def evaluate(name: str, mode: str, scheme: str = LAYERS) -> dict[str, Any]:
    """Estimate with several seeds."""
    make = (MODELS | HELD_OUT)[name] if scheme == LAYERS else WITH_STATES[name][0]
    spec, exact = make(), exact_scores(make(), mode, scheme)
    runs = []
    forwards = None
    peer: dict[str, float] = {}
    for seed in range(SEEDS):
        probe.SEED = 1000 * seed + probe.FIRST_SEED
        model = calibrate(spec, ops_of(spec, scheme), scheme, engine="probe", divergence=False)
        forwards = forwards or (Forwards(subject(spec)) if scheme == LAYERS else None)
        settle(model)
        engine: Any = model._engine
        if mode == "fallback":
            model._joint_scores()
        with torch.no_grad(), forwards.around() if forwards else nullcontext() as unit:
            spent = seconds(partial(engine.estimates, mode))
        estimates = {op: found["sse"] for op, found in engine.estimates(mode).found.items() if op in exact}
        values = {op: estimates[op].value if op in estimates else exact[op] for op in exact}
        logarithms = {op: abs(math.log(values[op] / exact[op])) for op in exact if values[op] > 0}
        runs.append(
            {
                "forwards": spent / unit.seconds if unit else math.nan,
                "spearman": float(spearmanr([values[op] for op in exact], list(exact.values())).statistic),
                "median": statistics.median(logarithms.values()),
                "median_estimated": statistics.median(logarithms.get(op, 0.0) for op in estimates),
                "within": sum(found.low <= exact[op] <= found.high for op, found in estimates.items()),
                "estimated": len(estimates),
            }
        )
        if forwards and seed == 0 and mode == "isolated":
            with torch.no_grad(), forwards.around() as unit:
                start = time.perf_counter()
                peer = peer_scores(model, exact, logits=spec.logits)
                spent = time.perf_counter() - start
            peer_cost = spent / unit.seconds
    found: dict[str, Any] = {"model": name, "scheme": scheme, "mode": mode, "ops": len(exact), "runs": runs}
    for key in ("forwards", "spearman", "median", "median_estimated"):
        found[key] = statistics.median(run[key] for run in runs)
    found["worst_spearman"] = min(run["spearman"] for run in runs)
    found["within"], found["estimated"] = (sum(run[key] for run in runs) for key in ("within", "estimated"))
    if peer:
        found["peer_spearman"] = float(spearmanr([peer[op] for op in exact], list(exact.values())).statistic)
        found["peer_forwards"] = peer_cost
    return found


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Write the results as a table."""
    lines = [
        "| model | mode | ops | forwards | Spearman (worst seed) | median log ratio | in the interval | peer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        peer = f"{row['peer_spearman']:.3f} ({row['peer_forwards']:.1f})" if "peer_spearman" in row else "-"
        lines.append(
            f"| {row['model']} | {row['mode']} | {row['ops']} | {row['forwards']:.1f} | {row['spearman']:.4f} "
            f"({row['worst_spearman']:.4f}) | {row['median_estimated']:.3f} | {share(row)} | {peer} |"
        )
    return "\n".join(lines)


def states_table(rows: Iterable[dict[str, Any]]) -> str:
    """Write the results of keys and values as a table."""
    lines = [
        "| model | scheme | mode | ops | Spearman (worst seed) | median log ratio | in the interval |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['model']} | `{row['scheme']}` | {row['mode']} | {row['ops']} | {row['spearman']:.4f} "
        f"({row['worst_spearman']:.4f}) | {row['median_estimated']:.3f} | {share(row)} |"
        for row in rows
    ]
    return "\n".join(lines)


def measure_states(names: Iterable[str], modes: Iterable[str], *, write: bool) -> list[dict[str, Any]]:
    """Estimate keys and values of models, and maybe write that part of the page and its template as rows come."""
    rows = []
    for mode in modes:
        for name in names:
            for scheme in WITH_STATES[name][1]:
                rows.append(evaluate(name, mode, scheme))
                print(states_table(rows[-1:]).splitlines()[-1], flush=True)
                if write:
                    write_states(rows)
    return rows


def write_states(rows: Sequence[dict[str, Any]]) -> None:
    """Put results of keys and values into the page and its template."""
    shares = [
        f"{all_of([row for row in rows if row['mode'] == mode])} ({mode})"
        for mode in dict.fromkeys(row["mode"] for row in rows)
    ]
    told = f"Intervals that hold the exact value, over all of them: {' and '.join(shares)}."
    for page in (HERE / "estimates.md.in", HERE.parent / "docs" / "estimates.md"):
        page.write_text(_STATES_PART.sub(lambda _: f"{told}\n\n{states_table(rows)}", page.read_text()))


def share(row: Mapping[str, Any]) -> str:
    """Share of intervals that hold the exact value."""
    return f"{row['within'] / row['estimated']:.0%}"


def pooled(rows: Iterable[dict[str, Any]], mode: str) -> str:
    """Share over all held-out models."""
    return all_of([row for row in rows if row["mode"] == mode and row["model"] in HELD_OUT])


def all_of(rows: Sequence[dict[str, Any]]) -> str:
    """Share over several."""
    return share({key: sum(row[key] for row in rows) for key in ("within", "estimated")}) if rows else "-"


def full_size(checkpoint: Path) -> None:
    """Estimate all ops of a checkpoint with pytest, in a process of its own, and print what that takes."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        files, result = scale.write_data(directory), directory / "result.json"
        arguments = [
            *(f"--rootdir={directory}", f"--qsens-model={scale.PRESET}", f"--qsens-checkpoint={checkpoint}"),
            *(f"--qsens-calib={files['calib']}", f"--qsens-eval={files['eval']}", f"--qsens-json={result}"),
            *("--qsens-engine=probe", "--qsens-no-cache", "--qsens-profile", str(directory)),
        ]
        found = scale.run(arguments, torch.get_num_threads(), None)
        document = json.loads(result.read_text()) if result.exists() else {}
    print("\n".join(found["end"]))
    print(f"exit {found['exit']}; {found['seconds']:.0f} s in all; peak PSS {found['peak'] / 1e9:.2f} GB, ")
    print(f"of which {found['files'] / 1e9:.2f} GB of files; largest private {found['largest_private'] / 1e9:.2f} GB")
    if document:
        print(json.dumps({key: document["run"][key] for key in ("engine", "cost", "profile")}, indent=1))
        status = [op["status"] for op in document["ops"]]
        print({kind: status.count(kind) for kind in sorted(set(status))})


def main() -> None:
    """Read the command line, and measure."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS | HELD_OUT))
    parser.add_argument("--mode", choices=("isolated", "fallback", "both"), default="isolated")
    parser.add_argument("--states", action="store_true", help="keys and values of: " + ", ".join(WITH_STATES))
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--write", action="store_true", help="write docs/estimates.md")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="estimate a checkpoint of full size instead")
    options = parser.parse_args()
    if options.checkpoint:
        full_size(options.checkpoint.resolve())
        return
    modes = ("isolated", "fallback") if options.mode == "both" else (options.mode,)
    about, rows = machine(), []
    if options.states:
        rows = measure_states(options.models or WITH_STATES, modes, write=options.write)
    for mode in () if options.states else modes:
        for name in options.models or MODELS | HELD_OUT:
            took = seconds(lambda name=name, mode=mode: rows.append(evaluate(name, mode)))  # type: ignore[misc] # of strings
            print(f"{table(rows[-1:]).splitlines()[-1]}  {took:.0f} s", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    if options.states:
        return
    print(table(rows))
    shares = {mode: pooled(rows, mode) for mode in modes}
    print("held-out models together:", shares)
    if options.write:
        page = (HERE / "estimates.md.in").read_text()
        values = {
            "machine": f"{about['cpu']} ({about['capability']}), {about['threads']} threads, torch {about['torch']}",
            "table": table(row for row in rows if row["model"] in MODELS),
            "held_out": table(row for row in rows if row["model"] in HELD_OUT),
            "pooled": " and ".join(f"{found} ({mode})" for mode, found in shares.items()),
            "seeds": str(SEEDS),
        }
        for key, value in values.items():
            page = page.replace(f"{{{key}}}", value)
        (HERE.parent / "docs" / "estimates.md").write_text(page)


if __name__ == "__main__":
    main()
