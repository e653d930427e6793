"""How the numbers of all engines and of Intel Neural Compressor compare; writes docs/accuracy.md.

Needs an environment with the extra ``inc``: python benchmarks/accuracy.py. It takes about half an hour on two cores.
"""

from __future__ import annotations

import gc
import resource
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from scipy.stats import spearmanr
from small_nets import cnn, mlp
from timing import machine
from torch.fx import GraphModule

from pytest_qsens.calibrated import CalibratedModel, calibrate
from pytest_qsens.engines import inc as inc_module
from pytest_qsens.engines.fx import FxEngine
from pytest_qsens.engines.inc import IncEngine
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.metrics import same
from pytest_qsens.models.resolve import resolve
from pytest_qsens.models.source import ModelRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    from pytest_qsens.models.spec import ModelSpec

DOCUMENT = Path(__file__).parent.parent / "docs" / "accuracy.md"
SCHEME = "w8a8"
WORLDS = 8


def preset(name: str, text: str | None = None) -> Callable[[], ModelSpec]:
    """Load a preset, on its own data or on lines of text."""

    def build() -> ModelSpec:
        if text is None:
            return resolve(ModelRequest(name)).load()
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "lines.txt"
            file.write_text(text)
            return resolve(ModelRequest(name, calib=str(file), eval=str(file))).load()

    return build


TEXT = "A clock tower rises above the market square.\nTwo boats lie on the sand by the sea.\n"
MODELS = {
    "tiny Qwen2.5-VL, images and text": preset("tiny_qwen2_5_vl"),
    "tiny Qwen2.5-VL, text only": preset("tiny_qwen2_5_vl", TEXT),
    "MiniLM": preset("minilm"),
    "MLP": mlp,
    "CNN (batch norms, residual additions)": cnn,
}


@cache
def engine(name: str, model: str) -> CalibratedModel:
    """Calibrate a model for an engine, once."""
    spec = MODELS[model]()
    assert not callable(spec.model) or isinstance(spec.model, torch.nn.Module)
    return calibrate(spec, list_ops(spec.model), SCHEME, engine=name)  # type: ignore[arg-type]  # a loaded model


def outputs(model: CalibratedModel, mode: str, op: str) -> list[Tensor]:
    """Return the outputs of all evaluation batches."""
    with torch.no_grad():
        return list(getattr(model._engine, mode)(op))


def ops_of(model: str) -> list[str]:
    """Ops that Intel Neural Compressor can quantize in a model that still runs."""
    driven = engine("inc", model)._engine
    assert isinstance(driven, IncEngine)
    return [
        op.name
        for op in list_ops(driven._model)
        if op.name in driven._quantizable - driven._without_kernels().keys() and op.name in driven.exercised
    ]


