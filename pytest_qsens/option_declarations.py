"""Every option: as pytest is told of it, with its ini twin, and whether the marker takes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pytest

from pytest_qsens.configs.names import FORMATS
from pytest_qsens.quant.schemes import USUAL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_qsens.results import Mode

Kind = Literal["text", "path", "count", "flag", "list", "shard"]

MODES: dict[str, tuple[Mode, ...]] = {
    "isolated": ("isolated",),
    "fallback": ("fallback",),
    "both": ("isolated", "fallback"),
}

ENGINES = ("auto", "replay", "delta", "eager", "probe", "fx", "inc")


@dataclass(frozen=True)
class Declaration:
    """One option: ``--qsens-NAME`` on the command line, ``qsens_NAME`` in the ini file."""

    name: str
    kind: Kind
    help: str
    metavar: str | None = None
    marker: bool = False
    """Whether ``@pytest.mark.qsens`` takes it as well: what decides the scores, not what is done with them."""

    @property
    def flag(self) -> str:
        """Spelling on the command line."""
        return "--qsens-" + self.name.replace("_", "-")

    @property
    def key(self) -> str:
        """Key of the ini file; pytest keeps the value of the command line under it, too."""
        return "qsens_" + self.name


DECLARATIONS = (
    Declaration(
        "model",
        "text",
        "model to measure: a preset (minilm, tiny_qwen2_5_vl, qwen2_5_vl_3b), a directory with a Hugging Face "
        "snapshot, hub:org/name, or package.module:factory",
        "MODEL",
        marker=True,
    ),
    Declaration("checkpoint", "path", "directory with the weights of a preset that has none", "DIR", marker=True),
    Declaration("scheme", "text", f"{', '.join(USUAL)} (default: w8a8), or others", "SCHEME", marker=True),
    Declaration(
        "config",
        "path",
        "quantization config that says each op's scheme: that of the ops that it quantizes is measured. One that only "
        "excludes ops (ONNX Runtime's nodes, ModelOpt's disabled_layers) goes with --qsens-scheme, that of all others",
        "FILE",
        marker=True,
    ),
    Declaration(
        "config_format",
        "text",
        f"{', '.join(FORMATS)} (default: found out from what is in the file)",
        "FORMAT",
        marker=True,
    ),
    Declaration(
        "config_problems",
        "text",
        "what is wrong with the config, such as a pattern that matches no op or a scheme that cannot be simulated: "
        "error (default) or warn",
        "error|warn",
        marker=True,
    ),
    Declaration(
        "config_down",
        "text",
        "measure the ops that the config leaves unquantized, too, with SCHEME: in mode fallback, what it would cost to "
        "add one of them to the config",
        "SCHEME",
        marker=True,
    ),
    Declaration(
        "mode",
        "text",
        "isolated: only the op is quantized (default); fallback: everything but the op; both",
        "MODE",
        marker=True,
    ),
    Declaration("ops", "list", "only ops whose name matches GLOB; repeatable", "GLOB", marker=True),
    Declaration("max_ops", "count", "only the first N ops", "N", marker=True),
    Declaration(
        "granularity",
        "text",
        "what is measured as one: op (default); fused: ops that read the same values, such as q, k and v; block: all "
        "ops of a block; type: the same op of all layers",
        "GRANULARITY",
        marker=True,
    ),
    Declaration(
        "calib",
        "path",
        "calibration data: one text per line, or JSONL with text and image (default: a set in the package)",
        "FILE",
        marker=True,
    ),
    Declaration("calib_samples", "count", "at most N calibration samples", "N", marker=True),
    Declaration("eval", "path", "evaluation data, as --qsens-calib", "FILE", marker=True),
    Declaration(
        "engine",
        "text",
        f"{', '.join(ENGINES)} (default: auto); probe: estimates; fx: torch's int8 kernels; inc: Intel Neural "
        "Compressor",
        "ENGINE",
        marker=True,
    ),
    Declaration(
        "fail",
        "text",
        "what counts as worse: nmse:5%% (default), nmse:1e-4 (absolute), sqnr_db:0.5; limits, which need no snapshot, "
        "total.nmse<=1e-3; of the order of all ops top10:9, kendall:0.95; several with commas",
        "METRIC:TOLERANCE",
        marker=True,
    ),
    Declaration(
        "memory",
        "text",
        "memory for values that could be computed again, such as 4GB: less is slower (default: a third of what the "
        "weights leave free, shared by the workers)",
        "SIZE",
        marker=True,
    ),
    Declaration(
        "time_budget",
        "text",
        "estimate all ops, then measure those that matter most until this time is up: 120s, 5m, 1h30m",
        "TIME",
    ),
    Declaration("top", "count", "measure until the K most sensitive ops are known, and estimate the others", "K"),
    Declaration(
        "representatives",
        "count",
        "measure one op of every type in each of N parts of the depth, and estimate the others by them",
        "N",
    ),
    Declaration("gate_estimates", "flag", "estimates fail, too, if all of their interval is past the threshold"),
    Declaration(
        "interactions",
        "flag",
        "sketch what each op alone does to the output, which tells how errors of several ops meet; for `qsens plan`",
    ),
    Declaration("device", "text", "torch device to measure on (default: cpu)", "DEVICE", marker=True),
    Declaration(
        "shard",
        "shard",
        "measure part i of N of the selected ops, the first one 1/N; `qsens merge` puts the results together",
        "i/N",
    ),
    Declaration("json", "path", "write every score to FILE", "FILE"),
    Declaration("gitlab", "path", "write what got worse to FILE, as a Code Quality report of GitLab", "FILE"),
    Declaration("report", "path", "write a report with charts to DIR: a page, Markdown, JSON and CSV", "DIR"),
    Declaration("profile", "flag", "tell where the time went, in the summary and in the file of --qsens-json"),
    Declaration("cache", "path", "where scores and op lists are cached (default: the user's cache directory)", "DIR"),
    Declaration("no_cache", "flag", "measure anew: neither read nor write the cache"),
    Declaration("cache_size", "text", "how large the cache may grow, such as 20GB (default)", "SIZE"),
    Declaration(
        "hash_weights", "flag", "know weights by their contents, not by file sizes and times, when scores are cached"
    ),
    Declaration("allow_pickle", "flag", "load pickled weights (*.bin), which can run code", marker=True),
    Declaration("snapshot_dir", "path", "where snapshots live (default: qsens_snapshots)", "DIR"),
    Declaration("allow_ci_update", "flag", "let --snapshot-update write sensitivity snapshots although CI is set"),
    Declaration(
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

MARKER_HELP = (
    f"qsens({', '.join(f'{d.name}=' for d in DECLARATIONS if d.marker)}): "
    "quantization sensitivity test; keywords override the --qsens-* options of the same name."
)


def declare(parser: pytest.Parser) -> None:
    """Declare every option, its ini twin and the settings that only an ini file has."""
    group = parser.getgroup("qsens", "quantization sensitivity (pytest-qsens)")
    for declared in DECLARATIONS:
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


def joined(arguments: Sequence[str]) -> list[str]:
    """Spell our options with their values in one argument each.

    xdist takes a lone argument that is a path here for one that it has to translate for other machines, and fails.
    """
    flags = {declared.flag for declared in DECLARATIONS if declared.kind != "flag"}
    found: list[str] = []
    for argument in arguments:
        if found and found[-1] in flags:
            found[-1] = f"{found[-1]}={argument}"
        else:
            found.append(argument)
    return found
