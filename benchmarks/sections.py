"""What benchmarks/performance.py measures, one function a section.

Each yields parts of what it finds as soon as they are there: they are kept if it fails later.
"""

from __future__ import annotations

import copy
import gc
import random
import statistics
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from products import Flops, time_shares
from scipy.stats import spearmanr
from subjects import Subject, language_model, minilm, resnet
from timing import Forwards, forget_peak, gemm_rates, peak, seconds
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pytest_qsens.calibrated import CalibratedModel, calibrate
from pytest_qsens.graph.capture import run_model
from pytest_qsens.graph.intercept import OpInterceptor
from pytest_qsens.metrics import energy, squared_distance
from pytest_qsens.noise import SEEDS
from pytest_qsens.threads import one_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pytest_qsens.graph.calls import Call
    from pytest_qsens.ops import Op
    from pytest_qsens.results import Mode

Found = dict[str, Any]

SCHEME = "w8a8"
TOKENS = 64
HIDDEN, INTERMEDIATE = 896, 4864
SIGNIFICANT = 1e-9
"""NMSE from which an error is not mostly rounding to fp32."""
KEPT = 1e-3
"""What takes fewer forwards than this was not measured, but known."""


@dataclass(frozen=True)
class Options:
    """How much is measured.

    Attributes:
        layers: Of the text model.
        long_layers: Of the text model where there are more than 1000 tokens.
        few: Ops that stand for all where an op costs a forward or more.
        repeats: Rounds whose median is reported.
        threads: Of torch.
        quick: Whether it is only to be tried: fewer and smaller subjects.

    """

    layers: int
    long_layers: int
    few: int
    repeats: int
    threads: int
    quick: bool

    def text(self, tokens: int = TOKENS, batches: int = 1, least: int = 1) -> Subject:
        """Build the text model, with at least so many layers."""
        layers = max(self.long_layers if tokens > 1000 else self.layers, least)
        return language_model(layers, 16384 if self.quick else 151936, tokens, batches)

    def resnet(self, name: str) -> Subject:
        """Build a ResNet."""
        return resnet(name, *((2, 64) if self.quick else (8, 224)))