@dataclass
class Agreement:
    """How many of the compared outputs have the same bits, and how far the errors of the others are apart."""

    identical: int = 0
    compared: int = 0
    apart: float = 0.0

    def add(self, reference: Sequence[Tensor], one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
        """Compare two outputs."""
        self.compared += 1
        if all(same(a, b) for a, b in zip(one, other, strict=True)):
            self.identical += 1
            return
        first, second = error(reference, one), error(reference, other)
        self.apart = max(self.apart, abs(first - second) / second)

    def __str__(self) -> str:
        apart = f", errors up to {self.apart:.1%} apart" if self.apart else ""
        return f"{self.identical} of {self.compared}{apart}"


def error(reference: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Sum of squared differences."""
    pairs = zip(reference, found, strict=True)
    return sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)


def fx_against_inc(model: str) -> dict[str, Agreement]:
    """Compare the kernels packed once with Intel Neural Compressor, over all ops."""
    driven, packed = engine("inc", model), engine("fx", model)
    a, b = driven._engine, packed._engine
    assert isinstance(a, IncEngine)
    assert isinstance(b, FxEngine)
    broken = a._without_kernels()
    b._quantizable = b._quantizable - broken.keys()  # what it cannot run stays in fp32 in both
    ops = ops_of(model)
    found = {"fallback": Agreement(), "cumulative": Agreement(), "isolated": Agreement()}
    reference = a.references
    with torch.no_grad():
        for op in ops:
            found["fallback"].add(reference, list(b.fallback(op)), a.fall_back(op).outputs)
        for count, measured in enumerate(a.requantize(ops), 1):
            found["cumulative"].add(reference, list(b.quantized(ops[:count])), measured.outputs)
        for op in ops[:: max(1, len(ops) // 8)]:
            found["isolated"].add(reference, list(b.isolated(op)), next(a.requantize([op])).outputs)
    return found


def simulated_against_kernels(model: str) -> dict[str, Agreement]:
    """Compare the simulation that gates with the kernels, over all ops."""
    simulated, packed = engine("replay", model), engine("fx", model)
    ops = [op for op in ops_of(model) if op in packed._engine._quantizable]  # type: ignore[attr-defined]  # fx's
    simulated._engine._quantizable = [*packed._engine._quantizable]  # type: ignore[attr-defined]  # replay's
    found = {"isolated": Agreement(), "fallback": Agreement()}
    for mode, agreement in found.items():
        for op in ops:
            agreement.add(packed._engine.references, outputs(simulated, mode, op), outputs(packed, mode, op))
    return found


def trap() -> str:
    """Score every vision op on text alone with Intel Neural Compressor itself."""
    spec = MODELS["tiny Qwen2.5-VL, text only"]()
    model: nn.Module = spec.model.eval().requires_grad_(False)  # type: ignore[union-attr]  # a loaded model
    names = [op.name for op in list_ops(model)]
    with torch.no_grad():
        driven = IncEngine(model, spec.evaluation, spec.output, names, spec.calibration)
        vision = [name for name in names if ".visual." in name]
        values = {driven.fall_back(name).sse for name in vision}
        list(driven.joint())
    everything = driven.reported["inc_sse"]
    ours = calibrate(spec, list_ops(model), SCHEME, engine="fx")
    statuses = {ours.score(op, ["isolated"]).status for op in list_ops(model) if ".visual." in op.name}
    return (
        f"{len(vision)} vision ops, {len(values)} different value: {min(values):.9g}. Everything quantized: "
        f"{everything:.9g}. Here: `{'`, `'.join(statuses)}`, and no number."
    )


def worlds() -> Iterator[CalibratedModel]:
    """MiniLM, and the same with its norm weights moved by a millionth, seeded."""
    for seed in range(WORLDS + 1):
        spec = MODELS["MiniLM"]()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in spec.model.named_parameters():  # type: ignore[union-attr]  # a loaded model
                if "LayerNorm" in name and seed:
                    weight.mul_(1 + 1e-6 * torch.randn(weight.shape, generator=generator))
        yield calibrate(spec, list_ops(spec.model), SCHEME, engine="fx")  # type: ignore[arg-type]  # as above


def noise() -> tuple[list[str], list[str]]:
    """How stable rankings are, and how many gains can be told from noise, on MiniLM."""
    rankings: dict[str, list[list[float]]] = {"isolated": [], "fallback": [], "gain": []}
    flags: list[bool] = []
    gains: list[float] = []
    for number, model in enumerate(worlds()):
        ops = [op for op in list_ops(model._engine._model) if op.name in model._engine.exercised]  # type: ignore[attr-defined]
        ops = [op for op in ops if op.name != "pooler.dense"]  # does not reach the scored output
        if number == 0:
            results = [model.score(op, ["isolated", "fallback"]) for op in ops]
            flags = [bool(r.fallback["distinguishable"]) for r in results if r.fallback]
            gains = [r.fallback["gain"] or 0.0 for r in results if r.fallback]
        reference = model._engine.references
        fallback = [error(reference, outputs(model, "fallback", op.name)) for op in ops]
        rankings["isolated"].append([error(reference, outputs(model, "isolated", op.name)) for op in ops])
        rankings["fallback"].append(fallback)
    sure = [i for i, flag in enumerate(flags) if flag]
    rows = []
    for name, values, kept in (
        ("`isolated`", rankings["isolated"], range(len(flags))),
        ("`fallback`, Intel Neural Compressor's order", rankings["fallback"], range(len(flags))),
        ("`fallback`, only ops that are `distinguishable`", rankings["fallback"], sure),
    ):
        found = [spearmanr([values[0][i] for i in kept], [other[i] for i in kept]).statistic for other in values[1:]]
        rows.append(f"| {name} | {len(kept)} | {statistics.mean(found):.4f} | {min(found):.4f} |")
    worse = sum(gain < 0 for gain in gains)
    sure_worse = sum(gains[i] < 0 for i in sure)
    facts = [
        f"{sum(flags)} of {len(flags)} ops have a gain that can be told from noise.",
        f"Restoring an op to fp32 makes the error larger for {worse} of {len(gains)} ops ({sure_worse} beyond noise).",
    ]
    return rows, facts


def wrong_module() -> str:
    """Exclude one op of the MLP, and read the scores where Intel Neural Compressor's own code reads them."""
    spec = mlp()
    names = [op.name for op in list_ops(spec.model)]  # type: ignore[arg-type]  # a loaded model
    with torch.no_grad():
        driven = IncEngine(spec.model.requires_grad_(False), spec.evaluation, spec.output, names, spec.calibration)  # type: ignore[union-attr, arg-type]
        excluded, others = names[0], names[1:]
        own: dict[str, float] = {}
        fp32 = driven._keys[excluded]
        config = inc_module._in_fp32(driven._config, [fp32])
        config["op"].move_to_end(fp32)  # where an excluded op goes
        with inc_module._quiet():
            from neural_compressor.adaptor.torch_utils import util

            vars(util)["sorted"] = lambda keys, key, **options: (
                own.update((k[0], float(key(k))) for k in keys) or sorted(keys, key=key, **options)
            )
            try:
                util.get_mse_order_per_fp32(driven._adaptor, spec.model, dict(spec.evaluation[0]), config)
            finally:
                del vars(util)["sorted"]
        ours = {op: error(driven.references, list(driven._outputs(set(others) - {op}, None))) for op in others}
    zero = sum(own[op] == 0 for op in others)
    return (
        f"{zero} of {len(others)} scores are 0; read at the scored output, they are {min(ours.values()):.3g} and more."
    )


def cost(model: str, count: int = 4) -> tuple[str, str]:
    """Seconds per op side by side, and what is left in memory per op by Intel Neural Compressor as it is."""
    driven, packed = engine("inc", model), engine("fx", model)
    a, b = driven._engine, packed._engine
    ops = ops_of(model)
    chosen = ops[:: max(1, len(ops) // count)][:count]
    with torch.no_grad():
        list(b.fallback(chosen[0]))  # buffers that are kept for later runs
    times: dict[str, list[float]] = {"inc": [], "fx": []}
    kept: dict[str, list[int]] = {"inc": [], "fx": []}
    memory: dict[str, list[float]] = {"inc": [], "fx": []}
    cleared = inc_module.assert_and_get_unique_device
    inc_module.assert_and_get_unique_device = _Uncleared()  # type: ignore[assignment]  # as it is without us
    try:
        with torch.no_grad():
            for op in chosen:
                for name, run in (("inc", a), ("fx", b)):
                    graphs, before = live_graphs(), resident()
                    start = time.perf_counter()
                    list(run.fallback(op))
                    times[name].append(time.perf_counter() - start)
                    kept[name].append(live_graphs() - graphs)
                    memory[name].append(resident() - before)
    finally:
        inc_module.assert_and_get_unique_device = cleared
        cleared.cache_clear()
    median = statistics.median
    slow, fast = median(times["inc"]), median(times["fx"])
    forward = driven.reference_seconds
    left = {name: f"{median(kept[name]):.0f} | {median(memory[name]):.1f} MB" for name in kept}
    seconds = f"{forward * 1e3:.3g} ms | {slow:.3g} s | {fast * 1e3:.3g} ms"
    ratios = f"{slow / fast:.0f} | {slow / forward:.0f} | {fast / forward:.2f}"
    return (
        f"| {model} | {len(ops)} | {seconds} | {ratios} |",
        f"| {model} | {left['inc']} | {left['fx']} |",
    )


class _Uncleared:
    """Does not clear the cache."""

    @staticmethod
    def cache_clear() -> None:
        """Leave it."""


def live_graphs() -> int:
    """Traced modules alive."""
    gc.collect()
    return sum(isinstance(found, GraphModule) for found in gc.get_objects())


def resident() -> float:
    """Resident memory in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def tables() -> dict[str, str]:
    """Everything that the document needs, by name."""
    own = machine()
    same_numbers = []
    simulated = []
    for model in MODELS:
        found = fx_against_inc(model)
        same_numbers.append(f"| {model} | {found['fallback']} | {found['cumulative']} | {found['isolated']} |")
        ours = simulated_against_kernels(model)
        simulated.append(f"| {model} | {ours['isolated']} | {ours['fallback']} |")
        print(same_numbers[-1], simulated[-1], sep="\n", flush=True)
    engine.cache_clear()
    costs = [cost(model) for model in MODELS]
    engine.cache_clear()
    rows, facts = noise()
    broken = engine("inc", "tiny Qwen2.5-VL, images and text")._engine._without_kernels()  # type: ignore[attr-defined]
    return {
        "machine": f"{own['cpu']} ({own['capability']}), {own['threads']} threads, torch {version('torch')}, "
        f"neural-compressor {version('neural-compressor')}, transformers {version('transformers')}, "
        f"Python {own['python']}",
        "same": "\n".join(same_numbers),
        "simulated": "\n".join(simulated),
        "noise": "\n".join(rows),
        "noise_facts": "\n".join(f"- {fact}" for fact in facts),
        "worlds": str(WORLDS),
        "trap": trap(),
        "wrong_module": wrong_module(),
        "broken": "; ".join(f"`{op}`: {type(e).__name__}: {e}" for op, e in broken.items()),
        "cost": "\n".join(row for row, _ in costs),
        "memory": "\n".join(row for _, row in costs),
    }


def main() -> None:
    """Measure, and write the document."""
    warnings.simplefilter("ignore")
    template = (Path(__file__).parent / "accuracy.md.in").read_text()
    found: dict[str, Any] = tables()
    DOCUMENT.write_text(template.format(**found))
    sys.stdout.write(f"wrote {DOCUMENT}\n")


if __name__ == "__main__":
    main()
