"""A comparison of two sensitivity files, for people (80 columns) and for machines."""

from __future__ import annotations

import json
import math
from textwrap import wrap
from typing import TYPE_CHECKING

from pytest_qsens.compare import NEVER_MEASURED
from pytest_qsens.report.numbers import coefficient
from pytest_qsens.wording import count

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_qsens.compare import Comparison, Correlation, Missing, Ranked, Shared, Side
    from pytest_qsens.results import Payload

_WIDTH = 79
_MODES = {
    "isolated": "isolated (only this op quantized)",
    "fallback": "fallback (everything quantized but this op)",
    "added": "added (everything quantized that the config says, and this op)",
    "cumulative": "cumulative (this op and all before it quantized)",
}


def report(found: Comparison, limit: int | None) -> Iterator[str]:
    """Lines for the terminal, with at most ``limit`` ops in lists that can be as long as the model (``None``: all)."""
    yield from _file("A", found.a)
    yield from _file("B", found.b)
    yield ""
    yield from _wrapped(_match(found))
    yield from _correlations(found)
    yield from _top(found)
    yield from _disagreements(found, limit)
    yield from _missing("A", "B", found.a, limit)
    yield from _missing("B", "A", found.b, limit)


def _wrapped(text: str, indent: str = "") -> list[str]:
    hang = f"{indent}  "
    return wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=hang, break_long_words=False)


def _file(letter: str, side: Side) -> Iterator[str]:
    source = side.source
    yield f"{letter}: {source.path}"
    yield from _wrapped(f"{source.tool}: {source.about}", "   ")
    yield from _wrapped(f"{source.metric}, {_MODES[source.mode]}", "   ")
    yield f"   {'LARGER' if source.larger_is_sensitive else 'SMALLER'} means a more sensitive op"
    yield f"   {len(source.ops)} ops, {len(source.values)} with a value"
    for note in _ties(side.shared):
        yield from _wrapped(note, "   ")
    for note in source.notes:
        yield from _wrapped(f"note: {note}", "   ")


def _ties(shared: Sequence[Shared]) -> Iterator[str]:
    for group in shared:
        verdict = f"{NEVER_MEASURED}, so not ranked" if group.suspect else "ranked as equals"
        yield f"{len(group.ops)} ops share the value {group.value:.9g}: {verdict}"


def _match(found: Comparison) -> str:
    prefix, how = found.matching.prefix, "names as they are"
    if prefix is not None:
        how = (
            f"{prefix.text!r} assumed in front of {prefix.side.upper()}'s names, which {found.matching.by_prefix} need"
        )
    elif found.matching.rivals:
        how += "; several prefixes would match equally many more, so none was assumed"
    return f"{found.common} common ops ({how}), {len(found.ops)} of them ranked in both files"


def _correlations(found: Comparison) -> Iterator[str]:
    if found.a.source.mode != found.b.source.mode:
        yield from _wrapped(
            f"note: A is {found.a.source.mode} and B {found.b.source.mode}: two questions, whose answers can differ"
        )
    yield ""
    yield "rank correlation; on both sides rank 1 is the most sensitive op"
    yield "(1: same order, 0: unrelated, -1: reversed)"
    rows = [("ops ranked in both", found.correlation)]
    if found.with_suspects is not None:
        rows.append((f"with those {NEVER_MEASURED}", found.with_suspects))
    width = max(len(name) for name, _ in rows)
    yield f"  {'':<{width}}  {'ops':>5}  {'Spearman':>9}  {'Kendall tau-b':>13}"
    for name, row in rows:
        yield f"  {name:<{width}}  {row.ops:>5}  {coefficient(row.spearman):>9}  {coefficient(row.kendall_tau_b):>13}"


def _top(found: Comparison) -> Iterator[str]:
    both = found.top_both
    yield ""
    chance = f"{found.expected_by_chance:.1f} expected by chance"
    if not found.top_a:
        yield "no list of the most sensitive ops: those at its end would have equal ranks, whatever its length"
        return
    yield f"{len(both)} of the {len(found.top_a)} most sensitive ops are the same ({chance})"
    only_a = [op for op in found.top_a if op not in both]
    only_b = [op for op in found.top_b if op not in both]
    for title, ops in (("in both", both), ("only in A's", only_a), ("only in B's", only_b)):
        if ops:
            yield f" {title}:"
            yield from _table(ops)


