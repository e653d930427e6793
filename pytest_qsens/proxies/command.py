"""The command ``qsens proxies``: which proxies rank the ops of a model as exact scores do."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pytest_qsens.calibrated import calibrate
from pytest_qsens.errors import QsensError, told
from pytest_qsens.manifest import load_manifest
from pytest_qsens.models.spec import ready
from pytest_qsens.ops import layers
from pytest_qsens.preparation import References, observe_all, placed
from pytest_qsens.proxies.agreement import agreement, best_first
from pytest_qsens.proxies.exact import Exact, ranked, read_exact
from pytest_qsens.proxies.functions import PROXIES
from pytest_qsens.proxies.gradients import (
    class_likelihood_gradient,
    likelihood_gradient,
    signs,
    squared_gradients,
    weighted_squared_gradients,
)
from pytest_qsens.proxies.observe import Clock, Observer
from pytest_qsens.proxies.statistics import FORWARD, GRADIENTS
from pytest_qsens.quant.calibration import Calibration
from pytest_qsens.quant.schemes import scheme_named
from pytest_qsens.quant.simulate import Simulator
from pytest_qsens.threads import reproducible_sums

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from torch import nn

    from pytest_qsens.models.source import ModelSource
    from pytest_qsens.models.spec import ModelSpec
    from pytest_qsens.ops import Op
    from pytest_qsens.proxies.agreement import Agreement
    from pytest_qsens.proxies.statistics import Group, Statistics


@dataclass(frozen=True)
class Comparison:
    """What proxies are worth on one model.

    Attributes:
        model: Its label.
        scheme: How ops are quantized.
        exact: The scores that count.
        proxies: Best first.
        without: Name of a proxy that cannot be ranked → why.
        reference_seconds: Wall seconds of one forward of the evaluation data.

    """

    model: str
    scheme: str
    exact: Exact
    proxies: tuple[Agreement, ...]
    without: Mapping[str, str]
    reference_seconds: float


def compare_proxies(
    source: ModelSource, scheme: str, result: Path | None, names: Collection[str] = (), *, draws: int
) -> Comparison:
    """Compute proxies of a model and compare them with exact scores.

    Args:
        source: The model and its data.
        scheme: Its name, as `scheme_named` takes it.
        result: Result file with exact scores; without one they are measured.
        names: Of the wanted proxies; all, if none is named.
        draws: Random vectors for each evaluation batch.

    Raises:
        QsensError: If the scheme is not of layers, the result does not fit the model, the exact scores cannot be
            ranked, or the model cannot be run.

    """
    parts = scheme_named(scheme, "scheme").parts
    if not parts.of_layers:
        what = "keys and values of attention" if parts.cache is not None else "products of two activations"
        raise QsensError(f"scheme {scheme!r} quantizes {what}, and proxies are of layers: choose w8a8, or another such")
    source.check()
    ops = layers(load_manifest(source, None))  # proxies are of weights
    exact = None if result is None else read_exact(result, source, scheme, ops)
    reproducible_sums()
    spec = source.load()
    if exact is None:
        exact = _measured(spec, ops, scheme)
    model = ready(spec)
    wanted = [PROXIES[name] for name in PROXIES if not names or name in names]
    collected = _Collected(model, spec, [op for op in ops if op.name in exact.nmse], scheme, draws)
    without = collected.collect(frozenset(group for proxy in wanted for group in proxy.needs))
    found = []
    for proxy in wanted:
        reason = next((without[group] for group in proxy.needs if group in without), None)
        if reason is None:
            values = {op: proxy.function(statistics) for op, statistics in collected.statistics.items()}
            compared = agreement(proxy.name, values, exact.nmse, collected.forwards(proxy.needs))
            if compared is not None:
                found.append(compared)
                continue
        without[proxy.name] = reason or "fewer than 3 ops have a value"
    return Comparison(
        source.label,
        scheme,
        exact,
        tuple(best_first(found)),
        {proxy.name: without[proxy.name] for proxy in wanted if proxy.name in without},
        collected.reference_seconds,
    )


def _measured(spec: ModelSpec, ops: Sequence[Op], scheme: str) -> Exact:
    calibrated = calibrate(spec, ops, scheme, divergence=False)
    start = time.perf_counter()
    results = [calibrated.score(op, ["isolated"]) for op in ops]
    seconds = time.perf_counter() - start
    nmse = {r.op: r.isolated["nmse"] or 0.0 for r in results if r.status == "measured" and r.isolated is not None}
    return ranked(Exact(f"measured by engine {calibrated.engine}", nmse, seconds / calibrated.reference_seconds))


class _Collected:
    """Statistics of the ops of a model, and what they cost."""

    def __init__(self, model: nn.Module, spec: ModelSpec, ops: Sequence[Op], scheme: str, draws: int) -> None:
        self._model = model
        self._spec = spec
        self._names = [op.name for op in ops]
        self._scheme = scheme_named(scheme, "scheme")
        self._draws = draws
        self._batches = [placed(batch, "cpu") for batch in spec.evaluation]
        self._clock = Clock()
        self.statistics: dict[str, Statistics] = {}
        self.reference_seconds = 0.0

    def collect(self, groups: frozenset[Group]) -> dict[str, str]:
        """Collect these; returns groups that cannot be, and why.

        Raises:
            QsensError: If the model cannot be run.

        """
        with torch.no_grad():
            calibration = Calibration(self._scheme, ranges="local" in groups)
            calibrating = [placed(batch, "cpu") for batch in self._spec.calibration]
            observe_all(self._model, calibrating, self._spec, calibration)
            references = References(self._model, self._batches, self._spec)  # after other forwards: the first is slow
            references.finish()
            self.reference_seconds = references.seconds
        self._names = [name for name in self._names if name in calibration.reached]
        self._simulator = Simulator(self._scheme, calibration)
        observer = Observer(self._names, groups, self._simulator, self._clock)
        observer.run(self._model, self._batches, self._spec)
        self.statistics = observer.found
        without: dict[str, str] = {}
        for group in sorted(GRADIENTS & groups):
            try:
                with self._clock.of(group):
                    self._add_gradients(group)
            except (RuntimeError, NotImplementedError) as error:  # an operator without a derivative, or no memory
                without[group] = f"no gradients: {told(error)}"
        return without

    def _add_gradients(self, group: Group) -> None:
        arguments = self._model, self._batches, self._spec, self._names, self._draws
        if group == "hessian":
            for op, trace in squared_gradients(*arguments, signs).items():
                self.statistics[op].hessian_trace = trace
            return
        draw = class_likelihood_gradient if self._spec.logits else likelihood_gradient
        for op, error in weighted_squared_gradients(*arguments, draw, self._simulator).items():
            self.statistics[op].fisher_error = error

    def forwards(self, groups: Collection[Group]) -> float:
        """Time of these groups and of the forward that they share, in forwards."""
        spent = sum(self._clock.seconds[group] for group in groups) / self.reference_seconds
        return spent + bool(FORWARD.intersection(groups))
