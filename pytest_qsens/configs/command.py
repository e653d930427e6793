"""The command ``qsens config``: op by op, what a quantization config says, and the same in another format."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qsens.configs import torchao
from pytest_qsens.configs.decisions import decide, told
from pytest_qsens.configs.read import read_config
from pytest_qsens.configs.rules import CLASS_OF, Problem
from pytest_qsens.configs.torchao_schemes import UNKNOWN_SIZES, depends_on_sizes
from pytest_qsens.configs.write import check_out, write_config
from pytest_qsens.errors import QsensError
from pytest_qsens.files import write_atomically
from pytest_qsens.manifest import load_manifest, load_tree
from pytest_qsens.models.resolve import resolve
from pytest_qsens.models.source import ModelRequest
from pytest_qsens.ops import PRODUCTS, STATES, Op
from pytest_qsens.quant.op_scheme import OpScheme, Unknown
from pytest_qsens.result_files import load
from pytest_qsens.wording import count

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Sequence

    from pytest_qsens.configs.rules import Config, Decision
    from pytest_qsens.module_tree import ModuleTree


def explain(given: Namespace) -> tuple[Config, list[Decision], list[Problem]]:
    """Read the config and decide every op of the model, if one is given.

    Raises:
        QsensError: If the config, the model or the result cannot be used; with ``strict`` if anything is wrong with
            what the config says; with ``to`` if the file cannot be written, or has no way to say it.

    """
    if (given.to is None) != (given.out is None):
        raise QsensError("--to and --out go together: what is to be written, and where")
    if given.to is not None and given.model is None and given.ops_from is None:
        raise QsensError("--to needs the ops of a model: give --model or --ops-from")
    if given.checkpoint is not None and given.model is None:
        raise QsensError("--checkpoint goes with --model")
    if given.model is not None and given.ops_from is not None:
        raise QsensError("give --model or --ops-from, not both")
    config = read_config(given.file, given.format)
    decisions: list[Decision] = []
    tree = None
    if given.model is None and given.ops_from is None:
        problems = list(config.problems)
    else:
        ops, tree = _ops(given)
        decisions, problems = decide(config, ops, tree)
    schemes = [decision.scheme for decision in decisions if isinstance(decision.scheme, OpScheme)]
    if given.ops_from is not None and given.to == torchao.NAME and any(map(depends_on_sizes, schemes)):
        problems.append(Problem(str(given.out), UNKNOWN_SIZES))
    if given.strict and problems:
        raise QsensError("\n  ".join([f"{count(len(problems), 'problem')} (--strict):", *map(str, problems)]))
    if given.to is not None:
        if given.ops_from is not None:
            _check_states(config, decisions, given.ops_from)
        _convert(config, decisions, given.to, given.out, tree)
    return config, told(decisions), problems


def _check_states(config: Config, decisions: Sequence[Decision], result: Path) -> None:
    """Refuse to leave out what a config says of keys and values, or products, which results of layers do not list.

    Raises:
        QsensError: If it says something of them, and there are none.

    """
    listed = {decision.op.type for decision in decisions}
    for rule in config.rules:
        scheme = rule.scheme
        if not isinstance(scheme, OpScheme) or scheme.of_layers:
            continue
        types, what = STATES, "keys and values of attention"
        if scheme.products is not None:
            types, what = PRODUCTS, "products of two activations"
        if listed.isdisjoint(types):
            raise QsensError(
                f"{rule.where}: {rule.label!r} quantizes {what} as {scheme.name}, and "
                f"{result} lists none, so they would be missing in what is written. Give --model, or the result of a "
                "run that measured them."
            )


def _convert(
    config: Config, decisions: Sequence[Decision], target: str, path: Path, tree: Callable[[], ModuleTree] | None
) -> None:
    syntax = check_out(path, target)
    assignment = {}
    for decision in decisions:
        if isinstance(decision.scheme, Unknown):
            where = config.path if decision.rule is None else decision.rule.where
            raise QsensError(
                f"{where}: {decision.op.name} is {decision.scheme.name!r}, which is written nowhere: "
                f"{decision.scheme.reason}."
            )
        assignment[decision.op.name] = decision.scheme
    ops = [decision.op for decision in decisions]
    write_atomically(path, write_config(assignment, ops, target, syntax, tree))


def _ops(given: Namespace) -> tuple[Sequence[Op], Callable[[], ModuleTree] | None]:
    """Return the ops of the model, and what lists its modules where it is given itself."""
    if given.ops_from is not None:
        result = load(given.ops_from)
        if result.run.granularity != "op":
            raise QsensError(
                f"{given.ops_from}: it is of groups of ops (granularity {result.run.granularity!r}), and a config is "
                "of ops. Give --model, or a result of single ops."
            )
        # no format is of recurrent layers; products that were not measured may have other names when they are
        ops = [
            Op(op.op, op.type)
            for op in result.ops
            if op.type in (*CLASS_OF, *STATES) or (op.type in PRODUCTS and op.weights is not None)
        ]
        if not ops:
            raise QsensError(
                f"{given.ops_from}: there is no op with a weight in it. Give the result of a run that has some."
            )
        return ops, None
    checkpoint = None if given.checkpoint is None else str(given.checkpoint.expanduser().absolute())
    source = resolve(ModelRequest(given.model, checkpoint, root=str(Path.cwd())))
    return load_manifest(source, None), partial(load_tree, source)