def spread(ops: Sequence[Op], count: int) -> list[Op]:
    """Draw ops evenly over the depth: one from each of ``count`` parts, as every n-th would always be of one kind."""
    count = min(count, len(ops))
    draw = random.Random(0)
    return [ops[draw.randrange(i * len(ops) // count, (i + 1) * len(ops) // count)] for i in range(count)]


def calibrated(subject: Subject, engine: str, *, divergence: bool = False) -> CalibratedModel:
    """Prepare the model for its ops to be scored."""
    return calibrate(subject.spec, subject.listed, SCHEME, engine=engine, divergence=divergence, expected=subject.ops)


def errors(model: CalibratedModel, ops: Sequence[Op], mode: Mode = "isolated") -> dict[str, float]:
    """Score ops; returns the NMSE of those that have one.

    Raises:
        RuntimeError: If an op fails, or none is measured.

    """
    results = [model.score(op, [mode]) for op in ops]
    failed = [f"{result.op}: {result.reason}" for result in results if result.status == "failed"]
    found = {r.op: r.modes[mode]["nmse"] or 0.0 for r in results if mode in r.modes}
    if failed or not found:
        raise RuntimeError("; ".join(failed) or "no op was measured")
    return found


def per_op(model: CalibratedModel, ops: Sequence[Op], mode: Mode) -> float:
    """Seconds per op, the mean over the ops."""
    return seconds(lambda: errors(model, ops, mode)) / len(ops)


@contextmanager
def without_noise(model: CalibratedModel) -> Iterator[None]:
    """Leave out what `fallback` measures to say how noisy it is."""
    own = model._engine.perturbs
    model._engine.perturbs = False
    try:
        yield
    finally:
        model._engine.perturbs = own


def rates(options: Options) -> Iterator[Found]:
    """Measure what products of the text model's sizes run at."""
    rows = (TOKENS, 7 * TOKENS) if options.quick else (TOKENS, 7 * TOKENS, 2048)
    yield {"shapes": gemm_rates(HIDDEN, INTERMEDIATE, rows, 5 if options.quick else 30)}


def compare(subject: Subject, options: Options) -> Iterator[Found]:
    """Time `isolated` for all ops, and `fallback` for a few, and both again with a full forward for every op."""
    forwards = Forwards(subject)
    yield described(subject) | {"flops": Flops(subject).shares()}
    few = spread(subject.ops, options.few)
    rounds: list[Found] = []
    for number in range(options.repeats):
        rounds.append({})
        for part in (_default_engine(subject, forwards), _naive_loop(subject, forwards, few)):
            for found in part:
                rounds[number] |= found
                yield {"rounds": rounds}
            gc.collect()  # what one engine keeps is not to be there for the next
    yield {"agreement": _with_replay(subject, forwards)}
    if subject.narrow:
        yield {"divergence": _with_divergence(subject, forwards)}


def described(subject: Subject) -> Found:
    """Say what is measured."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in subject.model.parameters())
    return {"title": subject.title, "ops": len(subject.ops), "narrow": subject.narrow, "model_bytes": size}


def built(subject: Subject, engine: str, *, divergence: bool = False) -> tuple[CalibratedModel, float]:
    """Calibrate, and let the default engine check itself; says how many seconds that takes."""
    start = time.perf_counter()
    model = calibrated(subject, engine, divergence=divergence)
    if engine == "auto":
        errors(model, subject.ops[:1])
    return model, time.perf_counter() - start


def whole_run(subject: Subject, forwards: Forwards) -> tuple[CalibratedModel, Found]:
    """Run mode `isolated` for all ops with the default engine, from nothing to the last score."""
    with forwards.around() as unit:
        before = forget_peak()
        model, setup = built(subject, "auto")
        scoring = per_op(model, subject.ops, "isolated")
        memory = {"before": before, "peak": peak()}
    found = {"unit": unit.seconds, "setup": setup, "per_op": scoring, "engine": model.engine}
    return model, found | {"memory": memory, "engine_reason": model.engine_reason}


def _default_engine(subject: Subject, forwards: Forwards) -> Iterator[Found]:
    found = whole_run(subject, forwards)[1]
    yield {"isolated": found}
    with forwards.around() as unit:
        found = others(subject)
        model, each = found.pop("model"), found["per_op"]
    yield {"fallback": found | {"unit": unit.seconds}}
    with forwards.around() as unit:
        joint = seconds(lambda: [model._joint_scores(seed) for seed in SEEDS])
        noise = per_op(model, subject.ops, "fallback")  # under the seeds: what it is without them is kept
    setup = found["setup"] + joint
    yield {"fallback_noise": {"unit": unit.seconds, "setup": setup, "per_op": each + noise}}


def others(subject: Subject) -> Found:
    """Run mode `fallback` for all ops with the default engine, without noise."""
    start = time.perf_counter()
    model = calibrated(subject, "auto")
    with torch.no_grad():
        model.total()
    setup = time.perf_counter() - start
    with without_noise(model):
        return {"model": model, "setup": setup, "per_op": per_op(model, subject.ops, "fallback")}


def _naive_loop(subject: Subject, forwards: Forwards, few: Sequence[Op]) -> Iterator[Found]:
    with forwards.around() as unit:
        model, setup = built(subject, "eager")
        each = per_op(model, few, "isolated")
    yield {"naive": {"unit": unit.seconds, "setup": setup, "per_op": each}}
    with forwards.around() as unit, without_noise(model):
        joint = seconds(model.total)
        each = per_op(model, few, "fallback")
    yield {"naive_fallback": {"unit": unit.seconds, "setup": setup + joint, "per_op": each}}


def _with_replay(subject: Subject, forwards: Forwards) -> Found:
    """Score all ops with the default engine and in an exact replay of everything downstream."""
    fast = errors(calibrated(subject, "auto"), subject.ops)
    with forwards.around() as unit:
        model, setup = built(subject, "replay")
        start = time.perf_counter()
        exact = errors(model, subject.ops)
        each = (time.perf_counter() - start) / len(subject.ops)
    ranks = spearmanr([fast[op] for op in exact], list(exact.values())).statistic
    return {"replay": {"unit": unit.seconds, "setup": setup, "per_op": each}, "spearman": float(ranks)} | apart(
        fast, exact
    )


def apart(found: dict[str, float], expected: dict[str, float]) -> Found:
    """Find the op whose NMSE is farthest from what it should be, of those whose error is not rounding alone."""
    far = {op: abs(found[op] - value) / value for op, value in expected.items() if value > SIGNIFICANT}
    if not far:
        return {"compared": 0, "apart": None, "worst": None}
    worst = max(far, key=lambda op: far[op])
    return {"compared": len(far), "apart": far[worst], "worst": worst}


def _with_divergence(subject: Subject, forwards: Forwards) -> Found:
    """Time the ops of two blocks with all logits made, which KL divergence and top-1 agreement need."""
    model, _ = built(subject, "auto", divergence=True)
    waves = list(blocks(subject.ops).values())
    chosen = [*waves[len(waves) // 3], *waves[2 * len(waves) // 3]]
    with forwards.around() as unit:
        each = per_op(model, chosen, "isolated")
    return {"unit": unit.seconds, "per_op": each}


def blocks(ops: Sequence[Op]) -> dict[str, list[Op]]:
    """Ops by their block, which are scored together."""
    found: dict[str, list[Op]] = {}
    for op in ops:
        found.setdefault(op.block, []).append(op)
    return found


def depth(options: Options) -> Iterator[Found]:
    """Time blocks of ops over the depth, but those that the set-up has measured to check itself."""
    subject = options.text(least=5)
    forwards = Forwards(subject)
    shares = Flops(subject).shares()
    yield described(subject) | {"flops": {key: shares[key] for key in ("forward", "head")}}
    waves = [
        (block, ops)
        for block, ops in blocks(subject.ops).items()
        if subject.ops[0] not in ops and subject.ops[-2] not in ops  # what the engine checks itself with
    ]
    chosen = [waves[i] for i in sorted({round(i * (len(waves) - 1) / 8) for i in range(9)})]
    found: dict[str, Found] = {}
    for _ in range(options.repeats):
        model, _ = built(subject, "auto")  # anew, as scores are kept
        for block, ops in chosen:
            with forwards.around() as unit:
                each = per_op(model, ops, "isolated")
            if each < KEPT * unit.seconds:
                continue
            after = [shares["after"][op.name] for op in ops]
            body, head = (statistics.fmean(share[i] for share in after) for i in (0, 1))
            wave = found.setdefault(block or ops[0].name, {"ops": len(ops), "body": body, "head": head, "timed": []})
            wave["timed"].append({"unit": unit.seconds, "per_op": each})
            yield {"waves": found}


def profiled(options: Options) -> Iterator[Found]:
    """Say where the time goes: set-up, blocks of ops at the beginning, middle and end, and ops of mode fallback."""
    subject = options.text(least=5)
    yield described(subject)
    Forwards(subject)  # the first forward allocates
    made: list[CalibratedModel] = []
    yield {"set-up": time_shares(lambda: made.append(built(subject, "auto")[0]))}
    (model,) = made
    waves = [ops for ops in blocks(subject.ops).values() if len(ops) > 1]
    middle = waves[len(waves) // 2]
    for ops in (middle,) if options.quick else (waves[1], middle, waves[-2]):  # the set-up measures the first and last
        shares = time_shares(lambda ops=ops: errors(model, ops))  # type: ignore[misc]  # its own
        yield {f"isolated, `{ops[0].block}`": shares}
    with without_noise(model):
        errors(model, waves[0], "fallback")
        yield {f"fallback, `{middle[0].block}`": time_shares(lambda: errors(model, middle, "fallback"))}


class _Stays64(TorchFunctionMode):
    """Models that go through fp32 by name, as norms and rotary embeddings do, stay in float64."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever func returns
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = [torch.float64 if argument is torch.float32 else argument for argument in args]
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return func(*args, **kwargs)


def float64(options: Options) -> Iterator[Found]:
    """Compare with a run in float64 of the same quantized values, for ops spread over the depth."""
    subject = options.text()
    ops = spread(subject.ops, 2 * options.few)
    yield described(subject) | {"compared_ops": len(ops)}
    model = calibrated(subject, "auto")
    fast = errors(model, ops)
    changes = _changes(subject, model, {op.name for op in ops})
    del model
    replayed = errors(calibrated(subject, "replay"), ops)
    gc.collect()
    wide = copy.deepcopy(subject.model).double()
    clean = _wide_run(wide, subject)
    exact = {
        op.name: squared_distance(_wide_run(wide, subject, op.name, changes[op.name]), clean) / energy(clean)
        for op in ops
    }
    yield {"default": apart(fast, exact), "replay": apart(replayed, exact)}


def _changes(subject: Subject, model: CalibratedModel, ops: set[str]) -> dict[str, Tensor]:
    """Find what quantizing an op changes in its own output, for each op."""
    found: dict[str, Tensor] = {}

    def handler(op: str, call: Call, run: Callable[[], Tensor]) -> Tensor:
        output = run()
        if op in ops:
            found[op] = model._simulator.output(op, call).double() - output.double()
        return output

    spec = subject.spec
    with torch.no_grad(), one_thread(), OpInterceptor(subject.model, handler):
        run_model(subject.model, spec.evaluation[0], spec.output)
    return found


def _wide_run(wide: torch.nn.Module, subject: Subject, changed: str = "", change: Tensor | None = None) -> Tensor:
    def handler(op: str, _: Call, run: Callable[[], Tensor]) -> Tensor:
        return run() + change if op == changed and change is not None else run()

    spec = subject.spec
    with torch.no_grad(), _Stays64(), OpInterceptor(wide, handler):
        output = run_model(wide, spec.evaluation[0], spec.output)
    assert output.dtype == torch.float64
    return output


def length(options: Options, tokens: int, batches: int = 1) -> Iterator[Found]:
    """Time mode `isolated` for all ops on more data."""
    subject = options.text(tokens, batches)
    layers = len(list(subject.model.get_submodule("model.layers").children()))
    found = {"tokens": tokens, "batches": batches, "layers": layers}
    yield described(subject) | found
    _, run = whole_run(subject, Forwards(subject))
    yield {"isolated": run}


def inc(options: Options, tokens: int) -> Iterator[Found]:
    """Time Intel Neural Compressor's own loop over a few ops, and the same ops here.

    Its functions loop over the candidates unchanged, see `pytest_qsens.engines.inc`. What is timed is one turn of the
    loop, with the cache cleared that keeps every model alive; its reference forward, one for all ops, is not in it.
    """
    from pytest_qsens.engines import inc as inc_module
    from pytest_qsens.engines.inc import IncEngine

    subject = options.text(tokens)
    forwards = Forwards(subject)
    yield described(subject) | {"version": version("neural-compressor"), "tokens": tokens}
    turns: list[float] = []
    loop = inc_module._Session.tqdm

    def timed(session: inc_module._Session, listed: object) -> Iterator[Any]:
        for candidate in loop(session, listed):
            start = time.perf_counter()
            yield candidate
            turns.append(time.perf_counter() - start)

    with forwards.around() as unit:
        driven = calibrated(subject, "inc")._engine
        assert isinstance(driven, IncEngine)
        with torch.no_grad():
            # the engine calibrates on one thread, for the same scales on any number; left to itself, INC uses all
            driven.calibrate = driven.evaluate  # type: ignore[method-assign, assignment]
            driven._threads = nullcontext
            runs = driven._quantizable - driven._without_kernels().keys()  # found out once, and not by its loop
            few = spread([op for op in subject.ops if op.name in runs], max(2, options.few // 2))
            inc_module._Session.tqdm = timed  # type: ignore[method-assign, assignment]
            for op in few:
                driven.fall_back(op.name)
                yield {"inc": {"turns": turns}}
            inc_module._Session.tqdm = loop  # type: ignore[method-assign]
    yield {"inc": {"unit": unit.seconds, "turns": turns, "per_op": statistics.median(turns), "peak": peak()}}
    del driven
    gc.collect()
    with forwards.around() as unit:
        model, setup = built(subject, "fx")
        with without_noise(model):
            setup += seconds(model.total)
            errors(model, few[:1], "fallback")
            each = per_op(model, few, "fallback")
    yield {"fx": {"unit": unit.seconds, "setup": setup, "per_op": each}}
    del model
    gc.collect()
    with forwards.around() as unit:
        ours = others(subject)
        del ours["model"]
    yield {"auto": ours | {"unit": unit.seconds}}


def _compared(build: Callable[[Options], Subject]) -> Callable[[Options], Iterator[Found]]:
    return lambda options: compare(build(options), options)


NOT_QUICK = {"profile", "resnet-18", "resnet-50", "batches-4"}
"""What a quick run leaves out unless it is asked for: it shall take a minute."""


def sections(*, quick: bool) -> dict[str, Callable[[Options], Iterator[Found]]]:
    """Everything that can be measured, by name, in order."""
    tokens = (64,) if quick else (64, 256, 512, 2048)
    found: dict[str, Callable[[Options], Iterator[Found]]] = {
        "rates": rates,
        "text": _compared(Options.text),
        "depth": depth,
        "profile": profiled,
        "float64": float64,
        "minilm": _compared(lambda _: minilm()),
        "resnet-18": _compared(lambda options: options.resnet("resnet-18")),
        "resnet-50": _compared(lambda options: options.resnet("resnet-50")),
    }
    found |= {f"length-{count}": lambda options, count=count: length(options, count) for count in tokens}  # type: ignore[misc]
    found["batches-4"] = lambda options: length(options, TOKENS, 4)
    inc_tokens = (64,) if quick else (64, 512, 2048)
    found |= {f"inc-{count}": lambda options, count=count: inc(options, count) for count in inc_tokens}  # type: ignore[misc]
    return found
