"""Result files: runs as JSON that tools and people read, one op a line."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from pytest_qsens.details import read_details
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
from pytest_qsens.result_payloads import from_payload, to_payload
from pytest_qsens.results import Cost, Interactions, RunInfo, RunResult, round_score
from pytest_qsens.shards import Shard

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from pytest_qsens.results import OpResult

SCHEMA = 1


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
