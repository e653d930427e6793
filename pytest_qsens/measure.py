"""The calibrated model of this process, and what it has measured."""

from __future__ import annotations

import gc
import platform
import traceback
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_qsens import profile
from pytest_qsens.collect import base_options, expected
from pytest_qsens.errors import QsensError
from pytest_qsens.memory import parse_memory
from pytest_qsens.ops import TOTAL
from pytest_qsens.profile import Profiler
from pytest_qsens.results import to_payload
from pytest_qsens.workers import limit_threads, workers_here

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from pytest_qsens.calibrated import CalibratedModel
    from pytest_qsens.collect import Model
    from pytest_qsens.ops import Op
    from pytest_qsens.options import Options, RunSpec
    from pytest_qsens.results import Mode, OpResult, Payload

_BENCH = pytest.StashKey["Bench"]()


class RunAborted(Exception):  # noqa: N818  # not an error of the test that meets it: the whole run cannot go on
    """The model cannot be measured at all; carries the message of the `QsensError` behind it."""


class Bench:
    """Keeps the most recently used calibrated model alive, and no other: one may fill the memory.

    A model that failed to load or calibrate is not tried again.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._spec: RunSpec | None = None
        self._calibrated: CalibratedModel | None = None
        self._results: dict[tuple[str, tuple[Mode, ...]], OpResult] = {}
        self._aborted: dict[RunSpec, str] = {}
        self._described: set[tuple[RunSpec, str, str, str]] = set()
        self._profilers: dict[tuple[str, str], Profiler] = {}
        self._told: dict[Profiler, float | None] = {}

    def calibrated(self, spec: RunSpec, model: Model) -> CalibratedModel:
        """Load and calibrate, or return what is there.

        Raises:
            RunAborted: If the model cannot be loaded, calibrated or run.

        """
        if spec in self._aborted:
            raise RunAborted(self._aborted[spec])
        if self._calibrated is None or spec != self._spec:
            self._spec, self._calibrated = spec, None
            self._results.clear()
            gc.collect()  # the old model holds reference cycles (hooks, graphs); two models may not fit
            try:
                with profile.running(self._profiler(spec, model)), profile.phase("load"):
                    limit_threads(self._config)
                    self._calibrated = _calibrate(
                        spec, model, expected(self._config, model.label, spec.scheme), workers_here(self._config)
                    )
            except Exception as error:  # whatever it is, the next op would meet it again
                self._aborted[spec] = _described(error)
                raise RunAborted(self._aborted[spec]) from error
        return self._calibrated

    def score(self, spec: RunSpec, model: Model, op: Op, modes: tuple[Mode, ...]) -> OpResult:
        """Measure one op, once however many tests ask for it."""
        key = op.name, modes
        calibrated = self.calibrated(spec, model)
        if key not in self._results:
            self._results[key] = calibrated.score(op, modes)
        return self._results[key]

    def total(self, spec: RunSpec, model: Model) -> OpResult:
        """Measure the whole model, everything quantized at once."""
        key = TOTAL, ()
        calibrated = self.calibrated(spec, model)
        if key not in self._results:
            self._results[key] = calibrated.total()
        return self._results[key]

    def profiles(self) -> list[Payload]:
        """Where the time of this process went so far, for each model that was measured since this was asked last."""
        found: list[Payload] = []
        for (model, scheme), profiler in self._profilers.items():
            if profiler.last != self._told.get(profiler):
                self._told[profiler] = profiler.last
                process = getattr(self._config, "workerinput", {}).get("workerid", "")
                found.append(
                    {"model": model, "scheme": scheme, "process": process, "profile": asdict(profiler.profile())}
                )
        return found

    def _profiler(self, spec: RunSpec, model: Model) -> Profiler | None:
        if not base_options(self._config).profile:
            return None
        return self._profilers.setdefault((model.label, spec.scheme), Profiler())

    def describe(self, options: Options, model: Model) -> Payload | None:
        """Facts about the calibrated model of these options, builtin values only; once for each process.

        Again where the model comes out different when it is loaded again.
        """
        if self._calibrated is None or self._spec != options.run_spec:
            return None
        reference = self._calibrated.reference_digest
        key = options.run_spec, options.mode, reference, self._calibrated.engine
        if key in self._described:
            return None
        self._described.add(key)
        data = model.source.data_fingerprint()
        return {
            "model": model.label,
            "scheme": options.scheme,
            "mode": options.mode,
            "engine": self._calibrated.engine,
            "engine_reason": self._calibrated.engine_reason,
            "reference_seconds": float(self._calibrated.reference_seconds),
            "reference": reference,
            "machine": getattr(self._config, "workerinput", {}).get("qsens_machine", ""),
            "data": data,
            "weights": model.source.weights_digest(),
            "environment": environment(options.device, options.engine) | ({"data": data} if data else {}),
            "functional": [to_payload(result) for result in self._calibrated.functional_ops],
        }


def _described(error: Exception) -> str:
    if isinstance(error, QsensError):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"the model cannot be measured: {type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"


def bench(config: pytest.Config) -> Bench:
    """Return the bench of this process."""
    if _BENCH not in config.stash:
        config.stash[_BENCH] = Bench(config)
    return config.stash[_BENCH]


def _cpu_vendor() -> str:
    """Vendor of the CPU: libraries choose other kernels for each, of the same instruction set."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def environment(device: str, engine: str) -> dict[str, str]:
    """Collect what moves scores in their last digits between machines. No host name, time or thread count."""
    import torch

    kind = torch.device(device).type
    kernels = {}  # the other engines simulate them, the same everywhere
    if engine == "fx":
        kernels["kernels"] = f"torch {torch.backends.quantized.engine}"
    elif engine == "inc":
        kernels["kernels"] = f"neural-compressor {version('neural-compressor')}"
    return kernels | {
        "cpu": f"{_cpu_vendor()} {torch.backends.cpu.get_cpu_capability()}".strip(),
        "device": torch.cuda.get_device_name(device) if kind == "cuda" else kind,
        "machine": platform.machine(),
        "pytest-qsens": version("pytest-qsens"),
        "torch": str(torch.__version__),
        "transformers": version("transformers"),
    }


def _calibrate(spec: RunSpec, model: Model, ops: Collection[str] | None, workers: int) -> CalibratedModel:
    import torch

    from pytest_qsens.calibrated import calibrate

    try:
        torch.empty(0, device=spec.device)
    except (RuntimeError, AssertionError) as error:  # torch asserts for a backend it was built without
        raise QsensError(f"device {spec.device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return calibrate(
        model.source.load(),
        model.ops,
        spec.scheme,
        engine=spec.engine,
        device=spec.device,
        divergence=spec.divergence,
        expected=ops,
        memory=None if spec.memory is None else parse_memory(spec.memory, "memory"),
        workers=max(1, workers),
    )


def accept_command(arguments: Sequence[str]) -> str:
    """Build the command that accepts what a run measured: the same one, with ``--snapshot-update``."""
    import shlex

    kept = [argument for argument in arguments if not argument.startswith("--snapshot-update")]
    return shlex.join(["pytest", *kept, "--snapshot-update"])
