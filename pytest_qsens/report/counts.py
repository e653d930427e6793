"""One line each: what of a run was measured, what became of it, and what it took."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pytest_qsens.ops import TOTAL

if TYPE_CHECKING:
    from pytest_qsens.results import Payload
    from pytest_qsens.session.run import Run


def outcomes(run: Run) -> str:
    """Count ops, or groups, by what became of them."""
    results = [result for op, result in run.results.items() if op != TOTAL]
    if not results:
        return f"the whole model, and none of its {_listed(run)}{_compared(run)}"
    statuses = Counter(result.status for result in results)
    found = [f"{count} {status}" for status, count in statuses.items()]
    tested = [op for op in run.ops if op.name not in run.unquantized]
    without = [op.name in run.elsewhere for op in tested if op.name not in run.results]
    found += [f"{without.count(False)} not run"] if False in without else []
    found += [f"{without.count(True)} in other shards"] if True in without else []
    found += [f"{len(run.unquantized)} unquantized"] if run.unquantized else []
    if run.functional:
        found.append(f"{len(run.functional)} functional products not quantized by {run.scheme}")
    return f"{_listed(run)}: {', '.join(found)}{_compared(run)}"


def _listed(run: Run) -> str:
    """Count what is measured, and, where that are groups, their ops: one with no other in its group counts as one."""
    if run.granularity == "op":
        return f"{len(run.ops)} ops"
    return f"{len(run.ops)} groups of {sum(len(unit.ops) for unit in run.ops)} ops"


def sources(run: Run) -> str:
    """Say how many scores came from the cache."""
    cached = {result.op for result in run.cached}
    measured = sum(result.op not in cached for result in run.measured)
    kind = noun(run)[: None if len(cached) != 1 else -1]
    return f"scores: {len(cached)} {kind} from the cache, {measured} measured in this run"


def noun(run: Run) -> str:
    """Name what is measured as one, in the plural."""
    return "ops" if run.granularity == "op" else "groups"


def _compared(run: Run) -> str:
    verdicts = Counter(verdict.kind for verdict in run.verdicts.values())
    found = [f"{verdicts[kind]} {kind}" for kind in ("regressed", "improved", "new") if verdicts[kind]]
    past = f"; {verdicts['exceeded']} past a limit" if verdicts["exceeded"] else ""
    return f"{past}; against the snapshot: {', '.join(found)}" if found else past


def config_line(run: Run, config: Payload) -> str:
    """Say what is measured: which file, and how many ops or groups have which scheme."""
    schemes = Counter(run.schemes[unit.name] for unit in run.ops)
    listed = ", ".join(f"{number} {name}" for name, number in schemes.most_common())
    return f"config: {config['about']['path']} ({config['about']['format']}): {listed}"


def cost(run: Run, wall_seconds: float) -> str:
    """Say what a run took; only with a known time of a reference forward."""
    told = f"cost: {wall_seconds:.1f} s in all; reference forward {run.reference_seconds:.3g} s"
    if run.estimated and run.forwards is not None:
        return f"{told}; {run.forwards:.1f} forwards for all ops"
    return told if run.forwards_per_op is None else f"{told}; {run.forwards_per_op:.2f} forwards per op"
