"""What counts as worse: rules such as ``nmse:5%,total.nmse<=1e-3,top10:9``, of a whole run and of single ops."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from pytest_qsens.errors import QsensError
from pytest_qsens.joint_gates import JointGate, is_joint, parse_joint
from pytest_qsens.limits import Limit, is_limit, named, parse_limit
from pytest_qsens.rank_gates import is_rank, parse_rank
from pytest_qsens.thresholds import of_all_ops, parse_thresholds

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pytest_qsens.rank_gates import RankGate
    from pytest_qsens.thresholds import Threshold


class Gates(NamedTuple):
    """What counts as worse: of single ops, of the order of all ops, and of what single ops say of the whole model."""

    thresholds: tuple[Threshold, ...]
    ranks: tuple[RankGate, ...] = ()
    limits: tuple[Limit, ...] = ()
    joint: tuple[JointGate, ...] = ()

    @property
    def metrics(self) -> set[str]:
        """Metrics of single ops that are gated."""
        return _metrics(self.thresholds, self.limits)

    @property
    def needs_snapshot(self) -> bool:
        """Whether what has no line in the snapshot fails: limits alone hold without one."""
        return bool(self.thresholds or self.ranks) or not (self.limits or self.joint)


class OpGates(NamedTuple):
    """What gates one op, a group, or the whole model."""

    thresholds: tuple[Threshold, ...]
    limits: tuple[Limit, ...] = ()
    needs_snapshot: bool = True

    @property
    def metrics(self) -> set[str]:
        """Metrics that are gated."""
        return _metrics(self.thresholds, self.limits)


def _metrics(thresholds: Iterable[Threshold], limits: Iterable[Limit]) -> set[str]:
    return {threshold.metric for threshold in thresholds} | {limit.metric for limit in limits}


def parse_gates(text: str, where: str = "--qsens-fail") -> Gates:
    """Read thresholds such as ``nmse:5%``, limits such as ``total.nmse<=1e-3``, and gates of a whole run, in any order.

    Those are ``top10:9`` and ``kendall:0.95`` of ranks, and ``total.additive_gap<=10%`` of interactions.

    Raises:
        QsensError: As `pytest_qsens.thresholds.parse_fail`; for a repeated gate, or one that cannot be.

    """
    values: list[str] = []
    found: dict[str, RankGate | Limit | JointGate] = {}
    for part in text.split(","):
        name, _, amount = (piece.strip() for piece in part.partition(":"))
        if is_limit(part):
            parse = parse_joint if is_joint(part) else parse_limit
            gate: RankGate | Limit | JointGate = parse(part, f"{where} {text!r}")
            name = str(gate).rpartition("=")[0]
        elif is_rank(name):
            gate = parse_rank(name, amount, f"{where} {text!r}")
        else:
            values.append(part)
            continue
        if name in found:
            raise QsensError(f"{where} {text!r}: {name} is there twice. Give one number for it.")
        found[name] = gate
    ranks, limits, joint = [], [], []
    for gate in found.values():
        if isinstance(gate, Limit):
            limits.append(gate)
        elif isinstance(gate, JointGate):
            joint.append(gate)
        else:
            ranks.append(gate)
    return Gates(parse_thresholds(values, text, where), tuple(ranks), tuple(limits), tuple(joint))


def parse_op_gates(text: str, where: str) -> Gates:
    """Read thresholds and limits of single ops.

    Raises:
        QsensError: As `parse_gates`, and for a gate of a whole run.

    """
    gates = parse_gates(text, where)
    for gate in gates.ranks:
        raise QsensError(f"{where} {text!r}: {of_all_ops(str(gate).partition(':')[0])}")
    for joint in gates.joint:
        raise QsensError(
            f"{where} {text!r}: {joint.name} is known when a whole run is through, so it gates no single op or test. "
            "Give it to --qsens-fail, or to qsens_fail in the ini file."
        )
    return gates


@dataclass(frozen=True)
class Overrides:
    """Gates of single ops: the first rule whose glob matches the op's name replaces the default ones."""

    rules: tuple[tuple[str, Gates], ...] = ()

    @classmethod
    def parse(cls, lines: Iterable[str], where: str = "qsens_fail_overrides") -> Overrides:
        """Read lines ``GLOB = GATES``, such as ``*.lm_head = nmse:10%,kl<=1e-3``.

        Raises:
            QsensError: If a line has no glob or its gates cannot be read.

        """
        rules = []
        for line in lines:
            glob, equals, fail = (piece.strip() for piece in line.partition("="))
            if not glob or not equals or glob[-1] in "<>":
                raise QsensError(f"{where}: {line!r} is not 'GLOB = THRESHOLDS', such as '*.lm_head = nmse:10%'.")
            gates = parse_op_gates(fail, f"{where}, {glob}:")
            for limit in gates.limits:
                if limit.glob is not None:
                    raise QsensError(f"{where}, {glob}: {limit} names ops again. Write {replace(limit, glob=None)}.")
            rules.append((glob, gates))
        return cls(tuple(rules))

    def gates_for(self, op: str, default: Gates, members: Sequence[str] = ()) -> OpGates:
        """Tell what gates ``op``; a group by its name, or by a glob that matches all of its ``members``.

        Limits of ``default`` that name ops hold beside what a rule says.
        """
        rule = next((gates for glob, gates in self.rules if named(glob, op, members)), None)
        own = default if rule is None else rule
        limits = [limit for limit in default.limits if limit.glob is not None or rule is None]
        limits = [limit for limit in limits if limit.is_of(op, members)] + ([] if rule is None else list(rule.limits))
        needs_snapshot = own.needs_snapshot or bool(default.ranks)
        return OpGates(own.thresholds, tuple(limits), needs_snapshot)
