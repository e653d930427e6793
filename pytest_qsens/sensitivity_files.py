"""Files with a sensitivity for every op: our result files, and those of two other tools."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qsens.errors import QsensError
from pytest_qsens.files import Fields, parse_json, read_text, typed
from pytest_qsens.quant.schemes import noun
from pytest_qsens.result_files import from_document
from pytest_qsens.results import MODES, lost_in_noise
from pytest_qsens.thresholds import METRICS
from pytest_qsens.wording import first_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from pytest_qsens.results import OpResult, RunResult

_FALLBACK = "fp32_fallback_sensitivity"
_REQUANT = "int8_requant_sensitivity"
_LAYERS = "layer_sensitivity"
_KNOWN = (
    "a result file of pytest-qsens ('schema', 'run', 'ops'; `pytest --qsens-json FILE` writes one), "
    f"Intel Neural Compressor's sensitivity ({_FALLBACK!r}, {_REQUANT!r}), "
    f"ModelOpt's AutoQuantize layers ({_LAYERS!r})"
)
_KEYS_SHOWN = 8
_WRAPPED = ".module"
"""Intel Neural Compressor puts a leaf module that it traces alone into a `QuantWrapper`, whose child has this name."""


@dataclass(frozen=True)
class Sensitivities:
    """One score of every op of one file.

    ``values`` and ``without`` are in the file's order: ops with a value, and for every other op of the file why it has
    none. ``mode`` is ``isolated``, ``fallback`` or ``cumulative`` (the op and all that are listed before it quantized).
    ``trusted``: the file says itself which ops were not measured, so equal values were really measured.
    """

    path: str
    tool: str
    about: str
    mode: str
    metric: str
    larger_is_sensitive: bool
    values: Mapping[str, float]
    without: Mapping[str, str]
    trusted: bool
    notes: tuple[str, ...] = ()

    @property
    def ops(self) -> tuple[str, ...]:
        """All ops of the file."""
        return (*self.values, *self.without)


@dataclass(frozen=True)
class _Results:
    """A result file of ours, before it is known which of its scores are wanted."""

    path: Path
    run: RunResult

    @property
    def modes(self) -> tuple[str, ...]:
        return tuple(mode for mode in MODES if self.metrics(mode))

    def metrics(self, mode: str) -> tuple[str, ...]:
        found = {metric for op in self.run.ops for metric in _scores(op, mode)}
        return tuple(metric for metric in METRICS if metric in found)


def read_pair(
    left: Path, right: Path, mode: str | None = None, metric: str | None = None
) -> tuple[Sensitivities, Sensitivities]:
    """Read two files of any known shape.

    Args:
        left: The one file.
        right: The other.
        mode: What to take from result files of ours. Default: what both files have, else the first a file has.
        metric: Likewise. Default: ``nmse``, or the metric of another tool's file where ours has it too.

    Raises:
        QsensError: If a file cannot be used or lacks what was asked for; names the file and the place in it.

    """
    files = _read(left), _read(right)
    _check_granularity(*files)
    if (mode or metric) and not any(isinstance(file, _Results) for file in files):
        option = "--mode" if mode else "--metric"
        raise QsensError(
            f"{option} chooses from result files of pytest-qsens, and neither {left} nor {right} is one. Leave it out."
        )
    return _chosen(files[0], files[1], mode, metric), _chosen(files[1], files[0], mode, metric)


def _check_granularity(left: _Results | Sensitivities, right: _Results | Sensitivities) -> None:
    """Check that both files are of ops, or both of groups of one kind; files of other tools are of ops."""
    one, two = (file.run.run.granularity if isinstance(file, _Results) else "op" for file in (left, right))
    if one != two:
        raise QsensError(
            f"{left.path} is of granularity {one!r} and {right.path} of {two!r}: the score of a group says nothing of "
            "its ops. Measure both with the same --qsens-granularity"
        )


def _read(path: Path) -> _Results | Sensitivities:
    text = read_text(path)
    if text is None:
        raise QsensError(f"there is no file {path}. Known are {_KNOWN}.")
    document = typed(parse_json(text, path, constants=True), dict, str(path))
    if _FALLBACK in document or _REQUANT in document:
        return _neural_compressor(document, path)
    if _LAYERS in document:
        return _model_opt(document, path)
    if "run" in document and "ops" in document:
        return _ours(document, path)
    keys = [repr(key) for key in document]
    found = f"keys {first_of(keys, _KEYS_SHOWN)}" if keys else "an object without keys"
    raise QsensError(f"{path}: unknown shape, found {found}. Known are {_KNOWN}.")


def _ours(document: object, path: Path) -> _Results:
    run = from_document(document, path)
    seen: set[str] = set()
    for op in run.ops:
        _refuse_twice(op.op, seen, f"{path}, 'ops'")
        seen.add(op.op)
    results = _Results(path, run)
    if not results.modes:
        raise QsensError(f"{path}: none of its {len(run.ops)} ops has a score. `qsens show {path}` says why.")
    return results


def _chosen(
    file: _Results | Sensitivities, other: _Results | Sensitivities, mode: str | None, metric: str | None
) -> Sensitivities:
    if isinstance(file, Sensitivities):
        return file
    others = other.modes if isinstance(other, _Results) else (other.mode,)
    mode = _choice(file.path, "mode", mode, file.modes, [known for known in file.modes if known in others])
    metrics = file.metrics(mode)
    if isinstance(other, Sensitivities):
        wanted = [known for known in (other.metric, "nmse") if known in metrics]
    else:
        # the mode that is chosen for the other file, seen from there
        shared = other.metrics(mode) if mode in other.modes else other.metrics(other.modes[0])
        wanted = [known for known in metrics if known in shared]
    metric = _choice(f"{file.path}, mode {mode}", "metric", metric, metrics, wanted)
    values: dict[str, float] = {}
    without: dict[str, str] = {}
    for op in file.run.ops:
        scores = _scores(op, mode)
        if metric in scores:
            value = scores[metric]
            values[op.op] = math.inf if value is None else value
        else:
            without[op.op] = _why(op, mode, metric)
    estimates = sum(op.status == "estimated" for op in file.run.ops if op.op in values)
    notes = [f"estimates, not measured: {estimates} of {len(values)} values"] if estimates else []
    scored = [op for op in file.run.ops if op.op in values]
    noisy = sum(lost_in_noise(scores) for op in scored for known, scores in op.modes.items() if known == mode)
    if noisy:
        notes.append(
            f"not to be told from noise: the {'loss' if mode == 'added' else 'gain'} of {noisy} of {len(values)} ops"
        )
    info = file.run.run
    return Sensitivities(
        path=str(file.path),
        tool="pytest-qsens",
        about=f"model {info.model}, {noun(info.scheme)} {info.scheme}, engine {info.engine}",
        mode=mode,
        metric=metric,
        larger_is_sensitive=_larger_is_sensitive(mode, metric),
        values=values,
        without=without,
        trusted=True,
        notes=tuple(notes),
    )


def _choice(where: object, what: str, asked: str | None, known: Sequence[str], wanted: Sequence[str]) -> str:
    if asked is None:
        return [*wanted, *known][0]
    if asked not in known:
        raise QsensError(f"{where}: there is no {what} {asked!r} in it. It has {', '.join(known)}.")
    return asked


def _larger_is_sensitive(mode: str, metric: str) -> bool:
    """Tell the direction: quantizing a sensitive op alone makes things worse, keeping it in fp32 makes them better."""
    worse = METRICS[metric].higher_is_worse
    return worse if mode in ("isolated", "added") or metric == "gain" else not worse


def _scores(op: OpResult, mode: str) -> Mapping[str, float | None]:
    return {str(known): scores for known, scores in op.metrics.items()}.get(mode, {})


def _why(op: OpResult, mode: str, metric: str) -> str:
    if op.status == "measured":
        return f"measured, but without {metric} in mode {mode}"
    return f"{op.status}: {op.reason}" if op.reason else op.status


def _neural_compressor(document: dict[str, Any], path: Path) -> Sensitivities:
    tables = {
        key: _entries(document, key, path, "op_name", "mse", optional_text="op_type", suffix=_WRAPPED)
        for key in (_FALLBACK, _REQUANT)
        if key in document
    }
    used = next((key for key, values in tables.items() if values), None)
    if used is None:
        raise QsensError(f"{path}: {' and '.join(map(repr, tables))} without a single op. Score some ops first.")
    notes = ["the values that it calls mse are sums of squared errors"]
    if used == _REQUANT:
        notes.append(
            "cumulative: an op's value is the error with it and all ops listed before it quantized. That is no score "
            "of the op alone, and grows along the list whatever the op"
        )
    elif tables.get(_REQUANT):
        notes.append(f"{_REQUANT!r} is cumulative and left aside")
    return Sensitivities(
        path=str(path),
        tool="Intel Neural Compressor",
        about=used,
        mode="fallback" if used == _FALLBACK else "cumulative",
        metric="sse",
        larger_is_sensitive=used == _REQUANT,
        values=tables[used],
        without={},
        trusted=False,
        notes=tuple(notes),
    )


def _model_opt(document: dict[str, Any], path: Path) -> Sensitivities:
    values = _entries(document, _LAYERS, path, "layer", "sensitivity", optional_number="num_bits")
    if not values:
        raise QsensError(f"{path}: {_LAYERS!r} without a single layer. Score some layers first.")
    about = [
        f"{what} {value}"
        for what, table, key in (
            ("model", "model", "id"),
            ("scheme", "scheme", "name"),
            ("method", "scheme", "auto_quantize_method"),
        )
        if isinstance(value := _inside(document, table, key), str)
    ]
    return Sensitivities(
        path=str(path),
        tool="ModelOpt AutoQuantize",
        about=", ".join(about) or _LAYERS,
        mode="isolated",
        metric="sensitivity",
        larger_is_sensitive=True,
        values=values,
        without={},
        trusted=False,
        notes=(
            "it can score layers as a group, named by one of them (q_proj for q, k and v; gate_proj for gate and up)",
        ),
    )


def _inside(document: dict[str, Any], table: str, key: str) -> object:
    found = document.get(table)
    return found.get(key) if isinstance(found, dict) else None


def _entries(
    document: dict[str, Any],
    key: str,
    path: Path,
    name_key: str,
    value_key: str,
    *,
    optional_text: str | None = None,
    optional_number: str | None = None,
    suffix: str = "",
) -> dict[str, float]:
    """Op, without ``suffix``, → value of one list of objects; other keys of an object are no concern of ours."""
    values: dict[str, float] = {}
    for index, entry in enumerate(typed(document[key], list, f"{path}, {key!r}"), 1):
        fields = Fields(entry, f"{path}, {key!r}, entry {index}")
        name = fields.text(name_key).removesuffix(suffix)
        if not name:
            raise QsensError(f"{fields.at(name_key)}: the name is empty")
        fields.where = f"{fields.where} {name!r}"
        value = fields.number(value_key)
        if value < 0:
            raise QsensError(f"{fields.at(value_key)}: {value!r} is not possible, it is never negative")
        if optional_text is not None:
            fields.optional_text(optional_text)
        if optional_number is not None:
            fields.optional_number(optional_number)
        _refuse_twice(name, values, fields.where)
        values[name] = value + 0.0
    return values


def _refuse_twice(name: str, seen: Mapping[str, object] | set[str], where: str) -> None:
    if name in seen:
        raise QsensError(f"{where}: {name!r} is there twice. Keep one of the two entries.")
