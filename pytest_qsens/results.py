"""Results of a run: per op, with a status; as plain values that travel between processes and into files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from pytest_qsens.details import Details, read_details
from pytest_qsens.errors import QsensError
from pytest_qsens.files import (
    Fields,
    check_replaceable,
    finite,
    parse_json,
    read_text,
    typed,
    write_atomically,
)
from pytest_qsens.profile import Profile
from pytest_qsens.shards import Shard

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

SCHEMA = 1

Status = Literal["measured", "estimated", "unexercised", "unquantizable", "unquantized", "failed", "unrun"]
"""``unrun``: an op of the model that this run did not select or did not reach; ``unquantized``: one that the config
leaves as it is."""

Mode = Literal["isolated", "fallback", "added"]
"""Only the op is quantized; everything but the op; everything that a config quantizes, and the op."""

MODES: tuple[Mode, ...] = get_args(Mode)

IDENTICAL = "identical to the reference"
"""Reason of a measured op whose quantized output is the reference bit by bit."""

CANNOT = "measured, as it cannot be estimated: "
"""Reason of an op that was measured by an engine that estimates, before why."""

WITHOUT = "without "
"""Reason of a group that was measured without some of its members, before their names."""

LEFT_OUT = "not measured: "
"""Reason of an op that there was no time or need to measure, before why."""

ABOUT_SCORES = frozenset(
    {
        "additive",
        "distinguishable",
        "gain_noise",
        "inc_sse",
        "loss_noise",
        "noise",
        "quadratic",
        "samples",
        "stderr",
    }
)
"""What results hold beside metrics, and snapshots leave out."""

Scores = dict[str, float | None]
"""Metric name → value. ``sqnr_db`` is ``None`` when the output equals the reference (it would be infinite).

