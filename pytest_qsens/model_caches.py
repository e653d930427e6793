"""Where what is found out about a model is kept between runs, and all that it depends on."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from pytest_qsens.artifact import Artifact
from pytest_qsens.cache import default_cache_dir
from pytest_qsens.engines.availability import KERNEL_ENGINES
from pytest_qsens.environment import environment
from pytest_qsens.errors import QsensError
from pytest_qsens.known_scores import Look
from pytest_qsens.result_cache import ResultCache, SchemeKeys
from pytest_qsens.surroundings import surroundings

if TYPE_CHECKING:
    from pytest_qsens.collection.model import Model
    from pytest_qsens.options import Options, RunSpec


def identity_of(model: Model) -> str | None:
    """Tell what the files of a model look like; ``None`` if they cannot be read."""
    try:
        return model.source.identity(hash_weights=False)
    except (QsensError, OSError):  # what is wrong is told when it is loaded
        return None


def look(options: Options, model: Model) -> Look | None:
    """Tell what model and data look like now; ``None`` if nothing is to be cached, or they cannot tell."""
    if options.cache_dir() is None:
        return None
    identity = identity_of(model)
    try:
        return None if identity is None else Look(identity, model.source.data_fingerprint())
    except (QsensError, OSError):  # what is wrong is told when it is loaded
        return None


def _basis(options: Options, spec: RunSpec, model: Model, seen: Look) -> dict[str, object]:
    """Collect what scores depend on but engine, metrics and schemes, in builtin values."""
    contents = model.source.identity(hash_weights=True) if options.hash_weights else None
    facts: dict[str, object] = {
        "model": contents or seen.identity,
        "data": seen.data,
        "device": spec.device,
        "surroundings": surroundings(),
    }
    if spec.device != "cpu" or spec.engine in KERNEL_ENGINES:  # what they are can be told by torch alone
        with suppress(Exception):  # a device that cannot be used says so when the model is loaded
            facts["environment"] = environment(spec.device, spec.engine)
    return facts


def open_cache(options: Options, spec: RunSpec, model: Model, seen: Look) -> ResultCache:
    """Find the cached scores of a model on all that they depend on."""
    # what an engine that estimates measures is what the usual one measures
    engine = "auto" if spec.engine == "probe" else spec.engine
    facts = _basis(options, spec, model, seen) | {"engine": engine, "divergence": spec.divergence}
    if spec.interactions:  # scores that are kept without sketches are not all that is asked for
        facts["interactions"] = True
    found = model.assigned.assignment
    return ResultCache(options.cache_dir() or default_cache_dir(), model.label, facts, found.own, found.base)


def artifact_of(options: Options, spec: RunSpec, model: Model, seen: Look | None) -> Artifact | None:
    """Find the place of what the first process finds out for all; ``None`` if nothing is to be cached.

    Or nothing can be: engines without a graph find out nothing of it, and graphs on a GPU hold tensors there.
    """
    cache_dir = options.cache_dir()
    if cache_dir is None or seen is None or spec.device != "cpu" or spec.engine in (*KERNEL_ENGINES, "eager"):
        return None
    facts = _basis(options, spec, model, seen) | {"schemes": SchemeKeys(model.assigned.assignment.own).joint}
    return Artifact.of(cache_dir, model.label, facts)
