"""The reviewed file of every op's score for one (model, scheme): reading, merging, and writing it safely.

One op is one line, keys are sorted and numbers have 6 significant digits, so that a change reads well as a diff::

    {
      "schema": 1,
      "model": "minilm",
      "scheme": "w8a8",
      "environment": {
        "torch": "2.13.0"
      },
      "ops": {
        "encoder.layer.0.output.dense": {"isolated": {"nmse": 0.0312, "sqnr_db": 15.0585}, "type": "linear"}
      },
      "total": {"isolated": {"nmse": 0.0547, "sqnr_db": 12.6201}, "type": "total"}
    }
"""

from __future__ import annotations

import glob
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qsens.errors import QsensError
from pytest_qsens.files import (
    Fields,
    check_writable,
    locked,
    parse_json,
    read_text,
    temporary_prefix,
    typed,
    write_atomically,
)
from pytest_qsens.ops import TOTAL
from pytest_qsens.result_payloads import read_scores
from pytest_qsens.results import MODES, Mode, OpResult, Payload, Scores, round_score

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from pytest_qsens.thresholds import Verdict

__all__ = [
    "EVALUATION",
    "Entry",
    "Snapshot",
    "accepted",
    "adopt",
    "changed",
    "check_writable",
    "collect_texts",
    "dumps",
    "environment_diff",
    "load",
    "merge",
    "on_other_data",
    "prune",
    "take_texts",
    "union",
    "with_other_schemes",
    "write",
]

SCHEMA = 1

EVALUATION = "evaluation"
"""Key of the hash of the evaluation data in an environment. Files of older versions have that of all data only."""


@dataclass(frozen=True)
class Entry:
    """What is recorded of one op: its type, and its scores in each mode that was accepted so far.

    ``scheme`` names what quantized it, where a config was measured.
    """

    type: str
    isolated: Scores | None = None
    fallback: Scores | None = None
    scheme: str | None = None
    added: Scores | None = None

    @property
    def modes(self) -> dict[Mode, Scores]:
        """The recorded modes, with their scores."""
        return {mode: scores for mode in MODES if (scores := getattr(self, mode)) is not None}

    def to_payload(self) -> Payload:
        """Builtin values with sorted keys and rounded numbers, as a test report and the file carry them."""
        payload: Payload = {
            mode: {
                metric: None if value is None else round_score(float(value)) for metric, value in sorted(scores.items())
            }
            for mode, scores in sorted(self.modes.items())
        }
        return {**payload, **({} if self.scheme is None else {"scheme": self.scheme}), "type": self.type}

    @classmethod
    def of(cls, result: OpResult) -> Entry:
        """Take what can be recorded of a result."""
        return cls(result.type, **result.metrics, scheme=result.scheme)

    @classmethod
    def from_payload(cls, payload: object, where: str = "payload") -> Entry:
        """Rebuild what `to_payload` gave.

        Raises:
            QsensError: If something is missing, unknown or of a wrong type; names ``where``.

        """
        fields = Fields(payload, where)
        modes = {
            mode: read_scores(value, fields.at(mode)) for mode in MODES if (value := fields.take(mode)) is not None
        }
        entry = cls(fields.text("type"), **modes, scheme=fields.optional_text("scheme"))
        fields.end()
        return entry


@dataclass(frozen=True)
class Snapshot:
    """A snapshot file. ``ops`` maps the names of ops, and `TOTAL` for the whole model, to their entries.

    Where groups of ops are measured as one (`pytest_qsens.groups`), ``granularity`` says of which kind, and ``ops``
    holds them: a group is never compared with an op, nor with a group of another kind.

    ``environment`` is where all of it was measured at first. What was accepted elsewhere since does not change it,
    until all of it is measured in one place again: see `adopt`.
    """

    model: str
    scheme: str
    environment: Mapping[str, str] = field(default_factory=dict)
    ops: Mapping[str, Entry] = field(default_factory=dict)
    granularity: str = "op"


def file_name(scheme: str, granularity: str) -> str:
    """Name of the snapshot file of a scheme: groups have one of their own."""
    return f"{scheme}.json" if granularity == "op" else f"{scheme}-{granularity}.json"


def dumps(snapshot: Snapshot) -> str:
    """Text of the file; the same snapshot always gives the same bytes."""
    ops = {name: _line(snapshot.ops[name]) for name in sorted(snapshot.ops)}
    total = ops.pop(TOTAL, None)
    environment = {name: _quoted(value) for name, value in sorted(snapshot.environment.items())}
    members = {
        "schema": str(SCHEMA),
        "model": _quoted(snapshot.model),
        "scheme": _quoted(snapshot.scheme),
        **({} if snapshot.granularity == "op" else {"granularity": _quoted(snapshot.granularity)}),
        "environment": _object(environment, "  "),
        "ops": _object(ops, "  "),
    }
    if total is not None:
        members["total"] = total
    return _object(members, "") + "\n"


