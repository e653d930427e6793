"""Our own format: exact names, then one scheme for all the rest."""

from __future__ import annotations

from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qsens.configs import ours
from pytest_qsens.configs.documents import Document
from pytest_qsens.configs.writers.assigned import Inexpressible, by_scheme, names
from pytest_qsens.ops import STATES
from pytest_qsens.quant.op_scheme import OpScheme, parse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_qsens.configs.writers.assigned import Assigned


def write(assigned: Sequence[Assigned]) -> dict[str, object]:
    """Give ``*`` the scheme that leaves fewest exceptions, and name these before it, scheme by scheme.

    Where all ops are of attention, nothing is said of layers: rules for these can follow in one file.

    Raises:
        Inexpressible: If a scheme has no canonical name.

    """
    schemes = by_scheme(assigned)
    for scheme, ops in schemes.items():
        if scheme is not None and parse(scheme.name) != scheme:
            raise Inexpressible(ops[0], "no canonical name means this scheme and no other")
    exceptions = {scheme: _exceptions(scheme, assigned) for scheme in schemes}
    rest = min(schemes, key=lambda scheme: len(exceptions[scheme]))
    rules = [_rule([*map(escape, names(ops))], scheme) for scheme, ops in by_scheme(exceptions[rest]).items()]
    types = sorted({one.op.type for one in assigned})
    only = {} if rest is not None or not set(types) <= set(STATES) else {"types": types}
    return {"schema": ours.SCHEMA, "rules": [*rules, _rule(["*"], rest) | only]}


def _exceptions(scheme: OpScheme | None, assigned: Sequence[Assigned]) -> list[Assigned]:
    """Ops that are not what a rule for all makes of them; what that is depends on their type."""
    everything = {"schema": ours.SCHEMA, "rules": [_rule(["*"], scheme)]}
    config = ours.read(Document(Path("*"), "JSON", everything))
    return [one for one in assigned if config.decide(one.op).scheme != one.scheme]


def _rule(globs: list[str], scheme: OpScheme | None) -> dict[str, object]:
    name = ours.UNQUANTIZED if scheme is None else scheme.name
    return {"ops": globs[0] if len(globs) == 1 else globs, "scheme": name}