def _disagreements(found: Comparison, limit: int | None) -> Iterator[str]:
    yield ""
    if not found.disagreements:
        yield "no op has different ranks"
        return
    yield "largest differences in rank"
    shown = found.disagreements[:limit]
    yield from _table(shown)
    yield from _more(len(found.disagreements) - len(shown), " ")


def _table(ops: Sequence[Ranked]) -> Iterator[str]:
    """Rank and value in A and B; names come last, so that a long one moves nothing else."""
    yield f"{'#A':>4} {'#B':>4}  {'value A':>9} {'value B':>9}  op"
    for op in ops:
        yield f"{op.rank_a:>4g} {op.rank_b:>4g}  {_number(op.value_a):>9} {_number(op.value_b):>9}  {op.op}"


def _missing(letter: str, other: str, side: Side, limit: int | None) -> Iterator[str]:
    if not side.missing:
        return
    yield ""
    valued = sum(op.other is not None for op in side.missing)
    values = f"{other} has a value for {valued}: shown, the most sensitive in {other} first"
    yield from _wrapped(
        f"not ranked in {letter}: {count(len(side.missing), 'op')} ({values if valued else f'nor has {other} a value'})"
    )
    groups: dict[str, list[Missing]] = {}
    for op in side.missing:
        groups.setdefault(op.why, []).append(op)
    for why, ops in groups.items():
        yield from _wrapped(f"{count(len(ops), 'op')}: {why}", " ")
        shown = ops[:limit]
        for op in shown:
            yield f"  {'-' if op.other is None else _number(op.other):>9}  {op.op}"
        yield from _more(len(ops) - len(shown), "  ")


def _more(number: int, indent: str) -> Iterator[str]:
    if number:
        yield f"{indent}and {number} more (--all shows them)"


def _number(value: float) -> str:
    return "infinite" if math.isinf(value) else f"{value:.4g}"


def as_json(found: Comparison) -> str:
    """Give everything as JSON: lists in full, an infinite ``sqnr_db`` as null (as in result files)."""
    prefix = found.matching.prefix
    document = {
        "a": _file_payload(found.a),
        "b": _file_payload(found.b),
        "common": found.common,
        "prefix": None
        if prefix is None
        else {"side": prefix.side, "text": prefix.text, "needed_by": found.matching.by_prefix},
        "rival_prefixes": [{"side": rival.side, "text": rival.text} for rival in found.matching.rivals],
        "ranked": _correlation_payload(found.correlation),
        "with_suspects": None if found.with_suspects is None else _correlation_payload(found.with_suspects),
        "top": {
            "k": len(found.top_a),
            "expected_by_chance": found.expected_by_chance,
            "both": [op.op for op in found.top_both],
            "a": [op.op for op in found.top_a],
            "b": [op.op for op in found.top_b],
        },
        "disagreements": [op.op for op in found.disagreements],
        "ops": [
            {
                "op": op.op,
                "rank_a": op.rank_a,
                "rank_b": op.rank_b,
                "value_a": _finite(op.value_a),
                "value_b": _finite(op.value_b),
            }
            for op in found.ops
        ],
    }
    return json.dumps(document, ensure_ascii=False, allow_nan=False, indent=2)


def _file_payload(side: Side) -> Payload:
    source = side.source
    return {
        "path": source.path,
        "tool": source.tool,
        "about": source.about,
        "mode": source.mode,
        "metric": source.metric,
        "sensitive": "larger" if source.larger_is_sensitive else "smaller",
        "ops": len(source.ops),
        "with_value": len(source.values),
        "shared": [
            {"value": _finite(group.value), "ops": list(group.ops), "suspect": group.suspect} for group in side.shared
        ],
        "not_ranked": [
            {"op": op.op, "why": op.why, "other_value": None if op.other is None else _finite(op.other)}
            for op in side.missing
        ],
        "notes": list(source.notes),
    }


def _correlation_payload(correlation: Correlation) -> Payload:
    return {
        "ops": correlation.ops,
        "spearman": correlation.spearman,
        "kendall_tau_b": correlation.kendall_tau_b,
    }


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else value
