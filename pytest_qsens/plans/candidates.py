"""From result files to what a plan chooses from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_qsens.errors import QsensError
from pytest_qsens.groups import Fused, grouped
from pytest_qsens.interactions import decode
from pytest_qsens.ops import Op, matches
from pytest_qsens.plans import caches
from pytest_qsens.plans.bits import cache_bits, scheme_bits
from pytest_qsens.plans.inputs import check_same, check_schemes, read_file
from pytest_qsens.plans.problem import Candidate, Problem, Unit, own_error

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from pytest_qsens.plans.inputs import ResultFile
    from pytest_qsens.plans.problem import Floats
    from pytest_qsens.results import OpResult, RunInfo


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


def read_problem(paths: Sequence[Path], wishes: Wishes) -> tuple[RunInfo, Problem]:
    """Read the results of one model under one or more schemes, a file for each.

    Returns:
        What the first file says of its run, and what there is to choose from.

    Raises:
        QsensError: If a file cannot be used, is not of the same model, data and ops as the others, or has a scheme that
            another one has, if a glob or pattern matches nothing, or nothing can be quantized; names files and values.

    """
    files = [read_file(path) for path in paths]
    for other in files[1:]:
        check_same(files[0], other)
    check_schemes(files)
    fullest = next((file for file in files if file.queries), files[0])  # all of its ops, and those of the others
    groups = _groups(fullest, wishes)
    units: list[Unit] = []
    candidates: list[Candidate] = []
    for group in groups:
        names = _names(group, fullest)
        ops = tuple(_ops(names, fullest))
        never = _is_never((group.name, *names, *ops), wishes)
        if _by_module(fullest):
            found = [*_of_module(len(units), group, fullest, files, wishes)]
        else:
            found = [] if never else [*_measured(len(units), names, files, wishes)]
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


def _groups(file: ResultFile, wishes: Wishes) -> Sequence[Op]:
    """List what gets one scheme: fused ops, or the groups that were measured as one."""
    ops = [Op(op.op, op.type) for op in file.entries.values()]
    every = [name for op in file.entries.values() for name in (op.op, *op.ops)]
    for glob in wishes.never:
        if not any(matches(name, glob) for name in every):
            raise QsensError(
                f"--never {glob!r} matches none of the {len(every)} ops of {file.path}. `qsens show` lists them"
            )
    granularity = file.result.run.granularity
    if granularity != "op" and wishes.fused:
        raise QsensError(
            f"--fused groups single ops, and {file.path} is of granularity {granularity}: its groups get one "
            "scheme each. Leave --fused out"
        )
    if granularity == "type" and file.queries:
        raise QsensError(
            f"{file.path} is of granularity type, which has queries apart from keys and values, and {file.scheme} is "
            "given to those of a module together, or to none. Measure with --qsens-granularity op"
        )
    for pattern in wishes.fused:
        if not any(pattern.parts(name) for name in every):
            raise QsensError(f"--fused {pattern.text!r} matches no op of {file.path}. `qsens show` lists them")
    if _by_module(file):
        return grouped(ops, "fused", (caches.OF_ONE_MODULE,))
    return grouped(ops, "fused", wishes.fused) if granularity == "op" else ops


def _by_module(file: ResultFile) -> bool:
    """Whether it tells queries, keys and values of a module apart, for which a scheme is chosen together."""
    return file.queries and not any(entry.ops for entry in file.entries.values())


def _names(group: Op, file: ResultFile) -> tuple[str, ...]:
    """Name the entries of a file that are of this group."""
    return (group.name,) if group.name in file.entries else group.member_names


def _ops(names: Sequence[str], file: ResultFile) -> Iterator[str]:
    for name in names:
        yield from file.entries[name].ops or (name,)


def _types(names: Sequence[str], file: ResultFile) -> Iterator[str]:
    for name in names:
        entry = file.entries[name]
        yield from [entry.type] * (len(entry.ops) or 1)


def _values(names: Sequence[str], files: Sequence[ResultFile]) -> int | None:
    if files[0].of_cache:
        found = caches.per_token(names, [file.entries for file in files])
        return None if found is None else found[0]
    counts = [files[0].entries[name].weights for name in names]
    return None if None in counts else sum(filter(None, counts))


def _is_never(names: Sequence[str], wishes: Wishes) -> bool:
    return any(matches(name, glob) for glob in wishes.never for name in names)


def _of_module(
    unit: int, group: Op, fullest: ResultFile, files: Sequence[ResultFile], wishes: Wishes
) -> Iterator[Candidate]:
    """Make candidates of a module: one scheme for queries, keys and values, or any for keys and for values."""
    names = _names(group, fullest)
    if not _is_never((group.name, *names), wishes):
        yield from _measured(unit, names, [file for file in files if file.queries], wishes)
    ops = [Op(op.op, op.type) for op in fullest.entries.values()]
    parts = caches.of_one_scheme(group, ops, wishes.fused)
    without = [file for file in files if not file.queries]
    found = [[] if _is_never(part, wishes) else [*_measured(unit, part, without, wishes)] for part in parts]
    yield from caches.combined(parts, found, [_values(part, files) for part in parts], wishes.unquantized)


def _measured(unit: int, names: Sequence[str], files: Sequence[ResultFile], wishes: Wishes) -> Iterator[Candidate]:
    for file in files:
        entries = [file.entries[name] for name in names]
        if any(_refusal(entry, wishes) for entry in entries):
            continue
        nmse = math.fsum(entry.isolated["nmse"] or 0.0 for entry in entries if entry.isolated)
        sketches = [_sketch(entry, file) for entry in entries]
        known: list[Floats] = [sketch for sketch in sketches if sketch is not None]
        bits = _bits(names, file, files, wishes)
        if len(known) < len(sketches):
            yield Candidate(unit, file.scheme, bits, nmse, nmse, None)
        else:
            yield Candidate(unit, file.scheme, bits, nmse, own_error(nmse, known), sum(known[1:], known[0]))


def _bits(names: Sequence[str], file: ResultFile, files: Sequence[ResultFile], wishes: Wishes) -> float:
    if not file.of_cache:
        return scheme_bits(file.scheme, wishes.unquantized)
    values, heads = caches.per_token(names, [each.entries for each in files]) or (0, 0)
    return cache_bits(file.scheme, values / heads if heads else None)


def _sketch(entry: OpResult, file: ResultFile) -> Floats | None:
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


def _why(names: Sequence[str], files: Sequence[ResultFile], wishes: Wishes) -> str:
    found: dict[str, dict[str, None]] = {}
    for file in files:
        for name in names:
            if name in file.entries and (refusal := _refusal(file.entries[name], wishes)) is not None:
                found.setdefault(refusal, {})[name] = None
    return "; ".join(
        refusal if len(which) == len(names) else "; ".join(f"{name} is {refusal}" for name in which)
        for refusal, which in found.items()
    )


def _notes(files: Sequence[ResultFile], candidates: Sequence[Candidate]) -> Iterator[str]:
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
