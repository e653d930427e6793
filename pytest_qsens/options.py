"""What a user asks for: command line, ini and marker, in one frozen value."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pytest_qsens.errors import QsensError, unknown
from pytest_qsens.groups import Fused
from pytest_qsens.models.source import ModelRequest
from pytest_qsens.option_declarations import DECLARATIONS, MODES
from pytest_qsens.option_values import from_ini, parse

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import pytest

    from pytest_qsens.configs.gate import ConfigRequest
    from pytest_qsens.gates import Gates, OpGates, Overrides
    from pytest_qsens.results import Mode
    from pytest_qsens.shards import Shard


@dataclass(frozen=True)
class RunSpec:
    """What decides the numbers of a calibrated model; equal values share one calibrated model."""

    request: ModelRequest
    scheme: str
    engine: str
    device: str
    memory: str | None
    divergence: bool
    representatives: int | None = None
    config: ConfigRequest | None = None
    """What says each op's scheme; ``scheme`` is its name then."""
    interactions: bool = False


@dataclass(frozen=True)
class Options:
    """Every option, checked, with absolute paths. Building one imports neither torch nor the model's code."""

    model: str | None
    checkpoint: Path | None
    scheme: str
    config: Path | None
    config_format: str | None
    config_problems: str
    config_down: str | None
    mode: str
    ops: tuple[str, ...]
    max_ops: int | None
    granularity: str
    calib: Path | None
    calib_samples: int | None
    eval: Path | None
    engine: str
    fail: str
    memory: str | None
    time_budget: str | None
    top: int | None
    representatives: int | None
    gate_estimates: bool
    interactions: bool
    device: str
    shard: Shard | None
    json: Path | None
    gitlab: Path | None
    report: Path | None
    profile: bool
    cache: Path | None
    no_cache: bool
    cache_size: str
    hash_weights: bool
    allow_pickle: bool
    snapshot_dir: Path
    allow_ci_update: bool
    snapshot_prune: bool
    fail_overrides: tuple[str, ...]
    fused: tuple[Fused, ...]
    """Patterns of the ini file, which go before those of `pytest_qsens.groups`."""
    root: Path
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Where a value was given, for messages: the option, the ini key or the marker's keyword."""
    config_rest: str | None = None
    """Scheme that is given beside the config, in the same place: of what it does not exclude."""

    @classmethod
    def from_config(cls, config: pytest.Config) -> Options:
        """Read the command line, then the ini file, then defaults.

        Relative paths are taken from where pytest was invoked on the command line, from the root directory in the
        ini file.

        Raises:
            QsensError: For a value that cannot be, naming the option it was given with.

        """
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for declared in DECLARATIONS:
            given = config.getoption(declared.key)
            origin, base = declared.flag, config.invocation_params.dir
            if given is None:
                given = from_ini(config, declared.key, declared.kind)
                origin, base = f"{declared.key} in the ini file", config.rootpath
            values[declared.name] = parse(declared, given, origin, base)
            origins[declared.name] = origin
        _choose_quantization(values, origins)
        overrides = tuple(from_ini(config, "qsens_fail_overrides", "list") or ())
        lines = from_ini(config, "qsens_fused", "list") or ()
        fused = tuple(Fused.parse(line, "qsens_fused in the ini file") for line in lines)
        defaults: dict[str, object] = {
            "scheme": "w8a8",
            "config_problems": "error",
            "mode": "isolated",
            "granularity": "op",
            "engine": "auto",
            "fail": "nmse:5%",
            "device": "cpu",
            "cache_size": "20GB",
            "ops": (),
            "snapshot_dir": config.rootpath / "qsens_snapshots",
        }
        values |= {name: default for name, default in defaults.items() if values[name] is None}
        options = cls(**values, fail_overrides=overrides, fused=fused, root=config.rootpath, origins=origins)
        options.overrides()
        options.check_config()
        return options

    def override(self, keywords: Mapping[str, object]) -> Options:
        """Put those of a ``qsens`` marker over these options; relative paths start at the root directory.

        Raises:
            QsensError: For an unknown keyword or a value that cannot be.

        """
        values: dict[str, Any] = {}
        origins = dict(self.origins)
        allowed = {declared.name: declared for declared in DECLARATIONS if declared.marker}
        for name, given in keywords.items():
            if name not in allowed:
                raise QsensError(unknown("keyword of @pytest.mark.qsens", name, allowed))
            if given is not None:
                origins[name] = f"{name}= of @pytest.mark.qsens"
                values[name] = parse(allowed[name], given, origins[name], self.root)
        if "fail" in values:  # of single tests, which have no ranks
            from pytest_qsens.gates import parse_op_gates

            parse_op_gates(values["fail"], origins["fail"])
        _choose_quantization(values, origins)
        if values.get("scheme") is not None:
            values |= _NO_CONFIG
        else:
            values.pop("scheme", None)
        options = replace(self, **values, origins=origins)
        options.check_config()
        return options

    def check_config(self) -> None:
        """Check what can be known of the config without reading it.

        Raises:
            QsensError: If it cannot be called as its file is, or there is only something about a config.

        """
        _ = self.label
        for name in ("config_format", "config_down"):
            if self.config is None and getattr(self, name) is not None:
                raise QsensError(f"{self.origins[name]} is about a config. Give one with --qsens-config FILE")

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The modes to measure, in the order of result files."""
        return MODES[self.mode]

    @property
    def request(self) -> ModelRequest:
        """Which model on which data.

        Raises:
            QsensError: If no model was chosen.

        """
        if self.model is None:
            raise QsensError(
                "no model to measure. Choose one with --qsens-model MODEL, with qsens_model in the ini file or with "
                "@pytest.mark.qsens(model=...)"
            )
        return ModelRequest(
            model=self.model,
            checkpoint=_text(self.checkpoint),
            calib=_text(self.calib),
            eval=_text(self.eval),
            calib_samples=self.calib_samples,
            allow_pickle=self.allow_pickle,
            root=str(self.root),
        )

    @property
    def label(self) -> str:
        """Name of what quantizes the ops, in node ids and file names: the scheme's or the config's.

        Raises:
            QsensError: If the config's cannot be one.

        """
        if self.config is None:
            return self.scheme
        from pytest_qsens.configs.gate import label_of

        return label_of(self.config, self.origins["config"])

    @property
    def config_request(self) -> ConfigRequest | None:
        """Which config is measured, if one is."""
        if self.config is None:
            return None
        from pytest_qsens.configs.gate import ConfigRequest

        strict = self.config_problems == "error"
        return ConfigRequest(str(self.config), self.config_format, strict, self.config_down, self.config_rest)

    @property
    def run_spec(self) -> RunSpec:
        """Key of the calibrated model these options ask for."""
        return RunSpec(
            self.request,
            self.label,
            "probe" if self.estimating else self.engine,
            self.device,
            self.memory,
            self._divergence,
            self.representatives,
            self.config_request,
            self.interactions,
        )

    @property
    def _divergence(self) -> bool:
        """Whether logits are to be compared as distributions: engines that need none, only if that gates."""
        rules = (gates for _, gates in self.overrides().rules)
        gated = self.gates.metrics.union(*(gates.metrics for gates in rules))
        return self.engine not in ("auto", "delta", "probe") or not gated.isdisjoint(("kl", "top1"))

    @property
    def estimating(self) -> bool:
        """Whether most scores are going to be estimates: nothing new is recorded then."""
        return self.engine == "probe" or self.refined or self.representatives is not None

    @property
    def recording(self) -> bool:
        """Whether what is measured may go into a snapshot: of a run that only estimates it is too little."""
        return not self.estimating or self.refined

    @property
    def refined(self) -> bool:
        """Whether ops are measured after all were estimated, as long as that is worth it."""
        return self.time_budget is not None or self.top is not None

    @property
    def selective(self) -> bool:
        """Whether only some of the ops are asked for, by all shards together."""
        return bool(self.ops) or self.max_ops is not None

    @property
    def restricted(self) -> bool:
        """Whether only some of the ops are measured."""
        return self.selective or self.shard is not None

    def cache_dir(self) -> Path | None:
        """Directory of cached scores and op lists, or ``None`` if nothing may be cached."""
        if self.no_cache:
            return None
        if self.cache is not None:
            return self.cache
        from pytest_qsens.cache import default_cache_dir

        return default_cache_dir()

    def overrides(self) -> Overrides:
        """Thresholds and limits of single ops in the ini file.

        Raises:
            QsensError: If a line cannot be read.

        """
        from pytest_qsens.gates import Overrides

        return Overrides.parse(self.fail_overrides)

    @property
    def gates(self) -> Gates:
        """What counts as worse, but for overrides."""
        from pytest_qsens.gates import parse_gates

        return parse_gates(self.fail)

    def gates_for(self, op: str, members: Sequence[str] = ()) -> OpGates:
        """Tell what makes this op (or ``total``, or a group of these members) count as worse."""
        return self.overrides().gates_for(op, self.gates, members)

    def snapshot_path(self, model: str) -> Path:
        """Snapshot file of the model with this label under these options."""
        from pytest_qsens.snapshot import file_name

        return self.snapshot_dir / model / file_name(self.label, self.granularity)


_NO_CONFIG: dict[str, Any] = {"config": None, "config_format": None, "config_down": None, "config_rest": None}


def _choose_quantization(values: dict[str, Any], origins: Mapping[str, str]) -> None:
    """Take the scheme or the config, whichever is given closer to the test: the command line goes before the ini file.

    Given in one place, the scheme is of what the config does not exclude; whether it only excludes is in the file.
    """
    given = [name for name in ("scheme", "config") if values.get(name) is not None]
    if values.get("config") is not None:
        values["config_rest"] = None
    if len(given) == 2:
        in_ini = [origins[name].endswith(" in the ini file") for name in given]
        if in_ini[0] == in_ini[1]:
            values |= {"config_rest": values["scheme"], "scheme": None}
        else:
            values |= {"scheme": None} if in_ini[0] else _NO_CONFIG


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
