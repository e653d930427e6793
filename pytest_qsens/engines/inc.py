"""The engine that drives Intel Neural Compressor's MSE_V2 strategy itself, to compare with.

`get_mse_order_per_fp32` and `get_mse_order_per_int8` run unchanged. What they call by name in their own module is
replaced while they run, to choose the ops they loop over, to read every score at the scored output instead of at
whatever module comes last in a dictionary, and to give them the run's calibration and evaluation batches.
"""

from __future__ import annotations

import copy
import io
import logging
import os
import random
import tempfile
import warnings
from collections import OrderedDict
from contextlib import contextmanager, redirect_stderr
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.ao.quantization.fx.utils import assert_and_get_unique_device

from pytest_qsens.engines.forward import KernelEngine
from pytest_qsens.errors import QsensError
from pytest_qsens.graph.capture import run_model
from pytest_qsens.graph.intercept import unchanged_state
from pytest_qsens.graph.modules import op_type

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from pytest_qsens.models.spec import Batch

_EVERYTHING = ("qsens_everything", "")
"""A candidate that is no op: with it left out, everything is quantized."""

_FP32 = {"weight": {"dtype": "fp32"}, "activation": {"dtype": "fp32"}}

Key = tuple[str, str]
"""Name and type of an op as Intel Neural Compressor has them."""


class Measured(NamedTuple):
    """What Intel Neural Compressor found for one candidate."""

    op: str
    sse: float
    """Its own number: a sum of squared differences in float32."""
    outputs: list[Tensor]
    """The scored outputs of all evaluation batches that it comes from."""
    quantized: frozenset[str]
    """Names of the modules that had int8 kernels."""


