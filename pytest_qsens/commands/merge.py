"""The command ``qsens merge``: put the result files of all shards together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qsens.accept import ranks_of
from pytest_qsens.commands.command import GateFailed
from pytest_qsens.errors import QsensError
from pytest_qsens.gates import Gates, parse_gates
from pytest_qsens.merge import merge
from pytest_qsens.result_files import check_overwritable, write
from pytest_qsens.snapshot import file_name
from pytest_qsens.snapshot import load as load_snapshot

if TYPE_CHECKING:
    from argparse import Namespace

    from pytest_qsens.commands.command import Subparsers


def register(commands: Subparsers) -> None:
    """Declare the command."""
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
    command.set_defaults(run=run)


def run(arguments: Namespace) -> list[str]:
    """Run it; returns the lines to print."""
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
    ranks = ranks_of(merged.result, recorded, gates.ranks) if gates.ranks else []
    joint = [gate.judge(merged.result.total) for gate in gates.joint]
    check_overwritable(arguments.output)
    write(arguments.output, merged.result)
    order = [f"order of ops, {path}: {verdict}" for verdict in ranks]
    lines = [*merged.notes, *order, *(f"interactions: {verdict}" for verdict in joint), f"wrote {arguments.output}"]
    if any(verdict.state != "held" for verdict in (*ranks, *joint)):
        raise GateFailed(lines)
    return lines
