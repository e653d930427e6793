"""Models from the user's own code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from pytest_qsens.errors import QsensError, told
from pytest_qsens.models.spec import ModelSpec
from pytest_qsens.models.transformers_model import on_meta
from pytest_qsens.wording import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


class FactorySource:
    """``package.module:factory``, a function without arguments that returns a ``ModelSpec``; follows ``ModelSource``.

    The working directory can be imported from, and ``root``, which is where an ini file's names belong, whatever the
    working directory is. There are no fingerprints: what the code does cannot be told from outside.
    """

    def __init__(self, name: str, root: str | None = None) -> None:
        self.name = name
        self.root = root
        self.module, _, self.attribute = name.partition(":")
        self.label = f"{self.module}.{self.attribute}"

    def check(self) -> None:
        """Import the factory. It is not called yet: it may load a model."""
        self._factory()

    def fingerprint(self) -> None:
        """Return ``None``."""

    def identity(self, *, hash_weights: bool) -> None:
        """Return ``None``."""

    def data_fingerprint(self) -> None:
        """Return ``None``."""

    def evaluation_fingerprint(self) -> None:
        """Return ``None``."""

    def weights_digest(self) -> None:
        """Return ``None``."""

    def weight_bytes(self) -> None:
        """Nothing: only calling the factory tells."""

    def skeleton(self) -> nn.Module:
        """Return the factory's module; a callable is called on the meta device."""
        model = self._spec.model
        return model if _is_module(model) else self._built(lambda: on_meta(model))

    def samples(self) -> None:
        """Return ``None``: a factory brings its own batches."""

    def load(self) -> ModelSpec:
        """Call the factory, and the model if it is a callable; in evaluation mode, without gradients."""
        spec = self._spec
        model = spec.model if _is_module(spec.model) else self._built(spec.model)
        model.requires_grad_(requires_grad=False)
        return replace(spec, model=model.eval())

    def _built(self, build: Callable[[], object]) -> nn.Module:
        model = self._called(build, "`model`")
        if not _is_module(model):
            raise QsensError(f"{self.name}: `model` returned {type(model).__name__}, not a torch.nn.Module.")
        return model

    def _called(self, function: Callable[[], object], what: str) -> object:
        try:
            return function()
        except QsensError:
            raise
        except (Exception, SystemExit) as error:
            raise QsensError(f"{self.name}: {what} raised {told(error)}") from error

    @cached_property
    def _spec(self) -> ModelSpec:
        spec = self._called(self._factory(), "it")
        if not isinstance(spec, ModelSpec):
            raise QsensError(
                f"{self.name} returned {type(spec).__name__}, not a ModelSpec (`from pytest_qsens import ModelSpec`)."
            )
        if not _is_module(spec.model) and not callable(spec.model):
            raise QsensError(
                f"{self.name}: `model` is {type(spec.model).__name__}, neither a torch.nn.Module nor a callable that "
                f"builds one."
            )
        if not callable(spec.output):
            raise QsensError(f"{self.name}: `output` is {spec.output!r}, not a callable of (model output, batch).")
        if spec.rows is not None and not callable(spec.rows):
            raise QsensError(f"{self.name}: `rows` is {spec.rows!r}, not a callable of a batch.")
        for split, batches in (("calibration", spec.calibration), ("evaluation", spec.evaluation)):
            if not isinstance(batches, Sequence) or isinstance(batches, str):
                raise QsensError(f"{self.name}: `{split}` is {type(batches).__name__}, not a list of batches.")
            if not batches:
                raise QsensError(f"{self.name}: `{split}` is empty. Give at least one batch.")
            for number, batch in enumerate(batches):
                if not isinstance(batch, Mapping):
                    raise QsensError(
                        f"{self.name}: `{split}[{number}]` is {type(batch).__name__}. A batch is a dict with the "
                        f"keyword arguments of one forward call."
                    )
        return spec

    def _factory(self) -> Callable[[], object]:
        places = list(dict.fromkeys(filter(None, (str(Path.cwd()), self.root))))
        sys.path[:0] = [place for place in places if place not in sys.path]
        try:
            module = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name is None or not (self.module + ".").startswith(error.name + "."):
                raise QsensError(f"cannot import {self.module} for {self.name}: {told(error)}") from error
            raise QsensError(
                f"no module {error.name!r} for --qsens-model {self.name}. Looked in {', '.join(places)} and the "
                f"installed packages."
            ) from None
        except (Exception, SystemExit) as error:
            raise QsensError(f"cannot import {self.module} for {self.name}: {told(error)}") from error
        factory = getattr(module, self.attribute, None)
        if factory is None:
            suggestion = did_you_mean(self.attribute, vars(module))
            raise QsensError(f"module {self.module} ({module.__file__}) has no {self.attribute!r}{suggestion}.")
        if not callable(factory):
            raise QsensError(f"{self.name} is {type(factory).__name__}, not a function that returns a ModelSpec.")
        return factory  # type: ignore[no-any-return] # its result is checked when it is called


def _is_module(value: object) -> TypeGuard[nn.Module]:
    from torch import nn

    return isinstance(value, nn.Module)
