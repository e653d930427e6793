"""The console script ``qsens``: result files, the cache of scores, stand-ins for models, proxies, configs, plans."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qsens.accept import accept, ranks_of
from pytest_qsens.cache import clear, default_cache_dir, entries
from pytest_qsens.compare import compare, count
from pytest_qsens.configs.names import FORMATS as CONFIG_FORMATS
from pytest_qsens.configs.names import WRITTEN as CONFIG_TARGETS
from pytest_qsens.diff import diff
from pytest_qsens.diff import read_pair as read_pair_of_scores
from pytest_qsens.errors import QsensError
from pytest_qsens.files import write_atomically
from pytest_qsens.gates import Gates, parse_gates
from pytest_qsens.merge import merge
from pytest_qsens.models import standin
from pytest_qsens.models.arguments import add_model_arguments, positive
from pytest_qsens.ops import TOTAL
from pytest_qsens.plans.arguments import add_arguments
from pytest_qsens.report.cached import listing, summary
from pytest_qsens.report.comparison import as_json, report
from pytest_qsens.report.interactions import side_by_side
from pytest_qsens.results import MODES, check_overwritable, load, lost_in_noise, write
from pytest_qsens.sensitivity_files import read_pair
from pytest_qsens.snapshot import file_name
from pytest_qsens.snapshot import load as load_snapshot
from pytest_qsens.thresholds import DEFAULT_FAIL, parse_fail

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pytest_qsens.results import OpResult, RunResult, Scores

FAILED = 1
"""Exit code for a gate that does not hold, as pytest's for a failed test."""

BAD_INPUT = 4
"""Exit code for a file that cannot be used, as pytest's for a usage error."""


