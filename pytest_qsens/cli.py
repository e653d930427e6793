"""The console script ``qsens``: look at result files and at the cache, and compare results."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qsens.cache import clear, default_cache_dir, entries
from pytest_qsens.compare import compare
from pytest_qsens.errors import QsensError
from pytest_qsens.report.cached import listing, summary
from pytest_qsens.report.comparison import as_json, report
from pytest_qsens.results import MODES, load, lost_in_noise
from pytest_qsens.sensitivity_files import read_pair

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pytest_qsens.results import OpResult, RunResult, Scores

BAD_INPUT = 4
"""Exit code for a file that cannot be used, as pytest's for a usage error."""

_LEGEND = {
    "nmse": "nmse: higher is worse",
    "sqnr_db": "sqnr_db: lower is worse",
    "fallback nmse": "fallback nmse (all quantized but this op): lower means a more sensitive op",
    "gain": "gain (total - fallback): higher means a more sensitive op; ~: not to be told from noise",
    "noise": "noise: how far the fallback nmse moves with the last digits of values",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="qsens", description=__doc__)
    commands = parser.add_subparsers(required=True)
    show = commands.add_parser("show", help="print the ops of a result file as a table")
    show.add_argument("result", type=Path, metavar="RESULT.json", help="written by `pytest --qsens-json`")
    show.add_argument("--sort", choices=("nmse", "op"), help="worst first, or by name; default: model order")
    show.set_defaults(run=_show)
    comparison = commands.add_parser(
        "compare",
        help="tell whether two files agree on which ops are sensitive",
        description="Compare the ops' sensitivity in two files: results of `pytest --qsens-json`, Intel Neural "
        "Compressor's fp32_fallback_sensitivity, ModelOpt's layer_sensitivity, in any combination.",
    )
    comparison.add_argument("a", type=Path, metavar="A.json")
    comparison.add_argument("b", type=Path, metavar="B.json")
    comparison.add_argument("--mode", choices=MODES, help="of our result files; default: what both files have")
    comparison.add_argument("--metric", help="of our result files; default: nmse, or the other tool's if ours has it")
    comparison.add_argument("--top", type=_positive, default=10, metavar="K", help="length of lists, default 10")
    comparison.add_argument("--all", action="store_true", help="shorten no list")
    comparison.add_argument("--json", action="store_true", help="print the same for machines")
    comparison.set_defaults(run=_compare)
    _add_cache(commands)
    arguments = parser.parse_args(argv)
    try:
        lines = arguments.run(arguments)
    except QsensError as error:
        sys.stderr.write(f"qsens: {error}\n")
        return BAD_INPUT
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _add_cache(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("cache", help="list or clear what earlier runs have kept")
    actions = command.add_subparsers(required=True)
    for name, run, about in (
        ("list", _list_cache, "print what is kept, the most recently used first"),
        ("clear", _clear_cache, "remove what is kept; it is measured again when it is needed"),
    ):
        action = actions.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
        action.add_argument("--cache", type=Path, metavar="DIR", help="as given to pytest in --qsens-cache")
        action.set_defaults(run=run)
    action.add_argument("--model", metavar="LABEL", help="only of this model, by the name in `qsens cache list`")


def _cache_dir(arguments: argparse.Namespace) -> Path:
    cache_dir: Path = arguments.cache or default_cache_dir()
    if cache_dir.exists() and not cache_dir.is_dir():
        raise QsensError(f"{cache_dir} is not a directory. Give the one that --qsens-cache names.")
    return cache_dir


def _list_cache(arguments: argparse.Namespace) -> list[str]:
    cache_dir = _cache_dir(arguments)
    found = entries(cache_dir)
    table = _aligned(listing(found)) if found else ()
    return [*table, summary(cache_dir, found)]


def _clear_cache(arguments: argparse.Namespace) -> list[str]:
    cache_dir, model = _cache_dir(arguments), arguments.model
    known = sorted({entry.model for entry in entries(cache_dir)})
    if model is not None and model not in known:
        raise QsensError(f"nothing of a model {model!r} in {cache_dir}. There is: {', '.join(known) or 'nothing'}.")
    return [f"removed from {summary(cache_dir, clear(cache_dir, model))}"]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on is needed, not {text!r}")
    return int(text)


def _show(arguments: argparse.Namespace) -> list[str]:
    return table(load(arguments.result), arguments.sort)


def _compare(arguments: argparse.Namespace) -> list[str]:
    a, b = read_pair(arguments.a, arguments.b, arguments.mode, arguments.metric)
    found = compare(a, b, arguments.top)
    return [as_json(found)] if arguments.json else list(report(found, None if arguments.all else arguments.top))


def table(result: RunResult, sort: str | None = None) -> list[str]:
    """Lines of a table of all ops: with ``sort`` ``nmse`` the most sensitive first, ops without numbers last."""
    run = result.run
    orders: dict[str | None, Callable[[OpResult], tuple[float | str, ...]]] = {
        "nmse": _least_sensitive_last,
        "op": lambda op: (op.op,),
    }
    ops = sorted(result.ops, key=orders[sort]) if sort else list(result.ops)
    if result.total is not None:
        ops.append(result.total)
    columns: dict[str, Callable[[OpResult], str]] = {}
    if any(op.isolated for op in ops):
        columns["nmse"] = lambda op: _cell(op.isolated, "nmse")
        columns["sqnr_db"] = lambda op: _cell(op.isolated, "sqnr_db")
    if any(op.fallback for op in ops):
        columns["fallback nmse"] = lambda op: _cell(op.fallback, "nmse")
        columns["gain"] = lambda op: _cell(op.fallback, "gain") + " ~" * lost_in_noise(op.fallback)
    if any(op.fallback and "noise" in op.fallback for op in ops):
        columns["noise"] = lambda op: _cell(op.fallback, "noise")
    header = ["op", "type", "status", *columns, "reason"]
    rows = [[op.op, op.type, op.status, *(cell(op) for cell in columns.values()), op.reason or ""] for op in ops]
    return [
        f"model {run.model}, scheme {run.scheme}, engine {run.engine}, mode {run.mode}",
        *(_LEGEND[name] for name in columns),
        "",
        *_aligned([header, *rows]),
    ]


def _least_sensitive_last(op: OpResult) -> tuple[float | str, ...]:
    if op.isolated and op.isolated.get("nmse") is not None:
        return (0, -(op.isolated["nmse"] or 0.0))
    if op.fallback and op.fallback.get("nmse") is not None:
        return (0, op.fallback["nmse"] or 0.0)
    return (1, 0.0)


def _cell(scores: Scores | None, metric: str) -> str:
    if scores is None or metric not in scores:
        return "-"
    value = scores[metric]
    return "infinite" if value is None else f"{value:.4g}"


def _aligned(rows: list[list[str]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