def _line(entry: Entry) -> str:
    return json.dumps(entry.to_payload(), ensure_ascii=False, allow_nan=False)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _object(members: Mapping[str, str], indent: str) -> str:
    if not members:
        return "{}"
    lines = f",\n{indent}  ".join(f"{_quoted(name)}: {text}" for name, text in members.items())
    return f"{{\n{indent}  {lines}\n{indent}}}"


_sent: Mapping[str, str] | None = None
"""Texts by path that this process takes for its snapshot files."""


def collect_texts(directory: Path) -> dict[str, str]:
    """Texts of all snapshot files in a snapshot directory, by path."""
    found = {str(path): read_text(path) for path in sorted(directory.glob("*/*.json"))}
    return {path: text for path, text in found.items() if text is not None}


def take_texts(texts: Mapping[str, str]) -> None:
    """Take these for the snapshot files of this process: it compares with what another machine has recorded."""
    global _sent  # noqa: PLW0603 - whoever loads a snapshot has its path alone
    _sent = texts


def load(path: Path, *, model: str | None = None, scheme: str | None = None, granularity: str = "op") -> Snapshot:
    """Read a snapshot file; a missing one is an empty snapshot of ``model``, ``scheme`` and ``granularity``.

    Raises:
        QsensError: If it is malformed, of a newer schema, or belongs to another model, scheme or granularity than
            given; names the file and the place in it. Nothing is changed.

    """
    text = read_text(path) if _sent is None else _sent.get(str(path))
    if text is None:
        return Snapshot(model or "", scheme or "", granularity=granularity)
    snapshot = from_document(parse_json(text, path), path)
    for kind, wanted, found in (
        ("model", model, snapshot.model),
        ("scheme", scheme, snapshot.scheme),
        ("granularity", granularity, snapshot.granularity),
    ):
        if wanted is not None and found != wanted:
            raise QsensError(
                f"{path} is the snapshot of {kind} {found!r}, not {wanted!r}. "
                "Move it away, or choose another snapshot directory."
            )
    return snapshot


def from_document(document: object, path: Path) -> Snapshot:
    """Rebuild a snapshot from the parsed JSON of its file.

    Raises:
        QsensError: If it is malformed or of a newer schema; names the file and the place in it.

    """
    fields = Fields(document, str(path))
    fields.schema(SCHEMA)
    snapshot = Snapshot(
        fields.text("model"),
        fields.text("scheme"),
        fields.texts("environment"),
        granularity=fields.optional_text("granularity") or "op",
    )
    listed = typed(fields.take("ops"), dict, fields.at("ops"))
    ops = {name: Entry.from_payload(entry, f"{path}, op {name!r}") for name, entry in listed.items()}
    if TOTAL in ops:
        raise QsensError(f"{path}: {TOTAL!r} belongs beside 'ops', not in it")
    total = fields.take("total")
    if total is not None:
        ops[TOTAL] = Entry.from_payload(total, fields.at("total"))
    fields.end()
    return replace(snapshot, ops=ops)


def union(*batches: Mapping[str, Entry]) -> dict[str, Entry]:
    """Put the entries of several reports together; neither order nor repetition matters.

    One op can be reported more than once: by two tests, by a rerun, after a worker's crash. Where two reports of the
    same op and mode differ at the file's precision, the one with the larger NMSE is taken (then the larger text): a
    value that was really measured, and the one a later run is least likely to be flagged against.

    Raises:
        QsensError: If two reports disagree about the type or the scheme of an op.

    """
    result: dict[str, Entry] = {}
    for batch in batches:
        for name, entry in batch.items():
            result[name] = _larger(name, result[name], entry) if name in result else entry
    return result


def _larger(name: str, one: Entry, other: Entry) -> Entry:
    for what, both in (("types", {one.type, other.type}), ("schemes", {str(one.scheme), str(other.scheme)})):
        if len(both) > 1:
            raise QsensError(f"op {name!r} was reported with two {what}, {' and '.join(sorted(both))}")
    modes = {
        mode: max((entry.modes[mode] for entry in (one, other) if mode in entry.modes), key=_rank)
        for mode in MODES
        if mode in one.modes or mode in other.modes
    }
    return Entry(one.type, **modes, scheme=one.scheme)


def _rank(scores: Scores) -> tuple[float, str]:
    rounded = {metric: None if value is None else round_score(value) for metric, value in sorted(scores.items())}
    return rounded.get("nmse") or 0.0, json.dumps(rounded)