class _GateFailed(Exception):  # noqa: N818 - the command has done its work
    """A gate does not hold; carries what the command prints."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__()
        self.lines = lines


_LEGEND = {
    "nmse": "nmse: higher is worse",
    "sqnr_db": "sqnr_db: lower is worse",
    "stderr": "stderr: standard error of the nmse over the evaluation samples",
    "fallback nmse": "fallback nmse (all quantized but this op): lower means a more sensitive op",
    "gain": "gain (total - fallback): higher means a more sensitive op; ~: not to be told from noise",
    "added nmse": "added nmse (all of the config and this op quantized): higher is worse",
    "loss": "loss (added - total): higher means a more sensitive op; ~: not to be told from noise",
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
    comparison.add_argument("--top", type=positive, default=10, metavar="K", help="length of lists, default 10")
    comparison.add_argument("--all", action="store_true", help="shorten no list")
    comparison.add_argument("--json", action="store_true", help="print the same for machines")
    comparison.set_defaults(run=_compare)
    _add_standin(commands)
    _add_merge(commands)
    _add_accept(commands)
    _add_cache(commands)
    _add_proxies(commands)
    _add_config(commands)
    _add_diff(commands)
    _add_plan(commands)
    arguments = parser.parse_args(argv)
    code = 0
    try:
        lines = arguments.run(arguments)
    except _GateFailed as failed:
        lines, code = failed.lines, FAILED
    except QsensError as error:
        sys.stderr.write(f"qsens: {error}\n")
        return BAD_INPUT
    except KeyboardInterrupt:
        sys.stderr.write("qsens: interrupted\n")
        return 128 + signal.SIGINT
    sys.stdout.write("\n".join(lines) + "\n")
    return code


def _add_standin(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    random = commands.add_parser(
        "standin",
        help="write a model of true sizes with random weights, for a dry run",
        description="Write a complete Hugging Face snapshot with random weights: a run on it takes the code path, time "
        "and memory of a run on the model, and its scores say nothing about the model.",
    )
    random.add_argument(
        "source",
        metavar="MODEL",
        help=f"{', '.join(standin.PRESETS)}, or a directory with config.json and tokenizer files",
    )
    random.add_argument("directory", type=Path, metavar="DIR", help="to write; new or empty")
    random.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights, default 0")
    random.set_defaults(run=_standin)


def _add_merge(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "merge",
        help="put the result files of all shards together",
        description="Put the result files of `pytest --qsens-shard i/N --qsens-json FILE`, one for each i, together "
        "into the one that a run without shards would have written.",
    )
    command.add_argument("shards", type=Path, nargs="+", metavar="SHARD.json")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.json")
    command.add_argument(
        "--mixed-environments",
        action="store_true",
        help="merge shards of different kinds of CPU or device, too; scores differ by about 1e-4 of themselves for "
        "that alone",
    )
    command.add_argument(
        "--partial", action="store_true", help="merge shards that did not come to all of their ops, too"
    )
    command.add_argument(
        "--fail",
        metavar="RULES",
        help="gates of all ops together, as in --qsens-fail, such as top10:9,total.additive_gap<=10%%: exit with 1 if "
        "one does not hold; thresholds and limits are gated by each shard",
    )
    command.add_argument(
        "--snapshot-dir",
        type=Path,
        default=Path("qsens_snapshots"),
        metavar="DIR",
        help="of the snapshot that --fail compares with (default: qsens_snapshots)",
    )
    command.set_defaults(run=_merge)


def _merge(arguments: argparse.Namespace) -> list[str]:
    if arguments.output.resolve() in [path.resolve() for path in arguments.shards]:
        raise QsensError(f"{arguments.output} is one of the shards. Give the result another name")
    gates = Gates(()) if arguments.fail is None else parse_gates(arguments.fail, "--fail")
    if arguments.fail is not None and not (gates.ranks or gates.joint):
        raise QsensError(
            f"--fail {arguments.fail!r}: no gate of all ops together, such as top10:9, kendall:0.95 or "
            "total.additive_gap<=10%. Thresholds and limits are gated by each shard"
        )
    merged = merge(arguments.shards, mixed_environments=arguments.mixed_environments, partial=arguments.partial)
    run = merged.result.run
    path = arguments.snapshot_dir / run.model / file_name(run.scheme, run.granularity)
    recorded = load_snapshot(path, model=run.model, scheme=run.scheme, granularity=run.granularity)
    verdicts = ranks_of(merged.result, recorded, gates.ranks) if gates.ranks else []
    joint = [gate.judge(merged.result.total) for gate in gates.joint]
    check_overwritable(arguments.output)
    write(arguments.output, merged.result)
    order = [f"order of ops, {path}: {verdict}" for verdict in verdicts]
    lines = [*merged.notes, *order, *(f"interactions: {verdict}" for verdict in joint), f"wrote {arguments.output}"]
    if any(state != "held" for state in [*(verdict.state for verdict in verdicts), *(each.state for each in joint)]):
        raise _GateFailed(lines)
    return lines


def _add_accept(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "accept",
        help="write a result file's scores into the snapshot",
        description="Write the scores of a result file into the snapshot of its model and scheme, as `pytest "
        "--snapshot-update` does after a run.",
    )
    command.add_argument("result", type=Path, metavar="RESULT.json", help="of a whole run, or merged")
    command.add_argument("--snapshot-dir", type=Path, default=Path("qsens_snapshots"), metavar="DIR")
    command.add_argument(
        "--fail",
        default=DEFAULT_FAIL,
        metavar="RULES",
        help=f"as --qsens-fail (default: {DEFAULT_FAIL}): lines that moved by less stay as they are".replace("%", "%%"),
    )
    command.add_argument("--allow-ci-update", action="store_true", help="write although CI is set")
    command.set_defaults(run=_accept)


def _accept(arguments: argparse.Namespace) -> list[str]:
    gates = parse_gates(arguments.fail, "--fail")
    path, news = accept(load(arguments.result), arguments.snapshot_dir, gates, allow_ci=arguments.allow_ci_update)
    return [f"{path}: {count(len(news), 'line')} new or changed"]


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


def _add_proxies(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "proxies",
        help="tell which proxies rank the ops of a model as exact scores do",
        description="Compute proxies of sensitivity on a model and its evaluation data, and print how well each ranks "
        "the ops: the rank correlation with exact scores, and what it costs.",
    )
    command.add_argument(
        "result",
        type=Path,
        nargs="?",
        metavar="RESULT.json",
        help="exact scores, written by `pytest --qsens-json`; without it they are measured first",
    )
    add_model_arguments(command)
    command.add_argument("--scheme", help="as --qsens-scheme (default: the result's, or w8a8)")
    command.add_argument("--only", action="append", default=[], metavar="PROXY", help="only this one; repeatable")
    command.add_argument(
        "--draws", type=positive, default=2, metavar="N", help="random vectors a batch for gradients, default 2"
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write all values and correlations to FILE")
    command.set_defaults(run=_proxies)


def _proxies(arguments: argparse.Namespace) -> list[str]:
    from pytest_qsens.proxies.request import check_names, check_output, find

    check_names(arguments.only)
    check_output(arguments.json, arguments.result)
    source, scheme = find(arguments)

    from pytest_qsens.proxies.command import compare_proxies  # torch, once all that is given can be
    from pytest_qsens.report import proxies

    found = compare_proxies(source, scheme, arguments.result, arguments.only, draws=arguments.draws)
    lines = list(proxies.report(found))
    if arguments.json is not None:
        write_atomically(arguments.json, proxies.as_json(found))
        lines.append(f"wrote {arguments.json}")
    return lines


def _add_config(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "config",
        help="tell op by op what a quantization config says",
        description="Read a quantization config of this or of another tool, and print for every op how it is "
        "quantized, which rule of the file says so, and what is wrong with it. Without a model its rules are printed. "
        "Formats are in docs/configs.md.",
    )
    command.add_argument("file", type=Path, metavar="FILE")
    command.add_argument("--model", help="as --qsens-model: the model whose ops are meant; no weights are loaded")
    command.add_argument("--checkpoint", type=Path, metavar="DIR", help="as --qsens-checkpoint")
    command.add_argument(
        "--ops-from", type=Path, metavar="RESULT.json", help="the ops of a result of `pytest --qsens-json` are meant"
    )
    command.add_argument(
        "--format",
        choices=CONFIG_FORMATS,
        metavar="FORMAT",
        help=f"{', '.join(CONFIG_FORMATS)} (default: found out from what is in the file)",
    )
    command.add_argument("--strict", action="store_true", help="everything that is wrong is an error: exit code 4")
    command.add_argument(
        "--to",
        choices=CONFIG_TARGETS,
        metavar="TARGET",
        help=f"write the same for all ops to --out, as one of {', '.join(CONFIG_TARGETS)}",
    )
    command.add_argument("--out", type=Path, metavar="FILE", help="file to write with --to; there must be none yet")
    command.set_defaults(run=_config)


def _config(arguments: argparse.Namespace) -> list[str]:
    from pytest_qsens.configs.command import explain
    from pytest_qsens.report import config as report_config

    found, decisions, problems = explain(arguments)
    return [
        *report_config.heading(found, decisions),
        "",
        *_aligned(report_config.rows(found, decisions)),
        "",
        *report_config.trouble(problems),
        *report_config.written(arguments.to, arguments.out),
    ]


def _add_diff(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "diff",
        help="tell what changed between two results or snapshots",
        description="Tell which ops got worse or better, by how much, appeared or vanished, block by block, by the "
        "rules of the gate. OLD and NEW are result files of one model, snapshot files, or REVISION:PATH of one in git; "
        "OLD may be a revision alone.",
    )
    command.add_argument("old", metavar="OLD")
    command.add_argument("new", metavar="NEW")
    command.add_argument(
        "--fail",
        default=DEFAULT_FAIL,
        metavar="RULES",
        help=f"what counts as worse, as in --qsens-fail (default: {DEFAULT_FAIL})".replace("%", "%%"),
    )
    command.add_argument("--all", action="store_true", help="list ops that are as before, too")
    command.add_argument("--format", choices=("text", "markdown", "html", "json"), default="text")
    command.add_argument("-o", "--output", type=Path, metavar="FILE", help="write it to FILE instead of printing it")
    command.add_argument("--exit-code", action="store_true", help="exit with 1 if an op got worse or lost its score")
    command.set_defaults(run=_diff)


def _diff(arguments: argparse.Namespace) -> list[str]:
    from pytest_qsens.report import diff as report_diff

    thresholds = parse_fail(arguments.fail, "--fail")
    found = diff(*read_pair_of_scores(arguments.old, arguments.new), thresholds)
    if arguments.format == "json":
        lines = [report_diff.as_json(found)]
    else:
        render = {"text": report_diff.text, "markdown": report_diff.markdown, "html": report_diff.html}
        lines = list(render[arguments.format](found, thresholds, everything=arguments.all))
    if arguments.output is not None:
        write_atomically(arguments.output, "\n".join(lines) + "\n")
        lines = [f"wrote {arguments.output}"]
    if arguments.exit_code and any(change.kind in ("worse", "lost") for change in found.changes):
        raise _GateFailed(lines)
    return lines


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "plan",
        help="choose a scheme for every op under a budget of size or error",
        description="Choose from measured scores which op gets which scheme, or none: with the lowest error within a "
        "budget of bits, the smallest within a budget of error, or the lowest error with a share of the ops kept. "
        "Exactly one of these, or a whole spectrum, is asked for.",
    )
    add_arguments(command)
    command.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> list[str]:
    from pytest_qsens.plans.command import make_plans
    from pytest_qsens.report import plan

    found = make_plans(arguments)
    lines = list(plan.report(found))
    if len(found.plans) > 1:
        lines += ["", *_aligned(plan.table(found.problem, found.plans, "saved"))]
    elif found.frontier:
        lines += ["", *_aligned(plan.table(found.problem, found.frontier, "saved"))]
    written = [*(made.path for made in found.plans), *filter(None, [arguments.plot])]
    return [*lines, "", *(f"wrote {path}" for path in written)]


def _show(arguments: argparse.Namespace) -> list[str]:
    return table(load(arguments.result), arguments.sort)


def _compare(arguments: argparse.Namespace) -> list[str]:
    a, b = read_pair(arguments.a, arguments.b, arguments.mode, arguments.metric)
    found = compare(a, b, arguments.top)
    return [as_json(found)] if arguments.json else list(report(found, None if arguments.all else arguments.top))


def _standin(arguments: argparse.Namespace) -> list[str]:
    def report(line: str) -> None:
        sys.stderr.write(f"qsens: {line}\n")

    # A terminated process would leave gigabytes behind: as an exception, the signal runs what cleans up.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        written = standin.write(arguments.source, arguments.directory, arguments.seed, report=report)
    finally:
        signal.signal(signal.SIGTERM, before)
    return standin.summary(written)


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
    if any(op.isolated and "stderr" in op.isolated for op in ops):
        columns["stderr"] = lambda op: _cell(op.isolated, "stderr")
    if any(op.fallback for op in ops):
        columns["fallback nmse"] = lambda op: _cell(op.fallback, "nmse")
        columns["gain"] = lambda op: _cell(op.fallback, "gain") + " ~" * lost_in_noise(op.fallback)
    if any(op.added for op in ops):
        columns["added nmse"] = lambda op: _cell(op.added, "nmse")
        columns["loss"] = lambda op: _cell(op.added, "loss") + " ~" * lost_in_noise(op.added)
    if any(op.fallback and "noise" in op.fallback for op in ops):
        columns["noise"] = lambda op: _cell(op.fallback, "noise")
    if run.config is not None:
        columns["scheme"] = lambda op: op.scheme or "-"
    if any(op.ops for op in ops):
        columns["ops"] = lambda op: str(len(op.ops) or 1) if op.type != TOTAL else "-"
    header = ["op", "type", "status", *columns, "reason"]
    rows = [[op.op, op.type, op.status, *(cell(op) for cell in columns.values()), op.reason or ""] for op in ops]
    granularity = "" if run.granularity == "op" else f", granularity {run.granularity}"
    what = "scheme" if run.config is None else "config"
    return [
        f"model {run.model}, {what} {run.scheme}, engine {run.engine}, mode {run.mode}{granularity}",
        *(_LEGEND[name] for name in columns if name in _LEGEND),
        "",
        *_aligned([header, *rows]),
        *side_by_side(result.total),
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