Beside its metrics, a mode has ``stderr`` and ``samples``: see `pytest_qsens.samples`. ``fallback`` has ``noise``,
``gain_noise`` and ``distinguishable``, a truth value: see `pytest_qsens.noise`; ``added`` the same with ``loss_noise``.
The whole model may have ``additive`` and ``quadratic``: see `pytest_qsens.interactions`.
"""

NON_NEGATIVE = frozenset({"sse", "mse", "nmse", "kl", "top1", *ABOUT_SCORES}) - {"distinguishable"}
"""Metrics that no measurement makes negative."""

Interval = tuple[float, float]
"""Bounds that an estimated ``nmse`` comes with, the lower one first."""

LEVEL = 0.90
"""Share of ops whose exact value an interval is to hold."""

INTERVAL = "interval"
"""Key of the interval beside the metrics of a mode."""

Payload = dict[str, Any]
"""Values of builtin types only: what a test report and JSON can carry."""


@dataclass(frozen=True)
class OpResult:
    """What is known about one op after a run.

    ``isolated``, ``fallback`` and ``added`` hold numbers only when ``status`` is ``measured`` or ``estimated``, or
    ``failed`` for another mode alone; ``intervals`` holds that of the ``nmse`` of every mode that is estimated.
    ``reason`` explains every status but ``measured``, and notes an output identical to the reference, what was left
    unquantized in a fully quantized model, or why an op was measured that would be estimated.
    """

    op: str
    type: str
    block: str
    status: Status
    reason: str | None = None
    isolated: Scores | None = None
    fallback: Scores | None = None
    seconds: float = 0.0
    intervals: Mapping[Mode, Interval] = field(default_factory=dict, hash=False)
    ops: tuple[str, ...] = ()
    """Of a group, the ops that were flipped together; empty for an op."""
    scheme: str | None = None
    """Name of its scheme, or of all schemes of a group or of the whole model, where a config is measured."""
    added: Scores | None = None
    weights: int | None = None
    """Values of its weight, or of those of all ops of a group; older files and products of activations have none."""
    kv_values: int | None = None
    """Of keys and values: how many values a cache stores of a token, of all heads; of a group, those of all its ops."""
    kv_heads: int | None = None
    """Likewise, in how many heads: what a token has a scale of its own for."""
    sketch: str | None = None
    """What it does to the output when it alone is quantized, see `pytest_qsens.interactions`; only if asked for."""

    @property
    def partial(self) -> bool:
        """Whether it is a group that was measured without some of its members."""
        return bool(self.ops) and any(part.startswith(WITHOUT) for part in (self.reason or "").split("; "))

    @property
    def modes(self) -> dict[Mode, Scores]:
        """The modes that were measured, with their scores."""
        return {mode: scores for mode in MODES if (scores := getattr(self, mode)) is not None}

    @property
    def metrics(self) -> dict[Mode, Scores]:
        """The modes with what can gate and be recorded, without what is only said about the scores."""
        return {
            mode: {name: value for name, value in scores.items() if name not in ABOUT_SCORES}
            for mode, scores in self.modes.items()
        }


@dataclass(frozen=True)
class Cost:
    """What a run took. ``forwards_per_op`` is the time of one op in units of ``reference_seconds``.

    Of merged shards, ``wall_seconds`` is that of the longest, and ``machine_seconds`` that of all together; other
    results have no ``machine_seconds``.
    """

    wall_seconds: float
    reference_seconds: float | None = None
    forwards_per_op: float | None = None
    machine_seconds: float | None = None


@dataclass(frozen=True)
class RunInfo:
    """What was run: enough to tell whether two results can be compared.

    ``mode`` is ``isolated``, ``fallback`` or ``both``; ``data`` a short hash of the batches, ``None`` if the model
    comes from a factory; ``engine_reason`` says why another engine than the usual one was used; ``profile`` is there if
    it was asked for, ``shard`` if only a part was measured. ``reference`` is a hash of the unquantized outputs' bits,
    where machines differ all of them, joined with ``+``; ``checkpoint`` is one of the weights' files, if there are any.
    ``cached`` is how many of the ops were measured by an earlier run and taken from the cache. ``granularity`` says
    what was measured as one, see `pytest_qsens.groups`. Where a config is measured, ``scheme`` is what it is called,
    and ``config`` has its ``path``, ``format`` and ``sha256``, and as ``down`` the scheme of ops that are added to it.
    """

    model: str
    scheme: str
    engine: str
    mode: str
    environment: Mapping[str, str]
    cost: Cost
    engine_reason: str | None = None
    data: str | None = None
    profile: Profile | None = None
    reference: str | None = None
    checkpoint: str | None = None
    shard: Shard | None = None
    cached: int = 0
    granularity: str = "op"
    config: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Interactions:
    """How what single ops do to the output meets: the matrix G of the products of their changes, in units of the NMSE.

    The sum over the rows and columns of a set of ops is the predicted NMSE of quantizing all of them at once.

    Attributes:
        ops: Names of rows and columns: all that were measured with a sketch.
        matrix: Symmetric. On the diagonal are the isolated errors, which are exact; products are those of sketches.

    """

    ops: tuple[str, ...]
    matrix: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class RunResult:
    """A result file: one entry per op of the model in model order, the whole model's, and how ops meet if asked for.

    ``details`` are there if a report was asked for.
    """

    run: RunInfo
    ops: tuple[OpResult, ...]
    total: OpResult | None = None
    interactions: Interactions | None = None
    details: Details | None = None


def joined(results: Sequence[OpResult]) -> OpResult:
    """Join the results of one op that were measured mode by mode."""
    if len(results) == 1:
        return results[0]
    failed = [result for result in results if result.status == "failed"]
    estimated = [result for result in results if result.status == "estimated"]
    told = [result.reason for result in failed or estimated or results]
    reasons = list(dict.fromkeys(reason for reason in told if reason not in (None, IDENTICAL)))
    if not reasons and all(reason == IDENTICAL for reason in told):
        reasons = [IDENTICAL]
    return replace(
        (failed or estimated or results)[0],
        reason="; ".join(reasons) or None,
        isolated=next((result.isolated for result in results if result.isolated is not None), None),
        fallback=next((result.fallback for result in results if result.fallback is not None), None),
        added=next((result.added for result in results if result.added is not None), None),
        seconds=sum(result.seconds for result in results),
        sketch=next((result.sketch for result in results if result.sketch is not None), None),
        intervals={mode: bounds for result in results for mode, bounds in result.intervals.items()},
    )


def lost_in_noise(scores: Scores | None) -> bool:
    """Whether the gain in these scores is known to be no more than noise."""
    return scores is not None and scores.get("distinguishable") is False


def round_score(value: float) -> float:
    """``value`` at the 6 significant digits that snapshots hold; never a negative zero."""
    return float(f"{value:.6g}") + 0.0


def to_payload(result: OpResult) -> Payload:
    """Turn an `OpResult` into builtin values, at full precision (xdist cannot carry NumPy's).

    Raises:
        ValueError: If a score is not finite: that op has failed, and a failed op has no numbers.

    """
    payload = asdict(result)
    del payload["intervals"], payload["ops"]
    for name in ("scheme", "added", "weights", "kv_values", "kv_heads", "sketch"):
        if payload[name] is None:
            del payload[name]
    if result.ops:
        payload["ops"] = list(result.ops)
    payload["seconds"] = float(result.seconds)
    for mode, scores in result.modes.items():
        payload[mode] = {metric: _builtin(value) for metric, value in sorted(scores.items())}
        try:
            read_scores(payload[mode], mode)
        except QsensError as error:
            raise ValueError(f"{result.op}: {error}") from error
        if mode in result.intervals:
            payload[mode][INTERVAL] = [float(bound) for bound in result.intervals[mode]]
    return payload


def _builtin(value: float | None) -> float | None:
    return value if value is None or isinstance(value, bool) else float(value)


def from_payload(payload: object, where: str = "payload") -> OpResult:
    """Rebuild the `OpResult` that `to_payload` took apart.

    Raises:
        QsensError: If something in it is missing, unknown or of a wrong type; names ``where``.

    """
    fields = Fields(payload, where)
    op = fields.text("op")
    if op:
        fields.where = f"{where} {op!r}"
    status = cast("Status", fields.choice("status", get_args(Status)))
    intervals: dict[Mode, Interval] = {}
    result = OpResult(
        op=op,
        type=fields.text("type"),
        block=fields.text("block"),
        status=status,
        reason=fields.optional_text("reason"),
        isolated=_optional_scores(fields, "isolated", intervals),
        fallback=_optional_scores(fields, "fallback", intervals),
        seconds=fields.number("seconds"),
        intervals=intervals,
        ops=_optional_names(fields, "ops"),
        scheme=fields.optional_text("scheme"),
        added=_optional_scores(fields, "added", intervals),
        weights=_optional_count(fields, "weights"),
        kv_values=_optional_count(fields, "kv_values"),
        kv_heads=_optional_count(fields, "kv_heads"),
        sketch=fields.optional_text("sketch"),
    )
    fields.end()
    return result


def _optional_count(fields: Fields, key: str) -> int | None:
    value, where = fields.take(key), fields.at(key)
    if value is None:
        return None
    count: int = typed(value, int, where)
    if count < 0:
        raise QsensError(f"{where}: {count!r} is not possible, it is never negative")
    return count


def _optional_names(fields: Fields, key: str) -> tuple[str, ...]:
    value, where = fields.take(key), fields.at(key)
    return () if value is None else tuple(typed(name, str, where) for name in typed(value, list, where))


def _optional_scores(fields: Fields, mode: Mode, intervals: dict[Mode, Interval]) -> Scores | None:
    """Scores of a mode; their interval, if there is one, is put where it belongs."""
    value, where = fields.take(mode), fields.at(mode)
    if value is None:
        return None
    scores = dict(typed(value, dict, where))
    if INTERVAL in scores:
        intervals[mode] = _read_interval(scores.pop(INTERVAL), f"{where}, {INTERVAL!r}")
    return read_scores(scores, where)


def _read_interval(value: object, where: str) -> Interval:
    bounds = [finite(bound, where) for bound in typed(value, list, where)]
    if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1]:
        raise QsensError(f"{where}: {value!r} is no interval, which is [low, high]")
    return bounds[0], bounds[1]


def read_scores(value: object, where: str) -> Scores:
    """Scores from parsed JSON: an object of finite numbers, where only ``sqnr_db`` may be null, and few negative.

    Raises:
        QsensError: With the place and the offending value.

    """
    return {
        metric: None if number is None and metric == "sqnr_db" else _score(metric, number, f"{where}, {metric!r}")
        for metric, number in typed(value, dict, where).items()
    }


def _score(metric: str, number: object, where: str) -> float:
    if metric == "distinguishable":
        flag: bool = typed(number, bool, where)
        return flag
    score = finite(number, where)
    if score < 0 and metric in NON_NEGATIVE:
        raise QsensError(f"{where}: {number!r} is not possible, it is never negative")
    return score


def dump(result: RunResult) -> str:
    """Text of a result file: floats at full precision, one op a line."""
    facts = asdict(result.run)
    for name in ("profile", "reference", "checkpoint", "shard", "config"):
        if facts[name] is None:
            del facts[name]
    if result.run.granularity == "op":
        del facts["granularity"]
    if result.run.cost.machine_seconds is None:
        del facts["cost"]["machine_seconds"]
    run = json.dumps(facts, ensure_ascii=False, indent=2).replace("\n", "\n  ")
    ops = ",\n    ".join(_line(op) for op in result.ops)
    total = "null" if result.total is None else _line(result.total)
    listed = f"[\n    {ops}\n  ]" if ops else "[]"
    more = "" if result.interactions is None else f',\n  "interactions": {_matrix(result.interactions)}'
    if result.details is not None:
        more += f',\n  "details": {json.dumps(asdict(result.details), ensure_ascii=False, allow_nan=False)}'
    return f'{{\n  "schema": {SCHEMA},\n  "run": {run},\n  "ops": {listed},\n  "total": {total}{more}\n}}\n'


def _matrix(found: Interactions) -> str:
    rows = ",\n      ".join(json.dumps([round_score(value) for value in row], allow_nan=False) for row in found.matrix)
    ops = json.dumps(found.ops, ensure_ascii=False)
    return f'{{\n    "ops": {ops},\n    "matrix": [\n      {rows}\n    ]\n  }}'


def _line(result: OpResult) -> str:
    return json.dumps(to_payload(result), ensure_ascii=False, allow_nan=False)


def load(path: Path) -> RunResult:
    """Read a result file.

    Raises:
        QsensError: If it is missing, malformed, of a newer schema, or no result file; names the place in it.

    """
    text = read_text(path)
    if text is None:
        raise QsensError(f"there is no result file {path}. `pytest --qsens-json FILE` writes one.")
    return from_document(parse_json(text, path), path)


def from_document(document: object, path: Path) -> RunResult:
    """Rebuild a run from the parsed JSON of a result file.

    Raises:
        QsensError: As `load`.

    """
    fields = Fields(document, str(path))
    fields.schema(SCHEMA)
    run = _read_run(Fields(fields.take("run"), fields.at("run")))
    ops = tuple(from_payload(op, f"{path}, op") for op in typed(fields.take("ops"), list, fields.at("ops")))
    total, more = fields.take("total"), fields.take("details")
    result = RunResult(
        run,
        ops,
        None if total is None else from_payload(total, fields.at("total")),
        _optional_interactions(fields, {op.op for op in ops}),
        None if more is None else read_details(more, fields.at("details")),
    )
    fields.end()
    return result


def _optional_interactions(fields: Fields, known: Collection[str]) -> Interactions | None:
    value, where = fields.take("interactions"), fields.at("interactions")
    if value is None:
        return None
    inner = Fields(value, where)
    names = tuple(typed(name, str, inner.at("ops")) for name in typed(inner.take("ops"), list, inner.at("ops")))
    rows = typed(inner.take("matrix"), list, inner.at("matrix"))
    matrix = tuple(tuple(finite(x, inner.at("matrix")) for x in typed(row, list, inner.at("matrix"))) for row in rows)
    inner.end()
    if strangers := [name for name in names if name not in known]:
        raise QsensError(f"{where}, 'ops': {strangers[0]!r} is no op of the file")
    if [len(row) for row in matrix] != [len(names)] * len(names):
        raise QsensError(f"{where}, 'matrix': a row and a column for each of {len(names)} ops are needed")
    return Interactions(names, matrix)


def _read_run(fields: Fields) -> RunInfo:
    cost = Fields(fields.take("cost"), fields.at("cost"))
    run = RunInfo(
        model=fields.text("model"),
        scheme=fields.text("scheme"),
        engine=fields.text("engine"),
        mode=fields.choice("mode", ("isolated", "fallback", "both")),
        environment=fields.texts("environment"),
        cost=Cost(
            wall_seconds=cost.number("wall_seconds"),
            reference_seconds=cost.optional_number("reference_seconds"),
            forwards_per_op=cost.optional_number("forwards_per_op"),
            machine_seconds=cost.optional_number("machine_seconds"),
        ),
        engine_reason=fields.optional_text("engine_reason"),
        data=fields.optional_text("data"),
        profile=_optional_profile(fields),
        reference=fields.optional_text("reference"),
        checkpoint=fields.optional_text("checkpoint"),
        shard=_optional_shard(fields),
        cached=int(fields.optional_number("cached") or 0),
        granularity=fields.optional_text("granularity") or "op",
        config=_optional_texts(fields, "config"),
    )
    cost.end()
    fields.end()
    return run


def _optional_profile(fields: Fields) -> Profile | None:
    value = fields.take("profile")
    return None if value is None else read_profile(value, fields.at("profile"))


def _optional_texts(fields: Fields, key: str) -> dict[str, str] | None:
    value, where = fields.take(key), fields.at(key)
    if value is None:
        return None
    return {name: typed(text, str, f"{where}, {name!r}") for name, text in typed(value, dict, where).items()}


def _optional_shard(fields: Fields) -> Shard | None:
    value, where = fields.take("shard"), fields.at("shard")
    if value is None:
        return None
    inner = Fields(value, where)
    shard = Shard.parse(f"{inner.number('index'):g}/{inner.number('count'):g}", where)
    inner.end()
    return shard


def read_profile(value: object, where: str) -> Profile:
    """Profile from parsed JSON.

    Raises:
        QsensError: With the place and the offending value.

    """
    fields = Fields(value, where)
    profile = Profile(
        processes=int(fields.number("processes")),
        seconds=fields.numbers("seconds"),
        replay=fields.numbers("replay"),
        gemm_seconds=fields.optional_number("gemm_seconds"),
    )
    fields.end()
    return profile


def write(path: Path, result: RunResult) -> None:
    """Write a result file in one step.

    Raises:
        QsensError: If it cannot be written; an older file is untouched.

    """
    write_atomically(path, dump(result))


def check_overwritable(path: Path) -> None:
    """Make sure before a run that its result can go to ``path`` and destroys nothing but an older result.

    Raises:
        QsensError: If something other than a result file of ours is there, or the directory is missing or read-only.

    """
    check_replaceable(path, _check_result)


def _check_result(path: Path) -> None:
    try:
        load(path)
    except QsensError as error:
        raise QsensError(
            f"{path} exists and is not a result file of this version; it is left untouched ({error}). "
            "Choose another name or remove it."
        ) from error
