"""From ops and their schemes to a config file, in our own format or that of another tool."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qsens.configs.decisions import scheme_name
from pytest_qsens.configs.documents import SUFFIXES, parse_document
from pytest_qsens.configs.read import config_of
from pytest_qsens.configs.rules import CLASS_OF
from pytest_qsens.configs.writers import (
    compressed_tensors,
    llm_compressor,
    modelopt,
    modelopt_quant_cfg,
    neural_compressor,
    onnx_runtime,
    ours,
    torchao,
)
from pytest_qsens.configs.writers.assigned import Assigned, Inexpressible
from pytest_qsens.configs.writers.dump import dump
from pytest_qsens.errors import QsensError
from pytest_qsens.files import check_replaceable
from pytest_qsens.ops import PRODUCTS, STATES, WEIGHTLESS
from pytest_qsens.quant.observer_names import OBSERVERS, percentile_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pytest_qsens.configs.documents import Syntax
    from pytest_qsens.configs.rules import Config
    from pytest_qsens.module_tree import ModuleTree
    from pytest_qsens.ops import Op
    from pytest_qsens.quant.op_scheme import OpScheme, Statistic


@dataclass(frozen=True)
class Target:
    """One kind of file that can be written.

    Attributes:
        write: From ops and schemes to the values in the file; raises `Inexpressible`.
        syntaxes: That it can be written in, the usual one first.
        exclusions: Whether the file only says which ops are not quantized, and nothing of how the others are.
        states: Whether it can say how keys and values of attention are quantized.
        products: Whether it can say how factors of products of two activations are.
        observers: That it can name; any percentile if it can name one. What has no static scales has them all.
        smooths: By which statistics of their channels it can say that inputs are smoothed.
        scaling_modes: Whether it can say in which mode scales are found that are powers of two.
        tree: Whether writing takes the modules of the model, too, or ``None`` where they are not known.

    """

    write: Callable[..., dict[str, Any]]
    syntaxes: tuple[Syntax, ...] = ("JSON",)
    exclusions: bool = False
    states: bool = False
    products: bool = False
    observers: tuple[str, ...] = ()
    smooths: tuple[Statistic, ...] = ()
    scaling_modes: bool = False
    tree: bool = False


_TORCHS = ("histogram", "minmax")
_AVERAGED = ("minmax", "moving_average")

TARGETS: dict[str, Target] = {
    "qsens": Target(
        ours.write,
        ("YAML", "TOML", "JSON"),
        states=True,
        products=True,
        observers=OBSERVERS,
        smooths=("magnitude", "range"),
        scaling_modes=True,
    ),
    "neural-compressor": Target(neural_compressor.write_given, ("JSON", "YAML"), observers=_TORCHS),
    "neural-compressor-best-configure": Target(neural_compressor.write_chosen, ("YAML",), observers=_TORCHS),
    "neural-compressor-qconfig": Target(neural_compressor.write_qconfig, observers=_TORCHS),
    "torchao": Target(torchao.write, observers=OBSERVERS, scaling_modes=True),
    "compressed-tensors": Target(compressed_tensors.write, states=True, observers=_AVERAGED, scaling_modes=True),
    "llm-compressor": Target(
        llm_compressor.write,
        ("YAML",),
        states=True,
        observers=_AVERAGED,
        smooths=("range",),
        scaling_modes=True,
        tree=True,
    ),
    "modelopt": Target(modelopt.write_exported, states=True, observers=("minmax",)),
    "modelopt-quant-cfg": Target(
        modelopt_quant_cfg.write, ("YAML",), states=True, observers=("minmax",), smooths=("magnitude",)
    ),
    "modelopt-disabled-layers": Target(modelopt.write_disabled, ("YAML", "JSON"), exclusions=True),
    "onnxruntime": Target(onnx_runtime.write, ("JSON", "YAML"), observers=("minmax", "percentile")),
}
"""By name, as in `names.WRITTEN`."""


def write_config(
    assignment: Mapping[str, OpScheme | None],
    ops: Sequence[Op],
    target: str = "qsens",
    syntax: Syntax | None = None,
    tree: Callable[[], ModuleTree] | None = None,
) -> str:
    """Write down how the ops of a model are to be quantized.

    The text is read back before it is returned: it says of every op what ``assignment`` says, or there is an error.

    Args:
        assignment: Name of an op → its scheme, ``None`` for one that is not quantized; one entry for every op. What
            the name of a group is given holds for each of its members. A scheme that is simulated for embeddings is
            `simulated.EMBEDDING`, not the scheme of other ops.
        ops: Of the model: all of them, since a file may speak of the rest as one. Recurrent
            ones and grouped products are quantized by no tool; they are left out, and must be given ``None``.
        target: What to write, one of `TARGETS`.
        syntax: One of the target's syntaxes; its usual one if none is given.
        tree: Lists all modules of the model, which llm-compressor needs to smooth.

    Returns:
        Text of the file. Of `Target.exclusions` it does not say how ops are quantized.

    Raises:
        QsensError: If the target has no way to say it: naming op, scheme, target, the property in the way, and the
            targets that can say it all.

    """
    assigned = _assigned(assignment, ops)
    chosen = TARGETS[target]
    used = chosen.syntaxes[0] if syntax is None else syntax
    if used not in chosen.syntaxes:
        raise QsensError(f"{target} is written as {' or '.join(chosen.syntaxes)}, not as {used}.")
    try:
        return _text(assigned, chosen, used, tree)
    except Inexpressible as refused:
        one = refused.one
        others = [name for name in TARGETS if name != target and _can(assigned, TARGETS[name], tree)]
        raise QsensError(
            f"{one.op.name} ({one.op.type}): {target} cannot say {scheme_name(one.scheme)!r}: {refused.why}. "
            + (f"{', '.join(others)} can say all that is asked for." if others else "Neither can any other format.")
        ) from refused


def check_out(path: Path, target: str) -> Syntax:
    """Check that a config can be written to a file that is not there yet, and what its name says of its syntax.

    Raises:
        QsensError: If it cannot, or the target is not written in this syntax.

    """
    syntax = SUFFIXES.get(path.suffix.lower())
    known = TARGETS[target].syntaxes
    if syntax not in known:
        suffixes = ", ".join(suffix for suffix, each in SUFFIXES.items() if each in known)
        raise QsensError(f"{path}: {target} is written to a file whose name ends in {suffixes}.")
    check_replaceable(path, _refuse)
    return syntax


def _refuse(path: Path) -> None:
    # no mark tells a config of ours from one that a person or a tool has written
    raise QsensError(f"{path} exists and is left untouched. Choose another name or remove it.")


def _assigned(assignment: Mapping[str, OpScheme | None], ops: Sequence[Op]) -> list[Assigned]:
    """Pair ops and schemes.

    Raises:
        QsensError: If a name is there twice, without op or without scheme, or is of an op that no tool quantizes.

    """
    known = {op.name for op in ops}
    for name in assignment:
        if name not in known:
            raise QsensError(f"a scheme is given to {name!r}, which is no op of the model.")
    found: dict[str, Assigned] = {}
    for op in ops:
        if op.name not in assignment:
            raise QsensError(f"{op.name!r} is given no scheme, nor is it left unquantized.")
        for member in op.ops:
            one = Assigned(member, assignment[op.name])
            if member.name in found:
                raise QsensError(f"{member.name!r} is there twice among the ops.")
            of_others = one.scheme is not None and one.scheme.products is None
            if member.type in (*CLASS_OF, *WEIGHTLESS) and not (member.type in PRODUCTS and of_others):
                found[member.name] = one
            elif one.scheme is not None:
                raise QsensError(
                    f"{member.name} ({member.type}): no format can say {one.scheme.name!r} of an op without a weight "
                    "of its own, or of a recurrent one. Leave it unquantized."
                )
    if all(one.op.type in PRODUCTS and one.scheme is None for one in found.values()):
        raise QsensError("there is no op with a weight. Nothing would be said in a config.")
    return [*found.values()]


def _in_the_way(scheme: OpScheme, target: Target) -> str | None:
    """Why a file cannot say how scales are found: from the calibration data, or those that are powers of two."""
    parts = (scheme.weight, scheme.activation, scheme.cache, scheme.products)
    modes = [part.scaling_mode for part in parts if part is not None and part.scaling_mode]
    if modes and not target.scaling_modes:
        return f"scales are found in mode {modes[0]}, which its files do not say"
    if scheme.smoothing is not None and not target.smooths:
        return "inputs are smoothed, which is not written to its files"
    if scheme.smoothing is not None and scheme.smoothing.statistic not in target.smooths:
        statistic = target.smooths[0]
        near = replace(scheme, smoothing=replace(scheme.smoothing, statistic=statistic)).name
        return f"inputs are smoothed there by the {statistic} of channels (measure {near!r} to write that)"
    part = scheme.cache or scheme.products or scheme.activation
    if part is None or part.kind == "dynamic":
        return None
    observer = part.observed_by if scheme.of_layers else part.observer or "minmax"
    name = "percentile" if percentile_of(observer) is not None else observer
    if name in target.observers:
        return None
    what = "activations" if scheme.of_layers else "keys and values" if scheme.cache is not None else "factors"
    why = f"ranges of {what} are found by {observer}; it has {' and '.join(target.observers)}"
    if observer == "histogram" and scheme.activation is not None:
        near = replace(scheme, activation=replace(scheme.activation, observer="minmax")).name
        why += f" (measure {near!r} to write that)"
    return why


def _can(assigned: Sequence[Assigned], target: Target, tree: Callable[[], ModuleTree] | None) -> bool:
    try:
        _text(assigned, target, target.syntaxes[0], tree)
    except Inexpressible:
        return False
    return not target.exclusions


def _text(assigned: Sequence[Assigned], target: Target, syntax: Syntax, tree: Callable[[], ModuleTree] | None) -> str:
    """Write and read back.

    Raises:
        Inexpressible: If the target cannot say it, or not with these names.

    """
    for one in assigned:
        if one.op.type == "embedding" and one.scheme is not None and one.scheme.activation is not None:
            raise Inexpressible(one, "an embedding is given indices, which are not quantized")
        why = None if target.exclusions or one.scheme is None else _in_the_way(one.scheme, target)
        if why is not None:
            raise Inexpressible(one, why)
    products = [one for one in assigned if one.op.type in PRODUCTS and one.scheme is not None]
    if products and not target.products:
        raise Inexpressible(products[0], "it says nothing of products of two activations")
    cached = [one for one in assigned if one.op.type in STATES and one.scheme is not None]
    left_out = (*(() if cached else STATES), *(() if products else PRODUCTS))
    written = [one for one in assigned if one.op.type not in left_out] or list(assigned)
    if not target.states and (cached or all(one.op.type in STATES for one in written)):
        raise Inexpressible([*cached, *written][0], "it quantizes layers, and no keys and values of attention")
    smoothed = [one for one in written if one.scheme is not None and one.scheme.smoothing is not None]
    # listing the modules takes a second, and matters where there is a layer before those that are smoothed
    known = tree if smoothed and target.tree else None
    arguments = (written, None if known is None else known()) if target.tree else (written,)
    text = dump(target.write(*arguments), syntax)
    config = _read_back(text, syntax, assigned[0])
    if known is not None:
        before = len(config.problems)
        config = config.of_model([one.op for one in assigned], known)
        if len(config.problems) > before:
            raise Inexpressible(smoothed[0], config.problems[-1].message)
    _check_same(config, assigned, target)
    return text


def _read_back(text: str, syntax: Syntax, first: Assigned) -> Config:
    try:
        return config_of(parse_document(text, Path("what was written"), syntax))
    except QsensError as error:
        raise Inexpressible(first, f"names of ops have a meaning of their own in it ({error})") from error


def _check_same(config: Config, assigned: Sequence[Assigned], target: Target) -> None:
    for one in assigned:
        decision = config.decide(one.op)
        same = (decision.scheme is None) == (one.scheme is None) if target.exclusions else decision.scheme == one.scheme
        if not same or decision.rivals:
            rule = "nothing" if decision.rule is None else repr(decision.rule.label)
            raise Inexpressible(one, f"a file would be read as {scheme_name(decision.scheme)!r}, by {rule}")
