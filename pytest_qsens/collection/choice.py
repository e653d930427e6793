"""Which ops of a model the options ask for."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from pytest_qsens.errors import QsensError
from pytest_qsens.ops import TOTAL, Op, matches

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_qsens.collection.model import Model
    from pytest_qsens.options import Options


def select(model: Model, options: Options) -> tuple[Op, ...]:
    """Ops, or groups of them, that the options ask for, in model order.

    A glob asks for a group by its name, or by that of any member.

    Raises:
        QsensError: If a glob matches neither an op nor ``total``, or only ops that a config leaves unquantized.

    """
    units, measurable = model.units(options), model.measurable(options)
    names = list(dict.fromkeys(op.name for op in (*model.ops, *units)))
    for glob in options.ops:
        if not any(matches(name, glob) for name in (*names, TOTAL)):
            hint = near_names(glob, names)
            raise QsensError(
                f"{options.origins['ops']} {glob!r} matches none of the {len(names)} ops of {model.label}{hint}. "
                "List them with --collect-only -q"
            )
        if not any(_asks_for(glob, unit) for unit in measurable) and not matches(TOTAL, glob):
            raise QsensError(
                f"{options.origins['ops']} {glob!r} matches only ops that {options.config} leaves unquantized, which "
                "are not measured. Give the config a scheme for them, or measure others"
            )
    chosen = [unit for unit in measurable if not options.ops or any(_asks_for(glob, unit) for glob in options.ops)]
    return tuple(chosen[: options.max_ops])


def _asks_for(glob: str, unit: Op) -> bool:
    return any(matches(name, glob) for name in (unit.name, *unit.member_names))


def wants_total(options: Options) -> bool:
    """Whether the whole model is measured as well: unless only some ops are asked for."""
    return not options.selective or any(matches(TOTAL, glob) for glob in options.ops)


def near_names(glob: str, names: Iterable[str]) -> str:
    """Tell for a message which names a glob that matches none was probably meant for."""
    names = tuple(names)
    known = dict.fromkeys((*names, *(name.rpartition(".")[2] for name in names)))  # a glob is often of the last part
    near = difflib.get_close_matches(glob.strip("*."), known, n=3, cutoff=0.5)
    return f" (near: {', '.join(near)})" if near else ""
