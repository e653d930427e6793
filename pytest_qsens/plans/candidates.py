"""From result files to what a plan chooses from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_qsens.configs.rules import CLASS_OF
from pytest_qsens.errors import QsensError
from pytest_qsens.groups import Fused, grouped
from pytest_qsens.interactions import decode
from pytest_qsens.ops import Op, matches
from pytest_qsens.plans import caches
from pytest_qsens.plans.bits import cache_bits, scheme_bits
from pytest_qsens.plans.problem import Candidate, Problem, Unit, own_error
from pytest_qsens.quant.op_scheme import parse
from pytest_qsens.result_files import load
from pytest_qsens.same_run import SAME_MODEL, difference, difference_of_ops, machine_difference

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from pytest_qsens.plans.problem import Floats
    from pytest_qsens.results import OpResult, RunInfo, RunResult


@dataclass(frozen=True)
class Wishes:
    """What holds whatever is measured.

    Attributes:
        never: Globs of ops that stay unquantized.
        fused: Patterns that go before those of `pytest_qsens.groups`.
        estimates: Whether estimated scores are taken, too.
        unquantized: Bits of a weight, or of a cached value, that is not quantized.

    """

    never: tuple[str, ...] = ()
    fused: tuple[Fused, ...] = ()
    estimates: bool = False
    unquantized: float = 16.0


@dataclass(frozen=True)
class _File:
    path: Path
    result: RunResult
    entries: Mapping[str, OpResult]

    @property
    def scheme(self) -> str:
        return self.result.run.scheme

    @property
    def of_cache(self) -> bool:
        return caches.is_of_cache(self.scheme)

    @property
    def queries(self) -> bool:
        return caches.quantizes_queries(self.scheme)


def read_problem(paths: Sequence[Path], wishes: Wishes) -> tuple[RunInfo, Problem]:
    """Read the results of one model under one or more schemes, a file for each.

    Returns:
        What the first file says of its run, and what there is to choose from.

    Raises:
        QsensError: If a file cannot be used, is not of the same model, data and ops as the others, or has a scheme that
            another one has, if a glob or pattern matches nothing, or nothing can be quantized; names files and values.

    """
    files = [_file(path) for path in paths]
    for other in files[1:]:
        _check_same(files[0], other)
    _check_schemes(files)
    fullest = next((file for file in files if file.queries), files[0])  # all of its ops, and those of the others
    groups = _groups(fullest, wishes)
    units: list[Unit] = []
    candidates: list[Candidate] = []
    for group in groups:
        names = _names(group, fullest)
        ops = tuple(_ops(names, fullest))
        never = any(matches(name, glob) for glob in wishes.never for name in (group.name, *names, *ops))
        found = [] if never else list(_measured(len(units), names, files, wishes))
        why = None if found else "never to be quantized" if never else _why(names, files, wishes)
        types = tuple(_types(names, fullest))
        units.append(Unit(group.name, ops, types, _values(names, files), why))
        candidates += found
    if not candidates:
        raise QsensError(
            f"{', '.join(str(file.path) for file in files)}: nothing can be quantized, {units[0].name} for one: "
            f"{units[0].kept}"
        )
    notes = [*_notes(files, candidates)]
    if files[0].of_cache:
        notes += caches.notes(units, candidates, [file.scheme for file in files])
    return files[0].result.run, Problem(
        files[0].result.run.model,
        tuple(file.scheme for file in files),
        tuple(units),
        tuple(candidates),
        wishes.unquantized,
        tuple(notes),
        files[0].of_cache,
    )


def _file(path: Path) -> _File:
    result = load(path)
    if result.run.shard is not None:
        raise QsensError(
            f"{path} is shard {result.run.shard}. Put all shards together with `qsens merge`, and plan then"
        )
    if result.run.config is not None:
        raise QsensError(
            f"{path} is a result of the config {result.run.scheme}, whose ops have schemes of their own. Plans are "
            "made of results of --qsens-scheme, a file for each scheme"
        )
    parts = parse(result.run.scheme)
    if parts is not None and parts.products is not None:
        raise QsensError(
            f"{path} is a result of scheme {result.run.scheme}, of products of two activations. Plans are of layers, "
            "or of keys and values: their budgets are of what is stored"
        )
    if caches.is_of_cache(result.run.scheme):
        entries = caches.entries_of(result.ops)
    else:
        entries = {op.op: op for op in result.ops if set(op.type.split("+")) <= CLASS_OF.keys()}
    if not any(op.isolated for op in entries.values()):
        raise QsensError(
            f"{path}: no op of it has a score in mode isolated, which plans are made from. Measure with "
            "--qsens-mode isolated or both"
        )
    return _File(path, result, entries)


def _check_same(first: _File, other: _File) -> None:
    """Check that two files are of one model on the same data.

    Raises:
        QsensError: Naming the first difference.

    """
    if first.of_cache != other.of_cache:
        layers, cache = (other, first) if first.of_cache else (first, other)
        raise QsensError(
            f"{layers.path} is of layers ({layers.scheme}) and {cache.path} of keys and values ({cache.scheme}): bits "
            "of weights and those of a cache are no one budget. Plan each by itself, and put the rules of the cache's "
            "plan before those of the layers' in one config"
        )
    here, there = first.result.run, other.result.run
    what = difference(here, there, SAME_MODEL)
    ops = [[*file.entries.values()] for file in (first, other)]
    if first.queries != other.queries:  # one of them knows of no queries
        ops = [caches.without_queries(file.entries) for file in (first, other)]
    what = what or difference_of_ops(*ops)
    if what is None and machine_difference(here.environment, there.environment) is None:
        same = here.reference == there.reference
        what = None if same else f"unquantized outputs, reference {here.reference} and {there.reference}"
    if what is not None:
        raise _foreign(first, other, what)


def _foreign(first: _File, other: _File, what: str) -> QsensError:
    return QsensError(
        f"{first.path} and {other.path} are not of one model on the same data: {what}. Measure every scheme with the "
        "same command but for --qsens-scheme and --qsens-json"
    )


def _check_schemes(files: Sequence[_File]) -> None:
    seen: dict[str, _File] = {}
    for file in files:
        other = seen.setdefault(file.scheme, file)
        if other is not file:
            raise QsensError(
                f"{other.path} and {file.path} are both of scheme {file.scheme}. Give one file for each scheme"
            )


def _groups(file: _File, wishes: Wishes) -> Sequence[Op]:
    """List what gets one scheme: fused ops, or the groups that were measured as one."""
    ops = [Op(op.op, op.type) for op in file.entries.values()]
    every = [name for op in file.entries.values() for name in (op.op, *op.ops)]
    for glob in wishes.never:
        if not any(matches(name, glob) for name in every):
            raise QsensError(
                f"--never {glob!r} matches none of the {len(every)} ops of {file.path}. `qsens show` lists them"
            )
    granularity = file.result.run.granularity
    if granularity != "op":
        if wishes.fused:
            raise QsensError(
                f"--fused groups single ops, and {file.path} is of granularity {granularity}: its groups get one "
                "scheme each. Leave --fused out"
            )
        return ops
    for pattern in wishes.fused:
        if not any(pattern.parts(name) for name in every):
            raise QsensError(f"--fused {pattern.text!r} matches no op of {file.path}. `qsens show` lists them")
    return grouped(ops, "fused", (*wishes.fused, *caches.fused(file.scheme)))


def _names(group: Op, file: _File) -> tuple[str, ...]:
    """Name the entries of a file that are of this group."""
    return (group.name,) if group.name in file.entries else group.member_names


def _ops(names: Sequence[str], file: _File) -> Iterator[str]:
    for name in names:
        yield from file.entries[name].ops or (name,)


def _types(names: Sequence[str], file: _File) -> Iterator[str]:
    for name in names:
        entry = file.entries[name]
        yield from [entry.type] * (len(entry.ops) or 1)


def _values(names: Sequence[str], files: Sequence[_File]) -> int | None:
    if files[0].of_cache:
        found = caches.per_token(names, [file.entries for file in files])
        return None if found is None else found[0]
    counts = [files[0].entries[name].weights for name in names]
    return None if None in counts else sum(filter(None, counts))


def _measured(unit: int, names: Sequence[str], files: Sequence[_File], wishes: Wishes) -> Iterator[Candidate]:
    for file in files:
        entries = [file.entries[name] for name in names if name in file.entries]
        if not entries or any(_refusal(entry, wishes) for entry in entries):
            continue
        left = frozenset(name for name in names if name not in file.entries)
        nmse = math.fsum(entry.isolated["nmse"] or 0.0 for entry in entries if entry.isolated)
        sketches = [_sketch(entry, file) for entry in entries]
        known: list[Floats] = [sketch for sketch in sketches if sketch is not None]
        bits = _bits(names, file, files, wishes)
        if len(known) < len(sketches):
            yield Candidate(unit, file.scheme, bits, nmse, nmse, None, left)
        else:
            yield Candidate(unit, file.scheme, bits, nmse, own_error(nmse, known), sum(known[1:], known[0]), left)


def _bits(names: Sequence[str], file: _File, files: Sequence[_File], wishes: Wishes) -> float:
    if not file.of_cache:
        return scheme_bits(file.scheme, wishes.unquantized)
    values, heads = caches.per_token(names, [each.entries for each in files]) or (0, 0)
    return cache_bits(file.scheme, values / heads if heads else None)


def _sketch(entry: OpResult, file: _File) -> Floats | None:
    return None if entry.sketch is None else decode(entry.sketch, f"{file.path}, op {entry.op!r}")


def _refusal(entry: OpResult, wishes: Wishes) -> str | None:
    """Why an op cannot be planned with; ``None`` if it can."""
    if entry.partial:
        return f"measured {entry.reason}"
    if entry.status == "measured" and entry.isolated is not None:
        return None
    if entry.status == "estimated" and entry.isolated is not None:
        return None if wishes.estimates else "estimated (--allow-estimated plans with it)"
    return f"{entry.status}: {entry.reason}" if entry.reason else entry.status


def _why(names: Sequence[str], files: Sequence[_File], wishes: Wishes) -> str:
    found: dict[str, dict[str, None]] = {}
    for file in files:
        for name in names:
            if name in file.entries and (refusal := _refusal(file.entries[name], wishes)) is not None:
                found.setdefault(refusal, {})[name] = None
    return "; ".join(
        refusal if len(which) == len(names) else "; ".join(f"{name} is {refusal}" for name in which)
        for refusal, which in found.items()
    )


def _notes(files: Sequence[_File], candidates: Sequence[Candidate]) -> Iterator[str]:
    lengths = {0 if candidate.sketch is None else len(candidate.sketch) for candidate in candidates}
    if len(lengths - {0}) > 1:
        raise QsensError(
            f"{', '.join(str(file.path) for file in files)}: sketches of {' and '.join(map(str, sorted(lengths)))} "
            "values, which are not of one output. Measure every scheme anew with --qsens-interactions"
        )
    if 0 in lengths:
        without = [str(f.path) for f in files if any(e.isolated and e.sketch is None for e in f.entries.values())]
        yield (
            f"no interactions in {', '.join(without)}: errors are taken to add up. Measure with "
            "--qsens-interactions to know how they meet"
        )
    references = {file.result.run.reference for file in files}
    if len(references) > 1:
        yield "measured on different machines: scores differ by about 1e-4 of themselves for that alone"