class IncEngine(KernelEngine):
    """Prepares, calibrates, converts and runs the whole model for every op, as Intel Neural Compressor does."""

    name = "inc"
    perturbs = False

    def _prepare(self) -> None:
        self._adaptor, self._config = _strategy(self._model, self._batches[0])
        own = [name for name, module in self._model.named_modules() if op_type(module)]
        self._ops = set(_keys(self._config["op"], own).values())
        self._keys = _keys(self._config["op"], self._quantizable)
        for op in self._quantizable - self._keys.keys():
            self.out_of_reach[op] = "Intel Neural Compressor does not list it as quantizable"
        self._quantizable &= self._keys.keys()
        self._broken: dict[str, Exception] | None = None
        self._quantized: Collection[str] = ()

    @property
    def note(self) -> str | None:
        """What is not quantized although everything should be."""
        return f"in fp32, as the model cannot run with them: {', '.join(self._broken)}" if self._broken else None

    def isolated(self, *ops: str) -> Iterator[Tensor]:
        """Only this op, of which there is one, is quantized: the second phase with one candidate."""
        (op,) = ops
        measured = next(self.requantize([op]))
        self._check_quantized(op, measured.quantized)
        yield from self._kept(measured)

    def joint(self, seed: int | None = None) -> Iterator[Tensor]:
        """Everything is quantized with which the model still runs."""
        return self._outputs(self._quantizable - self._without_kernels().keys(), seed)

    def fallback(self, *ops: str, seed: int | None = None) -> Iterator[Tensor]:  # noqa: ARG002 - see `perturbs`
        """Everything but this op, of which there is one, is quantized: the first phase with one candidate.

        Raises:
            Exception: What the model raised with this op quantized, if it does.

        """
        (op,) = ops
        yield from self._kept(self.fall_back(op))

    def fall_back(self, op: str) -> Measured:
        """Run the first phase for one op."""
        broken = self._without_kernels()
        if op in broken:
            raise broken[op]
        self._check_quantized(op, self._quantized)
        return self._first_phase(self._keys[op], self._quantizable - broken.keys())

    def requantize(self, ops: Sequence[str]) -> Iterator[Measured]:
        """Run the second phase: each op is scored with those before it in ``ops`` quantized as well.

        It leaves what it has quantized so, which its name does not say.
        """
        keys = [self._keys[op] for op in ops]
        return self._drive("get_mse_order_per_int8", keys, keys, _in_fp32(self._config, self._ops), keys)

    def _outputs(self, quantized: Collection[str], seed: int | None) -> Iterator[Tensor]:  # noqa: ARG002 - see `perturbs`
        yield from self._kept(self._first_phase(_EVERYTHING, quantized))

    def _check_quantized(self, op: str, quantized: Collection[str]) -> None:
        """Give no number for an op that it lists, but never finds in a trace, and so leaves as it is."""
        if self._keys[op][0] not in quantized:
            raise QsensError("Intel Neural Compressor lists it as quantized, but leaves it in fp32")

    def _kept(self, measured: Measured) -> list[Tensor]:
        self.reported = {"inc_sse": measured.sse}
        return measured.outputs

    def _first_phase(self, candidate: Key, quantized: Collection[str]) -> Measured:
        """Score one candidate left out of what is quantized."""
        # what it lists beside the ops, such as a ReLU6, stays as it wants it
        config = _in_fp32(self._config, self._ops - {self._keys[op] for op in quantized})
        config["op"][_EVERYTHING] = _FP32
        pair = candidate[0], True  # in place of the op's configuration, which is only put back at the end
        (measured,) = self._drive("get_mse_order_per_fp32", [pair], [candidate], config)
        return measured

    def _without_kernels(self) -> Mapping[str, Exception]:
        """Ops with which the quantized model cannot run, and what it raises; they stay in fp32."""
        if self._broken is None:
            self._broken = {}
            if self._raises(self._quantizable) is not None:
                by_type: dict[str, list[str]] = {}
                for op in sorted(self._quantizable):
                    by_type.setdefault(self._keys[op][1], []).append(op)
                for ops in by_type.values():
                    self._broken |= self._search(ops)
                if (error := self._raises(self._quantizable - self._broken.keys())) is not None:
                    raise QsensError(
                        f"engine inc: the model cannot run with everything quantized, and no op alone is to blame: "
                        f"{type(error).__name__}: {error}"
                    ) from error
        return self._broken

    def _search(self, ops: Sequence[str]) -> dict[str, Exception]:
        error = self._raises(ops)
        if error is None:
            return {}
        if len(ops) == 1:
            return {ops[0]: error}
        middle = len(ops) // 2
        return self._search(ops[:middle]) | self._search(ops[middle:])

    def _raises(self, ops: Collection[str]) -> Exception | None:
        try:
            self._quantized = self._first_phase(_EVERYTHING, ops).quantized
        except Exception as error:  # noqa: BLE001 - a model with quantized modules can raise anything
            return error
        return None

    def _drive(
        self,
        function: str,
        loop: Sequence[Any],
        candidates: Sequence[Key],
        config: dict[str, Any],
        known: Sequence[Key] = (),
    ) -> Iterator[Measured]:
        """Run one of its loops.

        Args:
            function: Name of the function that loops.
            loop: What it is to loop over.
            candidates: The op that each of these is.
            config: Its ``tune_cfg``.
            known: Ops whose configuration it knows from its first phase.

        """
        session = _Session(self, loop)
        # torch prints the code of a traced module that raises, which the caller tells in one line
        printed = redirect_stderr(io.StringIO())
        with printed, unchanged_state(self._model), _replaced(session, _qconfigs(self._config, known)) as util:
            getattr(util, function)(self._adaptor, self._model, {}, config)
        names = {key: op for op, key in self._keys.items()}
        for key, (outputs, quantized) in zip(candidates, session.runs[1:], strict=True):
            yield Measured(names.get(key, key[0]), session.scores[key], outputs, frozenset(quantized))

    def evaluate(self, model: nn.Module) -> list[Tensor]:
        """Scored outputs of the evaluation batches."""
        with self._threads():
            return [run_model(model, batch, self._output) for batch in self._batches]


class _Session:
    """Stands in for the names that Intel Neural Compressor's loops look up in their module."""

    def __init__(self, engine: IncEngine, loop: Sequence[Any]) -> None:
        self._engine = engine
        self._loops = [loop]
        self._hook: Callable[..., object] | None = None
        self.runs: list[tuple[list[Tensor], set[str]]] = []
        """Outputs of every scored run, and what had int8 kernels in it; that of the unquantized model first."""
        self.scores: dict[Key, float] = {}

    def tqdm(self, _: object) -> Iterator[Any]:
        """Loop over the candidates once; the first phase's second look at the best few is left out."""
        for candidate in self._loops.pop() if self._loops else ():
            assert_and_get_unique_device.cache_clear()  # keeps every model alive that was ever prepared
            yield candidate

    def fetch_module(self, *_: object) -> _Session:
        """Whatever module it means to read the score at, it gets the scored output."""
        return self

    def register_forward_hook(self, hook: Callable[..., object]) -> None:
        """Take the hook that waits for the value of the next run; it is never on a module of the model."""
        self._hook = hook

    def simple_inference(self, model: nn.Module, _: object) -> None:
        """Calibrate a prepared model; run one that is to be scored."""
        if self._hook is None:
            self._engine.calibrate(model)
            return
        outputs = self._engine.evaluate(model)
        kernels = {name for name, module in model.named_modules() if ".quantized" in type(module).__module__}
        self.runs.append((outputs, kernels))
        self._hook(None, None, torch.cat([output.flatten() for output in outputs]))
        self._hook = None

    def sorted(self, keys: Iterable[Key], key: Callable[[Key], Any], **options: bool) -> list[Key]:
        """Note the scores it sorts by."""
        found = list(keys)
        self.scores.update((candidate, float(key(candidate))) for candidate in found)
        return sorted(found, key=key, **options)


