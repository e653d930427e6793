"""What a user asks for: command line, ini and marker, in one frozen value."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from pytest_qsens.configs.names import FORMATS
from pytest_qsens.errors import QsensError
from pytest_qsens.groups import GRANULARITIES, Fused
from pytest_qsens.models.source import ModelRequest
from pytest_qsens.quant.schemes import CACHE_SCHEMES, SCHEMES, scheme_named
from pytest_qsens.shards import Shard

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from pytest_qsens.configs.gate import ConfigRequest
    from pytest_qsens.gates import Gates, OpGates, Overrides
    from pytest_qsens.results import Mode

Kind = Literal["text", "path", "count", "flag", "list", "shard"]

MODES: dict[str, tuple[Mode, ...]] = {
    "isolated": ("isolated",),
    "fallback": ("fallback",),
    "both": ("isolated", "fallback"),
}
ENGINES = ("auto", "replay", "delta", "eager", "probe", "fx", "inc")


@dataclass(frozen=True)
class _Declaration:
    """One option: ``--qsens-NAME`` on the command line, ``qsens_NAME`` in the ini file."""

    name: str
    kind: Kind
    help: str
    metavar: str | None = None
    marker: bool = False
    """Whether ``@pytest.mark.qsens`` takes it as well: what decides the scores, not what is done with them."""

    @property
    def flag(self) -> str:
        return "--qsens-" + self.name.replace("_", "-")

    @property
    def key(self) -> str:
        return "qsens_" + self.name


_DECLARATIONS = (
    _Declaration(
        "model",
        "text",
        "model to measure: a preset (minilm, tiny_qwen2_5_vl, qwen2_5_vl_3b), a directory with a Hugging Face "
        "snapshot, hub:org/name, or package.module:factory",
        "MODEL",
        marker=True,
    ),
    _Declaration("checkpoint", "path", "directory with the weights of a preset that has none", "DIR", marker=True),
    _Declaration(
        "scheme", "text", f"{', '.join(SCHEMES | CACHE_SCHEMES)} (default: w8a8), or others", "SCHEME", marker=True
    ),
    _Declaration(
        "config",
        "path",
        "quantization config that says each op's scheme: that of the ops that it quantizes is measured. One that only "
        "excludes ops (ONNX Runtime's nodes, ModelOpt's disabled_layers) goes with --qsens-scheme, that of all others",
        "FILE",
        marker=True,
    ),
    _Declaration(
        "config_format",
        "text",
        f"{', '.join(FORMATS)} (default: found out from what is in the file)",
        "FORMAT",
        marker=True,
    ),
    _Declaration(
        "config_problems",
        "text",
        "what is wrong with the config, such as a pattern that matches no op or a scheme that cannot be simulated: "
        "error (default) or warn",
        "error|warn",
        marker=True,
    ),
    _Declaration(
        "config_down",
        "text",
        "measure the ops that the config leaves unquantized, too, with SCHEME: in mode fallback, what it would cost to "
        "add one of them to the config",
        "SCHEME",
        marker=True,
    ),
    _Declaration(
        "mode",
        "text",
        "isolated: only the op is quantized (default); fallback: everything but the op; both",
        "MODE",
        marker=True,
    ),
    _Declaration("ops", "list", "only ops whose name matches GLOB; repeatable", "GLOB", marker=True),
    _Declaration("max_ops", "count", "only the first N ops", "N", marker=True),
    _Declaration(
        "granularity",
        "text",
        "what is measured as one: op (default); fused: ops that read the same values, such as q, k and v; block: all "
        "ops of a block; type: the same op of all layers",
        "GRANULARITY",
        marker=True,
    ),
    _Declaration(
        "calib",
        "path",
        "calibration data: one text per line, or JSONL with text and image (default: a set in the package)",
        "FILE",
        marker=True,
    ),
    _Declaration("calib_samples", "count", "at most N calibration samples", "N", marker=True),
    _Declaration("eval", "path", "evaluation data, as --qsens-calib", "FILE", marker=True),
    _Declaration(
        "engine",
        "text",
        f"{', '.join(ENGINES)} (default: auto); probe: estimates; fx: torch's int8 kernels; inc: Intel Neural "
        "Compressor",
        "ENGINE",
        marker=True,
    ),
    _Declaration(
        "fail",
        "text",
        "what counts as worse: nmse:5%% (default), nmse:1e-4 (absolute), sqnr_db:0.5; limits, which need no snapshot, "
        "total.nmse<=1e-3; of the order of all ops top10:9, kendall:0.95; several with commas",
        "METRIC:TOLERANCE",
        marker=True,
    ),
    _Declaration(
        "memory",
        "text",
        "memory for values that could be computed again, such as 4GB: less is slower (default: a third of what the "
        "weights leave free, shared by the workers)",
        "SIZE",
        marker=True,
    ),
    _Declaration(
        "time_budget",
        "text",
        "estimate all ops, then measure those that matter most until this time is up: 120s, 5m, 1h30m",
        "TIME",
    ),
    _Declaration("top", "count", "measure until the K most sensitive ops are known, and estimate the others", "K"),
    _Declaration(
        "representatives",
        "count",
        "measure one op of every type in each of N parts of the depth, and estimate the others by them",
        "N",
    ),
    _Declaration("gate_estimates", "flag", "estimates fail, too, if all of their interval is past the threshold"),
    _Declaration(
        "interactions",
        "flag",
        "sketch what each op alone does to the output, which tells how errors of several ops meet; for `qsens plan`",
    ),
    _Declaration("device", "text", "torch device to measure on (default: cpu)", "DEVICE", marker=True),
    _Declaration(
        "shard",
        "shard",
        "measure part i of N of the selected ops, the first one 1/N; `qsens merge` puts the results together",
        "i/N",
    ),
    _Declaration("json", "path", "write every score to FILE", "FILE"),
    _Declaration("gitlab", "path", "write what got worse to FILE, as a Code Quality report of GitLab", "FILE"),
    _Declaration("report", "path", "write a report with charts to DIR: a page, Markdown, JSON and CSV", "DIR"),
    _Declaration("profile", "flag", "tell where the time went, in the summary and in the file of --qsens-json"),
    _Declaration("cache", "path", "where scores and op lists are cached (default: the user's cache directory)", "DIR"),
    _Declaration("no_cache", "flag", "measure anew: neither read nor write the cache"),
    _Declaration("cache_size", "text", "how large the cache may grow, such as 20GB (default)", "SIZE"),
    _Declaration(
        "hash_weights", "flag", "know weights by their contents, not by file sizes and times, when scores are cached"
    ),
    _Declaration("allow_pickle", "flag", "load pickled weights (*.bin), which can run code", marker=True),
    _Declaration("snapshot_dir", "path", "where snapshots live (default: qsens_snapshots)", "DIR"),
    _Declaration("allow_ci_update", "flag", "let --snapshot-update write sensitivity snapshots although CI is set"),
    _Declaration(
        "snapshot_prune",
        "flag",
        "with --snapshot-update, after a complete run: remove snapshot lines of ops that were not measured",
    ),
)
_INI_TYPES: dict[Kind, Literal["string", "bool", "linelist", "int"]] = {
    "text": "string",
    "path": "string",
    # A native TOML file gives numbers as numbers; before 8.4, pytest knew neither those files nor this type.
    "count": "int" if pytest.version_tuple >= (8, 4) else "string",
    "flag": "bool",
    "list": "linelist",
    "shard": "string",
}
_TAKES: dict[Kind, str] = {
    "text": "a text",
    "path": "a path",
    "count": "a whole number from 1",
    "flag": "true or false",
    "list": "a list of texts",
    "shard": "i/N, part i of N",
}

MARKER_HELP = (
    f"qsens({', '.join(f'{d.name}=' for d in _DECLARATIONS if d.marker)}): "
    "quantization sensitivity test; keywords override the --qsens-* options of the same name."
)


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
        for declared in _DECLARATIONS:
            given = config.getoption(declared.key)
            origin, base = declared.flag, config.invocation_params.dir
            if given is None:
                given = _from_ini(config, declared.key, declared.kind)
                origin, base = f"{declared.key} in the ini file", config.rootpath
            values[declared.name] = _parse(declared, given, origin, base)
            origins[declared.name] = origin
        _choose_quantization(values, origins)
        overrides = tuple(_from_ini(config, "qsens_fail_overrides", "list") or ())
        lines = _from_ini(config, "qsens_fused", "list") or ()
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
        allowed = {declared.name: declared for declared in _DECLARATIONS if declared.marker}
        for name, given in keywords.items():
            if name not in allowed:
                raise QsensError(unknown("keyword of @pytest.mark.qsens", name, allowed))
            if given is not None:
                origins[name] = f"{name}= of @pytest.mark.qsens"
                values[name] = _parse(allowed[name], given, origins[name], self.root)
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


def declare(parser: pytest.Parser) -> None:
    """Declare every option, its ini twin and the settings that only an ini file has."""
    group = parser.getgroup("qsens", "quantization sensitivity (pytest-qsens)")
    for declared in _DECLARATIONS:
        if declared.kind == "flag":
            group.addoption(declared.flag, dest=declared.key, action="store_true", default=None, help=declared.help)
        else:
            action = "append" if declared.kind == "list" else "store"
            group.addoption(
                declared.flag,
                dest=declared.key,
                action=action,
                default=None,
                metavar=declared.metavar,
                help=declared.help,
            )
        default: object = {"flag": False, "list": []}.get(declared.kind)
        parser.addini(declared.key, f"the ini twin of {declared.flag}", type=_INI_TYPES[declared.kind], default=default)
    parser.addini(
        "qsens_fail_overrides",
        "thresholds and limits of single ops, one 'GLOB = METRIC:TOLERANCE' or 'GLOB = METRIC<=LIMIT' a line; the "
        "first glob that matches an op decides",
        type="linelist",
    )
    parser.addini(
        "qsens_fused",
        "what --qsens-granularity fused measures as one beside what it knows, one pattern such as "
        "'*.attn.{wq,wk,wv}' a line; the first that matches an op decides",
        type="linelist",
    )


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


def joined(arguments: Sequence[str]) -> list[str]:
    """Spell our options with their values in one argument each.

    xdist takes a lone argument that is a path here for one that it has to translate for other machines, and fails.
    """
    flags = {declared.flag for declared in _DECLARATIONS if declared.kind != "flag"}
    found: list[str] = []
    for argument in arguments:
        if found and found[-1] in flags:
            found[-1] = f"{found[-1]}={argument}"
        else:
            found.append(argument)
    return found


def unknown(what: str, value: object, known: Collection[str]) -> str:
    """Say that a name does not exist, what was probably meant and what there is."""
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"no {what} {value!r}{hint}. Known: {', '.join(known)}"


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _from_ini(config: pytest.Config, key: str, kind: Kind) -> Any:  # noqa: ANN401  # one of the types in _INI_TYPES
    """Value in the ini file, or ``None`` if there is none or it is empty.

    Raises:
        QsensError: If it is not of the type that pytest was told.

    """
    try:
        given = config.getini(key)
    except (TypeError, ValueError, pytest.UsageError) as error:  # which one depends on pytest's version
        raise QsensError(f"{key} in the ini file takes {_TAKES[kind]}: {error}") from error
    return None if given in ("", []) else given


def _parse(declared: _Declaration, given: object, origin: str, base: Path) -> object:
    """Turn what was given into the value of the ``Options`` field; ``None`` stays for options not given."""
    if declared.kind == "flag":
        return _flag(given, origin)
    if given is None:
        return None
    if declared.kind == "count":
        return _count(given, origin)
    if declared.kind == "list":
        items = given if isinstance(given, list | tuple) else (given,)
        return tuple(_given_text(item, declared.kind, origin) for item in items)
    text = _given_text(given, declared.kind, origin)
    if declared.kind == "text":
        return _model_name(text, base) if declared.name == "model" else _checked(declared.name, text, origin)
    return Shard.parse(text, origin) if declared.kind == "shard" else _absolute(text, base)


def _flag(given: object, origin: str) -> bool:
    if given is None or isinstance(given, bool):
        return bool(given)
    raise QsensError(f"{origin} takes {_TAKES['flag']}, not {given!r}")


def _given_text(given: object, kind: Kind, origin: str) -> str:
    text = os.fspath(given) if isinstance(given, str | os.PathLike) else None
    if not isinstance(text, str):
        raise QsensError(f"{origin} takes {_TAKES[kind]}, not {given!r}")
    if not text.strip():  # as a path it would be the current directory
        raise QsensError(f"{origin} is empty. Is a variable in it not set?")
    return text


def _checked(name: str, text: str, origin: str) -> str:
    if check := _CHECKS.get(name):
        check(text, origin)
    return text


def _count(given: object, origin: str) -> int:
    text = str(given)
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < 1:
        raise QsensError(f"{origin} takes {_TAKES['count']}, not {given!r}")
    return int(text)


def _absolute(text: str, base: Path) -> Path:
    # Not resolve(): the user's spelling of a symlinked checkpoint is what messages should show.
    return Path(os.path.normpath(base / Path(text).expanduser()))


def _model_name(text: str, base: Path) -> str:
    """Make a directory absolute, so that every process means the same one; leave other kinds of names alone.

    A bare word is a directory only if it is one here and no preset.
    """
    if ":" in text:  # hub:org/name or package.module:factory
        return text
    path = _absolute(text, base)
    if text.startswith((".", "/", "~")) or ("/" in text and path.is_dir()):
        return str(path)
    from pytest_qsens.models.presets import PRESETS

    return str(path) if text not in PRESETS and path.is_dir() else text


def _check_choice(known: Collection[str]) -> Callable[[str, str], None]:
    def check(text: str, origin: str) -> None:
        if text not in known:
            raise QsensError(unknown(f"value for {origin}:", text, known))

    return check


def _check_scheme(text: str, origin: str) -> None:
    scheme_named(text, f"value for {origin}:")


def _check_fail(text: str, origin: str) -> None:
    from pytest_qsens.gates import parse_gates

    parse_gates(text, origin)


def _check_device(text: str, origin: str) -> None:
    if not re.fullmatch(r"[a-z]+(:[0-9]+)?", text):
        raise QsensError(f"{origin} takes a torch device such as cpu, cuda or cuda:1, not {text!r}")


def _check_duration(text: str, origin: str) -> None:
    from pytest_qsens.time_budget import parse_duration

    parse_duration(text, origin)


def _check_memory(text: str, origin: str) -> None:
    from pytest_qsens.memory import parse_memory

    parse_memory(text, origin)


_CHECKS: dict[str, Callable[[str, str], None]] = {
    "scheme": _check_scheme,
    "config_format": _check_choice(FORMATS),
    "config_down": _check_scheme,
    "config_problems": _check_choice(("error", "warn")),
    "mode": _check_choice(MODES),
    "granularity": _check_choice(GRANULARITIES),
    "engine": _check_choice(ENGINES),
    "fail": _check_fail,
    "device": _check_device,
    "memory": _check_memory,
    "time_budget": _check_duration,
    "cache_size": _check_memory,
}