def accepted(measured: Entry, recorded: Entry | None, verdicts: Mapping[Mode, Verdict]) -> Entry:
    """Give what the file gets of an op whose scores are accepted.

    Modes within their thresholds are left as recorded: small moves make no diff, and do not add up unseen. Where
    only metrics are new, the recorded ones stay too. Nothing stays of another scheme.
    """
    known = recorded.modes if recorded is not None and recorded.scheme == measured.scheme else {}
    modes: dict[Mode, Scores] = {}
    for mode, verdict in verdicts.items():
        if verdict.kind == "new":
            modes[mode] = {**measured.modes[mode], **known.get(mode, {})}
        elif verdict.kind != "ok" or mode not in known:
            modes[mode] = measured.modes[mode]
    return Entry(measured.type, **modes, scheme=measured.scheme)


def merge(old: Snapshot, entries: Mapping[str, Entry]) -> Snapshot:
    """Put newly accepted entries in place of the old ones, op by op and mode by mode; everything else stays.

    Nothing stays of an op that has become another one under the same name, or has another scheme.
    """
    ops = dict(old.ops)
    for name, entry in entries.items():
        same = name in ops and (ops[name].type, ops[name].scheme) == (entry.type, entry.scheme)
        kept = ops[name].modes if same else {}
        ops[name] = Entry(entry.type, **{**kept, **entry.modes}, scheme=entry.scheme)
    return replace(old, ops=ops)


def with_other_schemes(old: Snapshot, measured: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return what was measured of ops that have another scheme than the snapshot says."""
    return {
        name: entry
        for name, entry in measured.items()
        if entry.scheme is not None and name in old.ops and old.ops[name].scheme != entry.scheme
    }


def adopt(snapshot: Snapshot, measured: Mapping[str, Entry], environment: Mapping[str, str]) -> Snapshot:
    """Put in ``environment`` and all that was ``measured`` in it, if that is every line and mode of the file.

    Otherwise nothing changes: no line is put under an environment that it was not measured in.
    """
    if not _parts(snapshot.ops) <= _parts(measured):
        return snapshot
    moved = merge(snapshot, {name: entry for name, entry in measured.items() if name in snapshot.ops})
    return replace(moved, environment=dict(environment))


def _parts(ops: Mapping[str, Entry]) -> set[tuple[str, str, Mode]]:
    return {(name, entry.type, mode) for name, entry in ops.items() for mode in entry.modes}


def changed(old: Snapshot, new: Snapshot) -> list[str]:
    """Names of the lines of ``new`` that ``old`` does not have, at the precision of the file."""
    return [name for name, entry in new.ops.items() if name not in old.ops or _line(entry) != _line(old.ops[name])]


def prune(snapshot: Snapshot, keep_ops: Collection[str]) -> Snapshot:
    """Remove every op that is not in ``keep_ops``. The whole model's entry is no op, and stays."""
    return replace(
        snapshot,
        ops={name: entry for name, entry in snapshot.ops.items() if name == TOTAL or name in keep_ops},
    )


def write(
    path: Path,
    update: Callable[[Snapshot], Snapshot],
    *,
    model: str,
    scheme: str,
    granularity: str = "op",
) -> bool:
    """Read the file anew, apply ``update`` and replace it in one step, while no other process does the same.

    Args:
        path: The snapshot file; its directory is created.
        update: Gets the present snapshot and returns the new one, for example by `merge`.
        model: Label the file must have.
        scheme: Scheme the file must have.
        granularity: Granularity the file must have.

    Returns:
        Whether the text changed. If not, the file is not touched.

    Raises:
        QsensError: If the file is malformed or foreign, or cannot be written. It is as it was.

    """
    try:
        Path(os.path.realpath(path)).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QsensError(f"{path.parent} cannot be created: {error.strerror}") from error
    with locked(path):
        text = dumps(update(load(path, model=model, scheme=scheme, granularity=granularity)))
        if text == read_text(path):
            return False
        _remove_leftovers(path)
        write_atomically(path, text)
        return True


def _remove_leftovers(path: Path) -> None:
    # A writer that was killed leaves its temporary file. Holding the lock, nobody is writing one now.
    target = Path(os.path.realpath(path))
    for leftover in target.parent.glob(f"{glob.escape(temporary_prefix(target))}*.tmp"):
        leftover.unlink(missing_ok=True)


def environment_diff(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """List what differs between two environments, a line for each key, such as ``torch 2.12.1 → 2.13.0``."""
    names = {*old, *new}
    if EVALUATION not in old:
        names -= {EVALUATION}  # ``data`` differs if it does
    return [
        f"{name} {old.get(name, 'not recorded')} → {new.get(name, 'not known')}"
        for name in sorted(names)
        if old.get(name) != new.get(name)
    ]


def on_other_data(old: Mapping[str, str], evaluation: str | None) -> bool:
    """Whether scores of an environment are known to be of other evaluation data than those with this hash."""
    return None not in (old.get(EVALUATION), evaluation) and old[EVALUATION] != evaluation
