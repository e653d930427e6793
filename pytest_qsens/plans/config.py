"""The config file of a plan, in the format of this project or of another tool."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_qsens.configs import torchao
from pytest_qsens.configs.documents import SUFFIXES, read_document
from pytest_qsens.configs.ours import NAME, read
from pytest_qsens.configs.simulated import EMBEDDING
from pytest_qsens.configs.torchao_schemes import UNKNOWN_SIZES, depends_on_sizes
from pytest_qsens.configs.write import TARGETS, check_out, write_config
from pytest_qsens.errors import QsensError
from pytest_qsens.files import check_replaceable
from pytest_qsens.ops import CACHED, Op
from pytest_qsens.quant.schemes import scheme_named

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from pytest_qsens.configs.documents import Syntax
    from pytest_qsens.plans.problem import Problem
    from pytest_qsens.quant.op_scheme import OpScheme


def check_output(path: Path, target: str) -> Syntax:
    """Make sure that a config can go to ``path`` and takes the place of nothing but an older one of this project.

    Returns:
        What the name says of the syntax.

    Raises:
        QsensError: If it cannot.

    """
    syntax = SUFFIXES.get(path.suffix.lower())
    if target != NAME or syntax not in TARGETS[NAME].syntaxes:
        return check_out(path, target)
    check_replaceable(path, _check_config)
    return syntax


def _check_config(path: Path) -> None:
    try:
        read(read_document(path))
    except QsensError as error:
        raise QsensError(
            f"{path} exists and is no config of this project; it is left untouched ({error}). Choose another name or "
            "remove it."
        ) from error


def config_text(problem: Problem, assignment: Mapping[str, str | None], target: str, syntax: Syntax) -> str:
    """Write down which op gets which scheme.

    Args:
        problem: What was chosen from.
        assignment: Op → name of its scheme, ``None`` for those that are not quantized.
        target: One of `pytest_qsens.configs.names.WRITTEN`.
        syntax: Of the file.

    Raises:
        QsensError: If the target has no way to say it, or the result files do not tell what type an op is of.

    """
    ops = []
    for unit in problem.units:
        for name, kind in zip(unit.ops, unit.types, strict=True):
            if "+" in kind:
                raise QsensError(
                    f"{name}: its group has ops of several types ({kind}), and the result file does not tell which is "
                    "which. Measure with --qsens-granularity op, and fuse with --fused"
                )
            ops.append(Op(name, kind))
    schemes = {op.name: _scheme(op, assignment[op.name]) for op in ops}
    chosen = dict.fromkeys(name for name in assignment.values() if name is not None)
    if TARGETS[target].exclusions and len(chosen) > 1:
        raise QsensError(
            f"{target} only says which ops are not quantized, and the plan has {len(chosen)} schemes: "
            f"{', '.join(chosen)}. Plan with one result file, or write another format"
        )
    return write_config(schemes, ops, target, syntax)


def notes(target: str, schemes: Iterable[str]) -> Iterator[str]:
    """Tell what result files do not tell of a file that was written with these schemes."""
    if target == torchao.NAME and any(depends_on_sizes(scheme_named(name, "scheme").parts) for name in schemes):
        yield UNKNOWN_SIZES


def _scheme(op: Op, name: str | None) -> OpScheme | None:
    if name is None:
        return None
    if op.type in CACHED:  # what is said of queries, too, means the same of these
        return replace(scheme_named(name, "scheme").parts, queries=False)
    return EMBEDDING if op.type == "embedding" else scheme_named(name, "scheme").parts
