"""What the collected tests are going to measure, as the controller and the measuring process are told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import pytest

from pytest_qsens.collection.catalogue import catalogue
from pytest_qsens.collection.checks import check_fused, check_overrides
from pytest_qsens.collection.parametrized import SPEC, made_with
from pytest_qsens.collection.part import elsewhere
from pytest_qsens.collection.subjects import Subject
from pytest_qsens.errors import QsensError
from pytest_qsens.given_options import base_options, options_for
from pytest_qsens.ops import TOTAL, Op

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_qsens.collection.model import Model
    from pytest_qsens.options import Options, RunSpec
    from pytest_qsens.result_cache import Part
    from pytest_qsens.results import Mode, Payload

_WANTED = pytest.StashKey[dict[tuple[str, str], "Wanted"]]()


@dataclass
class Wanted:
    """What the collected tests need of a model under a scheme."""

    parts: dict[Op, set[Part]] = field(default_factory=dict)
    """Op or group → its scores; the whole model's under the op `TOTAL`."""
    model: bool = False
    """Whether a test takes the calibrated model itself."""


def plan(session: pytest.Session) -> Payload | None:
    """Tell what the collected tests are going to measure, in builtin values; ``None`` if they measure nothing.

    ``cases`` maps node ids to the fields of a `Case`; ``models`` lists label, scheme, granularity, ops or groups,
    names of what other shards measure, and what a config says; ``refusal`` is what is wrong with all of it together,
    if something is.
    """
    config = session.config
    cases: dict[str, tuple[str, str, str, str, tuple[str, ...]]] = {}
    models: dict[Subject, tuple[Op, ...]] = {}
    configs: dict[Subject, Payload | None] = {}
    for item in session.items:
        names = getattr(item, "fixturenames", ())
        if not isinstance(item, pytest.Function) or SPEC not in names:
            continue
        spec = cast("RunSpec", item.callspec.params[SPEC])
        op = cast("Op | None", item.callspec.params.get("qsens_op"))
        model = catalogue(config).known(spec)
        wanted = config.stash.setdefault(_WANTED, {}).setdefault((model.label, spec.scheme), Wanted())
        wanted.model = wanted.model or "qsens_model" in names
        if op is not None and "qsens_score" in names:
            modes = model.assigned.assignment.modes_of(op, _modes(item))
            wanted.parts.setdefault(op, set()).update(modes)
        if "qsens_total" in names:
            wanted.parts.setdefault(Op(TOTAL, TOTAL), set()).add("total")
        if "qsens_score" in names or "qsens_total" in names:
            made = made_with(item)
            members = op.member_names if op else ()
            cases[item.nodeid] = (model.label, spec.scheme, op.name if op else TOTAL, made.granularity, members)
            subject = Subject(model.label, spec.scheme, made.granularity)
            if subject not in models:
                models[subject] = model.units(made)
                configs[subject] = _config_facts(model, made)
    if not cases:
        return None
    refusal = None
    try:
        units = [unit for found in models.values() for unit in found]
        check_overrides(base_options(config), catalogue(config).models, units)
        if any(subject.granularity == "fused" for subject in models):
            check_fused(base_options(config), catalogue(config).models)
    except QsensError as error:
        refusal = str(error)
    others = elsewhere(config)
    listed = [
        [*key, [unit.plain() for unit in units], sorted(others.get(key, ())), configs[key]]
        for key, units in models.items()
    ]
    return {"cases": cases, "models": listed, "refusal": refusal}


def _config_facts(model: Model, options: Options) -> Payload | None:
    """Tell what a config says, in builtin values.

    ``about`` itself; ``schemes``, of ops or groups and of `TOTAL`; ``unquantized``, of these; ``unsimulated``, ops that
    are quantized in a way that cannot be simulated; ``problems``, what is wrong.
    """
    found = model.assigned
    if found.about is None:
        return None
    units = model.units(options)
    return {
        "about": found.about,
        "schemes": {unit.name: found.assignment.name_of(unit) for unit in units} | {TOTAL: found.assignment.name},
        "unquantized": [unit.name for unit in units if not found.assignment.measures(unit)],
        "unsimulated": found.assignment.unsimulated,
        "problems": list(found.problems),
    }


def files(config: pytest.Config) -> dict[str, dict[str, str | None]]:
    """Hash what every process must have alike: name → kind of file → hash, ``None`` where that cannot be told.

    Configs, and the checkpoint and data of each model in workers that are on several machines, or in several
    directories; elsewhere there is nothing to compare of these.
    """
    found: dict[str, dict[str, str | None]] = {}
    for model in catalogue(config).models:
        found |= {f"{name} of {model.label}": {"config": sha256} for name, sha256 in model.config_hashes.items()}
        if getattr(config, "workerinput", {}).get("qsens_scattered"):
            source = model.source
            found[source.label] = {"checkpoint": source.weights_digest(), "data": source.data_fingerprint()}
    return found


def _modes(item: pytest.Function) -> Iterable[Mode]:
    try:
        return options_for(item).modes
    except QsensError:  # the test says so itself
        return ()


def expected(config: pytest.Config, label: str, scheme: str) -> Wanted:
    """Tell what the collected tests need of a model under a scheme."""
    return config.stash.get(_WANTED, {}).get((label, scheme)) or Wanted()
