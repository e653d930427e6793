"""Which op of a model is quantized with which scheme. No torch needed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from pytest_qsens.ops import Op
    from pytest_qsens.quant.schemes import Scheme
    from pytest_qsens.results import Mode, Status


ADDED_AS = ", added as "
"""In the name of the scheme of an op that a config leaves unquantized, before that of what it is quantized with."""


@dataclass(frozen=True)
class Assignment:
    """One scheme for all ops, or each op's own.

    Attributes:
        title: How messages call it.
        schemes: Op → what quantizes it when it is quantized.
        names: Op → canonical name of its scheme (`pytest_qsens.quant.op_scheme`), for all ops.
        left_out: Op → status and reason, for the ops that are not quantized when all are.
        added: Those of them that have a scheme all the same: it is measured what quantizing them, too, would cost.

    """

    title: str
    schemes: Mapping[str, Scheme]
    names: Mapping[str, str]
    left_out: Mapping[str, tuple[Status, str]] = field(default_factory=dict)
    added: Collection[str] = frozenset()

    @classmethod
    def uniform(cls, scheme: Scheme, ops: Iterable[Op]) -> Assignment:
        """Quantize every op with one scheme, as far as it can be."""
        names = [op.name for op in ops]
        return cls(scheme.name, dict.fromkeys(names, scheme), dict.fromkeys(names, scheme.name))

    def refusal(self, op: Op, group: Op | None = None) -> tuple[Status, str] | None:
        """Status of an op that is not quantized when it is scored, by itself or in a group; ``None`` if it is."""
        scheme = self.schemes.get(op.name)
        if scheme is None or (op.name in self.added and not self.adds(group or op)):
            return self.left_out[op.name]
        reason = scheme.refusal(op.type, op.features)
        return None if reason is None else ("unquantizable", reason)

    def adds(self, op: Op) -> bool:
        """Whether a score is of what is quantized beside all others: of a group, if none of its members is anyway."""
        members = [member.name for member in op.ops]
        return any(name in self.added for name in members) and all(name in self.left_out for name in members)

    def modes_of(self, op: Op, modes: Iterable[Mode]) -> tuple[Mode, ...]:
        """Modes that an op is measured in: the others' mode ``fallback`` is ``added`` of one that is added."""
        return tuple("added" if mode == "fallback" and self.adds(op) else mode for mode in modes)

    def measures(self, op: Op) -> bool:
        """Whether an op, or a member of a group, is quantized, or would be if that could be done."""
        return any(member.name in self.schemes or self.left_out[member.name][0] != "unquantized" for member in op.ops)

    @property
    def unsimulated(self) -> list[str]:
        """Ops that are quantized, but in no way that can be simulated."""
        return [op for op, (status, _) in self.left_out.items() if status == "unquantizable"]

    @property
    def base(self) -> dict[str, Scheme | str]:
        """Op → what is known of it when all are quantized: its scheme, or why it has none."""
        return {**self.schemes, **{op: f"{status}: {reason}" for op, (status, reason) in self.left_out.items()}}

    @property
    def own(self) -> dict[str, Scheme | str]:
        """Op → what is known of it when it is scored."""
        return {**self.base, **self.schemes}

    def name_of(self, op: Op) -> str:
        """Name of an op's scheme; of a group, equal for equal schemes of the same ops only."""
        found = {member.name: self.names[member.name] for member in op.ops}
        if self.adds(op):
            found |= {name: f"{found[name]}{ADDED_AS}{self.schemes[name].name}" for name in found if name in self.added}
        return joint_name(found)

    @property
    def name(self) -> str:
        """Name of all schemes together, equal for equal ones only."""
        return joint_name(self.names)


@dataclass(frozen=True)
class Assigned:
    """An assignment, and the config that it comes from, if it comes from one.

    Attributes:
        assignment: Of the ops.
        about: ``path``, ``format`` and ``sha256`` of it, and ``down`` if that is asked for; ``None``
            if there is none.
        problems: What is wrong with it, and only told.

    """

    assignment: Assignment
    about: dict[str, str] | None = None
    problems: tuple[str, ...] = ()


def joint_name(names: Mapping[str, str]) -> str:
    """Name the schemes of several ops together; where they differ, a hash tells which op has which.

    >>> joint_name({"q": "w8a8", "k": "w8a8"}), joint_name({"q": "w8a8", "k": "unquantized"})
    ('w8a8', 'unquantized+w8a8#abadc503')
    """
    known = sorted(set(names.values()))
    if len(known) == 1:
        return known[0]
    digest = hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()
    return f"{'+'.join(known)}#{digest[:8]}"
