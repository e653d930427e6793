"""A quantization config as what is measured: from the file to the scheme of every op of a model."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qsens.configs.decisions import decide, scheme_name, told
from pytest_qsens.configs.read import read_config
from pytest_qsens.configs.simulated import EMBEDDING, is_simulated, simulating
from pytest_qsens.errors import QsensError
from pytest_qsens.groups import GRANULARITIES
from pytest_qsens.quant.assignment import Assigned, Assignment
from pytest_qsens.quant.op_scheme import NotTold, parse
from pytest_qsens.quant.schemes import SCHEMES, scheme_named

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_qsens.configs.rules import Config, Decision
    from pytest_qsens.module_tree import ModuleTree
    from pytest_qsens.ops import Op
    from pytest_qsens.results import Status

UNQUANTIZED = "the config leaves it unquantized"
"""Reason of an op with status ``unquantized``."""

_LABEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*", re.ASCII)


@dataclass(frozen=True)
class ConfigRequest:
    """Which config is measured.

    Attributes:
        path: The file.
        format: Its format, if it is forced.
        strict: Whether what is wrong with it is an error.
        down: Scheme of the ops that it leaves unquantized, if it is measured what quantizing them, too, would cost.
        rest: Scheme of all that it does not exclude, of a file that only excludes ops.

    """

    path: str
    format: str | None = None
    strict: bool = True
    down: str | None = None
    rest: str | None = None


def label_of(path: Path, origin: str) -> str:
    """Name of a config in node ids and file names: that of the file, without its last suffix.

    Raises:
        QsensError: If it cannot be one, or is that of a scheme.

    """
    label = path.stem
    what = None
    if not _LABEL.fullmatch(label):
        what = f"{label!r} is no name for test ids and files: letters, digits and . _ + - can be in one"
    elif label in SCHEMES or parse(label) is not None:
        what = f"{label!r} is a scheme, whose scores have snapshots under that name"
    elif any(label.endswith(f"-{granularity}") for granularity in GRANULARITIES):
        what = f"the snapshot of {label.rpartition('-')[0]!r} with another granularity has the name {label!r}"
    if what is not None:
        raise QsensError(f"{origin} {path}: the config is called as its file, and {what}. Rename the file")
    return label


def assign(request: ConfigRequest, ops: Sequence[Op], tree: Callable[[], ModuleTree] | None = None) -> Assigned:
    """Read a config, and tell what it does to the ops of a model; ``tree`` lists all of its modules.

    Raises:
        QsensError: If it cannot be used, quantizes no op, or has something wrong with it and the request is strict.

    """
    path = Path(request.path)
    config = read_config(path, request.format)
    if request.rest is not None:
        config = _completed(config, request.rest)
    about = {"path": request.path, "format": config.format, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    about |= {} if request.down is None else {"down": request.down}
    about |= {} if request.rest is None else {"scheme": request.rest}
    decisions, problems = decide(config, ops, tree)
    wrong = tuple(map(str, problems))
    if wrong and request.strict:
        number = "something is" if len(wrong) == 1 else f"{len(wrong)} things are"
        raise QsensError(
            "\n  ".join([f"{number} wrong with the config {path}:", *wrong])
            + "\nCorrect the file, or measure it as far as that goes: --qsens-config-problems warn"
        )
    assignment = _assignment(decisions, request.down)
    if not assignment.schemes.keys() - assignment.added:
        unsimulated = len(assignment.unsimulated)
        why = f": {unsimulated} of them have schemes that cannot be simulated" if unsimulated else ""
        raise QsensError(
            f"{path} quantizes none of the {len(ops)} ops of the model{why}, so there is nothing to measure. "
            "`qsens config FILE --model MODEL` tells what it says"
        )
    return Assigned(assignment, about, wrong)


def _completed(config: Config, rest: str) -> Config:
    """Give what a file does not exclude a scheme, which means embeddings as it does where it is that of all ops.

    Raises:
        QsensError: If the file says itself how ops are quantized, or the scheme is not of layers.

    """
    if not config.only_excludes:
        raise QsensError(
            f"{config.path} says the scheme of each op, and the scheme that is given beside it, {rest}, that of all. "
            "Leave one out"
        )
    scheme = scheme_named(rest, "scheme").parts
    if not scheme.of_layers:
        raise QsensError(f"{config.path} excludes layers, and the scheme that is given beside it, {rest}, is of none")
    of_embeddings = EMBEDDING if is_simulated(scheme) else None
    rules = tuple(
        replace(rule, scheme=of_embeddings if rule.pattern.types == ("embedding",) else scheme)
        if isinstance(rule.scheme, NotTold)
        else rule
        for rule in config.rules
    )
    return replace(config, rules=rules)


def _assignment(decisions: Sequence[Decision], down: str | None) -> Assignment:
    lower = None if down is None else scheme_named(down, "scheme")
    listed = told(decisions, lower)
    names = {decision.op.name: scheme_name(decision.scheme) for decision in listed}
    schemes, left_out = {}, dict[str, tuple["Status", str]]()
    added = set()
    for decision in listed:
        op = decision.op
        if decision.scheme is None:
            left_out[op.name] = "unquantized", UNQUANTIZED
            if lower is not None and lower.refusal(op.type, op.features) is None:
                schemes[op.name] = lower
                added.add(op.name)
            continue
        simulated, obstacle = simulating(decision.scheme, op)
        if simulated is None:
            left_out[op.name] = "unquantizable", f"{names[op.name]} cannot be simulated: {obstacle}"
        else:
            schemes[op.name] = simulated
    return Assignment("the config", schemes, names, left_out, frozenset(added))
