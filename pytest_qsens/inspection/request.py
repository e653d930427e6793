"""What ``qsens inspect`` is asked for, checked before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from pytest_qsens.errors import QsensError
from pytest_qsens.files import check_json_output
from pytest_qsens.inspection.found import NAMES, Recorded
from pytest_qsens.inspection.schemes import usual_alternatives
from pytest_qsens.ops import PRODUCTS, STATES, TOTAL, layers
from pytest_qsens.quant.assignment import ADDED_AS
from pytest_qsens.quant.schemes import CACHE_SCHEMES, SCHEMES, scheme_named
from pytest_qsens.result_files import load
from pytest_qsens.results import OpResult
from pytest_qsens.wording import did_you_mean, first_of

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence
    from pathlib import Path

    from pytest_qsens.ops import Op
    from pytest_qsens.results import Mode, RunInfo, RunResult

_NAMED = 3
"""Ops named in a message."""


@dataclass(frozen=True)
class Request:
    """A question about one op.

    Attributes:
        path: Result file.
        result: What is in it.
        op: Name of the op.
        recorded: What the result says of it.
        scheme: Canonical name of the scheme that is asked about.
        mode: ``isolated`` or ``fallback``.
        against: Names of other schemes to measure.
        by_config: Whether a config gives the op its scheme.

    """

    path: Path
    result: RunResult
    op: str
    recorded: Recorded
    scheme: str
    mode: Mode
    against: tuple[str, ...]
    by_config: bool

    @property
    def run(self) -> RunInfo:
        """What was run."""
        return self.result.run


def read_request(given: Namespace) -> Request:
    """Read the result and find the op in it.

    Raises:
        QsensError: If the file, the op, a scheme, the mode or the output file cannot be used, or there is nothing to
            explain: the evaluation data never reached the op, or the scheme cannot quantize it.

    """
    path: Path = given.result
    check_output(given.json, path)
    result = load(path)
    op = _find(result, given.op, path)
    _check_status(op, given.scheme, path)
    scheme = given.scheme or _scheme_of(result.run, op, path)
    scheme_named(scheme, "scheme" if given.scheme is None else "--scheme")
    against = tuple(dict.fromkeys(given.against or usual_alternatives(scheme, op.type)))
    for name in against:
        scheme_named(name, "--against")
    mode = _mode(result.run, op, given.mode, path)
    by_config = result.run.config is not None and not _is_added(op)
    return Request(path, result, given.op, _recorded(result, op, mode, path), scheme, mode, against, by_config)


def check_output(path: Path | None, result: Path) -> None:
    """Check that a file can be written and destroys nothing but an older one of its kind.

    Raises:
        QsensError: If it cannot, or would.

    """
    if path is None:
        return
    if path.resolve() == result.resolve():
        raise QsensError(f"--json {path} would overwrite the result that is inspected. Choose another name.")
    check_json_output(path, "inspection", "qsens inspect")


def _find(result: RunResult, name: str, path: Path) -> OpResult:
    """Find an op; one that is in a group of the result has no numbers of its own."""
    found = {op.op: op for op in result.ops}
    members = {member: op for op in result.ops for member in op.ops}
    if name in found and found[name].ops:
        ops = found[name].ops
        raise QsensError(f"{name} is a group of {len(ops)} ops. Inspect one of them: {first_of(ops, _NAMED)}.")
    if name in found:
        return found[name]
    if name in members:
        group = members[name]
        why = f"{path} has only the score of the group {group.op}"
        return OpResult(name, group.type, group.block, "unrun", why)
    if name == TOTAL:
        raise QsensError(f"{TOTAL!r} is the whole model. Give the name of an op; `qsens show {path}` lists them.")
    hint = did_you_mean(name, [*found, *members])
    if name.endswith(tuple(f":{kind}" for kind in STATES)) and all(op.type not in STATES for op in result.ops):
        hint = ", nor other keys, values or queries: measure them, for example with --qsens-scheme attn_int8_dynamic"
    raise QsensError(f"{path} has no op {name!r}{hint}. `qsens show {path}` lists its {len(found)} ops.")


def _scheme_of(run: RunInfo, op: OpResult, path: Path) -> str:
    if run.config is None:
        return run.scheme
    if op.status == "unquantized":
        raise QsensError(f"the config of {path} leaves {op.op} unquantized. Ask about a scheme with --scheme NAME.")
    if op.scheme is None:
        raise QsensError(f"{path} does not tell the scheme of {op.op}. Give it with --scheme NAME.")
    return _own_scheme(op.scheme)


def _is_added(op: OpResult) -> bool:
    """Whether a config leaves the op unquantized, and it was measured what quantizing it, too, would cost."""
    return op.scheme is not None and ADDED_AS in op.scheme


def _own_scheme(told: str) -> str:
    """Name of the scheme that an op was measured with, of what the result of a config says."""
    return told.rpartition(ADDED_AS)[2]


def _mode(run: RunInfo, op: OpResult, given: str | None, path: Path) -> Mode:
    """Choose the mode: the one asked for, else what the result has of the op, ``isolated`` first."""
    only_fallback = op.isolated is None and (op.fallback is not None or run.mode == "fallback")
    mode = cast("Mode", given) if given is not None else "fallback" if only_fallback else "isolated"
    if mode == "fallback" and run.config is not None:
        raise QsensError(
            f"{path} is of the config {run.scheme}, whose other ops have schemes that it does not tell in full: mode "
            "fallback cannot be measured again. Ask with --mode isolated."
        )
    return mode


def _check_status(op: OpResult, asked: str | None, path: Path) -> None:
    """Check that there is something to explain.

    Raises:
        QsensError: If there is not.

    """
    if op.status == "unexercised":
        raise QsensError(
            f"{op.op} is unexercised in {path}: {op.reason}. Nothing was measured, so there is nothing to explain. "
            "Measure it with data that reach it (--qsens-calib, --qsens-eval)."
        )
    if op.type in PRODUCTS:
        raise QsensError(
            f"{op.op} is a product of two activations ({op.type}), and these are not inspected. Give a layer, or keys, "
            "values or queries of attention."
        )
    if op.weights is None and ":" in op.op and op.type not in STATES:
        raise QsensError(
            f"{op.op} has no weight ({op.type}: {op.reason}). Give a linear, a convolution or an embedding."
        )
    if op.status == "unquantizable" and asked is None:
        able = [name for name, scheme in (SCHEMES | CACHE_SCHEMES).items() if scheme.refusal(op.type) is None]
        raise QsensError(
            f"{op.op} is unquantizable in {path}: {op.reason}. Ask about another scheme with --scheme, for a "
            f"{NAMES.get(op.type, op.type)} for example {', '.join(able[:_NAMED])}."
        )


def _recorded(result: RunResult, op: OpResult, mode: Mode, path: Path) -> Recorded:
    scored = {o.op: scores["nmse"] or 0.0 for o in result.ops if (scores := o.modes.get(mode)) and "nmse" in scores}
    # a fallback that is small is that of an op which most of the error comes from
    order = sorted(scored, key=lambda name: scored[name] if mode == "fallback" else -scored[name])
    rank = order.index(op.op) + 1 if op.op in scored else None
    run = result.run
    own = run.scheme if run.config is None else op.scheme and _own_scheme(op.scheme)
    scores = op.modes.get(mode)
    return Recorded(str(path), run.scheme, own, run.engine, op.status, op.reason, scores, rank, len(scored))


def check_model(request: Request, ops: Sequence[Op]) -> Op:
    """Check that the ops of the model are those of the result; returns the one that is asked about.

    Raises:
        QsensError: If they differ in name, type or size: the result is of another version of the model.

    """
    known = {op.name: op for op in ops}
    listed = {name: op for op in request.result.ops for name in op.ops or (op.op,)}
    own = {name for name in listed if ":" not in name}  # others are no modules
    modules = {op.name for op in layers(ops)} if own else set()  # a scheme of keys and values lists no layer
    states = {op.op for op in request.result.ops if op.type in STATES}
    strangers = sorted((own ^ modules) | (states - known.keys()))
    changed = sorted(
        op.op
        for op in request.result.ops
        if not op.ops
        and op.op in known
        and (op.type != known[op.op].type or op.weights not in (None, known[op.op].elements))
    )
    for names, what in (
        (strangers, "in the result or in the model only"),
        (changed, "with another type or another number of weights in the model"),
    ):
        if names:
            number = "1 op is" if len(names) == 1 else f"{len(names)} ops are"
            raise QsensError(
                f"{request.path}: {number} {what}, {names[0]} for one. Is it the same model? Measure it again."
            )
    return known[request.op]
