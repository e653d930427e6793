"""The models and snapshots of one process, each looked up and checked once."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING

import pytest

from pytest_qsens.collection.choice import select
from pytest_qsens.collection.model import Model
from pytest_qsens.engines.availability import check_added, check_engine, check_group, check_products
from pytest_qsens.errors import QsensError
from pytest_qsens.given_options import updating
from pytest_qsens.workers import SNAPSHOTS

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from pytest_qsens.configs.gate import ConfigRequest
    from pytest_qsens.models.source import ModelRequest, ModelSource
    from pytest_qsens.ops import Op
    from pytest_qsens.options import Options, RunSpec
    from pytest_qsens.snapshot import Snapshot

_CATALOGUE = pytest.StashKey["Catalogue"]()


class Catalogue:
    """The models and snapshots of this process, each looked up once.

    Args:
        thorough: Whether checkpoints and data files are checked as far as that goes without loading weights. One
            process of a run does it.
        updating: Whether snapshots are going to be written.
        apart: Whether that is done on another machine, or in another directory.

    """

    def __init__(self, *, thorough: bool, updating: bool, apart: bool) -> None:
        self._thorough = thorough
        self._updating = updating
        self._apart = apart
        self._listed: dict[ModelRequest, tuple[ModelSource, tuple[Op, ...]]] = {}
        self._models: dict[tuple[ModelRequest, str | ConfigRequest], Model] = {}
        self._snapshots: dict[tuple[Path, str, str], Snapshot] = {}
        self._measured: dict[Path, RunSpec] = {}
        self._configs: dict[tuple[str, str], ConfigRequest | None] = {}

    def model(self, options: Options) -> Model:
        """Model of these options; its snapshot is readable and, where that is asked for, may be written.

        Raises:
            QsensError: For everything wrong with the model, its data, the choice of ops or the snapshot.

        """
        check_engine(options.engine, options.label, options.device)
        model = self._look_up(options)
        check_added(options.run_spec.engine, model.assigned.assignment.added)
        check_products(options.run_spec.engine, model.ops)
        for unit in select(model, options):
            check_group(options.run_spec.engine, unit)
        self.snapshot(options, model)
        path = options.snapshot_path(model.label)
        other = self._measured.setdefault(path, options.run_spec)
        if other != options.run_spec:
            raise QsensError(
                f"two tests would be compared with one snapshot, {path}, but measure different things: "
                f"{_differences(other, options.run_spec)}. Measure them in two runs, each with its own "
                "--qsens-snapshot-dir"
            )
        config = self._configs.setdefault((model.label, options.label), options.config_request)
        if config != options.config_request:
            raise QsensError(
                f"two tests measure {model.label} under the name {options.label!r}, but not the same: {config} and "
                f"{options.config_request}. Rename one of the config files"
            )
        return model

    @property
    def models(self) -> Iterable[Model]:
        """Every model that was looked up, for each way in which it is quantized."""
        return self._models.values()

    def known(self, spec: RunSpec) -> Model:
        """Model that was looked up for a test before."""
        return self._models[spec.request, spec.config or spec.scheme]

    def snapshot(self, options: Options, model: Model) -> Snapshot:
        """Snapshot that the tests of these options are compared with, as it was when first asked for."""
        from pytest_qsens.snapshot import check_writable, load

        key = options.snapshot_path(model.label), model.label, options.label
        if key not in self._snapshots:
            if self._updating and not options.recording:
                raise QsensError(
                    f"engine {options.engine} estimates, and snapshots hold what was measured: {key[0]} is left as it "
                    "is. Update it with another engine, such as delta, or leave --snapshot-update out"
                )
            if self._updating and os.environ.get("CI") and not options.allow_ci_update:
                raise QsensError(
                    f"CI is set to {os.environ['CI']!r}, and there snapshots are compared, not written: {key[0]} "
                    "would accept whatever was measured. Update it on your own machine and commit it, or add "
                    "--qsens-allow-ci-update"
                )
            self._snapshots[key] = load(
                key[0], model=model.label, scheme=options.label, granularity=options.granularity
            )
            if self._updating and not self._apart:
                check_writable(key[0].resolve().parent)  # where its lock goes, too
        return self._snapshots[key]

    def _look_up(self, options: Options) -> Model:
        from pytest_qsens.manifest import load_manifest
        from pytest_qsens.models.resolve import resolve

        request, spec = options.request, options.run_spec
        key = request, spec.config or spec.scheme
        if key not in self._models:
            if request not in self._listed:
                source = resolve(request)
                if self._thorough:
                    source.check()
                self._listed[request] = source, load_manifest(source, options.cache_dir())
            self._models[key] = Model.of(*self._listed[request], spec)
        return self._models[key]


def catalogue(config: pytest.Config) -> Catalogue:
    """Models of this process."""
    if _CATALOGUE not in config.stash:
        apart = SNAPSHOTS in getattr(config, "workerinput", {})
        config.stash[_CATALOGUE] = Catalogue(
            thorough=not (config.option.collectonly or (hasattr(config, "workerinput") and not apart)),
            updating=updating(config),
            apart=apart,
        )
    return config.stash[_CATALOGUE]


def _differences(one: RunSpec, other: RunSpec) -> str:
    def flat(spec: RunSpec) -> dict[str, object]:
        config = {} if spec.config is None else {f"config {name}": value for name, value in asdict(spec.config).items()}
        return {**asdict(spec.request), "engine": spec.engine, "device": spec.device, **config}

    old, new = flat(one), flat(other)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} {old.get(name)!r} and {new.get(name)!r}" for name in names)