@contextmanager
def _replaced(session: _Session, mapping: dict[str, Any]) -> Iterator[Any]:
    with _quiet():
        from neural_compressor.adaptor.torch_utils import util

        names = ("tqdm", "fetch_module", "simple_inference", "sorted")
        saved = {name: vars(util)[name] for name in names if name in vars(util)}
        known = dict(util.op_cfg_mapping)
        try:
            vars(util).update({name: getattr(session, name) for name in names})
            util.op_cfg_mapping.clear()  # it would take an op of one model for that of another
            util.op_cfg_mapping.update(mapping)
            yield util
        finally:
            for name in names:
                del vars(util)[name]
            vars(util).update(saved)
            util.op_cfg_mapping.clear()
            util.op_cfg_mapping.update(known)
            assert_and_get_unique_device.cache_clear()


class _Loader:
    """One batch with a label beside it: alone, a batch of two keys would be taken for batch and label."""

    batch_size = 1

    def __init__(self, batch: Batch) -> None:
        self.dataset = [(dict(batch), 0)]

    def __iter__(self) -> Iterator[tuple[dict[str, Any], int]]:
        return iter(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset)


def _strategy(model: nn.Module, batch: Batch) -> tuple[Any, dict[str, Any]]:
    """Build the strategy on the model; returns its adaptor and the configuration that quantizes everything."""
    with _quiet(), tempfile.TemporaryDirectory() as workspace:
        from neural_compressor.config import AccuracyCriterion, PostTrainingQuantConfig, TuningCriterion, options
        from neural_compressor.model import Model
        from neural_compressor.quantization import _Config
        from neural_compressor.strategy.mse_v2 import MSE_V2TuneStrategy

        own, options.workspace = options.workspace, workspace  # it writes its history there
        try:
            quantization = PostTrainingQuantConfig(
                device="cpu",
                quant_level=1,
                tuning_criterion=TuningCriterion(max_trials=1, strategy="mse_v2"),
                accuracy_criterion=AccuracyCriterion(tolerable_loss=0.0),
            )
            config = _Config(quantization=quantization, benchmark=None, pruning=None, distillation=None, nas=None)
            strategy = MSE_V2TuneStrategy(
                model=Model(model, conf=quantization), conf=config, q_dataloader=_Loader(batch), eval_func=None
            )
            strategy._prepare_tuning()  # noqa: SLF001 - what its `traverse` does first
            _, _, tuning = strategy.initial_tuning_cfg()
            tuning.setdefault("calib_sampling_size", 1)
            return strategy.adaptor, strategy._tune_cfg_converter(tuning)  # noqa: SLF001 - as above
        finally:
            options.workspace = own


def _keys(listed: Iterable[Key], ops: Collection[str]) -> dict[str, Key]:
    """Op → its name and type there: a module traced alone is wrapped, and has ``.module`` after its name."""
    wrapped = {name.removesuffix(".module"): (name, kind) for name, kind in listed}
    exact = {name: (name, kind) for name, kind in listed}
    return {op: found for op in ops if (found := exact.get(op) or wrapped.get(op))}


def _in_fp32(config: dict[str, Any], keys: Collection[Key]) -> dict[str, Any]:
    """Copy the configuration, with these ops in fp32."""
    ops = ((key, _FP32 if key in keys else value) for key, value in config["op"].items())
    return {**config, "op": copy.deepcopy(OrderedDict(ops))}


def _qconfigs(config: dict[str, Any], keys: Sequence[Key]) -> dict[str, Any]:
    """Name → how it is quantized, for some of the ops."""
    with _quiet():
        from neural_compressor.adaptor.pytorch import _cfg_to_qconfig

        found = _cfg_to_qconfig(config, config["approach"])
    return {name: found[name] for name, _ in keys if name in found}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what it logs and warns about out of the terminal, and its seeds and settings out of the process."""
    disabled = logging.root.manager.disable
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - the state that it seeds
    environment = dict(os.environ)  # what it imports sets variables, OpenCV among it
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002 - as above
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
