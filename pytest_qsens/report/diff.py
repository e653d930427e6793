"""What changed between two files with scores: for the terminal, Markdown, HTML and machines."""

from __future__ import annotations

import json
from html import escape
from typing import TYPE_CHECKING

from pytest_qsens.diff import KINDS
from pytest_qsens.ops import TOTAL
from pytest_qsens.quant.schemes import noun
from pytest_qsens.report.markdown import escaped
from pytest_qsens.wording import count

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_qsens.diff import Change, Diff, Kind
    from pytest_qsens.thresholds import Threshold

SAID: dict[Kind, str] = {
    "exceeded": "past a limit",
    "worse": "worse",
    "lost": "without a score now",
    "better": "better",
    "appeared": "new",
    "vanished": "gone",
    "unrun": "not run",
    "same": "as before",
}
"""Kind of change → what it is called."""


def text(found: Diff, thresholds: Sequence[Threshold], *, everything: bool) -> Iterator[str]:
    """Lines for the terminal; ops that are as before only if ``everything`` is asked for."""
    yield f"{found.new.model}, {noun(found.new.scheme)} {found.new.scheme}: {found.old.name} → {found.new.name}"
    yield f"by {_rules(thresholds)}, {' and '.join(found.modes)}; higher is worse, but for sqnr_db and top1"
    yield from (f"note: {note}" for note in found.notes)
    yield f"{_counts(found)}"
    for block, changes in found.blocks().items():
        shown = _shown(changes, everything=everything)
        if shown:
            yield ""
            yield f"{_title(block)}: {_of_kinds(changes)}"
        for change in shown:
            yield f"  {change.kind:<8}  {change.op}"
            yield from (f"{'':<12}{line}" for line in change.lines)


def markdown(found: Diff, thresholds: Sequence[Threshold], *, everything: bool) -> Iterator[str]:
    """Lines of a Markdown document with one table."""
    yield f"### {escaped(found.new.model)}, {escaped(found.new.scheme)}: {_counts(found)}"
    yield ""
    yield (
        f"{escaped(found.old.name)} → {escaped(found.new.name)}, by {escaped(_rules(thresholds))}, "
        f"{' and '.join(found.modes)}. Higher is worse, but for sqnr_db and top1."
    )
    yield from (f"- {escaped(note)}" for note in found.notes)
    rows = _rows(found, everything=everything)
    if rows:
        yield ""
        yield "| block | change | op | scores |"
        yield "|---|---|---|---|"
    for block, change in rows:
        yield f"| {escaped(block)} | {change.kind} | {escaped(change.op)} | {'<br>'.join(map(escaped, change.lines))} |"


def html(found: Diff, thresholds: Sequence[Threshold], *, everything: bool) -> Iterator[str]:
    """Lines of one HTML file that needs nothing else."""
    title = escape(f"{found.new.model}, {found.new.scheme}")
    yield '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{title}: what changed</title><style>{_STYLE}</style></head><body>"
    yield f"<h1>{title}: {escape(_counts(found))}</h1>"
    yield f"<p>{escape(found.old.name)} → {escape(found.new.name)}, by {escape(_rules(thresholds))}, "
    yield f"{' and '.join(found.modes)}. Higher is worse, but for sqnr_db and top1.</p>"
    if found.notes:
        yield f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in found.notes)}</ul>"
    rows = _rows(found, everything=everything)
    if rows:
        yield "<div><table><thead><tr><th>change</th><th>op</th><th>scores</th></tr></thead><tbody>"
    last = None
    for block, change in rows:
        if block != last:
            yield f'<tr><th colspan="3" scope="rowgroup">{escape(_title(block))}</th></tr>'
            last = block
        lines = "<br>".join(map(escape, change.lines))
        yield f'<tr class="{change.kind}"><td>{change.kind}</td><td>{escape(change.op)}</td><td>{lines}</td></tr>'
    if rows:
        yield "</tbody></table></div>"
    yield "</body></html>"


_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem }
h1 { font-size: 1.3rem }
div { overflow-x: auto }
table { border-collapse: collapse; width: 100% }
tr { border-bottom: 1px solid light-dark(#ddd, #444) }
td, th { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; overflow-wrap: anywhere }
tbody th { padding-top: 1rem }
td:first-child { white-space: nowrap; font-weight: 600 }
.worse td:first-child, .lost td:first-child { color: light-dark(#b00020, #ff8a80) }
.better td:first-child { color: light-dark(#1b6e20, #8fd694) }
"""


def as_json(found: Diff) -> str:
    """Everything, ops that are as before among it."""
    document = {
        "old": found.old.name,
        "new": found.new.name,
        "model": found.new.model,
        "scheme": found.new.scheme,
        "modes": found.modes,
        "notes": found.notes,
        "counts": {kind: found.count(kind) for kind in KINDS if kind != "exceeded"},
        "ops": [
            {
                "op": change.op,
                "block": change.block,
                "change": change.kind,
                "scores": change.lines,
                "ratio": change.ratio,
            }
            for change in found.changes
        ],
    }
    return json.dumps(document, ensure_ascii=False, allow_nan=False, indent=2)


def _shown(changes: Sequence[Change], *, everything: bool) -> list[Change]:
    return [change for change in changes if everything or change.kind != "same"]


def _rows(found: Diff, *, everything: bool) -> list[tuple[str, Change]]:
    blocks = found.blocks().items()
    return [(block, change) for block, changes in blocks for change in _shown(changes, everything=everything)]


def _title(block: str) -> str:
    return "the whole model" if block == TOTAL else block or "(no block)"


def _rules(thresholds: Sequence[Threshold]) -> str:
    return ",".join(map(str, thresholds))


def _counts(found: Diff) -> str:
    counts = {kind: found.count(kind) for kind in KINDS}
    parts = [f"{number} {SAID[kind]}" for kind, number in counts.items() if number]
    return f"{count(sum(counts.values()), 'op')}: {', '.join(parts) or 'none'}"


def _of_kinds(changes: Sequence[Change]) -> str:
    kinds = [change.kind for change in changes]
    return ", ".join(f"{kinds.count(kind)} {SAID[kind]}" for kind in KINDS if kind in kinds)
